"""Record a server under mixed load for minutes, and replay all of it: every file of the recording, to the last bit.

    python -m tests.soak.recorded_minutes [--minutes 10] [--clients 12] [SERVE FLAGS ...]

Requests have shared beginnings, several choices, log-probabilities, forms, stop strings; some clients disconnect. The
KV cache is small, so some requests are preempted. Printed are what the file takes, what the replays find, and what one
finds with a constant of the network changed: the epsilon of its norms, twice as large.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import httpx
from server_load import metrics, wait_until_idle
from server_process import server_process

from splitfuse.bench.workload import WORDS
from splitfuse.core.request_output import FinishReason
from splitfuse.engine.trace import FinishTrace, PreemptTrace, RequestTrace, StepTrace
from splitfuse.models.sources.hub import BUNDLED_MODEL
from splitfuse.recording.format import Recording, Records
from splitfuse.recording.replay import config_of, load, replay

TIGHT = ["--num-blocks", "72", "--max-num-batched-tokens", "128", "--record-max-mib", "64"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=12)
    arguments, flags = parser.parse_known_args()
    folder = Path(tempfile.mkdtemp(prefix="recorded-"))
    path = folder / "server.rec"
    with server_process(folder, f"soak-{folder.name}", *TIGHT, "--record", str(path), *flags) as server:
        url = server.client().url
        asyncio.run(send(url, arguments.clients, 60 * arguments.minutes))
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as http:
            wait_until_idle(http)
            counted = metrics(http)
        server.terminate()
        server.process.wait()
    files = [file for n in (3, 2, 1) if (file := folder / f"server.rec.{n}").exists()] + [path]
    report(files, counted, arguments.minutes)
    for file in files:
        check(file)
    check_changed_constant(path)


async def send(url: str, clients: int, seconds: float) -> None:
    """Let so many clients send requests, one after the other."""
    end = time.monotonic() + seconds
    async with httpx.AsyncClient(base_url=f"{url}/v1", timeout=120, trust_env=False) as http:
        await asyncio.gather(*(ask(http, Random(client), end) for client in range(clients)))


async def ask(http: httpx.AsyncClient, rng: Random, end: float) -> None:
    while time.monotonic() < end:
        body = make_body(rng)
        if rng.random() < 0.15:  # it disconnects
            async with http.stream("POST", "/completions", json={**body, "stream": True}) as stream:
                lines, wanted = 0, rng.randrange(1, 12)
                async for _ in stream.aiter_lines():
                    lines += 1
                    if lines >= wanted:
                        break
        else:
            answer = await http.post("/completions", json=body)
            assert answer.status_code == 200, answer.text


def make_body(rng: Random) -> dict[str, Any]:
    """A request of any kind."""
    beginnings = [" ".join(Random(number).choices(WORDS, k=90)) for number in range(6)]
    prompt = " ".join([*rng.sample(beginnings, rng.choice((0, 1, 2))), *rng.choices(WORDS, k=rng.randrange(1, 60))])
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": rng.choice((1, 8, 30, 120)), "n": rng.choice((1, 1, 1, 3))}
    body |= rng.choice(({"temperature": 0}, {"temperature": 1.0, "seed": rng.randrange(99)}, {"top_p": 0.9}))
    body |= rng.choice(({}, {"logprobs": 2}, {"stop": ["goose", "boat"]}, {"ignore_eos": True}))
    if rng.random() < 0.2:
        body["structured_outputs"] = {"regex": "([A-Z][a-z]{2,9} ){2,8}!"}
    return body


def report(files: Sequence[Path], counted: dict[str, float], minutes: float) -> None:
    """Print what was recorded."""
    kinds: Counter[str] = Counter()
    for file in files:
        for frame in Recording.open(file).frames():
            for record in frame.records if isinstance(frame, Records) else ():
                kinds[type(record).__name__] += 1
                if isinstance(record, FinishTrace):
                    kinds[record.reason.value] += 1
    size = counted["splitfuse:recorded_bytes_total"]
    choices = sum(kinds[reason.value] for reason in FinishReason)
    print(
        f"{len(files)} files, {size / 2**20:.2f} MiB in {minutes:g} minutes: {size / minutes / 2**20:.2f} MiB a minute"
    )
    print(f"{choices} choices ended ({size / choices:.0f} bytes each), {kinds[StepTrace.__name__]} steps")
    tokens = int(counted["splitfuse:generated_tokens_total"] + counted["splitfuse:prompt_tokens_total"])
    print(f"{size / tokens:.2f} bytes for each of {tokens} tokens of prompts and answers")
    cached = int(counted["splitfuse:cached_tokens_total"])
    print(f"{kinds[PreemptTrace.__name__]} preemptions, {kinds['abort']} aborts, {cached} tokens from the prefix cache")
    print(f"requests told: {kinds[RequestTrace.__name__]}")


def check(file: Path) -> None:
    """Print what a replay of a file finds."""
    recording = Recording.open(file)
    found = replay(recording, load(recording, config_of(recording, {})))
    print(f"{file.name}: {found}", flush=True)


def check_changed_constant(file: Path) -> None:
    """Print what a replay finds if each norm has another epsilon."""
    changed = file.with_name("changed")
    shutil.copytree(BUNDLED_MODEL, changed)
    config = json.loads((changed / "config.json").read_text())
    config["rms_norm_eps"] *= 2
    (changed / "config.json").write_text(json.dumps(config))
    recording = Recording.open(file)
    found = replay(recording, load(recording, config_of(recording, {"model": str(changed)})))
    print(f"with twice the epsilon: {found.difference}, after {found.num_steps} equal steps", flush=True)


if __name__ == "__main__":
    main()
