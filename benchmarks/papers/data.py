"""Reads the published figures of this folder (README.md has their sources and licences) as workloads and step times."""

from __future__ import annotations

import csv
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from random import Random
from statistics import median

from splitfuse.bench.workload import Lengths, LoadRequest, Workload
from splitfuse.core.slo.cost_model import CostModel, Sample, StepFeatures, fit
from splitfuse.runtime.calibration import Calibration
from splitfuse.simulator.machines import MACHINES

FOLDER = Path(__file__).parent
BLOCK_SIZE = 16
MIXED_STEP = 1.1
"""Time of a step with prompts and decodes, as a multiple of one with as many prompt tokens: Splitwise's assumption."""


@cache
def _rows(name: str) -> tuple[dict[str, str], ...]:
    with (FOLDER / name).open(encoding="utf-8", newline="") as file:
        return tuple(csv.DictReader(file))


@dataclass(frozen=True)
class Drawn(Workload):
    """Draws the lengths of prompts and answers from published ones, each by itself, as Splitwise's generator does."""

    kind = "drawn"
    name: str
    prompts: tuple[int, ...]
    answers: tuple[int, ...]
    longest: int
    """Longest sum of prompt and answer: prompts are cut to it."""
    seed: int = 0
    lengths: Lengths = field(default_factory=lambda: Lengths(1, 1))
    """Unused."""

    def first(self, stream: str, number: int) -> LoadRequest:
        """See Workload. All tokens are zeros: nothing is cached."""
        random = Random(f"{self.seed} {stream} {number}")
        answer = random.choice(self.answers)
        prompt = min(random.choice(self.prompts), self.longest - answer)
        return LoadRequest(stream, number, 0, (0,) * prompt, answer)


def workload(name: str, *, longest: int, seed: int = 0) -> Drawn:
    """Return the workload of that name: azure_code, azure_conversation, sharegpt, humaneval or longbench."""
    if name == "longbench":  # DistServe's script cuts prompts to 1900 to 2048 tokens; the answers' length is assumed
        return Drawn(name, tuple(range(1900, 2049)), (100,), longest, seed)
    rows = _rows("lengths.csv")
    prompts, answers = (tuple(int(row[f"{name}_{part}"]) for row in rows) for part in ("prompt", "answer"))
    return Drawn(name, prompts, answers, longest, seed)


@cache
def turns_of_conversations() -> tuple[tuple[tuple[int, int], ...], ...]:
    """Return conversations of ShareGPT: for each turn the new tokens of its prompt and the tokens of its answer."""
    lines = (FOLDER / "conversations.txt").read_text(encoding="utf-8").splitlines()
    numbers = [[int(each) for each in line.split()] for line in lines if not line.startswith("#")]
    return tuple(tuple(zip(each[::2], each[1::2], strict=True)) for each in numbers)


@dataclass(frozen=True)
class FittedTimes:
    """Gives the times of steps that DistServe published: a fit for prompts, and two for decodes, in ms.

    A step with both, which DistServe does not have, takes as long as a prompt with as many tokens, and as reading the
    keys and values of all that was computed before; that is rather too long, and not measured.
    """

    prompt: tuple[float, float, float]
    """Coefficients of one step, a token, and the square of a prompt's length."""
    decode: tuple[float, float, float]
    """Coefficients of one step, a position of context, and a request."""
    large: tuple[float, float, float]
    """The same for steps of LARGE requests or more."""

    def seconds(self, step: StepFeatures) -> float:
        """See StepTimes."""
        before = step.kv_tokens - step.tokens
        if step.tokens == step.requests:
            floor, position, request = self.large if step.requests >= LARGE else self.decode
            return (floor + position * step.kv_tokens + request * step.requests) / 1e3
        floor, token, square = self.prompt
        squares = 2 * step.pairs - step.tokens  # of a chunk from s to e: e^2 - s^2
        return (floor + token * step.tokens + square * squares + self.decode[1] * before) / 1e3

    @property
    def cost_model(self) -> CostModel:
        """Return the cost model that is equal for all steps but those of decodes alone, which it takes as longer."""
        floor, token, square = self.prompt
        position = self.decode[1]
        return CostModel(
            floor=floor / 1e3,
            per_token=(token - square - position) / 1e3,
            per_pair=2 * square / 1e3,
            per_kv_token=position / 1e3,
        )


