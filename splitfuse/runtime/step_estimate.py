"""Estimates a cost model in some hundredths of a second, for an engine that starts without a calibration.

Some layers of the model compute steps of a few sizes; all layers take as many times as long, and the output head as
much longer as its weights are. That is enough to choose a first token budget (core/step_budget.py), which real steps
correct. What it does not know: contexts, whose attention takes longer, and layers that differ from the first ones.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace

import torch

from splitfuse.core.limits import ceil_div
from splitfuse.core.plan import Chunk, StateSlots
from splitfuse.core.slo.cost_model import CostModel
from splitfuse.kernels.interface import Role
from splitfuse.models.decoder import Decoder
from splitfuse.runtime.loading import LoadedModel

FEW, SOME, MANY, MOST = SIZES = (1, 16, 64, 192)
"""Tokens of the steps that are timed: two that wait for memory, and two that do not on most machines."""
WEIGHT_BYTES = 2**26
"""Bytes of weights which the shorter steps read, so that they come from memory and not from a cache."""
RUNS = 3
"""Number of runs of each size, of which the shortest counts."""
HOST_SECONDS = 4e-3
"""Seconds of each step outside the layers: scheduling, sampling, and handling of results, for some dozen requests."""


def estimate_cost(model: LoadedModel) -> CostModel | None:
    """Return a rough cost model of a model on this machine; None if some of its layers cannot be timed alone, or if its
    steps are too short for it to matter: those of a small model, or on a GPU.
    """
    decoder, spec = model.decoder, model.spec
    head, num_layers = _head_bytes(model), len(spec.layers)
    layer_bytes = model.plan.weights - (1 if spec.tied_embeddings else 2) * head
    if decoder.device.type != "cpu" or layer_bytes < WEIGHT_BYTES or spec.token_input_size:
        return None
    fewest = 1 + max(spec.layers.index(layer) for layer in set(spec.layers))  # one of each kind
    shorter = min(num_layers, ceil_div(WEIGHT_BYTES * num_layers, layer_bytes))
    seconds = {size: _seconds(model, max(fewest, shorter if size <= SOME else 1), size) for size in SIZES}
    cost = from_times({size: each * num_layers for size, each in seconds.items()})
    if cost is None:
        return None
    share = head / layer_bytes
    slope = cost.per_token + cost.per_token_beyond
    return replace(cost, floor=(1.0 + share) * cost.floor + HOST_SECONDS, per_row=share * slope)


def from_times(seconds: Mapping[int, float]) -> CostModel | None:
    """Return the cost model with these times of steps of SIZES tokens: one straight line through the shorter two, one
    through the longer two, and the knee where they meet. None if longer steps are no slower.
    """
    slope = (seconds[MOST] - seconds[MANY]) / (MOST - MANY)
    if slope <= 0.0:
        return None
    first = min(max((seconds[SOME] - seconds[FEW]) / (SOME - FEW), 0.0), slope)
    floor, origin = max(seconds[FEW] - first, 0.0), seconds[MANY] - slope * MANY
    knee = (floor - origin) / (slope - first) if slope > first and floor > origin else 0.0
    return CostModel(floor=floor, per_token=first, knee=knee, per_token_beyond=slope - first)


def _seconds(model: LoadedModel, num_layers: int, size: int) -> float:
    """Return the seconds of a layer in a step of one prompt of `size` tokens, of the first `num_layers` layers."""
    whole, spec, block_size = model.decoder, model.spec, model.plan.block_size
    spec = replace(spec, layers=spec.layers[:num_layers], max_position=min(spec.max_position, MOST))
    weights = replace(whole.weights, layers=whole.weights.layers[:num_layers])
    num_blocks = ceil_div(MOST, block_size)
    part = replace(
        model,
        spec=spec,
        decoder=Decoder(spec, weights, whole.backend, dtype=whole.dtype),
        plan=replace(model.plan, num_blocks=num_blocks, num_states=1 if model.plan.num_states else 0),
    )
    executor = part.make_executor()
    tokens = tuple(number % spec.vocab_size for number in range(min(size, spec.max_position)))
    state = StateSlots(0, 0) if part.plan.num_states else None
    chunk = Chunk("", 0, tokens, tuple(range(num_blocks)), num_logits=1, samples=True, state=state)
    shortest = math.inf
    with torch.inference_mode():
        for _ in range(RUNS):
            began = time.perf_counter()
            executor.hidden([chunk])
            shortest = min(shortest, time.perf_counter() - began)
    return shortest * size / len(tokens) / num_layers


def _head_bytes(model: LoadedModel) -> int:
    """Return the bytes of the weights of the output head."""
    decoder, spec = model.decoder, model.spec
    return decoder.backend.weight_bytes((spec.vocab_size, spec.hidden_size), role=Role.HEAD, dtype=decoder.dtype)
