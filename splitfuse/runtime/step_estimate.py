"""Estimates a cost model in some tenths of a second, for an engine that starts without a calibration.

Some layers of the model compute a few steps; all layers take as many times as long, and the output head as much longer
as its weights are. That is enough for a first token budget (core/step_budget.py) and a first prediction of steps, which
those that run correct (core/slo/latency_predictor.py). What it does not know: layers that differ from the first ones,
and that the last one computes rows without logits only to their keys and values. The last norm, of
all rows here, counts once for each layer that is timed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from splitfuse.core.limits import ceil_div
from splitfuse.core.plan import Chunk, StateSlots
from splitfuse.core.slo.cost_model import CostModel
from splitfuse.kernels.weights import WeightRole
from splitfuse.models.decoder import Decoder
from splitfuse.runtime.loading import LoadedModel

FEW, SOME, MANY, MOST = SIZES = (1, 16, 64, 192)
"""Tokens of the steps that are timed: two that wait for memory, and two that do not on most machines."""
LARGE_SIZES = (512, 1536)
"""Longer steps in place of the last two, for a machine where those too wait for memory, or for the host."""
CONTEXT, DECODES = 1024, 16
"""Length of contexts that are timed, with a chunk of MANY tokens at its end and with so many decodes."""
WEIGHT_BYTES = 2**26
"""Bytes of weights which the shorter steps read, so that they come from memory and not from a cache. A model with fewer
has steps so short that a chosen token budget is not worth their timing."""
RUNS, RUN_SECONDS = 3, 0.1
"""Number of runs of each step, of which the shortest counts; none begins after so many seconds of them."""
HOST_SECONDS = 4e-3
"""Seconds of each step outside the layers: scheduling, sampling, and handling of results, for some dozen requests."""
NOISE = 0.05
"""Noise of equal steps, as calibrations of an idle machine find it."""
SMALL_NUMBER = 0x3C
"""Byte that makes a small finite number of every dtype: 0.0115 in bf16 and fp32, 1.06 in fp16."""


def has_long_steps(model: LoadedModel) -> bool:
    """Return whether the steps of a model are long enough for a token budget to be chosen by an estimate: not those of
    a small model, on a GPU, or of several ranks, which compute all layers each time.
    """
    is_here = model.decoder.device.type == "cpu" and model.leader is None
    return is_here and _layer_bytes(model) >= WEIGHT_BYTES


def estimate_cost(model: LoadedModel) -> CostModel:
    """Return a rough cost model of a model on this machine."""
    spec, num_layers = model.spec, len(model.spec.layers)
    layer_bytes = max(_layer_bytes(model), 1)
    fewest = 1 + max(spec.layers.index(layer) for layer in set(spec.layers))  # one of each kind
    if spec.token_input_size or model.leader is not None:  # of all layers at once
        fewest = num_layers
    shorter = max(fewest, min(num_layers, ceil_div(WEIGHT_BYTES * num_layers, layer_bytes)))

    def seconds(*chunks: tuple[int, int], layers: int = fewest) -> float:
        return num_layers * _seconds(model, layers, chunks)

    times = {size: seconds((0, size), layers=shorter if size <= SOME else fewest) for size in SIZES}
    if times[MOST] < 2.0 * times[FEW]:
        times = {size: times[size] for size in (FEW, SOME)} | {size: seconds((0, size)) for size in LARGE_SIZES}
    cost = from_times(times)
    context = min(CONTEXT, spec.max_position)
    if model.leader is not None:  # whose ranks have a cache of this size
        context = min(context, model.plan.num_blocks // DECODES * model.plan.block_size)
    start = max(context - MANY, 0)
    per_pair = per_kv_token = 0.0
    if start >= MANY:  # else the differences are noise
        per_pair = max(seconds((start, MANY)) - seconds((0, MANY)), 0.0) / (MANY * start)
        decodes = seconds(*[(context - 1, 1)] * DECODES) - seconds(*[(0, 1)] * DECODES)
        per_kv_token = max(decodes / (DECODES * context) - per_pair, 0.0)
    share = _head_bytes(model) / layer_bytes
    return replace(
        cost,
        floor=(1.0 + share) * cost.floor + HOST_SECONDS,
        per_row=share * (cost.per_token + cost.per_token_beyond),
        per_pair=per_pair,
        per_kv_token=per_kv_token,
        noise=NOISE,
    )


def from_times(seconds: Mapping[int, float]) -> CostModel:
    """Return the cost model with these times of steps of four sizes: one straight line through the shorter two, one
    through the longer two, and the knee where they meet. If longer steps are no slower, the knee is at the longest.
    """
    few, some, many, most = sorted(seconds)
    slope = (seconds[most] - seconds[many]) / (most - many)
    if slope <= 0.0:
        floor = max(seconds[few], seconds[most])
        return CostModel(floor=floor, per_token=0.0, knee=most, per_token_beyond=floor / most)
    first = min(max((seconds[some] - seconds[few]) / (some - few), 0.0), slope)
    floor, origin = max(seconds[few] - first, 0.0), seconds[many] - slope * many
    knee = (floor - origin) / (slope - first) if slope > first and floor > origin else 0.0
    return CostModel(floor=floor, per_token=first, knee=knee, per_token_beyond=slope - first)


def _seconds(model: LoadedModel, num_layers: int, chunks: Sequence[tuple[int, int]]) -> float:
    """Return the seconds of a layer in a step of chunks, each of (start, tokens), of the first `num_layers` layers. A
    model with shorter contexts computes parts of them, and takes as much longer.
    """
    whole, block_size = model.decoder, model.plan.block_size
    longest = whole.spec.max_position
    if model.leader is not None:
        longest = min(longest, model.plan.num_blocks * block_size)
    tokens = sum(count for _, count in chunks)
    chunks = [(min(start, longest - 1), min(count, longest - min(start, longest - 1))) for start, count in chunks]
    ends = [start + count for start, count in chunks]
    spec = replace(whole.spec, layers=whole.spec.layers[:num_layers], max_position=max(ends))
    weights = replace(whole.weights, layers=whole.weights.layers[:num_layers])
    blocks = [ceil_div(end, block_size) for end in ends]
    part = replace(
        model,
        spec=spec,
        decoder=whole if model.leader is not None else Decoder(spec, weights, whole.backend, dtype=whole.dtype),
        plan=replace(model.plan, num_blocks=sum(blocks), num_states=len(chunks) if model.plan.num_states else 0),
    )
    is_part = num_layers < len(whole.spec.layers)
    executor = part.make_executor()
    for store in executor.kv_cache.layers:  # untouched pages would read unrealistically fast
        if store is not None:
            whole.backend.fill_kv(store, SMALL_NUMBER)
    step, first = [], 0
    for number, ((start, count), size) in enumerate(zip(chunks, blocks, strict=True)):
        ids = tuple((start + each) % spec.vocab_size for each in range(count))
        state = StateSlots(number, number) if part.plan.num_states else None
        table = tuple(range(first, first + size))
        num_logits = count if is_part else 1  # else the last layer of a part would not be computed to its end
        step.append(Chunk(str(number), start, ids, table, num_logits=num_logits, samples=True, state=state))
        first += size
    shortest, began = math.inf, time.perf_counter()
    with torch.inference_mode():
        for run in range(RUNS):
            if run and time.perf_counter() - began > RUN_SECONDS:
                break
            run_began = time.perf_counter()
            executor.hidden(step)[-1:].cpu()  # of a GPU: waits for it
            shortest = min(shortest, time.perf_counter() - run_began)
    return shortest * tokens / sum(count for _, count in chunks) / num_layers


def _layer_bytes(model: LoadedModel) -> int:
    """Return the bytes of the weights of the layers."""
    return model.plan.weights - (1 if model.spec.tied_embeddings else 2) * _head_bytes(model)


def _head_bytes(model: LoadedModel) -> int:
    """Return the bytes of the weights of the output head."""
    decoder, spec = model.decoder, model.spec
    num_ids = spec.vocab_size // (1 if model.leader is None else model.leader.group.shard.size)
    return decoder.backend.weight_bytes((num_ids, spec.hidden_size), role=WeightRole.HEAD, dtype=decoder.dtype)
