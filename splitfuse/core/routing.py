"""Which replica gets a request: a pure function, for the router that does it and for a simulation that predicts it.

A replica is remembered by the beginnings of the prompts it was sent, as hashes: one that has a prompt's beginning in
its prefix cache need not compute it. That is a guess of what the cache still holds, and costs little when it is wrong.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

PREFIX_TOKENS = 32
"""Tokens that are remembered together."""


@dataclass(frozen=True)
class ReplicaLoad:
    """How a replica stands."""

    accepts: bool
    """It is alive and not draining."""
    outstanding_tokens: int
    """Still to be computed for what it was given."""
    cached_tokens: int
    """Of this request's prompt, expected in its prefix cache."""
    silent: bool = False
    """Nothing has been heard of it for a while: it may be hanging."""


def choose_replica(loads: Sequence[ReplicaLoad], num_tokens: int) -> int | None:
    """The index of the replica where a request of `num_tokens` would be done first: the one with the fewest tokens
    before and with it, those cached not counted; a silent one only if all are. The lowest among equals; None if nobody
    accepts.
    """
    best, least = None, (True, 0)
    for index, load in enumerate(loads):
        order = (load.silent, load.outstanding_tokens + num_tokens - load.cached_tokens)
        if load.accepts and (best is None or order < least):
            best, least = index, order
    return best


class PrefixMemory:
    """The beginnings of prompts that one replica was sent lately, `capacity` blocks of them at most."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._known: OrderedDict[int, None] = OrderedDict()

    def cached_tokens(self, hashes: Sequence[int]) -> int:
        """Leading tokens that were sent before, of a prompt with these `prefix_hashes`."""
        count = 0
        for prefix in hashes:
            if prefix not in self._known:
                break
            count += 1
        return count * PREFIX_TOKENS

    def add(self, hashes: Sequence[int]) -> None:
        """A prompt with these `prefix_hashes` was sent. What was sent longest ago is forgotten first."""
        for prefix in hashes:
            self._known[prefix] = None
            self._known.move_to_end(prefix)
        while len(self._known) > self._capacity:
            self._known.popitem(last=False)

    def clear(self) -> None:
        """The replica has begun anew."""
        self._known.clear()


def prefix_hashes(token_ids: Sequence[int], salt: str = "") -> list[int]:
    """A hash for each whole run of PREFIX_TOKENS, each of everything up to its end."""
    hashes, parent = [], hash(salt)
    for end in range(PREFIX_TOKENS, len(token_ids) + 1, PREFIX_TOKENS):
        parent = hash((parent, tuple(token_ids[end - PREFIX_TOKENS : end])))
        hashes.append(parent)
    return hashes
