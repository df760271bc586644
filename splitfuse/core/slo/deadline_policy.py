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
from splitfuse.core.slo.decode_load import DecodeLoad
from splitfuse.core.slo.latency_predictor import LatencyPredictor
from splitfuse.core.slo.outlook import Outlook
from splitfuse.core.step_builder import RequestQueue

MAX_SKIPPED_STEPS = 32
"""Number of consecutive steps without a token after which a decode is urgent, whatever else is."""


import os
PARAMS = {**dict(eta=0.9, eta0=0.75, short=1 / 8, rows=1.25, ride=True), **eval(os.environ.get('PARAMS', '{}'))}


class Rank(IntEnum):
    """Orders the claims of a priority that are not urgent."""

    RIDE = 0
    FEASIBLE = 1
    """Prefills which can meet their TTFT target."""
    DECODE = 2
    """Decodes without an ITL target."""
    PREFILL = 3
    """Prefills without a TTFT target, and not late."""
    AHEAD = 4
    """Decodes ahead of their ITL target."""
    LATE_DECODE = 5
    LATE_PREFILL = 6


class DeadlinePolicy(Fcfs):
    """Lets as many requests as possible meet their SLO.

    Urgent are decodes whose deadline is before the end of the step after this one, or which were skipped
    MAX_SKIPPED_STEPS times. Then come the claims of each `Rank`, by deadline or, without one, by fair share and age.
    """

    def __init__(self, predictor: LatencyPredictor, *, token_budget: int, tail_share: float = TAIL_SHARE) -> None:
        super().__init__(tail_share=tail_share)
        self.predictor: LatencyPredictor = predictor
        self.planner = DeadlinePlanner(predictor, token_budget=token_budget)

    def order(self, running: Sequence[Request], waiting: Sequence[Request], *, now: float) -> ClaimOrder:
        """See SchedulingPolicy."""
        import os
        K = PARAMS
        if not any(request.slo.exists for request in (*running, *waiting)):
            return super().order(running, waiting, now=now)
        decodes, prefills = split_running(running)
        prefills += waiting
        outlook = Outlook(self.predictor, decodes, now=now)
        feasible = outlook.feasible(prefills)
        safety = outlook.safety
        slack = safety * outlook.slack
        every = outlook.base + outlook.rows
        ttfts = [r.slo.ttft_target for r in (*decodes, *prefills) if r.slo.ttft_target < math.inf]
        base = outlook.base / (1 - K["eta"])
        if ttfts:
            base = min(base, max(K["short"] * min(ttfts), outlook.base / (1 - K["eta0"])))
        base = max(base, K["rows"] * max(every, outlook.floor))
        needed, total, rides = base, 0.0, True
        for request in feasible:
            total += outlook.seconds(request)
            steps = math.floor(((request.slo.deadline - now) * safety - total) / every)
            if steps < 1:
                rides = False
                break
            needed = max(needed, total / steps + every)
        rides = rides and needed <= slack
        seconds = min(slack, needed if rides else math.inf)
        late_seconds = min(seconds, base)
        turn = every if rides else max([every, *(safety * (r.slo.itl_target or 0.0) for r in outlook.live)][:1] + [safety * min((r.slo.itl_target or 0.0 for r in outlook.live), default=0.0)])
        soon = now + seconds + turn
        if rides and K["ride"]:
            urgent = [r for r in decodes if r.slo.deadline <= soon and not r.slo.missed]
        else:
            urgent = [r for r in decodes if r.slo.deadline <= soon and not r.slo.missed]
        urgent += [r for r in decodes if r.slo.missed and r.slo.deadline <= now or r.slo.steps_skipped >= MAX_SKIPPED_STEPS]
        urgent = list(dict.fromkeys(urgent))
        spare = set(decodes).difference(urgent)
        feasible_set = set(feasible)

        def rank(request: Request) -> tuple[Priority, Rank, float, int]:
            slo = request.slo
            its_rank, key = Rank.PREFILL, request.fair_share_key
            if request in feasible_set:
                its_rank, key = Rank.FEASIBLE, slo.deadline
            elif request in spare:
                its_rank = Rank.LATE_DECODE if slo.missed else Rank.DECODE
                if not slo.missed and slo.deadline < math.inf:
                    its_rank, key = Rank.AHEAD, slo.deadline
                if rides and K["ride"]:
                    its_rank = Rank.RIDE
            elif slo.missed or slo.deadline < math.inf:
                its_rank = Rank.LATE_PREFILL
            return request.priority, its_rank, key, request.sequence_number

        others = sorted((*spare, *prefills), key=rank)
        is_last = bool(running) and running[0] not in urgent and rank(running[0])[1] >= Rank.LATE_DECODE
        tail_share = self.tail_share if is_last or is_overtaken(running, (*urgent, *others)) else 0.0
        urgent.sort(key=lambda r: (r.slo.missed, r.priority, r.slo.deadline, r.sequence_number))
        late = [r for r in others if rank(r)[1] >= Rank.AHEAD]
        others = [r for r in others if rank(r)[1] < Rank.AHEAD]
        return ClaimOrder(urgent, others, seconds, tail_share, late, late_seconds)

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
