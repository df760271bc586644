"""Reads streams of a server, all at once: `python stream_all.py URL COUNT TOKENS`.

It prints `begun` when each has a few tokens, and at the end a line of JSON: for each the text, and how many times it
went on elsewhere.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import httpx

BEGUN = 5  # events


def main() -> None:
    url, count, tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    begun = Barrier(count, action=lambda: print("begun", flush=True))

    def read(seed: int) -> tuple[str, int]:
        body = {"prompt": "Tom lives in " * (seed + 1), "max_tokens": tokens, "stream": True, "seed": seed}
        body |= {"temperature": float(seed % 2), "ignore_eos": True, "splitfuse_timing": True}
        text, resumed, num_events = "", 0, 0
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=None, trust_env=False) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    text += "".join(choice["text"] for choice in event.get("choices", ()))
                    resumed = event.get("splitfuse_timing", {}).get("resumed", resumed)
                    assert "error" not in event, event
                    num_events += 1
                    if num_events == BEGUN:
                        begun.wait()
        return text, resumed

    with ThreadPoolExecutor(count) as pool:
        print(json.dumps([*pool.map(read, range(count))]))


if __name__ == "__main__":
    main()
