"""Make docs/images/console.png: `python tools/console_picture.py` (needs playwright, and a Chromium).

Serves the bundled model, sends it requests at random times, of which some miss their SLO, and takes a picture of the
console with one of these chosen.
"""

import random
import shutil
import threading
import time
from pathlib import Path

import httpx
from playwright.sync_api import sync_playwright

import splitfuse

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "console.png"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
RATE, SECONDS = 6.0, 12.0
"""Requests/s, and for how long."""


def send(url: str, chance: random.Random) -> None:
    """Send a request of random length."""
    body = {
        "prompt": [chance.randrange(1000) for _ in range(chance.randint(50, 400))],
        "max_tokens": chance.randint(60, 200),
        "ignore_eos": True,
    }
    httpx.post(f"{url}/v1/completions", json=body, timeout=60).raise_for_status()


def main() -> None:
    path = next(filter(None, map(shutil.which, CHROMIUM)))
    settings = {"ttft": "150ms", "itl": "60ms", "max_num_batched_tokens": 64, "max_num_seqs": 12, "num_blocks": 600}
    client = splitfuse.serve(deployment_name="picture", port=0, console=True, **settings)
    chance = random.Random(1)
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1280, "height": 1050}, color_scheme="light")
            page.goto(f"{client.url}/console")
            page.wait_for_selector("#engines li[data-state=ready]")
            threads, end = [], time.monotonic() + SECONDS
            while time.monotonic() < end:
                threads.append(threading.Thread(target=send, args=(client.url, chance)))
                threads[-1].start()
                time.sleep(chance.expovariate(RATE))
            for thread in threads:
                thread.join()
            time.sleep(1.0)  # the last frames
            page.keyboard.press("m")  # goes to one that missed its SLO, and pauses
            time.sleep(1.0)
            page.screenshot(path=PICTURE)
            browser.close()
    finally:
        client.terminate_server()


if __name__ == "__main__":
    main()
