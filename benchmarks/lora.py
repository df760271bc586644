"""Cost of LoRA: steps of a shape with requests over several adapters and with none, in turns.

    python -m benchmarks.lora [--shape 0.5b] [--requests 16] [--adapters 8] [--rank 16] [FLAGS]

Weights and adapters are random; adapters change all projections of attention and MLP. Each row of the table compares
steps in which all requests decode, or steps of one long prompt, with the same steps without adapters. Engine FLAGS as
--name=value.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file

from benchmarks.models import SHAPES, config, write_json
from splitfuse.config.engine import EngineConfig
from splitfuse.core.events import StepRecord
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.engine.engine import Engine
from splitfuse.models.lora import TARGETS
from splitfuse.models.parameters import parameters

PROMPT = 16  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--turns", type=int, default=7)
    arguments, flags = parser.parse_known_args()
    settings = dict(flag.removeprefix("--").replace("-", "_").split("=", 1) for flag in flags)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_json(folder / "config.json", config(SHAPES[arguments.shape]))
        chosen = {"dtype": "bfloat16", "load_format": "dummy", "num_blocks": 512, **settings}
        engine = Engine.load(EngineConfig.from_settings({"model": name, **chosen}))
        digests = [
            engine.adapters.load(str(number), str(write_adapter(engine, folder / str(number), arguments.rank, number)))
            for number in range(arguments.adapters)
        ]
    print(engine.model.decoder.backend.describe(), "\n")
    print("| step | adapters | with | without | ratio |\n|---|---|---|---|---|")
    decodes = f"{arguments.requests} decodes"
    for count in (1, arguments.adapters):
        spread = [digests[number % count] for number in range(arguments.requests)]
        compare(engine, decodes, spread, arguments)
    compare(engine, "1 decode", digests[:1], arguments)
    compare(engine, "prompt of 256", digests[:1], arguments, prompt=256)


def write_adapter(engine: Engine, folder: Path, rank: int, seed: int) -> Path:
    """Write an adapter of all modules that can have one, and return its folder."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for parameter in parameters(engine.model.spec):
        for part in parameter.parts if parameter.name in TARGETS else ():
            rows, columns = part.piece.shape
            name = f"base_model.model.{part.piece.name.removesuffix('.weight')}.lora"
            tensors[f"{name}_A.weight"] = torch.randn(rank, columns, generator=generator) * 0.01
            tensors[f"{name}_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.01
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 16}))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def compare(
    engine: Engine, label: str, adapters: Sequence[str], arguments: argparse.Namespace, *, prompt: int = PROMPT
) -> None:
    """Print a row: the same steps with these adapters of the requests, and without."""
    times: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(arguments.turns + 1):
        for has in (True, False):
            chosen = adapters if has else [""] * len(adapters)
            found = seconds(engine, chosen, arguments.steps, prompt, seed=2 * turn + has)
            times[has] += [found] if turn else []  # the first turn warms up
    ratio = median(a / b for a, b in zip(times[True], times[False], strict=True))
    best = {has: f"{min(each) * 1e3:.2f} ms" for has, each in times.items()}
    print(f"| {label} | {len(set(adapters))} | {best[True]} | {best[False]} | {ratio:.3f} |", flush=True)


def seconds(engine: Engine, adapters: Sequence[str], num_steps: int, prompt: int, *, seed: int) -> float:
    """Return the median time of a step in which all requests decode, or for a long prompt that of its first."""
    steps: list[StepRecord] = []
    unsubscribe = engine.events.subscribe(StepRecord, steps.append)
    params = SamplingParams(max_tokens=num_steps if prompt == PROMPT else 1, ignore_eos=True)
    for number, adapter in enumerate(adapters):
        tokens = [(seed * 7919 + number * 31 + i) % 1000 + 100 for i in range(prompt)]
        engine.add_request(f"r{number}", tokens, params, adapter=adapter)
    while engine.has_unfinished:
        engine.step()
    unsubscribe()
    if prompt > PROMPT:
        return steps[0].measured_seconds
    count = len(adapters)
    return median(s.measured_seconds for s in steps if len(s.plan.chunks) == s.plan.num_tokens == count)


if __name__ == "__main__":
    began = time.perf_counter()
    main()
    print(f"\n{time.perf_counter() - began:.0f} s")
