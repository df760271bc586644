"""Holds what a model needs of a device's memory, and what the device has."""

from __future__ import annotations

from dataclasses import dataclass

from splitfuse.runtime.machine import GIB

INDEX_BYTES = 256
"""Bytes that each engine takes for a block in a tier: its entry in the file and in the index (241 were measured)."""


@dataclass(frozen=True)
class DraftSizes:
    """Holds what a draft model needs, in bytes. Its KV cache has as many blocks as the other, of as many tokens."""

    name: str
    weights: int
    activations: int
    block: int


@dataclass(frozen=True)
class MemoryPlan:
    """Holds what is needed and available, in bytes, and the sizes that follow. `str(plan)` is a table."""

    weights: int
    activations: int
    block: int  # one KV block over all layers; 0: the network has no cache
    block_size: int
    num_blocks: int
    max_model_len: int
    available: int
    kernels: str  # in a line
    model_len_lowered: bool  # the model allows longer requests, the cache cannot hold them
    max_num_seqs: int
    max_num_batched_tokens: int  # the most that a step may have; chosen budgets are at most this
    state: int = 0  # one recurrent state over all layers; 0: the network has none
    num_states: int = 0
    snapshot_interval: int = 0  # tokens of a prompt between snapshots of its state
    tiers: int = 0  # KV blocks behind the cache, in memory and on their way
    tiers_are_for: str = "behind the cache"
    draft: DraftSizes | None = None  # of the draft model, if there is one
    num_seqs_lowered: bool = False  # more running requests are allowed than there is memory for the states of
    remarks: tuple[str, ...] = ()  # lines at the end

    @property
    def kv_cache(self) -> int:
        """Return the size of the KV cache in bytes."""
        return self.num_blocks * self.block

    @property
    def draft_model(self) -> int:
        """Return the size of the draft model with its KV cache in bytes."""
        draft = self.draft
        return 0 if draft is None else draft.weights + draft.activations + self.num_blocks * draft.block

    @property
    def block_of_both(self) -> int:
        """Return the size of a KV block and one of the draft model in bytes."""
        return self.block + (0 if self.draft is None else self.draft.block)

    @property
    def states(self) -> int:
        """Return the size of all recurrent states in bytes."""
        return self.num_states * self.state

    @property
    def need(self) -> int:
        """Return the sum of all that is needed, in bytes."""
        return self.weights + self.activations + self.states + self.tiers + self.kv_cache + self.draft_model

    def index_bytes(self, tier_bytes: int) -> int:
        """Return the memory that an engine takes to know the blocks in a tier of so many bytes."""
        return INDEX_BYTES * (tier_bytes // max(self.block, 1))

    def __str__(self) -> str:
        sizes = f"{self.num_blocks} blocks of {self.block_size}: {self.num_blocks * self.block_size} tokens"
        lines = [
            self.kernels,
            f"weights      {self.weights / GIB:8.3f} GiB",
            f"activations  {self.activations / GIB:8.3f} GiB",
            *([f"states       {self.states / GIB:8.3f} GiB   {self._states_line}"] if self.state else ()),
            *([f"KV tiers     {self.tiers / GIB:8.3f} GiB   {self.tiers_are_for}"] if self.tiers else ()),
            *([f"KV cache     {self.kv_cache / GIB:8.3f} GiB   {sizes}"] if self.block else ()),
            *([f"draft model  {self.draft_model / GIB:8.3f} GiB   {self._draft_line}"] if self.draft else ()),
            f"need         {self.need / GIB:8.3f} GiB",
            f"have         {self.available / GIB:8.3f} GiB",
            f"longest request: {self.max_model_len} tokens"
            + (" (the model allows more: raise kv_cache_memory_gib)" if self.model_len_lowered else ""),
            *self.remarks,
        ]
        if self.num_seqs_lowered:
            lines.append(f"running requests: {self.max_num_seqs} at most, as there is no memory for more states")
        return "\n".join(lines)

    @property
    def _draft_line(self) -> str:
        assert self.draft is not None
        cache = self.num_blocks * self.draft.block / GIB
        return f"{self.draft.name}: weights {self.draft.weights / GIB:.3f}, KV cache {cache:.3f}"

    @property
    def _states_line(self) -> str:
        return f"{self.num_states} recurrent states, snapshots included, for {self.max_num_seqs} running requests"
