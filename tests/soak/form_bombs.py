"""Hostile forms against running streams: how soon each is refused, and which requests it delays.

    python -m tests.soak.form_bombs [--streams N] [--bombs N] [SERVE FLAGS ...]

Each form is sent by one key while another key's streams run. Then eight connections of the first key send the slowest
form again and again, while the other key sends forms of its own, each a new one.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from hostile_forms import HOSTILE
from server_process import server_process

PATH = "/v1/completions"
PROMPT = "Once upon a time"
SLOWEST = "products of patterns"
CONNECTIONS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--bombs", type=int, default=24)
    arguments, flags = parser.parse_known_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    keys = folder / "keys"
    keys.write_text("first name=first\nother name=other\n")
    keys.chmod(0o600)
    with server_process(folder, f"soak-{folder.name}", "--api-key-file", str(keys), *flags) as server:
        server.wait_for("splitfuse serves ")
        url = server.said.partition(" on ")[2].split()[0]
        first, other = (_client(url, key) for key in ("first", "other"))
        streams = [_Stream(url) for _ in range(arguments.streams)]
        time.sleep(2)  # until all run
        for name, form in HOSTILE.items():
            began = time.monotonic()
            answer = first.post(PATH, json={"prompt": PROMPT, **form})
            took = time.monotonic() - began
            gap = max((each.longest_gap(began) for each in streams), default=0.0)
            print(f"{name:24} {answer.status_code} in {took:.2f} s, longest gap of a stream {gap:.3f} s", flush=True)
        began, waits = time.monotonic(), list[float]()
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            bombs = [
                pool.submit(first.post, PATH, json={"prompt": PROMPT, **HOSTILE[SLOWEST]})
                for _ in range(arguments.bombs)
            ]
            while not all(each.done() for each in bombs):
                asked = time.monotonic()
                form: dict[str, Any] = {"guided_regex": f"[a-z]{{{len(waits) + 1}}}", "max_tokens": 2}
                assert other.post(PATH, json={"prompt": PROMPT, **form}).status_code == 200
                waits.append(time.monotonic() - asked)
                time.sleep(0.2)
        gap = max((each.longest_gap(began) for each in streams), default=0.0)
        median, worst = np.median(waits), max(waits)
        print(f"{arguments.bombs} bombs of a key: {len(waits)} forms of the other took {median:.2f} s in the median,")
        print(f"{worst:.2f} s at worst; longest gap of a stream {gap:.3f} s")
        for stream in streams:
            stream.ends = True


def _client(url: str, key: str) -> httpx.Client:
    return httpx.Client(base_url=url, timeout=120, trust_env=False, headers={"authorization": f"Bearer {key}"})


class _Stream:
    """Reads one answer after another, and notes when pieces came."""

    def __init__(self, url: str) -> None:
        self.ends = False
        self._times: list[float] = []
        threading.Thread(target=self._run, args=(_client(url, "other"),), daemon=True).start()

    def longest_gap(self, since: float) -> float:
        """Seconds between two pieces, or since the last one."""
        times = [each for each in [*self._times, time.monotonic()] if each >= since]
        return max((after - before for before, after in pairwise(times)), default=0.0)

    def _run(self, http: httpx.Client) -> None:
        body = {"prompt": PROMPT, "max_tokens": 1500, "ignore_eos": True, "stream": True}
        while not self.ends:
            with suppress(httpx.TransportError), http.stream("POST", PATH, json=body) as answer:  # the server has gone
                for _ in answer.iter_lines():
                    self._times.append(time.monotonic())
                    if self.ends:
                        return


if __name__ == "__main__":
    main()
