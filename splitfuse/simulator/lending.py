"""Lets machines hold a part of another's request: loans, as Infinite-LLM has them (Lin et al., arXiv 2401.02669).

Requests are admitted in order of arrival: each as soon as the cache of one machine has room for all that it may need,
or, with loans, the caches of several together. One of these, the debtor, computes it; the others hold its leading
tokens and attend to them for it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Protocol

from splitfuse.core.kv.block_allocator import BlockAllocator
from splitfuse.core.kv.loans import FEWEST_TILES, TILE, KvLoan
from splitfuse.core.limits import ceil_div
from splitfuse.core.plan import StepPlan
from splitfuse.core.slo.cost_model import CostModel, StepFeatures, features_of
from splitfuse.errors import ConfigError, RequestTooLargeError


class Lender(Protocol):
    """Holds what loans need to know of a simulated machine."""

    pool: LoanPool | None
    cost: CostModel
    block_size: int
    allocator: BlockAllocator

    @property
    def num_blocks(self) -> int:
        """Return the number of its KV blocks."""

    @property
    def num_open(self) -> int:
        """Return the number of its requests."""

    def owe(self, seconds: float) -> None:
        """Compute for another machine."""


@dataclass(frozen=True)
class Lending:
    """Describes loans between the machines of a deployment."""

    latency: float
    """Seconds of a message from one machine to another. Each layer of a step with a loan takes two."""
    layers: int
    most_creditors: int | None = None
    """Most machines that lend to one request; 0: none does, None: as many as there are."""

    def __post_init__(self) -> None:
        if not 0 <= self.latency < float("inf"):
            raise ConfigError(f"the latency of loans must be a number of seconds, at least 0, not {self.latency}")
        if self.layers < 1:
            raise ConfigError(f"loans need the number of layers, at least 1, not {self.layers}")


@dataclass(frozen=True)
class Part:
    """Describes what one creditor holds of a request."""

    creditor: Lender
    blocks: list[int]


@dataclass(frozen=True)
class Admission:
    """Says where a request runs, and what others hold of it."""

    index: int
    """Place of the debtor among the machines."""
    debtor: Lender
    num_blocks: int
    """Blocks that it may need of the debtor's cache."""
    loan: KvLoan | None = None
    parts: tuple[Part, ...] = ()


