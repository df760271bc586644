"""Make docs/images/console.png: `python tools/console_picture.py` (needs playwright, pillow and a Chromium).

Serves the bundled model, sends it requests at random times, and takes a picture of the console with one chosen that has
missed its SLO: on a slow machine choose a lower --rate and a longer --ttft and --itl, so that most meet it.
"""

import argparse
import random
import shutil
import threading
import time
from pathlib import Path

import httpx
from PIL import Image
from playwright.sync_api import sync_playwright

import splitfuse

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "console.png"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 12.0
"""Seconds for which requests are sent."""


def send(url: str, chance: random.Random) -> None:
    """Send a request of random length."""
    body = {
        "prompt": [chance.randrange(1000) for _ in range(chance.randint(50, 400))],
        "max_tokens": chance.randint(60, 200),
        "ignore_eos": True,
    }
    httpx.post(f"{url}/v1/completions", json=body, timeout=60).raise_for_status()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=8.0, help="requests/s")
    parser.add_argument("--ttft", default="110ms")
    parser.add_argument("--itl", default="40ms")
    options = parser.parse_args()
    path = next(filter(None, map(shutil.which, CHROMIUM)))
    settings = {
        "ttft": options.ttft,
        "itl": options.itl,
        "max_num_batched_tokens": 64,
        "max_num_seqs": 12,
        "num_blocks": 600,
    }
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
                time.sleep(chance.expovariate(options.rate))
            for thread in threads:
                thread.join()
            time.sleep(1.0)  # the last frames
            page.keyboard.press("m")  # goes to one that missed its SLO, and pauses
            time.sleep(1.0)
            page.screenshot(path=PICTURE)
            browser.close()
        with Image.open(PICTURE) as image:
            image.quantize(128).save(PICTURE, optimize=True)  # a third of the bytes
    finally:
        client.terminate_server()


if __name__ == "__main__":
    main()
