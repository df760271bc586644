"""Meets SLOs: those of as many requests as possible, the others when there is time.

A decode with an ITL target of 250 ms needs no token earlier: the time that it lends lets prefills meet their TTFT
targets, and what is left over goes back to the decodes. Without any SLO the order is that of `Fcfs`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum

from splitfuse.config import TAIL_SHARE, SchedulerConfig
from splitfuse.core.policy import (
    ClaimOrder,
    Fcfs,
    SchedulingPolicy,
    Tier,
    is_overtaken,
    oldest_number,
    preemption_key,
    slo_required,
    split_running,
)
from splitfuse.core.request import Priority, Request
from splitfuse.core.slo.admission import check_on_time
from splitfuse.core.slo.cost_model import CostModel
from splitfuse.core.slo.deadline_planner import DeadlinePlanner
from splitfuse.core.slo.latency_predictor import LatencyPredictor
from splitfuse.core.slo.feasibility import Feasibility
from splitfuse.core.slo.turns import Turns
from splitfuse.core.step_builder import RequestQueue, StepBuilder

MAX_SKIPPED_STEPS = 32
"""Number of consecutive steps without a token after which a decode is urgent, whatever else is."""


import os
PARAMS = {**dict(eta=0.85, eta0=0.75, short=1 / 8, rows=1.25, share=1/3), **eval(os.environ.get('PARAMS', '{}'))}


class Rank(IntEnum):
    """Orders the claims of a priority."""

    FEASIBLE = 0
    """Prefills which can meet their TTFT target."""
    DECODE = 1
    """Decodes which have not missed their SLO."""
    PREFILL = 2
    """Prefills without a TTFT target, and not late."""
    LATE_DECODE = 3
    LATE_PREFILL = 4


class DeadlinePolicy(Fcfs):
    """Lets as many requests as possible meet their SLO."""

    def __init__(self, predictor: LatencyPredictor, *, token_budget: int, tail_share: float = TAIL_SHARE) -> None:
        super().__init__(tail_share=tail_share)
        self.predictor: LatencyPredictor = predictor
        self.planner = DeadlinePlanner(predictor, token_budget=token_budget)
        self.turns = Turns(PARAMS["share"])

    def accept(self, request: Request, queue: RequestQueue, *, now: float) -> None:
        """See SchedulingPolicy."""
        queue.expect_cached(request)
        outlook = Feasibility(self.predictor, (), now=now)
        before = sum(outlook.seconds(r) for r in (*queue.running, *queue.waiting) if not r.output_token_ids)
        self.turns.accept(request, own=outlook.seconds(request), before=before)

    def compose(self, step: StepBuilder) -> None:
        """See SchedulingPolicy."""
        super().compose(step)
        outlook = Feasibility(self.predictor, (), now=step.now)
        decodes = sum(outlook.seconds(request) for request in step.granted if request.output_token_ids)
        self.turns.advance(max(self.predictor.seconds(step.features) - decodes, 0.0))

    def order(self, running: Sequence[Request], waiting: Sequence[Request], *, now: float) -> ClaimOrder:
        """See SchedulingPolicy."""
        K = PARAMS
        if not any(request.slo.exists for request in (*running, *waiting)):
            return super().order(running, waiting, now=now)
        decodes, prefills = split_running(running)
        prefills += waiting
        highest = min((r.priority for r in prefills), default=Priority.LOW)
        outlook = Feasibility(self.predictor, decodes, now=now, priority=highest)
        overdue = self.turns.have_come(prefills)
        share = self.turns.share if overdue else 0.0
        feasible = outlook.feasible([r for r in prefills if r not in overdue] if overdue else prefills, share=1 - share)
        safety = outlook.safety_factor
        slack = outlook.slack
        every = outlook.overhead + outlook.decode_seconds
        ttfts = [r.slo.ttft_target for r in (*decodes, *prefills) if r.slo.ttft_target < math.inf]
        base = every / (1 - K["eta"])
        if ttfts:
            base = min(base, max(K["short"] * min(ttfts), every / (1 - K["eta0"])))
        base = max(base, K["rows"] * max(every, outlook.floor))
        seconds, spare_time = base, math.inf
        total = 0.0
        for request in feasible:
            total += outlook.seconds(request) / (1 - share)
            allowed = (request.slo.deadline - now) * safety
            spare_time = min(spare_time, outlook.room(request.slo.deadline) - total)
            steps = max(math.floor((allowed - total) / every), 1)
            seconds = max(seconds, total / steps + every)
        whole = 0.0
        if feasible:
            first = feasible[0]
            whole = outlook.seconds(first) + outlook.overhead + min(outlook.decode_seconds, max(spare_time, 0.0))
            seconds = min(max(seconds, whole), max(whole, (first.slo.deadline - now) * safety))
        seconds = min(seconds, slack)
        late_seconds = min(seconds, base)
        soon = now + seconds + every
        spare_time -= 0.0

        def is_urgent(r):
            return r.slo.steps_skipped >= MAX_SKIPPED_STEPS or r.slo.deadline <= (now if r.slo.missed else soon)

        urgent = [r for r in decodes if is_urgent(r)]
        for r in sorted((r for r in decodes if not r.slo.missed and not is_urgent(r)), key=lambda r: r.slo.deadline):
            spare_time -= outlook.seconds(r)
            if spare_time < 0.0:
                break
            urgent.append(r)
        urgent.sort(key=lambda r: (r.priority, r.slo.missed, r.slo.deadline, r.sequence_number))
        spare = set(decodes).difference(urgent)
        in_time = set(feasible)
        apart = set(overdue)

        def rank(request: Request) -> tuple[Priority, Rank, float, int]:
            slo = request.slo
            its_rank, key = Rank.PREFILL, request.fair_share_key
            if request in in_time:
                its_rank, key = Rank.FEASIBLE, slo.deadline
            elif request in spare:
                its_rank, key = (Rank.LATE_DECODE, key) if slo.missed else (Rank.DECODE, slo.deadline)
            elif slo.missed or slo.deadline < math.inf:
                its_rank = Rank.LATE_PREFILL
            return request.priority, its_rank, key, request.sequence_number

        others = sorted((r for r in (*spare, *prefills) if r not in apart), key=rank)
        first = [r for r in others if r in in_time]
        later = [r for r in others if r not in in_time]
        used = outlook.overhead + sum(outlook.seconds(r) for r in urgent)
        tail = max(used + share * seconds, seconds * share) if overdue else 0.0
        tiers = [Tier(urgent), Tier(overdue, min(max(seconds, used / (1 - share)), tail) if feasible else late_seconds), Tier(first, seconds), Tier(later, late_seconds)]
        return ClaimOrder(tiers, 0.0)

    def preemption_victim(self, running: Sequence[Request], *, claimant: Request) -> Request | None:
        """Return the late request of the lowest priority with the fewest computed tokens; otherwise the newest.

        A late request takes only from late ones that came after it, unless it is the oldest of all.
        """
        oldest = oldest_number(running, claimant)
        is_oldest = claimant.sequence_number == oldest
        late = [r for r in running if r.slo.missed and r is not claimant and r.sequence_number != oldest]
        if not is_oldest:
            late = [r for r in late if r.priority >= claimant.priority]
        if claimant.slo.missed and not is_oldest:
            late = [r for r in late if preemption_key(r) > preemption_key(claimant)]
        elif not late:
            return super().preemption_victim(running, claimant=claimant)
        return min(late, key=lambda r: (-r.priority, r.kv.num_computed, -r.sequence_number), default=None)

    def check_admission(self, request: Request, queue: RequestQueue, *, now: float) -> None:
        """See SchedulingPolicy."""
        if not request.slo.exists:
            raise slo_required()
        check_on_time(request, self.planner, queue, tail_share=self.tail_share, now=now)


def make_policy(config: SchedulerConfig, cost: CostModel | None = None) -> SchedulingPolicy:
    """Return a DeadlinePolicy if there is a cost model to predict steps with, otherwise Fcfs."""
    if cost is None:
        return Fcfs(tail_share=config.tail_share)
    predictor = LatencyPredictor(cost)
    return DeadlinePolicy(predictor, token_budget=config.token_budget, tail_share=config.tail_share)
