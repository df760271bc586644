"""Choose the replica for a request: `choose_replica`, used by the router and by the simulator.

For each replica, the names (kv/names.py) of the blocks of the prompts that it was sent are remembered: it need not
compute a beginning that its prefix cache still holds. That is a guess, and costs little when it is wrong.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ReplicaLoad:
    """State of one replica, as far as the choice depends on it."""

    accepts: bool
    """Whether it is ready for requests."""
    outstanding_tokens: int
    """Tokens that it still has to compute for the requests it was given."""
    cached_tokens: int
    """Tokens of this request's prompt that its prefix cache is expected to hold."""
    silent: bool = False
    """Whether it has sent nothing for a while: it may be hanging."""


def choose_replica(loads: Sequence[ReplicaLoad], num_tokens: int) -> int | None:
    """Return the index of the replica that would finish a prompt of `num_tokens` first, or None if none accepts.

    That is the one with the fewest tokens to compute, this prompt's included and cached ones not counted; the lowest
    index among equals. A silent replica is chosen only if all are silent.
    """
    best, least = None, (True, 0)
    for index, load in enumerate(loads):
        order = (load.silent, load.outstanding_tokens + num_tokens - load.cached_tokens)
        if load.accepts and (best is None or order < least):
            best, least = index, order
    return best


class PrefixMemory:
    """Remembers the names of the last `num_blocks` blocks of `block_size` tokens that one replica was sent."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._known: OrderedDict[bytes, None] = OrderedDict()

    def cached_tokens(self, names: Sequence[bytes]) -> int:
        """Return how many leading tokens of a prompt whose blocks have these names were sent before."""
        num_known = next((count for count, name in enumerate(names) if name not in self._known), len(names))
        return num_known * self._block_size

    def add(self, names: Sequence[bytes]) -> None:
        """Remember a prompt whose blocks have these names; the blocks sent longest ago are forgotten first."""
        for name in names:
            self._known[name] = None
            self._known.move_to_end(name)
        while len(self._known) > self._num_blocks:
            self._known.popitem(last=False)
