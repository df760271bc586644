"""Cost of structured output: steps of the 0.5B shape with a large vocabulary, with and without a form, in turns.

    python -m benchmarks.structured --tokenizer FILE [--requests N] [--temperature T ...] [--form NAME ...] [FLAGS]

FILE is a tokenizer.json, whose vocabulary the model gets, padded to 151,936 tokens. The weights are random, so that the
likeliest token hardly ever has the form: the most that forms cost. What is asked of matchers, masks, their application
and the matchers' advance are all in the time of a step. Printed are also the seconds until the first form's vocabulary
is there, the milliseconds for each further form, and the time to the first token of a request with a schema that is
new. Engine FLAGS as --name=value.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.models import SHAPES, config, write_json
from splitfuse.config.engine import EngineConfig
from splitfuse.core.events import StepRecord
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.structured_outputs import StructuredOutputs
from splitfuse.engine.engine import Engine
from splitfuse.text.grammar import compile_structured_outputs

VOCAB_SIZE = 151_936
PROMPT = 16  # tokens
RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 4},
        "address": {"type": "object", "properties": {"street": {"type": "string"}, "zip": {"pattern": "^[0-9]{5}$"}}},
    },
    "required": ["name", "age", "tags", "address"],
    "additionalProperties": False,
}
FORMS: dict[str, dict[str, Any]] = {
    "schema": {"json": {"type": "array", "items": RECORD, "minItems": 1000}},
    "any values": {"json": {"type": "array", "minItems": 1000}},
    "regex": {"regex": r"(\w{1,12} ){1000}"},
    "grammar": {"grammar": 'root ::= "(" root ")" root | [a-z]+ " " root'},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--form", choices=list(FORMS), nargs="+", default=list(FORMS))
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--turns", type=int, default=5)
    arguments, flags = parser.parse_known_args()
    settings = dict(flag.removeprefix("--").replace("-", "_").split("=", 1) for flag in flags)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_json(folder / "config.json", {**config(SHAPES["0.5b"]), "vocab_size": VOCAB_SIZE})
        shutil.copy(arguments.tokenizer, folder / "tokenizer.json")
        chosen = {"quantization": "int8", "dtype": "bfloat16", "load_format": "dummy", "num_blocks": 512, **settings}
        engine = Engine.load(EngineConfig.from_settings({"model": name, **chosen}))
        compare(engine, arguments)


def compare(engine: Engine, arguments: argparse.Namespace) -> None:
    forms = {name: compile_structured_outputs(StructuredOutputs.of(FORMS[name])) for name in arguments.form}
    for name, form in forms.items():
        began = time.perf_counter()
        engine.model.grammars.prepare(form).result()
        print(f"{name}: ready after {(time.perf_counter() - began) * 1e3:.1f} ms")
    free = SamplingParams(max_tokens=arguments.steps, seed=1, ignore_eos=True)
    seconds(engine, free, arguments.requests)  # warm
    alone = median(first_token(engine, None) for _ in range(2 * arguments.turns))
    new = median(first_token(engine, f"name {turn}") for turn in range(2 * arguments.turns))
    print(f"first token: {alone * 1e3:.1f} ms without a form, {new * 1e3:.1f} ms with a new schema")
    print("\n| form | temperature | step | without | difference |\n|---|---|---|---|---|")
    for temperature in arguments.temperature:
        for name, form in forms.items():
            with_form, without = [], []
            plain = replace(free, temperature=temperature)
            for _ in range(arguments.turns):
                without.append(seconds(engine, plain, arguments.requests))
                with_form.append(seconds(engine, replace(plain, structured_outputs=form), arguments.requests))
            ratio = median(a / b for a, b in zip(with_form, without, strict=True)) - 1
            times = f"{min(with_form) * 1e3:.2f} ms | {min(without) * 1e3:.2f} ms"
            print(f"| {name} | {temperature:g} | {times} | {ratio:+.1%} |", flush=True)


def first_token(engine: Engine, name: str | None) -> float:
    """Return the time to the first token of a request alone, with a form that has a property of this name."""
    began = time.perf_counter()
    params = SamplingParams(max_tokens=1, ignore_eos=True)
    if name is not None:
        schema = {**RECORD, "properties": {**RECORD["properties"], name: {"type": "string", "maxLength": 9}}}
        params = replace(params, structured_outputs=compile_structured_outputs(StructuredOutputs.of({"json": schema})))
    engine.add_request("first", range(100, 100 + PROMPT), params)
    while engine.has_unfinished:
        engine.step()
    return time.perf_counter() - began


def seconds(engine: Engine, params: SamplingParams, num_requests: int) -> float:
    """Return the median time of a step in which all requests decode."""
    steps: list[StepRecord] = []
    unsubscribe = engine.events.subscribe(StepRecord, steps.append)
    for number in range(num_requests):
        prompt = [(number * PROMPT + i) % 1000 + 100 for i in range(PROMPT)]
        engine.add_request(f"r{number}", prompt, replace(params, seed=number))
    while engine.has_unfinished:
        engine.step()
    unsubscribe()
    decodes = [step.measured_seconds for step in steps if len(step.plan.chunks) == step.plan.num_tokens == num_requests]
    assert len(decodes) > params.max_tokens // 2, "the forms ended"  # type: ignore[operator]
    return median(decodes)


if __name__ == "__main__":
    main()
