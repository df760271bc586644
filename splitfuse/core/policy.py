"""Decides which requests claim tokens of the next step, and in which order.

`SchedulingPolicy.compose` is Dynamic SplitFuse; its policies differ in the order of claims and in the choice of the
request to preempt. `Fcfs` is the default; `DeadlinePolicy` (core/slo/deadline_policy.py) meets SLOs; bench/baselines.py
has other ways to compose a step, for comparison.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from splitfuse.core.compiling import mypyc_attr
from splitfuse.core.request import Request, by_queue_key
from splitfuse.core.slo.latency_predictor import LatencyPredictor
from splitfuse.core.step_builder import RequestQueue, StepBuilder
from splitfuse.errors import InvalidRequestError

OVERTAKEN_SHARE = 1 / 16
"""Fraction of a step reserved for the oldest request while others come before it, by priority or fair share."""


def _by_priority(request: Request) -> int:
    return request.priority


class PlanningError(Exception):
    """Raised when a step cannot be planned. Without the `blamed` requests, the next one may be."""

    def __init__(self, blamed: Sequence[Request]) -> None:
        super().__init__(f"a step could not be planned: {len(blamed)} requests are to blame")
        self.blamed = blamed


class Tier(NamedTuple):
    """Holds claims on a step, the first first. They get what keeps the step within `max_seconds`."""

    claims: Sequence[Request]
    max_seconds: float = math.inf


@dataclass(frozen=True)
class ClaimOrder:
    """Lists the claims on one step, tier by tier."""

    tiers: Sequence[Tier]
    tail_share: float = 0.0
    """Fraction of the step reserved for the oldest request until its claim; one token is reserved at least."""
    limits_time: bool = False
    """Whether the seconds of the tiers limit the step, and not the token budget that is chosen for throughput."""


@mypyc_attr(allow_interpreted_subclasses=True)
class SchedulingPolicy(ABC):
    """Decides about steps, requests and blocks. A subclass gives the order of claims and the preemption victim."""

    predictor: LatencyPredictor | None = None
    """Predicts the time of steps; None: steps are bound by the token budget alone."""

    def compose(self, step: StepBuilder) -> None:
        """Compose a step by Dynamic SplitFuse: grant each claim in order as many tokens as fit, until a budget or the
        blocks run out. Waiting requests of a tier are started in the order of their claims, until one does not fit:
        none of its tier overtakes it. Another tier may have more time.
        """
        oldest = step.start_oldest()
        order = self.order(step.queue.running, step.queue.waiting, now=step.now)
        if order.limits_time:
            step.raise_budget()
        if oldest is not None and oldest.num_unscheduled:
            step.reserve(order.tail_share, at_most=oldest.num_unscheduled)
        running = set(step.queue.running)
        for tier in order.tiers:
            step.max_seconds, starts = tier.max_seconds, True
            for request in tier.claims:
                if request in running:
                    step.grant(request)
                elif starts:
                    starts = step.start(request)
        for request in [each for each in step.queue.waiting if each in running]:  # preempted in this step
            if not step.start(request):
                break

    @abstractmethod
    def order(self, running: Sequence[Request], waiting: Sequence[Request], *, now: float) -> ClaimOrder:
        """Return the claims on the next step. Both lists are in order of acceptance; running requests that need no
        token may be among them. Nothing is changed.
        """

    @abstractmethod
    def preemption_victim(self, running: Sequence[Request], *, claimant: Request) -> Request | None:
        """Return the request which loses its blocks to `claimant`, never the oldest of all; None if none has to."""

    def blamed(self, step: StepBuilder) -> list[Request]:
        """Return the requests to end after `compose` or `StepBuilder.build` has raised: the one whose claim or chunk it
        was about, else those that cannot be ordered even alone, else one without which the others can be, else all.
        """
        if step.claimant is not None:
            return [step.claimant]
        queue, now = step.queue, step.now
        requests = [*queue.running, *queue.waiting]

        def fails(some: Collection[Request]) -> bool:
            running, waiting = ([r for r in part if r in some] for part in (queue.running, queue.waiting))
            try:
                self.order(running, waiting, now=now)
            except Exception:
                return True
            return False

        if alone := [each for each in requests if fails({each})]:
            return alone
        if fails(set(requests)):
            for each in requests:
                if not fails({*requests} - {each}):
                    return [each]
        return requests

    def accept(self, request: Request, queue: RequestQueue) -> None:
        """Take note of a new request, which is not in the queue yet."""
        del request, queue

    def finish(self, request: Request) -> None:
        """Take note of a request that has finished."""
        del request

    def check_admission(self, request: Request, queue: RequestQueue, *, now: float) -> None:
        """Raise SloUnattainableError if a new request with `on_time_only` cannot meet its SLO, InvalidRequestError if
        it has none that this policy heeds.
        """
        del request, queue, now
        raise slo_required()


@mypyc_attr(allow_interpreted_subclasses=True)
class Fcfs(SchedulingPolicy):
    """Serves first come, first served within each priority and fair share: decodes, then prefills in progress, then
    waiting requests.
    """

    def order(self, running: Sequence[Request], waiting: Sequence[Request], *, now: float) -> ClaimOrder:
        """See SchedulingPolicy."""
        del now
        parts = [sorted(part, key=by_queue_key) for part in (*split_running(running), waiting)]
        claims = [request for part in parts for request in part]
        claims.sort(key=_by_priority)
        is_overtaken = any(part and by_queue_key(part[0]) < by_queue_key(running[0]) for part in parts if running)
        return ClaimOrder([Tier(claims)], tail_share=OVERTAKEN_SHARE if is_overtaken else 0.0)

    def preemption_victim(self, running: Sequence[Request], *, claimant: Request) -> Request | None:
        """Return the newest request of the lowest priority, if it comes after `claimant`; the oldest request of all may
        take the blocks of any other.
        """
        oldest = oldest_of(running, claimant)
        return newest_behind(claimant, [r for r in running if r is not oldest], is_oldest=claimant is oldest)


def split_running(running: Sequence[Request]) -> tuple[list[Request], list[Request]]:
    """Return the decodes, which need only their newest token in this step, and the prefills, which need more.

    So the last token of a prompt counts as a decode, and a preempted request as a prefill until it is recomputed: what
    counts is what the request needs of this step. Admission (core/slo/admission.py) looks farther ahead, and counts as
    decodes the requests which have generated a token.
    """
    decodes: list[Request] = []
    prefills: list[Request] = []
    for request in running:
        if needed := request.num_unscheduled:
            (decodes if needed == 1 else prefills).append(request)
    return decodes, prefills


def oldest_of(running: Sequence[Request], claimant: Request) -> Request:
    """Return the oldest request of all, which is never preempted: the first of `running`, or one that is to run."""
    return claimant if not running or claimant.sequence_number < running[0].sequence_number else running[0]


def newest_behind(claimant: Request, others: Iterable[Request], *, is_oldest: bool) -> Request | None:
    """Return the newest of the lowest priority among `others`, if it comes after `claimant`; behind the oldest request
    of all are all others.
    """
    behind = others if is_oldest else [r for r in others if preemption_key(r) > preemption_key(claimant)]
    return max(behind, key=preemption_key, default=None)


def preemption_key(request: Request) -> tuple[int, int]:
    """Return a key by which requests are preempted, the largest first: the newest of the lowest priority."""
    return request.priority, request.sequence_number


def slo_required() -> InvalidRequestError:
    """Return the error for a request with `on_time_only` and without an SLO."""
    return InvalidRequestError(
        "on_time_only requires an SLO: a ttft, itl or tpot of the request (splitfuse_slo) or of the server (--ttft, "
        "--itl, --tpot)",
        parameter="targets",
    )
