"""Kill and stop engines under load: texts are those without a kill, no stream has an error, and how long they pause.

    python -m tests.soak.engine_deaths [--case CASE] [--runs N] [--first N] [--replicas N] [--body JSON] [FLAGS ...]

In each run 16 streams are read, greedy and random ones, and an engine process gets SIGKILL, with --stop SIGSTOP: once
all have begun, and the one that is farthest has come to a random part of its answer. `--body` adds fields to all
requests. The cases of CASES have bodies, flags and models of their own. The moment of a run depends on the case and the
number of the run alone, so 20 runs can be done in pieces: `--first 5 --runs 5` are the runs 5 to 9. The exit status is
1 if a text differs or a stream had an error, or if fewer than 16 streams ran at a signal.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median
from types import MappingProxyType
from typing import Any

import httpx
import tiny_adapters
import tiny_models
from safetensors.torch import load_file
from server_load import children
from server_process import ServerProcess, server_process

from splitfuse.models.sources.hub import BUNDLED_MODEL

STREAMS = 16
LIMIT = 300.0
TOKENS = 200
WORDS = ["Anna", "Tom", "has", "a", "little", "dog", "and", "the", "park", "ran", "to", "red", "ball"]
LATEST = 0.9
"""Largest part of its answer that the farthest stream has at a signal, unless another begins later."""


def with_adapter(folder: Path) -> tuple[list[str], dict[str, Any]]:
    weights = load_file(Path(BUNDLED_MODEL) / "model.safetensors")
    shapes = tiny_adapters.module_shapes(weights, tiny_adapters.EVERYTHING)
    return [f"--lora=a={tiny_adapters.save_adapter(folder / 'adapter', shapes)}"], {"model": "a"}


def with_hybrid(folder: Path) -> tuple[list[str], dict[str, Any]]:
    """A small Qwen3.5 with random weights, and the tokenizer of the bundled model. It is fast: with longer answers all
    streams run at the signal.
    """
    bundled, path = Path(BUNDLED_MODEL), folder / "hybrid"
    vocab_size = json.loads((bundled / "config.json").read_text())["vocab_size"]
    model = tiny_models.make(
        "qwen3.5", lambda: tiny_models.qwen3_5(vocab_size=vocab_size, max_position_embeddings=1280)
    )
    model.save_pretrained(path)
    for each in bundled.glob("tokenizer*"):
        shutil.copy(each, path)
    return [f"--model={path}", "--dtype=bfloat16"], {"max_tokens": 1000}


CASES: dict[str, Callable[[Path], tuple[list[str], dict[str, Any]]]] = {
    "plain": lambda _: ([], {}),
    "grammar": lambda _: ([], {"structured_outputs": {"regex": "([a-d]{2} ){20,40}!"}}),
    "adapter": with_adapter,
    "drafts": lambda _: (["--num-speculative-tokens=7"], {}),
    "int8-cache": lambda _: (["--kv-cache-dtype=int8"], {}),
    "hybrid": with_hybrid,
}
"""Functions that return the flags and the fields of the requests of a case, and write its model."""


@dataclass
class Answer:
    """What a stream gave."""

    text: str = ""
    times: list[float] = field(default_factory=list)
    error: str = ""
    resumed: int = 0
    refused: int = 0
    """Number of times that it was sent again, since no engine was ready."""
    has_ended: bool = False

    @property
    def longest_gap(self) -> float:
        return max((b - a for a, b in zip(self.times, self.times[1:], strict=False)), default=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="number of the first run")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--case", choices=CASES, default="plain")
    parser.add_argument("--body", type=json.loads, default={})
    parser.add_argument("--stop", action="store_true")
    arguments, flags = parser.parse_known_args()
    number = signal.SIGSTOP if arguments.stop else signal.SIGKILL
    own = (f"--replicas={arguments.replicas}", *flags)
    runs = range(arguments.first, arguments.first + arguments.runs)
    sys.exit(not signal_all(arguments.case, runs, own, fields=arguments.body, number=number))


def signal_all(
    case: str,
    runs: range,
    flags: Sequence[str],
    *,
    fields: Mapping[str, Any] = MappingProxyType({}),
    number: signal.Signals = signal.SIGKILL,
) -> bool:
    """Do the runs of these numbers, and print what happened. Returns whether all texts were those without a signal, and
    all streams ran at each.
    """
    folder, rng = Path(tempfile.mkdtemp(prefix="soak-")), Random(0)
    of_case, of_bodies = CASES[case](folder)
    bodies = [make_body(rng, seed, {**of_bodies, **fields}) for seed in range(STREAMS)]
    equal = errors = resumed = num_whole = 0
    pauses: list[float] = []
    with (
        server_process(folder, f"soak-{folder.name}", "--num-blocks=2000", *of_case, *flags) as server,
        server.client() as client,
        httpx.Client(base_url=client.url, timeout=LIMIT, trust_env=False) as http,
    ):
        num_engines = len(children(server.process.pid))
        whole = stream_all(http, bodies)
        if failed := [answer.error for answer in whole if answer.error]:
            sys.exit(f"without a signal: {failed[0]}")
        usual = [answer.longest_gap for answer in whole]
        for run in runs:
            while len(children(server.process.pid)) < num_engines or http.get("/ready").status_code != 200:
                time.sleep(0.05)
            share = Random(f"{case} {run}").uniform(0.02, LATEST)
            kill = Signal(server, number, [len(answer.times) for answer in whole], share)
            answers = stream_all(http, bodies, kill)
            same = [a.text == b.text and not a.error for a, b in zip(answers, whole, strict=True)]
            equal += sum(same)
            errors += sum(bool(answer.error) for answer in answers)
            pauses += [answer.longest_gap for answer in answers if answer.resumed]
            refused = sum(answer.refused > 0 for answer in answers)
            moved = sum(answer.resumed for answer in answers)
            resumed += moved
            num_whole += kill.num_running == STREAMS
            print(
                f"run {run}: {kill.num_running} running at {kill.share:.2f}, {sum(same)} of {STREAMS} equal, {moved} "
                f"resumed, {refused} sent again",
                flush=True,
            )
            for answer in answers:
                if answer.error:
                    print(f"  {answer.error}", flush=True)
    print(
        f"{case}: {equal} of {len(runs) * STREAMS} texts equal, {errors} errors, {resumed} resumed, "
        f"{num_whole} of {len(runs)} signals while all ran"
    )
    if pauses:
        print(
            f"longest gap of a resumed stream: {min(pauses):.2f} s at least, {median(pauses):.2f} s in the middle, "
            f"{max(pauses):.2f} s at most; without a signal {max(usual):.2f} s at most"
        )
    print("log of the server:\n" + "\n".join(line for line in server.said.splitlines() if "ready again" in line))
    shutil.rmtree(folder)
    return equal == len(runs) * STREAMS and num_whole == len(runs)


def make_body(rng: Random, seed: int, more: dict[str, Any]) -> dict[str, Any]:
    prompt = " ".join(rng.choice(WORDS) for _ in range(rng.randint(2, 80)))
    body = {"prompt": prompt, "max_tokens": TOKENS, "stream": True, "splitfuse_timing": True, "seed": seed}
    return {**body, "temperature": float(seed % 2), "ignore_eos": True, **more}


@dataclass
class Signal:
    """Ends or stops an engine while answers come."""

    server: ServerProcess
    number: signal.Signals
    lengths: list[int]
    """Number of events of each answer without it."""
    share: float
    """Part of its answer that the farthest stream has then."""
    num_running: int = 0
    """Number of streams that had begun, and had not ended."""

    def send(self, answers: list[Answer]) -> None:
        """Wait for the moment, and send it to any of the engines, which all have streams."""
        while True:
            farthest = max(len(a.times) / most for a, most in zip(answers, self.lengths, strict=True))
            if farthest >= 1.0 or (farthest >= self.share and all(answer.times for answer in answers)):
                break
            time.sleep(0.0005)
        engine = Random(self.share).choice(children(self.server.process.pid))
        self.num_running = sum(bool(answer.times) and not answer.has_ended for answer in answers)
        os.kill(engine, self.number)


def stream_all(http: httpx.Client, bodies: list[dict[str, Any]], kill: Signal | None = None) -> list[Answer]:
    """Read all streams, and meanwhile send a signal to an engine."""
    answers = [Answer() for _ in bodies]
    threads = [threading.Thread(target=read, args=(http, *each)) for each in zip(bodies, answers, strict=True)]
    for thread in threads:
        thread.start()
    if kill is not None:
        kill.send(answers)
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
    finally:
        answer.has_ended = True


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
