"""Guesses what the KV tiers of each machine have, from the requests that were sent to its engines, for a router."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from splitfuse.core.replicas.prefix_index import PrefixMemory
from splitfuse.engine.client import EngineState, LocalClient


class Held(NamedTuple):
    """Says what tiers have of one prompt: `own` tokens on the engine's machine, `elsewhere` on another one, which can
    be fetched from `sources`.
    """

    own: int = 0
    elsewhere: int = 0
    sources: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Return how many leading tokens need not be computed."""
        return max(self.own, self.elsewhere)


class MachineTiers:
    """Knows the tiers by the machine, which an engine's address stands for. Belongs to the router."""

    def __init__(self, replicas: Sequence[LocalClient]) -> None:
        self._replicas = replicas
        self._memories: dict[str, PrefixMemory] = {}
        self._sources: dict[str, tuple[str, ...]] = {}

    def follow(self) -> None:
        """Take note of which engines are ready."""
        ready = {each.address: each for each in self._replicas if each.state is EngineState.READY}
        for address, engine in ready.items():
            if address not in self._memories and (num_slots := engine.info.num_tier_slots):
                self._memories[address] = PrefixMemory(num_slots, engine.info.limits.block_size)
        for address in [each for each in self._memories if each and each not in ready]:
            del self._memories[address]  # its memory is gone with it
        self._sources = {address: _peers(engine) for address, engine in ready.items()}

    def held(self, names: Sequence[bytes]) -> dict[str, Held]:
        """Return what each machine with tiers has, or can fetch, of a prompt whose blocks have these names."""
        own = {address: memory.cached_tokens(names) for address, memory in self._memories.items()}
        sources = self._sources
        most = sorted(((own[each], sources[each], each) for each in own if sources.get(each)), reverse=True)[:2]
        found: dict[str, Held] = {}
        for address, num_tokens in own.items():  # the most that another one has
            elsewhere = next((each[:2] for each in most if each[2] != address), (0, ()))
            found[address] = Held(num_tokens, *elsewhere)
        return found

    def add(self, engine: LocalClient, names: Sequence[bytes]) -> None:
        """Take note of a request that an engine was sent."""
        if (memory := self._memories.get(engine.address)) is not None:
            memory.add(names)


def _peers(engine: LocalClient) -> tuple[str, ...]:
    """Return where engines on other machines can fetch the blocks of an engine."""
    return tuple(each for each in engine.info.block_sources if "://" in each)
