"""Counts the memory of a step besides weights and caches: activations, logits, copies of weights, CUDA graphs."""

from __future__ import annotations

import torch

from splitfuse.config.engine import EngineConfig
from splitfuse.core.limits import ceil_div
from splitfuse.kernels.group import WHOLE, Shard
from splitfuse.kernels.interface import Backend, StepSizes
from splitfuse.kernels.layers import AttentionSpec, ExpertsSpec, LayerSpec, RecurrentSpec
from splitfuse.models.sharding import rank_shard, rank_spec
from splitfuse.models.sources.source import WeightSource
from splitfuse.models.spec import ModelSpec
from splitfuse.models.weights import copy_bytes, resolve_dtype
from splitfuse.runtime.step_graphs import MAX_BYTES, round_up

LOGIT_BYTES = 20
"""Bytes of each logit while rows are sampled, about: in fp32, also in the kernels' own buffer, adjusted in fp64, and
what drawing adds."""
SUM_BYTES = 8
"""Bytes of each number that a rank receives of another one to add it up: in fp32, and in the library's own buffer."""


def first_shard(config: EngineConfig, backend: Backend) -> Shard:
    """Return the part of the model that rank 0 has, which is that of an engine."""
    return rank_shard(backend, 0, config.model.tensor_parallel_size, elsewhere=bool(config.model.rank))


def activation_bytes(
    spec: ModelSpec,
    config: EngineConfig,
    backend: Backend,
    weights: WeightSource | None,
    *,
    num_tokens: int,
    num_positions: int,
) -> int:
    """Return the bytes that steps of so many tokens take besides weights and caches, and the CUDA graphs of steps, if
    there are any.
    """
    dtype, shard = resolve_dtype(config.model.dtype, spec), first_shard(config, backend)
    size = step_bytes(spec, dtype, num_tokens, backend, weights, shard=shard)
    size += attention_bytes(spec, config, backend, num_tokens=num_tokens, num_positions=num_positions)
    return size + (graph_bytes(size) if config.model.cuda_graphs else 0)


def step_bytes(
    spec: ModelSpec,
    dtype: torch.dtype,
    num_tokens: int,
    backend: Backend,
    weights: WeightSource | None = None,
    *,
    shard: Shard = WHOLE,
) -> int:
    """Return the bytes of the activations and logits of a rank's step of so many tokens, and of the copies of weights
    that `backend` makes for it, of those that are quantized in `weights` too.
    """
    token_size = token_bytes(spec, dtype, shard)
    copies = copy_bytes(spec, dtype, backend, weights, shard=shard)
    return num_tokens * token_size + backend.capabilities.head_rows * spec.vocab_size * LOGIT_BYTES + copies


def attention_bytes(
    spec: ModelSpec, config: EngineConfig, backend: Backend, *, num_tokens: int, num_positions: int
) -> int:
    """Return the bytes that attention takes for itself in a step of so many tokens, with at most `num_positions` in the
    KV cache. Those of CUDA graphs are padded.
    """
    is_padded, size = config.model.cuda_graphs, config.cache.block_size
    num_requests = min(config.scheduler.max_num_seqs, num_tokens)
    longest = config.model.max_model_len or spec.max_position
    if is_padded:
        num_requests, longest = round_up(num_requests), round_up(ceil_div(longest, size)) * size
        num_tokens = max(round_up(num_tokens), num_requests + 1)
    sizes = StepSizes(
        num_tokens=num_tokens,
        num_requests=num_requests,
        num_positions=num_positions,
        longest=longest,
        is_padded=is_padded,
    )
    dtype = resolve_dtype(config.model.dtype, spec)
    layers = rank_spec(spec, config.model.tensor_parallel_size).layers
    mixers = {layer.mixer for layer in layers if isinstance(layer.mixer, AttentionSpec)}
    return max((backend.attention_bytes(each, sizes, dtype) for each in mixers), default=0)


def graph_bytes(activations: int) -> int:
    """Return the most bytes that CUDA graphs keep, of steps that have so many bytes of activations."""
    return MAX_BYTES + activations


def token_bytes(spec: ModelSpec, dtype: torch.dtype, shard: Shard = WHOLE) -> int:
    """Return the bytes of one token at the widest moment of a rank's step, generously. Ranks that share memory have
    those of the whole network in it; others receive what all of them give of a hidden state.
    """
    layers = set(rank_spec(spec, shard.size).layers if shard.sums else spec.layers)
    token_inputs = 3 * spec.token_input_size * len(spec.layers)
    width = max(_layer_width(layer, spec.hidden_size) for layer in layers) + token_inputs
    sums = shard.size * spec.hidden_size * SUM_BYTES if shard.sums else 0
    return width * max(dtype.itemsize, 4) + sums


def _layer_width(layer: LayerSpec, hidden: int) -> int:
    """Return how many numbers one token takes in a layer at most: its heads, and inputs, outputs and gate of the MLP
    or of each expert it is routed to.
    """
    width, mixer, mlp = 4 * hidden, layer.mixer, layer.mlp
    if isinstance(mlp, ExpertsSpec):
        width += mlp.router.top_k * 2 * (hidden + mlp.expert.intermediate_size) + mlp.router.num_experts
        mlp = mlp.shared
    if mlp is not None:
        width += 4 * mlp.intermediate_size
    if isinstance(mixer, RecurrentSpec):
        width += 4 * mixer.num_channels
    elif mixer is not None:
        width += (3 + mixer.gate) * mixer.num_heads * mixer.head_dim
    return width