LARGE = 95
"""Number of requests from which DistServe's second fit of decodes holds."""


@dataclass(frozen=True)
class Engine:
    """Holds an engine of DistServe's evaluation on some GPUs: its step times and the size of its cache."""

    name: str
    times: FittedTimes
    gpus: int
    kv_tokens: int
    kv_bytes_per_token: float

    @property
    def calibration(self) -> Calibration:
        return Calibration(
            name=self.name,
            cost=self.times.cost_model,
            num_blocks=self.kv_tokens // BLOCK_SIZE,
            block_size=BLOCK_SIZE,
            max_model_len=2048,
            kv_bytes_per_token=self.kv_bytes_per_token,
        )


KV_BYTES = {"OPT-13B": 40 * 2 * 5120 * 2, "OPT-66B": 64 * 2 * 9216 * 2}
"""Bytes of the keys and values of a token: layers, key and value, hidden size, fp16."""


def distserve_engine(engine: str, model: str, gpus: int, *, kv_tokens: int | None = None) -> Engine:
    """Return an engine, `vLLM` or `DistServe`, tensor parallel over `gpus` A100-80GB."""
    row = next(
        row
        for row in _rows("distserve.csv")
        if (row["engine"], row["model"], row["gpus"]) == (engine, model, str(gpus))
    )

    def fit(*names: str) -> tuple[float, float, float]:
        first, second, third = (float(row[f"{name}_ms"]) for name in names)
        return first, second, third

    times = FittedTimes(
        fit("prompt", "prompt_token", "prompt_square"),
        fit("decode", "decode_context", "decode_request"),
        fit("large", "large_context", "large_request"),
    )
    name = f"{model} on {gpus} x A100-80GB, {engine}"
    return Engine(name, times, gpus, kv_tokens or int(row["kv_tokens"]), KV_BYTES[model])


@dataclass(frozen=True)
class MeasuredTimes:
    """Gives the times of steps that Splitwise measured on a machine, linear between the measured points."""

    prompts: tuple[tuple[float, float], ...]
    """Tokens of a step and its time in ms."""
    decodes: tuple[tuple[float, float], ...]
    """Requests of a step and its time in ms, with contexts of 512 tokens."""
    contexts: tuple[tuple[float, float], ...]
    """Context of a single request, and the time of its decode in ms."""

    def seconds(self, step: StepFeatures) -> float:
        """See StepTimes. A step with both is MIXED_STEP times one of as many prompt tokens."""
        if step.tokens == step.requests:
            return self.decode_ms(step.requests, step.kv_tokens) / 1e3
        is_mixed = step.kv_tokens - step.tokens > 0 and step.requests > 1
        return self.prompt_ms(step.tokens) * (MIXED_STEP if is_mixed else 1.0) / 1e3

    def prompt_ms(self, tokens: int) -> float:
        """Return the time of a step of so many prompt tokens."""
        return _interpolated(self.prompts, tokens)

    def decode_ms(self, requests: int, context: int) -> float:
        """Return the time of a step of decodes with so many positions of context together."""
        longer = _interpolated(self.contexts, context) - _interpolated(self.contexts, 512 * requests)
        return _interpolated(self.decodes, requests) + longer


@dataclass(frozen=True)
class TokenLineTimes:
    """Gives the times of steps as Splitwise's simulator does: from one line for prompts and one for decodes, each of
    medians by the product of prompt and batch. A step of decodes has as many tokens on its line as it has requests, so
    that their time is that of the line before its first point, 128 tokens.
    """

    prompts: tuple[tuple[float, float], ...]
    """Tokens of a step and its time in ms."""
    decodes: tuple[tuple[float, float], ...]
    """Tokens of a step and the time of a decode in ms."""

    def seconds(self, step: StepFeatures) -> float:
        """See StepTimes."""
        if step.tokens == step.requests:
            return _on_line(self.decodes, step.tokens) / 1e3
        is_mixed = step.kv_tokens - step.tokens > 0 and step.requests > 1
        return self.prompt_ms(step.tokens) * (MIXED_STEP if is_mixed else 1.0) / 1e3

    def prompt_ms(self, tokens: int) -> float:
        """Return the time of a step of so many prompt tokens."""
        return _on_line(self.prompts, tokens)

    def decode_ms(self, requests: int, context: int) -> float:
        """Return the time of a decode that others are normalized with: that of its prompt on the line."""
        assert requests == 1, "a lone request's"
        return _on_line(self.decodes, context)


