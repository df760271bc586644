"""Latency of /health and /ready while a prompt of 100,000 tokens is tokenized, and while long prompts are computed.

    python -m benchmarks.server.probes [--seconds S] [SERVE FLAGS ...]

Probes are requests on a kept connection, one after the other with a pause of 5 ms, alternating between the two routes.
The prompt to be tokenized is too long for the model and is rejected afterwards; it is sent repeatedly.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from statistics import median

import httpx
from server_process import server_process
from stories import make_story

PATHS = ("/health", "/ready")
NUM_TOKENS = 100_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="seconds of probing in each state")
    arguments, flags = parser.parse_known_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    with (
        server_process(folder, f"bench-{folder.name}", *flags) as server,
        server.client() as client,
        httpx.Client(base_url=client.url, timeout=300, trust_env=False) as http,
    ):
        limit = http.get("/v1/models").json()["data"][0]["max_model_len"]
        text = _story(http, NUM_TOKENS)
        long = _story(http, int(limit * 0.9))
        chat = {"messages": [{"role": "user", "content": text}]}
        states: dict[str, Callable[[], str]] = {
            "nothing": lambda: "",
            f"a text of {NUM_TOKENS} tokens is tokenized": lambda: _post(http, "/v1/completions", {"prompt": text}),
            "it is a message of a chat": lambda: _post(http, "/v1/chat/completions", chat),
            "it is tokenized for /tokenize": lambda: _post(http, "/tokenize", {"prompt": text}),
            "four prompts of 0.9 of the model's length are computed": lambda: _compute(http, long),
        }
        for name, work in states.items():
            _probe_during(client.url, name, work, arguments.seconds)


def _probe_during(url: str, name: str, work: Callable[[], str], seconds: float) -> None:
    stop, times, said = threading.Event(), [], ""

    def repeat() -> None:
        nonlocal said
        while not stop.is_set():
            began = time.monotonic()
            said = work()
            times.append(time.monotonic() - began)
            if not said:
                stop.wait()

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        probes = _probe(url, seconds)
    finally:
        stop.set()
        thread.join()
    print(f"{name}: {said}{f' in {median(times):.2f} s, {len(times)} times' if said else ''}")
    for path, found in probes.items():
        ordered = sorted(found)
        print(
            f"  {path:7} median {1000 * median(found):.1f} ms, 99 % {1000 * ordered[int(0.99 * len(found))]:.1f} ms, "
            f"worst {1000 * ordered[-1]:.1f} ms, of {len(found)}",
            flush=True,
        )


def _probe(url: str, seconds: float) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {path: [] for path in PATHS}
    end = time.monotonic() + seconds
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as http:
        http.get("/health")
        while time.monotonic() < end:
            for path in PATHS:
                began = time.monotonic()
                status = http.get(path).status_code
                times[path].append(time.monotonic() - began)
                if status != 200:
                    raise RuntimeError(f"{path} returned {status}")
                time.sleep(0.005)
    return times


def _post(http: httpx.Client, path: str, body: object) -> str:
    answer = http.post(path, json=body)
    if answer.status_code == 200:
        return f"200, {answer.json()['count']} tokens,"
    return f"{answer.status_code} {answer.json()['error']['code']}"


def _compute(http: httpx.Client, text: str) -> str:
    body = {"prompt": [f"{i} {time.monotonic()} {text}" for i in range(4)], "max_tokens": 1}
    return f"{http.post('/v1/completions', json=body).status_code} "


def _story(http: httpx.Client, num_tokens: int) -> str:
    """Return a text of so many tokens, or a few fewer."""
    text = "\n".join(make_story(Random(i), 100, lambda s: len(s.split())).passage for i in range(10))
    per_text = http.post("/tokenize", json={"prompt": text}).json()["count"]
    return "\n".join([text] * (num_tokens // (per_text + 1)))


if __name__ == "__main__":
    main()
