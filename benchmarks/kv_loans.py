"""KV loans: the time of a token of a request whose beginning another process holds, beside an engine with the memory.

    python -m benchmarks.kv_loans MODEL [--cache 1024] [--pairs 12] [FLAGS]

One engine has a cache for all of a context of three caches; another has one cache, and a creditor in a process of its
own lends the rest. Both are given the same prompt; then they generate in turns A B A B, a few tokens at a time, and
their tokens are compared. Each has one thread, and so has the creditor.

MODEL is a folder, such as `python -m benchmarks.models 0.5b FOLDER` writes. Engine FLAGS as --name=value.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import msgspec

from splitfuse.config.engine import EngineConfig
from splitfuse.core.kv.loans import TILE
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.engine.engine import Engine
from splitfuse.engine.messages import Add, Loan
from splitfuse.kernels.loans import make_channel
from splitfuse.runtime.loading import load_model

BLOCK = 32
TOKENS_AT_ONCE = 4
"""Number of tokens that one engine generates before it is the other's turn."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--cache", type=int, default=1024, help="tokens of the small cache, a multiple of 512")
    parser.add_argument("--pairs", type=int, default=12, help="turns of each engine")
    parser.add_argument("--creditor", action="store_true", help=argparse.SUPPRESS)
    arguments, flags = parser.parse_known_args()
    settings: dict[str, Any] = {"model": str(arguments.model), "load_format": "safetensors", "kv_loans": True}
    settings |= {"num_threads": 1, "max_num_batched_tokens": 512, "max_model_len": 3 * arguments.cache}
    for flag in flags:
        name, _, text = flag.removeprefix("--").replace("-", "_").partition("=")
        settings[name] = int(text) if text.isdigit() else text
    if arguments.creditor:
        lend(settings, arguments.cache)
    else:
        compare(arguments, settings, flags)


def config(settings: dict[str, Any], num_tokens: int) -> EngineConfig:
    return EngineConfig.from_settings({**settings, "num_blocks": num_tokens // BLOCK})


def lend(settings: dict[str, Any], cache: int) -> None:
    """Lend as the lines of standard input ask for, and tell of the processor time so far after each."""
    engine = Engine.load(config(settings, 3 * cache))
    print(json.dumps(engine.channel_bytes), flush=True)
    for line in sys.stdin:
        if line.strip():
            engine.lend(msgspec.json.decode(line, type=Loan))
        print(json.dumps(time.process_time()), flush=True)


class Creditor:
    """Runs `lend` in a process."""

    def __init__(self, arguments: argparse.Namespace, flags: list[str]) -> None:
        command = [sys.executable, "-m", "benchmarks.kv_loans", str(arguments.model), "--creditor"]
        self._process = subprocess.Popen(
            [*command, f"--cache={arguments.cache}", *flags], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.channel_bytes = self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def ask(self, loan: Loan | None = None) -> float:
        """Lend, if there is a loan; return the processor time of the process."""
        assert self._process.stdin is not None
        self._process.stdin.write((b"" if loan is None else msgspec.json.encode(loan)) + b"\n")
        self._process.stdin.flush()
        seconds: float = self._read()
        return seconds

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class Timed:
    """Steps an engine, and adds up its seconds: of the clock, and of the processor with its creditor's."""

    def __init__(self, engine: Engine, creditor: Creditor | None) -> None:
        self.engine, self._creditor = engine, creditor
        self.tokens: list[int] = []

    def generate(self, count: int) -> tuple[float, float]:
        """Generate so many tokens; return the seconds that they took."""
        until = len(self.tokens) + count
        theirs = 0.0 if self._creditor is None else self._creditor.ask()
        clock, processor = time.perf_counter(), time.process_time()
        while len(self.tokens) < until:
            for output in self.engine.step():
                assert output.error is None, output.error
                self.tokens += output.token_ids
        clock, processor = time.perf_counter() - clock, time.process_time() - processor
        return clock, processor + (0.0 if self._creditor is None else self._creditor.ask() - theirs)


def compare(arguments: argparse.Namespace, settings: dict[str, Any], flags: list[str]) -> None:
    """Time both engines in turns."""
    cache, answer = arguments.cache, TOKENS_AT_ONCE * (arguments.pairs + 1) + 1
    creditor = Creditor(arguments, flags)
    model = load_model(config(settings, 3 * cache))  # once: both have the same copy of the weights
    whole = Timed(Engine(config(settings, 3 * cache), model), None)
    small = load_model(config(settings, cache))
    debtor = Timed(Engine(config(settings, cache), small), creditor)
    rng = Random(0)
    prompt = tuple(rng.randrange(10, 1000) for _ in range(3 * cache - answer - 4))
    lent = 2 * cache // TILE * TILE // BLOCK
    fd = make_channel(1, creditor.channel_bytes)
    loan = Loan(1, f"/proc/{os.getpid()}/fd/{fd}", lent)
    creditor.ask(loan)
    params = SamplingParams(max_tokens=answer + 4, ignore_eos=True)
    whole.engine.add(Add("request", prompt, params, seed=0))
    debtor.engine.add(Add("request", prompt, params, seed=0, loan=loan))
    print(
        f"{model.plan.kernels}; {len(prompt)} + {answer} tokens, caches of {3 * cache} and of {cache} + {lent * BLOCK}"
    )
    first = [each.generate(1) for each in (whole, debtor)]
    pairs = []
    for turn in range(arguments.pairs + 1):
        order = (whole, debtor) if turn % 2 else (debtor, whole)
        seconds = {each: each.generate(TOKENS_AT_ONCE) for each in order}
        if turn:  # the first ones warm up
            pairs.append((seconds[whole], seconds[debtor]))
    assert whole.tokens == debtor.tokens, "other tokens"
    whole.engine.abort("request")
    debtor.engine.abort("request")
    creditor.close()
    print("\n| | one engine | with a loan | ratio | quartiles |\n|---|---|---|---|---|")
    for index, name in enumerate(("clock", "processor")):
        ratio = first[1][index] / first[0][index]
        print(f"| prompt, {name} | {first[0][index]:.1f} s | {first[1][index]:.1f} s | {ratio:.2f} | |")
    for index, name in enumerate(("clock", "processor")):
        alone, lending = (median(pair[side][index] for pair in pairs) / TOKENS_AT_ONCE * 1e3 for side in (0, 1))
        ratios = sorted(pair[1][index] / pair[0][index] for pair in pairs)
        spread = f"{ratios[len(ratios) // 4]:.2f} to {ratios[len(ratios) * 3 // 4]:.2f}"
        print(f"| token, {name} | {alone:.1f} ms | {lending:.1f} ms | {median(ratios):.2f} | {spread} |")
    print(f"\nequal tokens; {arguments.pairs} turns of {TOKENS_AT_ONCE} tokens each")


if __name__ == "__main__":
    main()
