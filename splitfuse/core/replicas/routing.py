"""Chooses the replica for a request: `choose_replica`, used by the router and by the simulator.

It goes to the replica that would give its first token soonest, of those where it can meet its SLO and makes no other
request late; if there is none, to where least is broken. What replicas would need is counted in seconds, by the test
that orders claims and admits requests (core/slo/feasibility.py), from what the front knows of each (replica_view.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from splitfuse.core.request import Request
from splitfuse.core.slo.cost_model import StepTimes

MOST_TESTED = 4
"""Number of replicas, the soonest, for which it is tested what a request would break there."""

FETCHED_SHARE = 31 / 32
"""Fraction of what a token costs that is saved by fetching its keys and values: of two replicas that would compute
nothing, the one that need not fetch goes first.
"""


class View(Protocol):
    """Predicts what a new request would find at a replica, as a ReplicaView does."""

    times: StepTimes | None

    def first_token(self, request: Request, cached: int) -> float:
        """Return the seconds until its first token, if its first `cached` tokens are in the prefix cache."""

    def num_broken(self, request: Request, cached: int, now: float) -> int:
        """Return how many requests would miss their SLO by it, itself included."""

    def wait(self, request: Request, cached: int, now: float) -> float:
        """Return the seconds until it could be admitted with `on_time_only`."""


class Candidate(NamedTuple):
    """Describes a replica that accepts requests."""

    view: View
    cached: int = 0
    """Leading tokens of the prompt that its prefix cache is expected to hold."""
    silent: bool = False
    """True if it has sent nothing for a while: it may be hanging."""


def expected_tokens(cached: int, shared: int) -> int:
    """Return how many leading tokens count as there at a replica whose cache holds `cached`, where tiers that all
    replicas share have `shared`.

    >>> expected_tokens(64, 320), expected_tokens(320, 64)
    (312, 320)
    """
    return cached + int(FETCHED_SHARE * max(shared - cached, 0))


def choose_replica(replicas: Sequence[Candidate | None], request: Request, now: float) -> int | None:
    """Return the index of the replica for a request, or None if none accepts; None among `replicas` is one that does
    not. A silent one is chosen only if all are silent.

    Sets `request.num_expected_cached` to what the chosen one has.
    """
    accepting = [(index, each) for index, each in enumerate(replicas) if each is not None]
    talking = [(index, each) for index, each in accepting if not each.silent] or accepting
    if not talking:
        return None
    times = next((each.view.times for _, each in talking if each.view.times is not None), None)
    for _, each in talking:  # until it has said its own, those of another; and if none has, all count in tokens
        each.view.times = each.view.times or times
    ranked = sorted((each.view.first_token(request, each.cached), index, each) for index, each in talking)
    _, chosen, candidate = ranked[0]
    if request.slo.exists and len(ranked) > 1:
        least = math.inf
        for _, index, each in ranked[:MOST_TESTED]:
            harm = (each.view.wait if request.on_time_only else each.view.num_broken)(request, each.cached, now)
            if harm < least:
                chosen, candidate, least = index, each, harm
            if not harm:
                break
    request.num_expected_cached = candidate.cached
    return chosen
