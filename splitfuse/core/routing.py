"""Choose the replica for a request: `choose_replica`, used by the router and by the simulator.

For each replica, the names (kv/names.py) of the blocks of the prompts that it was sent are remembered: it need not
compute a beginning that its prefix cache still holds. That is a guess, and costs little when it is wrong.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple


class ReplicaLoad(NamedTuple):
    """State of one replica that accepts requests, as far as the choice depends on it: the least is chosen."""

    silent: bool
    """True if it has sent nothing for a while: it may be hanging."""
    tokens: int
    """Tokens that it would still have to compute before this request's own, less those of its prompt that its prefix
    cache is expected to hold.
    """


def choose_replica(loads: Sequence[ReplicaLoad | None]) -> int | None:
    """Return the index of the replica that would finish a prompt first, or None if none accepts; None among `loads` is
    one that does not.

    That is the one with the fewest tokens to compute, the lowest index among equals. A silent replica is chosen only if
    all are silent.
    """
    accepting = [(load, index) for index, load in enumerate(loads) if load is not None]
    return min(accepting)[1] if accepting else None


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
