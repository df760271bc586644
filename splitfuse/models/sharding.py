"""Divides a network among the ranks of a tensor-parallel group, which compute it together.

A rank has its heads, its part of the inner elements of each MLP and expert, and of the rows of o, down, embedding and
output head. It reads all columns of each: so every sum is that of one process, to the last bit. Ranks that share no
memory, or compute one operation after the other, have the columns of o and down that belong to their heads and inner
elements, and add up the partial sums.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from splitfuse.errors import ConfigError, RankLostError
from splitfuse.kernels.batch import RaggedBatch
from splitfuse.kernels.drawing import Filter
from splitfuse.kernels.group import Group, Shard, SharedGroup, SummingGroup
from splitfuse.kernels.interface import Backend
from splitfuse.kernels.layers import AttentionSpec, ExpertsSpec, LayerSpec, MlpSpec
from splitfuse.kernels.weights import NetworkWeights
from splitfuse.models.decoder import Decoder
from splitfuse.models.kv_cache import KVCache
from splitfuse.models.spec import ModelSpec

_logger = logging.getLogger(__name__)

DIVIDED = frozenset(
    [
        *("embed", "head", "head_bias", "qkv", "qkv_bias", "attn_gate", "sinks", "o", "o_bias"),
        *("w13", "w1", "w1_bias", "w2", "w2_bias"),
        *(f"{mlp}.{name}" for mlp in ("mlp", "shared") for name in ("gate_up", "up", "up_bias", "down", "down_bias")),
    ]
)
"""Names of the weights that ranks divide by rows; of the others each has a copy."""
SUMMED = frozenset(["o", "w2", "mlp.down", "shared.down"])
"""Names of the weights that ranks which add up divide by columns instead."""
ADDED_ONCE = frozenset(f"{name}_bias" for name in SUMMED)
"""Names of the biases that only the first of such ranks adds."""


def rank_spec(spec: ModelSpec, size: int) -> ModelSpec:
    """Return the network of which a rank of `size` computes all: with its heads and inner elements."""
    return spec if size == 1 else replace(spec, layers=tuple(_rank_layer(layer, size) for layer in spec.layers))


def _rank_layer(layer: LayerSpec, size: int) -> LayerSpec:
    mixer, mlp = layer.mixer, layer.mlp
    if isinstance(mixer, AttentionSpec):
        mixer = replace(mixer, num_heads=mixer.num_heads // size, num_kv_heads=mixer.num_kv_heads // size)
    if isinstance(mlp, ExpertsSpec):
        shared = None if mlp.shared is None else _rank_mlp(mlp.shared, size)
        mlp = replace(mlp, expert=_rank_mlp(mlp.expert, size), shared=shared)
    elif mlp is not None:
        mlp = _rank_mlp(mlp, size)
    return replace(layer, mixer=mixer, mlp=mlp)


def _rank_mlp(spec: MlpSpec, size: int) -> MlpSpec:
    return replace(spec, intermediate_size=spec.intermediate_size // size)


def rank_shard(backend: Backend, rank: int, size: int, *, elsewhere: bool) -> Shard:
    """Return the part of a rank of `size`, of which some are `elsewhere`, on other machines."""
    return Shard(rank, size, sums=size > 1 and (elsewhere or not backend.capabilities.gathers))


def check_ranks(spec: ModelSpec, backend: Backend, size: int) -> None:
    """Raise ConfigError, naming a number of ranks that would do, unless `size` ranks can compute the network."""
    if size == 1:
        return
    is_fused = backend.capabilities.gathers
    obstacles = (_obstacle(layer, is_fused=is_fused) for layer in set(spec.layers))
    if (reason := next(filter(None, obstacles), None)) is not None:
        raise ConfigError(f"tensor_parallel_size={size} cannot be used: the model has {reason}; leave it out")
    sizes = dict.fromkeys(_sizes(spec, is_fused=is_fused))
    if wrong := next(((name, length) for name, length in sizes if length % size), None):
        fitting = [str(each) for each in range(1, size) if not any(length % each for _, length in sizes)]
        raise ConfigError(
            f"tensor_parallel_size={size} does not divide the {wrong[1]} {wrong[0]} of the model: it can be "
            f"{' or '.join(fitting)}"
        )


def _sizes(spec: ModelSpec, *, is_fused: bool) -> list[tuple[str, int]]:
    """Return what ranks must be able to divide evenly, by name."""
    sizes = [("elements of hidden states", spec.hidden_size)] if is_fused else []
    for layer in spec.layers:
        mlps = [layer.mlp]
        if isinstance(layer.mlp, ExpertsSpec):
            mlps = [layer.mlp.expert, layer.mlp.shared]
        if isinstance(layer.mixer, AttentionSpec):
            sizes.append(("key/value heads", layer.mixer.num_kv_heads))
        sizes += [("inner elements of an MLP", mlp.intermediate_size) for mlp in mlps if isinstance(mlp, MlpSpec)]
    return sizes


def _obstacle(layer: LayerSpec, *, is_fused: bool) -> str | None:
    """Return what a layer has that ranks cannot divide, if anything: a network in one call, or its operations."""
    mixer, mlp = layer.mixer, layer.mlp
    if not isinstance(mixer, AttentionSpec | None):
        return "layers with a recurrent state"
    if mixer is not None:
        norms = mixer.qk_norm
        for found, what in (
            (mixer.latent, "latent attention"),
            (mixer.gate and is_fused, "a gate of attention"),
            (mixer.alibi, "ALiBi, whose slopes depend on all heads"),
            (norms and norms.whole_row, "norms over all heads of queries and keys"),
            (norms and norms.own_weights, "norms with weights of each head"),
        ):
            if found:
                return what
    if isinstance(mlp, ExpertsSpec) and mlp.own_norm is not None:
        return "norms of experts of their own"
    if is_fused and (layer.token_input is not None or layer.output_scale):
        return "layers with an input or a scale of their own"
    return None


class RankDecoder(Decoder):
    """Computes the part of one rank. All ranks must be given the same batches and rows of hidden states, in the same
    order; then each has the hidden states and logits of the whole network.

    Raises RankLostError if another rank has ended, or does not come in time. If this one fails in what all compute, the
    group ends: the others wait for it in the midst of a step, and would take the next one for that.
    """

    def __init__(
        self, spec: ModelSpec, weights: NetworkWeights, backend: Backend, *, dtype: torch.dtype, group: Group
    ) -> None:
        super().__init__(spec, weights, backend, dtype=dtype, group=group)
        self.group = group
        self.on_step: Callable[[RaggedBatch, bool], None] = lambda *_: None
        """Called with each batch that is about to be computed, and whether its tokens are chosen at once: what the
        other ranks must compute too.
        """
        self.on_head: Callable[[Tensor], None] = lambda _: None
        """Called with each rows of hidden states that the output head is about to be applied to."""
        self.on_failed: Callable[[str], None] = lambda _: None
        """Called with the reason once this rank has failed in what the others compute too."""

    def forward(self, batch: RaggedBatch, kv_cache: KVCache) -> Tensor:
        with self._telling(batch, chooses=False):
            return super().forward(batch, kv_cache)

    def forward_and_choose(
        self, batch: RaggedBatch, kv_cache: KVCache, filters: Sequence[Filter] = (), numbers: Sequence[float] = ()
    ) -> tuple[list[int], list[float]]:
        """Return what the first rank chooses; the others return nothing of use."""
        with self._telling(batch, chooses=True):
            return super().forward_and_choose(batch, kv_cache, filters, numbers)

    @contextmanager
    def _telling(self, batch: RaggedBatch, *, chooses: bool) -> Iterator[None]:
        """Surround the computation of a batch, of which the other ranks are told."""
        begin = batch.on_start
        with self._together() as tell:

            def start() -> None:
                tell()
                self.on_step(batch, chooses)
                begin()

            if self.is_fused:  # only once the batch is known to be one that can be computed
                batch.on_start = start
            else:
                start()
            yield

    def embed(self, ids: Tensor) -> Tensor:
        own = self.group.shard.span(self.spec.vocab_size)
        mine = ((ids >= own.start) & (ids < own.stop)).unsqueeze(1)
        found = super().embed((ids - own.start).clamp(0, len(own) - 1))
        return self.total(found.masked_fill(~mine, 0.0))  # one rank has the row: the sum is exact

    def total(self, branch: Tensor) -> Tensor:
        assert isinstance(self.group, SummingGroup)
        branch = branch.contiguous()
        self.group.add_up(branch)
        return branch

    def logits(self, hidden: Tensor) -> Tensor:
        found = super().logits(hidden)
        is_shared = isinstance(self.group, SharedGroup) and found.data_ptr() == self.group.logits_address
        return found.clone() if is_shared else found  # the next ones overwrite them

    def head_products(self, hidden: Tensor) -> Tensor:
        most = len(hidden)
        if isinstance(self.group, SharedGroup):
            most = self.group.logit_bytes // (4 * self.spec.vocab_size)
        if len(hidden) <= most:
            return self._products(hidden)
        starts = range(0, len(hidden), most)
        return torch.cat([self._products(hidden[start : start + most]).clone() for start in starts])

    def _products(self, hidden: Tensor) -> Tensor:
        """Return the products of rows for which there is room."""
        weights = self.weights
        with self._together() as tell:
            tell()
            self.on_head(hidden)
            if isinstance(self.group, SummingGroup):
                hidden = hidden.contiguous()
                self.group.broadcast(hidden)
            return self.backend.gather_logits(hidden, weights.head, weights.head_bias, self.spec.vocab_size, self.group)

    @contextmanager
    def _together(self) -> Iterator[Callable[[], None]]:
        """Surround what all ranks compute. What this yields is to be called just before the others are told: what fails
        after that ends the group.
        """
        is_told = False

        def tell() -> None:
            nonlocal is_told
            is_told = True

        with _without_ctrl_c():
            try:
                yield tell
            except BaseException as error:
                if not is_told:
                    raise
                self.group.end()
                if isinstance(error, RankLostError):
                    self.on_failed(str(error))
                    raise
                reason = f"rank {self.group.shard.rank} failed in a step of all ranks: {error!r}"
                self.on_failed(reason)
                if not isinstance(error, Exception):
                    raise
                _logger.error("%s", reason, exc_info=True)
                raise RankLostError(reason) from error

    def check_complete(self) -> None:
        """Raise RankLostError if the group has ended: sums that were broken off on a GPU end without an error."""
        self.group.check()

    def choose(
        self, hidden: Tensor, filters: Sequence[Filter] = (), numbers: Sequence[float] = ()
    ) -> tuple[list[int], list[float]]:
        return self.backend.choose_from(super().logits(hidden), filters, numbers)


@contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Let Ctrl-C wait for the end of what all ranks compute: broken off at one of them, it would end the group."""
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[tuple[Any, ...]] = []
    signal.signal(signal.SIGINT, lambda *signals: caught.append(signals))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if caught:
            handler(*caught[-1])