def _on_line(points: Sequence[tuple[float, float]], at: float) -> float:
    """Return the value at `at`, linear between the nearest points, and beyond them on the first and the last line."""
    if at >= points[0][0]:
        return _interpolated(points, at)
    (x, y), (right, higher) = points[:2]
    return y + (higher - y) * (at - x) / (right - x)


def _interpolated(points: Sequence[tuple[float, float]], at: float) -> float:
    """Return the value at `at`, linear between the nearest points; before the first it is the first's, after the last
    on the last line.
    """
    if at <= points[0][0]:
        return points[0][1]
    index = min(max(bisect_left(points, (at, 0.0)), 1), len(points) - 1)
    (x, y), (right, higher) = points[index - 1], points[index]
    return y + (higher - y) * (at - x) / (right - x)


LLAMA, BLOOM = "Llama-2 70B", "BLOOM-176B"
"""Models that Splitwise measured."""
BLOOM_KV_BYTES = 70 * 2 * 14_336 * 2
BLOOM_WEIGHTS = 2 * 176e9
"""Size in bytes: fp16."""


def splitwise_measured(machine: str, model: str = LLAMA) -> dict[tuple[int, int], tuple[float, float]]:
    """Return the times in ms of a prompt's step and of a token by prompt length and batch."""
    return {
        (int(row["prompt_tokens"]), int(row["batch"])): (float(row["prompt_ms"]), float(row["token_ms"]))
        for row in _rows("splitwise.csv")
        if (row["machine"], row["model"]) == (machine, model)
    }


def token_line_times(machine: str, model: str = LLAMA) -> TokenLineTimes:
    """Return the times of a model on `DGX-A100` or `DGX-H100` as Splitwise's simulator reads them."""
    by_tokens: dict[int, list[tuple[float, float]]] = {}
    for (tokens, batch), times in splitwise_measured(machine, model).items():
        by_tokens.setdefault(tokens * batch, []).append(times)
    lines = [
        tuple((tokens, median(each[which] for each in times)) for tokens, times in sorted(by_tokens.items()))
        for which in (0, 1)
    ]
    return TokenLineTimes(*lines)


def splitwise_times(machine: str, model: str = LLAMA) -> MeasuredTimes:
    """Return the times of a model on `DGX-A100` or `DGX-H100`."""
    measured = splitwise_measured(machine, model)
    prompts: dict[int, list[float]] = {}
    for (tokens, batch), (prompt, _) in measured.items():
        prompts.setdefault(tokens * batch, []).append(prompt)
    return MeasuredTimes(
        prompts=tuple((tokens, sum(times) / len(times)) for tokens, times in sorted(prompts.items())),
        decodes=tuple((batch, times[1]) for (tokens, batch), times in sorted(measured.items()) if tokens == 512),
        contexts=tuple((tokens, times[1]) for (tokens, batch), times in sorted(measured.items()) if batch == 1),
    )


@cache
def splitwise_calibration(machine: str, model: str) -> Calibration:
    """Return a machine with the cost model that fits what was measured on it."""
    if model == LLAMA:
        return MACHINES[f"splitwise-{machine[-4:].lower()}"]
    samples = []
    for (tokens, batch), (prompt, token) in splitwise_measured(machine, model).items():
        prompts, decodes = StepFeatures(), StepFeatures()
        for _ in range(batch):
            prompts = prompts.plus(start=0, count=tokens, rows=1)
            decodes = decodes.plus(start=tokens, count=1, rows=1)
        samples += [Sample(prompts, prompt / 1e3), Sample(decodes, token / 1e3)]
    return Calibration(
        name=f"{model} on {machine}",
        cost=replace(fit(samples, held_out=samples), noise=0.0),
        num_blocks=int((0.9 * 640e9 - BLOOM_WEIGHTS) / BLOOM_KV_BYTES / BLOCK_SIZE),
        block_size=BLOCK_SIZE,
        max_model_len=16_384,
        kv_bytes_per_token=BLOOM_KV_BYTES,
    )
