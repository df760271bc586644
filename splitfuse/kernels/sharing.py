"""Says where processes share their packed weights. It needs no torch: a process is started with it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class WeightSharing:
    """Names memory in which several processes keep one copy of the weights: the first packs them, the others map them.

    `fd` is the descriptor of a file in memory, inherited. `filled` says that another process has packed all weights
    there, in the order in which they are loaded. `num_sharers` processes divide the remaining memory; once the first of
    them has planned, `share` are the bytes that it planned with, weights included: so many has each that comes later.
    """

    fd: int
    num_sharers: int = 1
    filled: bool = False
    share: int | None = None
