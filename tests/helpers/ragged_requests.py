"""Requests that feed a decoder without a scheduler: any chunks in any batch, blocks in shuffled order."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from backends import poison
from torch import Tensor

from splitfuse.core.plan import ZERO_STATE, StateSlots
from splitfuse.kernels.lora import PackedAdapter
from splitfuse.models.decoder import Decoder
from splitfuse.models.kv_cache import KVCache
from splitfuse.runtime.batch import BatchBuilder


@dataclass(frozen=True)
class Chunk:
    """What BatchBuilder takes."""

    start: int
    token_ids: Sequence[int]
    block_table: Sequence[int]
    num_logits: int
    state: StateSlots | None = None


@dataclass
class Request:
    """Tokens so far, how many of them are computed, and the logits seen, a row for each computed token."""

    token_ids: list[int]
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    state: int = ZERO_STATE
    adapter: PackedAdapter | None = None

    @property
    def num_pending(self) -> int:
        return len(self.token_ids) - self.num_computed


NUM_STATES = 16


class Runner:
    """A decoder with a cache full of NaN, whose blocks and state slots are handed out in random order. A chunk leaves
    its state where it found it or, as after a snapshot, in another slot: by chance.
    """

    def __init__(self, decoder: Decoder, *, block_size: int, num_blocks: int = 64, seed: int = 0) -> None:
        self.decoder = decoder
        self.cache = KVCache(
            decoder.spec,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=decoder.dtype,
            device=decoder.device,
            backend=decoder.backend,
            num_states=NUM_STATES,
        )
        for store in self.cache.layers:
            if store is not None:
                poison(store)
        self.batches = BatchBuilder(block_size, decoder.device)
        self.free, self.free_states = list(range(num_blocks)), list(range(NUM_STATES))
        self.rng = random.Random(seed)
        self.rng.shuffle(self.free)

    def step(self, lengths: Sequence[tuple[Request, int]]) -> None:
        """One forward step of the next `length` pending tokens of each request; logits of all rows are kept."""
        chunks, left = [], []  # left: slots of states that only this step reads
        for request, length in lengths:
            end = request.num_computed + length
            while len(request.blocks) * self.cache.block_size < end:
                request.blocks.append(self.free.pop())
            ids = request.token_ids[request.num_computed : end]
            read = request.state
            if read == ZERO_STATE or self.rng.random() < 0.5:
                left += [read] * (read != ZERO_STATE)
                request.state = self.free_states.pop(self.rng.randrange(len(self.free_states)))
            state = StateSlots(read, request.state)
            chunks.append(Chunk(request.num_computed, ids, tuple(request.blocks), length, state))
        adapters = [request.adapter for request, _ in lengths]
        batch = self.batches.build(chunks, adapters)
        rows = self.decoder.logits(self.decoder.forward(batch, self.cache))
        self.free_states += left
        for (request, length), part in zip(lengths, rows.split([length for _, length in lengths]), strict=True):
            request.logits.extend(part)
            request.num_computed += length

    def run_split(self, requests: Sequence[Request], rng: random.Random) -> None:
        """Compute all that is pending in random chunks, several requests in a step."""
        while pending := [request for request in requests if request.num_pending]:
            chosen = rng.sample(pending, rng.randint(1, len(pending)))
            self.step([(request, rng.randint(1, min(request.num_pending, 11))) for request in chosen])

    def generate(self, requests: Sequence[Request], num_tokens: int) -> None:
        """Append the greedy choice to each request, `num_tokens` times, all requests in one step."""
        for _ in range(num_tokens):
            for request in requests:
                request.token_ids.append(int(torch.argmax(request.logits[-1])))
            self.step([(request, request.num_pending) for request in requests])
