"""Kill and stop engines under load: texts are those without a kill, no stream has an error, and how long they pause.

    python -m tests.soak.engine_deaths [--runs N] [--replicas N] [--body JSON] [SERVE FLAGS ...]

In each run 16 streams are read, greedy and random ones, and at a random moment an engine process gets SIGKILL, with
--stop SIGSTOP. `--body` adds fields to all requests, such as '{"structured_outputs": {"regex": "[a-c ]+"}}'. The exit
status is 1 if a text differs or a stream had an error.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import httpx
from server_load import children
from server_process import ServerProcess, server_process

STREAMS = 16
LIMIT = 300.0
TOKENS = 200
WORDS = ["Anna", "Tom", "has", "a", "little", "dog", "and", "the", "park", "ran", "to", "red", "ball"]


@dataclass
class Answer:
    """What a stream gave."""

    text: str = ""
    times: list[float] = field(default_factory=list)
    error: str = ""
    resumed: int = 0
    refused: int = 0
    """Number of times that it was sent again, since no engine was ready."""

    @property
    def longest_gap(self) -> float:
        return max((b - a for a, b in zip(self.times, self.times[1:], strict=False)), default=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--body", type=json.loads, default={})
    parser.add_argument("--stop", action="store_true")
    arguments, flags = parser.parse_known_args()
    folder, rng = Path(tempfile.mkdtemp(prefix="soak-")), Random(arguments.runs)
    number = signal.SIGSTOP if arguments.stop else signal.SIGKILL
    bodies = [make_body(rng, seed, arguments.body) for seed in range(STREAMS)]
    own = (f"--replicas={arguments.replicas}", "--num-blocks=2000", *flags)
    equal = errors = resumed = 0
    pauses: list[float] = []
    with (
        server_process(folder, f"soak-{folder.name}", *own) as server,
        server.client() as client,
        httpx.Client(base_url=client.url, timeout=LIMIT, trust_env=False) as http,
    ):
        whole = stream_all(http, bodies, None, 0.0, number)
        usual = [answer.longest_gap for answer in whole]
        seconds = max(answer.times[-1] - answer.times[0] for answer in whole)
        for run in range(arguments.runs):
            while len(children(server.process.pid)) < arguments.replicas or http.get("/ready").status_code != 200:
                time.sleep(0.05)
            answers = stream_all(http, bodies, server, rng.uniform(0.02, 0.9) * seconds, number)
            same = [a.text == b.text and not a.error for a, b in zip(answers, whole, strict=True)]
            equal += sum(same)
            errors += sum(bool(answer.error) for answer in answers)
            pauses += [answer.longest_gap for answer in answers if answer.resumed]
            refused = sum(answer.refused > 0 for answer in answers)
            moved = sum(answer.resumed for answer in answers)
            resumed += moved
            print(f"run {run}: {sum(same)} of {STREAMS} equal, {moved} resumed, {refused} sent again", flush=True)
            for answer in answers:
                if answer.error:
                    print(f"  {answer.error}", flush=True)
    print(f"{equal} of {arguments.runs * STREAMS} texts equal, {errors} errors, {resumed} resumed")
    if pauses:
        print(
            f"longest gap of a resumed stream: {min(pauses):.2f} s at least, {median(pauses):.2f} s in the middle, "
            f"{max(pauses):.2f} s at most; without a kill {max(usual):.2f} s at most"
        )
    print("log of the server:\n" + "\n".join(line for line in server.said.splitlines() if "ready again" in line))
    sys.exit(int(equal < arguments.runs * STREAMS))


def make_body(rng: Random, seed: int, more: dict[str, Any]) -> dict[str, Any]:
    prompt = " ".join(rng.choice(WORDS) for _ in range(rng.randint(2, 80)))
    body = {"prompt": prompt, "max_tokens": TOKENS, "stream": True, "splitfuse_timing": True, "seed": seed}
    return {**body, "temperature": float(seed % 2), "ignore_eos": True, **more}


def stream_all(
    http: httpx.Client, bodies: list[dict[str, Any]], server: ServerProcess | None, delay: float, number: signal.Signals
) -> list[Answer]:
    """Read all streams; meanwhile send a signal to an engine of `server`, after a delay from the first token on."""
    answers = [Answer() for _ in bodies]
    threads = [threading.Thread(target=read, args=(http, *each)) for each in zip(bodies, answers, strict=True)]
    for thread in threads:
        thread.start()
    if server is not None:
        while not any(answer.times for answer in answers):
            time.sleep(0.001)
        time.sleep(delay)
        os.kill(Random(delay).choice(children(server.process.pid)), number)
    for thread in threads:
        thread.join(LIMIT)
    return answers


def read(http: httpx.Client, body: dict[str, Any], answer: Answer) -> None:
    """Read a stream. One that comes while no engine is ready is a 503, and sent again, as clients do."""
    try:
        while (status := read_once(http, body, answer)) == 503:
            answer.refused += 1
            time.sleep(0.1)
        if status != 200:
            answer.error = f"status {status}"
    except httpx.HTTPError as error:
        answer.error = repr(error)


def read_once(http: httpx.Client, body: dict[str, Any], answer: Answer) -> int:
    with http.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code == 200:
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    answer.error = event["error"]["message"]
                if event.get("choices"):
                    answer.text += event["choices"][0]["text"]
                    answer.times.append(time.monotonic())
                if "splitfuse_timing" in event:
                    answer.resumed = event["splitfuse_timing"]["resumed"]
        return response.status_code


if __name__ == "__main__":
    main()
