"""Meets SLOs: those of as many requests as possible, the others when there is time.

A decode with an ITL target of 250 ms needs no token earlier: the time that it lends lets prefills meet their TTFT
targets, and what is left over goes back to the decodes. Without any SLO, and where no request can meet its own, the
order is that of `Fcfs`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from splitfuse.config.engine import TAIL_SHARE, SchedulerConfig
from splitfuse.core.policy import (
    ClaimOrder,
    Fcfs,
    SchedulingPolicy,
    Tier,
    newest_behind,
    oldest_of,
    preemption_key,
    slo_required,
    split_running,
)
from splitfuse.core.request import Request, by_queue_key
from splitfuse.core.scheduling_options import Priority
from splitfuse.core.slo.admission import check_on_time
from splitfuse.core.slo.answers import Answers
from splitfuse.core.slo.cost_model import CostModel
from splitfuse.core.slo.feasibility import Feasibility, Prefill
from splitfuse.core.slo.latency_predictor import LatencyPredictor
from splitfuse.core.slo.turns import Turns
from splitfuse.core.slo.usual_step import MOST_LOOKED_AT, Arrivals, usual_step
from splitfuse.core.slo.work_times import MIN_EFFICIENCY, WorkTimes
from splitfuse.core.step_builder import RequestQueue, StepBuilder

DECODES_PER_STEP = 1 / 2
"""Largest fraction of a step without deadlines to meet that a token of every decode takes."""
MIN_STEP = 1.25
"""Shortest such step, relative to one of a single decode: the rest is for prompts."""
AIM = 1 / 2
"""Fraction of the time to its deadline in which a prompt is to be done, if decodes have the slack for it: the rest is
for requests that arrive meanwhile."""
MOST_SKIPPED_STEPS = math.ceil(1.0 / TAIL_SHARE)
"""Number of steps in a row that a decode can be left out of, whatever its targets: in the next it is urgent. So it is
in about as large a part of the steps as late prompts have of each by default."""


def _by_deadline(request: Request) -> tuple[float, int]:
    return request.slo.deadline, request.sequence_number


def _by_urgency(request: Request) -> tuple[int, bool, float, int]:
    return request.priority, request.slo.missed, request.slo.deadline, request.sequence_number


class StepLimit(NamedTuple):
    """Limits the predicted seconds of a step."""

    seconds: float
    """For prompts that can be in time."""
    others: float
    """For all other claims."""
    spare: float
    """Seconds that decodes may take without need, and all these prompts be in time, and one that arrives meanwhile."""


class DeadlinePolicy(Fcfs):
    """Lets as many requests as possible meet their SLO.

    Urgent are decodes whose deadline is before the end of the step after this one, or which were left out
    of `MOST_SKIPPED_STEPS`; and as many others as leave the prompts that can be in time enough. Late prompts whose turn
    has come (turns.py) have a share of each step. Then come the prompts that can be in time, by deadline; then all
    others, decodes first, and those last that are late.
    """

    def __init__(self, predictor: LatencyPredictor, *, token_budget: int, tail_share: float = TAIL_SHARE) -> None:
        self.predictor = self._predictor = predictor
        self._token_budget = token_budget
        self._turns = Turns(tail_share)
        self._arrivals, self._answers = Arrivals(), Answers()
        self._in_time: set[Request] = set()
        """Prompts that could be in time when the last step was planned."""

    def _feasibility(self, decodes: Iterable[Request], **how: Any) -> Feasibility:
        return Feasibility(self._predictor, decodes, token_budget=self._token_budget, **how)

    def _work_times(self) -> WorkTimes:
        return WorkTimes(self._predictor, token_budget=self._token_budget)

    def accept(self, request: Request, queue: RequestQueue) -> None:
        """See SchedulingPolicy."""
        queue.expect_cached(request)
        work_times, before, in_time = self._work_times(), 0.0, 0.0
        for other in queue.unfinished:
            if not other.output_token_ids:
                work = work_times.seconds(other)
                before += work
                in_time += work if other in self._in_time else 0.0
        own = work_times.seconds(request)
        margin = request.slo.ttft_target - work_times.overhead - work_times.with_floor(in_time + own)
        self._arrivals.accept(arrival_time=request.slo.arrival_time, margin=margin)
        self._turns.accept(request, own=own, before=before)
        self._answers.expect(request)

    def finish(self, request: Request) -> None:
        """See SchedulingPolicy."""
        self._answers.end(request)

    def compose(self, step: StepBuilder) -> None:
        """See SchedulingPolicy."""
        self._arrivals.plan(step.now)
        super().compose(step)
        work_times = self._work_times()
        decodes = sum([work_times.seconds(request) for request in step.granted if request.output_token_ids])
        self._turns.advance(max(self._predictor.seconds(step.features) - decodes, 0.0))

    def order(self, running: Sequence[Request], waiting: Sequence[Request], *, now: float) -> ClaimOrder:
        """See SchedulingPolicy."""
        if not any(request.slo.exists for part in (running, waiting) for request in part):
            return super().order(running, waiting, now=now)
        decodes, prefills = split_running(running)
        prefills += waiting
        highest = min([request.priority for request in prefills], default=Priority.LOW)
        feasibility = self._feasibility(decodes, now=now, priority=highest)
        feasible, share = self._feasible(feasibility, prefills), 0.0
        if not feasible and self._is_out_of_reach(feasibility, decodes):
            self._in_time = set()
            return super().order(running, waiting, now=now)
        in_time = {prefill.request for prefill in feasible}
        overdue: list[Request] = []
        if not any(request.on_time_only for request in in_time):
            overdue = [request for request in self._turns.have_come(prefills) if request not in in_time]
        if overdue:
            share = self._turns.share
            apart = set(overdue)
            prefills = [request for request in prefills if request not in apart]
            feasible = feasibility.feasible(prefills, share=1.0 - share, at_most=MOST_LOOKED_AT)
            in_time = {prefill.request for prefill in feasible}
        limit = self._limit(feasibility, feasible, decodes, share=share)
        urgent = self._urgent(decodes, feasibility, limit)
        others = self._others(decodes, prefills, apart=in_time.union(urgent))
        self._in_time = in_time
        used = sum([feasibility.seconds_of_token(request) for request in urgent])
        late = share * max(limit.seconds, (feasibility.overhead + used) / (1.0 - share))
        return ClaimOrder(
            (
                Tier(urgent),
                Tier(overdue, feasibility.overhead + feasibility.with_floor(used + late) if feasible else limit.others),
                Tier([prefill.request for prefill in feasible], limit.seconds),
                Tier(others, limit.others),
            ),
            limits_time=True,
        )

    def _is_out_of_reach(self, feasibility: Feasibility, decodes: Sequence[Request]) -> bool:
        """Return whether all decodes are late and hardly any of the newest requests could have waited for a step of any
        length: a smaller fraction than late prompts have of each step. By age the others wait less for their first
        token, and no gap that is in time becomes longer.
        """
        shortest, newest = self._shortest(feasibility), self._arrivals.longest_steps
        is_few = sum([longest >= shortest for longest in newest]) < self._turns.share * len(newest)
        return is_few and all(decode.slo.missed for decode in decodes)

    @staticmethod
    def _shortest(work_times: WorkTimes) -> float:
        """Return the seconds of the shortest step with prompts that no deadline makes still shorter."""
        return max(work_times.efficient_step(MIN_EFFICIENCY), MIN_STEP * work_times.floor)

    @staticmethod
    def _feasible(feasibility: Feasibility, prefills: Sequence[Request]) -> list[Prefill]:
        """Return the prefills that can be in time. If none can with the safety factor, those that can without: a prompt
        at risk may be in time, one that is given up is not. Decodes are not put at risk for it.
        """
        feasible = feasibility.feasible(prefills, at_most=MOST_LOOKED_AT)
        if not feasible and prefills:
            safety_factor, feasibility.safety_factor = feasibility.safety_factor, 1.0
            feasible = feasibility.feasible(prefills, at_most=MOST_LOOKED_AT)
            feasibility.safety_factor = safety_factor
        return feasible

    def _limit(
        self,
        feasibility: Feasibility,
        feasible: Sequence[Prefill],
        decodes: Sequence[Request],
        *,
        share: float,
    ) -> StepLimit:
        """Return how long a step may be: as short as throughput allows, as long as the deadlines of the `feasible`
        prompts require, and no longer than the slack of the decodes, or of the first of these prompts.
        """
        every = feasibility.overhead + feasibility.decode_seconds
        usual = usual_step(feasibility, self._arrivals.longest_steps)
        if 0 < len(decodes) >= len(feasible) and every < DECODES_PER_STEP * feasibility.floor:
            # Steps of decodes alone would waste the rest of the floor: prompts are computed in many short steps. If
            # more can be in time, they are computed at full throughput: the decodes that they become fill the floor.
            usual = 0.0
        usual = max(usual, every / DECODES_PER_STEP, self._shortest(feasibility))
        seconds, spare, before = usual, math.inf, 0.0
        for each in feasible:
            before += each.work
            spare = min(spare, each.room - feasibility.with_floor(before))
            steps = (AIM * feasibility.time_until(each.request.slo.deadline) - before / (1.0 - share)) // every
            seconds = max(seconds, before / (1.0 - share) / max(steps, 1.0) + every)
        if feasible:
            first = feasible[0]
            whole = (
                feasibility.overhead
                + feasibility.with_floor(first.work)
                + min(feasibility.decode_seconds, max(spare, 0.0))
            )
            seconds = min(seconds, max(whole, feasibility.time_until(first.request.slo.deadline)))
            spare = min(spare, self._spare_for_arrivals(feasibility, first))
        seconds = min(seconds, feasibility.slack, max(feasibility.longest + feasibility.decode_seconds, usual))
        return StepLimit(seconds, min(seconds, usual), spare)

    def _spare_for_arrivals(self, feasibility: Feasibility, first: Prefill) -> float:
        """Return the seconds that decodes may take without need in the step of the `first` prompt, so that one like it
        that arrives meanwhile, and waits for this step, can still be in time.
        """
        whole = feasibility.overhead + feasibility.with_floor(first.work)
        margin = feasibility.safety_factor * first.request.slo.ttft_target - whole
        return AIM * margin - whole

    def _urgent(self, decodes: Sequence[Request], feasibility: Feasibility, limit: StepLimit) -> list[Request]:
        """Return the decodes that get their token before any prompt."""
        soon = feasibility.now + limit.seconds + feasibility.step_of_decodes / feasibility.safety_factor
        urgent, ahead = [], []
        for request in decodes:
            slo = request.slo
            if slo.steps_skipped >= MOST_SKIPPED_STEPS or slo.deadline <= (feasibility.now if slo.missed else soon):
                urgent.append(request)
            elif not slo.missed:
                ahead.append(request)
        spare = limit.spare
        for request in sorted(ahead, key=_by_deadline) if spare > 0.0 else ():
            spare -= feasibility.seconds_of_token(request)
            if spare < 0.0:
                break
            urgent.append(request)
        return sorted(urgent, key=_by_urgency)

    def _others(self, decodes: Sequence[Request], prefills: Sequence[Request], *, apart: set[Request]) -> list[Request]:
        """Return the claims besides those `apart`, by priority; within one, decodes before prefills, and before both
        those that have not missed their SLO.
        """
        parts: list[list[Request]] = [[] for _ in range(4 * len(Priority))]
        for kind, requests in enumerate((decodes, prefills)):
            for request in requests:
                if request not in apart:
                    slo = request.slo
                    is_late = slo.missed or (kind == 1 and slo.deadline < math.inf)
                    parts[4 * request.priority + 2 * is_late + kind].append(request)
        claims: list[Request] = []
        for number, part in enumerate(parts):
            claims += sorted(part, key=by_queue_key) if number % 4 else sorted(part, key=_by_deadline)
        return claims

    def preemption_victim(self, running: Sequence[Request], *, claimant: Request) -> Request | None:
        """Return the late request of the lowest priority with the fewest computed tokens; otherwise the newest.

        A late request takes only from late ones that came after it, unless it is the oldest of all. A prompt takes from
        lower priorities alone: to compute again what another had computed makes more prompts late than one.
        """
        oldest = oldest_of(running, claimant)
        is_oldest = claimant is oldest
        others = [r for r in running if r is not oldest]
        if claimant.slo.exists and not (is_oldest or claimant.output_token_ids):
            others = [r for r in others if r.priority > claimant.priority]
        late = [r for r in others if r.slo.missed and (is_oldest or r.priority >= claimant.priority)]
        if claimant.slo.missed and not is_oldest:
            late = [r for r in late if preemption_key(r) > preemption_key(claimant)]
        elif not late:
            return newest_behind(claimant, others, is_oldest=is_oldest)
        return min(late, key=lambda r: (-r.priority, r.kv.num_computed, -r.sequence_number), default=None)

    def check_admission(self, request: Request, queue: RequestQueue, *, now: float) -> None:
        """See SchedulingPolicy."""
        if not request.slo.exists:
            raise slo_required()
        queue.expect_cached(request)
        check_on_time(request, queue, self._feasibility, now=now)


def make_policy(config: SchedulerConfig, cost: CostModel | None = None) -> SchedulingPolicy:
    """Return a DeadlinePolicy if there is a cost model to predict steps with, otherwise Fcfs."""
    if cost is None:
        return Fcfs()
    predictor = LatencyPredictor(cost)
    return DeadlinePolicy(predictor, token_budget=config.token_budget, tail_share=config.tail_share)
