"""Chooses a machine for the prompt of a request and one for what it generates, by the roles of machines.

The pair is chosen when the request comes, so that its KV can follow the computing chunk by chunk. As in Splitwise
(Patel et al., ISCA 2024), a role whose machines are all busy borrows one of the other role, which then does both until
it is idle; and if none is left, one machine computes the whole request.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Generic, Protocol, TypeVar

from splitfuse.config.values import EngineRole
from splitfuse.core.replicas.prefix_index import PrefixMemory
from splitfuse.errors import ServerError


class Member(Protocol):
    """Holds what is known of a machine when one is chosen."""

    role: EngineRole
    num_to_compute: int
    num_reserved: int

    @property
    def is_running(self) -> bool:
        """Return whether it computes: it has not failed, or has come back."""

    @property
    def memory(self) -> PrefixMemory:
        """Return what it was sent before."""

    @property
    def is_idle(self) -> bool:
        """Return whether it has no request, and none is on its way."""

    def seconds_to_compute(self, names: list[bytes]) -> float:
        """Return about how long its requests take, less what is cached of a prompt whose blocks have these names."""

    def fits(self, num_tokens: int) -> bool:
        """Return whether its KV cache has room for one more request of so many tokens."""


M = TypeVar("M", bound=Member)


class Pools(Generic[M]):
    """Knows which machines are borrowed from their role."""

    def __init__(self, replicas: Sequence[M], long_queue: float) -> None:
        """A prompt machine is busy from `long_queue` waiting tokens on, one that generates when a request does not fit
        its KV cache. If that number is infinite, none is ever borrowed: requests wait for those of their role.
        """
        self._replicas = replicas
        self._long_queue = long_queue
        self._borrowed: dict[M, None] = {}
        self.num_borrowed = 0
        """Number of times that a machine was borrowed."""

    def choose(self, num_known: int, max_tokens: int, names: list[bytes]) -> tuple[M, M]:
        """Return the machine for a prompt of `num_known` tokens whose blocks have these names, and the one for the
        `max_tokens` that follow; the same twice if one does both.

        Raises ServerError if all machines have failed.
        """
        for replica in [each for each in self._borrowed if each.is_idle]:
            del self._borrowed[replica]
        running = [each for each in self._replicas if each.is_running]
        if not running:
            raise ServerError("all machines have failed")
        prompt = self._for_prompt(running, num_known, names)
        if prompt is not None and prompt.role is EngineRole.MIXED:
            prompt.memory.add(names)
            return prompt, prompt
        generation = self._for_generation(running, num_known + max_tokens, prompt)
        if prompt is None or generation is None:
            fitting = [each for each in running if each.fits(num_known + max_tokens)]
            prompt = generation = min(fitting or running, key=lambda each: each.seconds_to_compute(names))
        prompt.memory.add(names)
        return prompt, generation

    def _for_prompt(self, running: Sequence[M], num_known: int, names: list[bytes]) -> M | None:
        for role in (self._own(running, EngineRole.PROMPT), self._of_both(running)):
            best = min(role, key=lambda each: each.seconds_to_compute(names), default=None)
            if best is not None and (best.is_idle or best.num_to_compute + num_known <= self._long_queue):
                return best
        return self._borrow(min(self._own(running, EngineRole.GENERATION), key=_num_to_compute, default=None))

    def _for_generation(self, running: Sequence[M], num_tokens: int, prompt: M | None) -> M | None:
        for role in (self._own(running, EngineRole.GENERATION), self._of_both(running)):
            best = min(role, key=_num_reserved, default=None)
            if best is not None and (best.fits(num_tokens) or self._long_queue == math.inf):
                return best
        others = (each for each in self._own(running, EngineRole.PROMPT) if each is not prompt)
        borrowed = self._borrow(min(others, key=_num_reserved, default=None))
        return borrowed if borrowed is None or borrowed.fits(num_tokens) else None

    def _own(self, running: Iterable[M], role: EngineRole) -> list[M]:
        return [each for each in running if each.role is role and each not in self._borrowed]

    def _of_both(self, running: Iterable[M]) -> list[M]:
        """Return the machines that do both: those which are mixed, and those which are borrowed."""
        return [each for each in running if each.role is EngineRole.MIXED or each in self._borrowed]

    def _borrow(self, replica: M | None) -> M | None:
        if replica is not None and self._long_queue < math.inf:
            self._borrowed[replica] = None
            self.num_borrowed += 1
            return replica
        return None


def _num_to_compute(replica: Member) -> int:
    return replica.num_to_compute


def _num_reserved(replica: Member) -> int:
    return replica.num_reserved