class LoanPool:
    """Admits requests to machines, and knows their loans."""

    def __init__(self, replicas: Sequence[Lender], lending: Lending) -> None:
        self._replicas, self._lending = replicas, lending
        self._waiting: deque[tuple[int, asyncio.Future[Admission]]] = deque()
        self._admitted: dict[int, Admission] = {}  # those with a loan, by its number
        self._reserved = dict.fromkeys(replicas, 0)  # blocks that requests of its own, or of others, may need
        self._numbers = count(1)
        for replica in replicas:
            replica.pool = self

    async def admit(self, num_tokens: int) -> Admission:
        """Wait for room for a request of so many tokens, after all that came before. Raises RequestTooLargeError if
        there will be none.
        """
        size = self._replicas[0].block_size
        need, tile = ceil_div(num_tokens, size), TILE // size
        most = max(each.num_blocks for each in self._replicas) - 1
        creditors = self._lending.most_creditors
        others = sorted((each.num_blocks for each in self._replicas), reverse=True)[1:][:creditors]
        if need > most + sum(max(each // tile - FEWEST_TILES, 0) * tile for each in others):
            raise RequestTooLargeError(
                f"a request of {num_tokens} tokens is longer than what these machines hold together: shorten it"
            )
        admitted: asyncio.Future[Admission] = asyncio.get_running_loop().create_future()
        self._waiting.append((need, admitted))
        self._advance()
        return await admitted

    def end(self, admission: Admission) -> None:
        """Give back what a request has had."""
        self._reserved[admission.debtor] -= admission.num_blocks
        for part in admission.parts:
            self._reserved[part.creditor] -= len(part.blocks)
            part.creditor.allocator.take_back(part.blocks)
        if admission.loan is not None:
            del self._admitted[admission.loan.number]
        self._advance()

    def _advance(self) -> None:
        while self._waiting:
            need, admitted = self._waiting[0]
            if not admitted.cancelled():
                admission = self._place(need)
                if admission is None:
                    return
                admitted.set_result(admission)
            self._waiting.popleft()

    def _room(self, replica: Lender) -> int:
        """Return how many blocks a machine has that no request may need; one is left for each that runs."""
        return replica.num_blocks - self._reserved[replica] - replica.num_open - 1

    def _free(self, replica: Lender, room: int) -> int:
        """Return how many blocks of its room a machine can lend now: a debtor holds what it has not deposited yet."""
        return min(room, replica.allocator.num_available)

    def _place(self, need: int) -> Admission | None:
        """Return where a request of `need` blocks goes now: to the machine with most room, if that is enough; else its
        leading tiles are divided among the others by their room, those with most first.
        """
        rooms = sorted(((self._room(each), index) for index, each in enumerate(self._replicas)), reverse=True)
        (room, index), *others = rooms
        debtor = self._replicas[index]
        if need <= room:
            self._reserved[debtor] += need
            return Admission(index, debtor, need)
        tile = TILE // debtor.block_size
        others = others[: self._lending.most_creditors]
        found = [(self._free(self._replicas[number], room), self._replicas[number]) for room, number in others]
        lenders = [(free // tile * tile, each) for free, each in found if free >= tile]
        total = room + sum(room for room, _ in lenders)
        if total < need or room < FEWEST_TILES * tile:
            return None
        lent, left = [], ceil_div(need - need * room // total, tile) * tile
        for number, (most, each) in enumerate(lenders):
            rest = sum(room for room, _ in lenders[number:])
            share = min(ceil_div(left * most // rest, tile) * tile, most, left)
            lent.append((share, each))
            left -= share
        if left > 0:
            return None
        parts = tuple(Part(each, each.allocator.lend(share)) for share, each in lent if share)
        for part in parts:
            self._reserved[part.creditor] += len(part.blocks)
        own = need - sum(len(part.blocks) for part in parts)
        loan = KvLoan(next(self._numbers), need - own, debtor.block_size)
        self._reserved[debtor] += own
        admission = self._admitted[loan.number] = Admission(index, debtor, own, loan, parts)
        return admission

    # The time of steps ------------------------------------------------------------------------------------------------

    def seconds(self, plan: StepPlan, cost: CostModel) -> float:
        """Return the time of a step of a debtor, and charge creditors for theirs.

        What creditors hold is read and multiplied by them, all at once and while the debtor attends to its own. For
        each layer a message goes there, and one comes back.
        """
        local, attended, slowest = features_of(plan), 0.0, 0.0
        for chunk in plan.chunks:
            if chunk.loan is None:
                continue
            queries, remote = len(chunk.token_ids), chunk.loan.num_tokens
            local = local._replace(pairs=local.pairs - queries * remote, kv_tokens=local.kv_tokens - remote)
            own = StepFeatures().plus(start=chunk.start - remote, count=queries, rows=0)
            attended += _attention(cost, own.pairs, own.kv_tokens)
            slow, admission = 0.0, self._admitted[chunk.loan.number]
            assert admission.loan is not None
            for part in admission.parts:  # each has its share of what is deposited so far
                share = remote * len(part.blocks) // admission.loan.num_blocks
                seconds = _attention(part.creditor.cost, queries * share, share)
                part.creditor.owe(seconds)
                slow = max(slow, seconds)
            slowest += slow
        if slowest == 0.0:
            return cost.seconds(local)
        return cost.seconds(local) + max(slowest - attended, 0.0) + 2 * self._lending.latency * self._lending.layers


def _attention(cost: CostModel, pairs: int, kv_tokens: int) -> float:
    return cost.per_pair * pairs + cost.per_kv_token * kv_tokens
