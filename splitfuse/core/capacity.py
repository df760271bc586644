"""Says how many replicas the arrivals of the last minutes need: `replicas_needed`, for servers and for simulations.

They are sent again to virtual replicas, as few as are enough: with so many, nearly all of those that came in each
minute are in time. So a minute in which SLOs break asks for more replicas at once, and one fewer is enough only once it
would have been for all of the minutes.

What requests take, and what decodes must have meanwhile, is counted as claims are (core/slo/feasibility.py), but as a
fluid: a virtual replica has no steps, only seconds that prompts take one after the other, by deadline, while every
decode has its part of each of them.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

from splitfuse.core.slo.cost_model import StepTimes
from splitfuse.core.slo.feasibility import Feasibility
from splitfuse.core.slo.targets import NO_SLO, SloTargets
from splitfuse.core.slo.usual_step import usual_step

WINDOW = 300.0
"""Seconds whose arrivals are looked at."""
PART = 60.0
"""Seconds of the window in each of which enough requests are to be in time."""
IN_TIME = 0.99
"""Fraction of the requests that are to be in time."""
LONGEST_WAIT = 10.0
"""Seconds that the first token of a request without a TTFT target may take beyond its own time."""
MOST_ARRIVALS = 4096
"""Number of arrivals, the newest, that are looked at."""
MOST_REPLICAS = 1024
LEAST_SPEED = 1 / 16
"""Fraction of its time that a replica must have left for prompts, if its decodes are to be in time."""
LAST_BIT = 1e-9
"""Fraction of a token, or of a second, that is as good as none."""


@dataclass(slots=True)
class Arrival:
    """Holds a request as far as it is known."""

    at: float
    num_prompt: int
    max_tokens: int
    targets: SloTargets = NO_SLO
    num_cached: int = 0
    """Leading tokens that were found in the prefix cache."""
    num_generated: int = 0
    has_ended: bool = False


class _Job:
    """Holds what a request takes of a virtual replica."""

    __slots__ = ("deadline", "gap", "keeps_alone", "part", "seconds", "tokens", "work")

    def __init__(self, arrival: Arrival, tokens: float, outlook: Feasibility, *, start: float) -> None:
        count = arrival.num_prompt - arrival.num_cached
        self.work = outlook.overhead + outlook.with_floor(outlook.seconds_of(arrival.num_cached, max(count, 1)))
        target = arrival.targets.ttft_target(arrival.num_prompt)
        self.deadline = arrival.at + (LONGEST_WAIT + self.work if target == math.inf else target)
        self.tokens = max(tokens - 1.0, 0.0)  # after the first
        self.seconds = outlook.seconds_of(arrival.num_prompt + round(tokens / 2), 1)  # of a token
        gaps = [each for each in (arrival.targets.itl, arrival.targets.tpot) if each is not None]
        self.gap = min(gaps, default=None)
        self.part = int((arrival.at - start) // PART)
        step = outlook.overhead + outlook.with_floor(self.seconds)
        self.keeps_alone = arrival.at + self.work <= self.deadline and (
            self.gap is None or step <= (1.0 - LEAST_SPEED) * self.gap
        )
        """Whether it would be in time on an idle replica."""


class _VirtualReplica:
    """Serves jobs: prompts by deadline, and those last that would be late."""

    def __init__(self, outlook: Feasibility, late: Counter[int], *, step: float) -> None:
        """`step` are the seconds of a usual step."""
        self._outlook, self._late = outlook, late
        self._usual_step = self._step = step
        self._now = 0.0
        self._backlog = 0.0
        self._due: list[tuple[float, int, _Job]] = []
        self._overdue: list[tuple[float, int, _Job]] = []
        self._num_jobs = 0
        self._decodes: list[_Job] = []
        self._decode_seconds = 0.0
        self._speed = 1.0
        """Seconds of prompts that are done in a second."""

    def wait(self, now: float) -> float:
        """Return about how long a new prompt waits, as the router counts it."""
        return max(self._backlog - (now - self._now) * self._speed, 0.0) + self._decode_seconds

    def add(self, job: _Job, now: float) -> None:
        """Take a job that arrives now."""
        self.advance(now)
        self._num_jobs += 1
        if self._backlog:  # it waits for the step in flight
            job.deadline -= min(self._step, self._backlog + self._decode_seconds) / 2
        elif self._decodes:
            job.deadline -= self._step_of_decodes / 2
        self._backlog += job.work
        heapq.heappush(self._due, (job.deadline, self._num_jobs, job))
        self._settle()

    def advance(self, until: float = math.inf) -> None:
        """Serve until a time, or until all prompts are done."""
        while self._now < until:
            prompts = self._due or self._overdue
            if not prompts and (until == math.inf or not self._decodes):
                self._now = until
                return
            gaps = self._gaps if prompts else [self._step_of_decodes] * len(self._decodes)
            first = prompts[0][2].work / self._speed if prompts else math.inf
            ends = min([each.tokens * gap for each, gap in zip(self._decodes, gaps, strict=True)], default=math.inf)
            seconds = min(first, ends, until - self._now)
            self._now += seconds
            for each, gap in zip(self._decodes, gaps, strict=True):
                each.tokens -= seconds / gap
            if prompts:
                done = prompts[0][2].work if first <= seconds else seconds * self._speed
                prompts[0][2].work -= done
                self._backlog -= done
                if first <= seconds:
                    self._backlog *= len(self._due) + len(self._overdue) > 1  # no rest of a sum when it is the last
                    self._begin_decode(heapq.heappop(prompts)[2])
            if ends <= seconds:
                self._decodes = [each for each in self._decodes if each.tokens > LAST_BIT]
            self._settle()

    def _begin_decode(self, job: _Job) -> None:
        is_late = self._now > job.deadline + LAST_BIT
        if job.tokens > 0.0:
            self._decodes.append(job)
            self._settle()
            is_late |= self._speed < LEAST_SPEED
        self._late[job.part] += is_late

    @property
    def _step_of_decodes(self) -> float:
        return self._outlook.overhead + self._outlook.with_floor(self._decode_seconds)

    @property
    def _gaps(self) -> list[float]:
        """Return the seconds from token to token of each decode while there are prompts."""
        return [self._step if each.gap is None else each.gap for each in self._decodes]

    def _settle(self) -> None:
        """Set what a step is like, and put those prompts aside which would be late if they were next."""
        self._decode_seconds = sum([each.seconds for each in self._decodes])
        self._step = min([self._usual_step, *(each.gap for each in self._decodes if each.gap is not None)])
        used = sum([each.seconds / gap for each, gap in zip(self._decodes, self._gaps, strict=True)])
        self._speed = max(1.0 - self._outlook.overhead / self._step - used, 0.0)
        while self._due and self._now + self._due[0][2].work / max(self._speed, LEAST_SPEED) > self._due[0][0]:
            heapq.heappush(self._overdue, heapq.heappop(self._due))


def replicas_needed(arrivals: Iterable[Arrival], times: StepTimes, *, now: float) -> int:
    """Return the smallest number of replicas with which IN_TIME of the requests that arrived in each part of the window
    would have had their first token in time, and kept their ITL and TPOT targets; 0 if none arrived.

    Requests that would be late even alone count for nothing. What an unfinished one will generate is not known: it is
    taken to be the mean of those that have ended, or of the most that they may if none has.
    """
    start = now - WINDOW
    recent = sorted((each for each in arrivals if start <= each.at <= now), key=lambda each: each.at)[-MOST_ARRIVALS:]
    ended = [each.num_generated for each in recent if each.has_ended]
    usual = fmean(ended or [each.max_tokens for each in recent]) if recent else 0.0
    tokens = [
        each.num_generated if each.has_ended else min(max(usual, each.num_generated), each.max_tokens)
        for each in recent
    ]
    outlook = Feasibility(times, (), now=0.0)

    def jobs() -> list[tuple[float, _Job]]:
        made = ((each.at, _Job(each, count, outlook, start=start)) for each, count in zip(recent, tokens, strict=True))
        return [(at, job) for at, job in made if job.keeps_alone]

    counted = Counter(job.part for _, job in jobs())
    if not counted:
        return 0
    margins = [outlook.safety_factor * (job.deadline - at) - job.work for at, job in jobs()]
    # Which part of a step each waits for is chance: one waits for little of it, another for nearly all.
    step = usual_step(outlook, [margin * len(margins) / (n + 0.5) for n, margin in enumerate(margins)])

    def is_enough(count: int) -> bool:
        late: Counter[int] = Counter()
        replicas = [_VirtualReplica(outlook, late, step=step) for _ in range(count)]
        for at, job in jobs():
            min(replicas, key=lambda each: each.wait(at)).add(job, at)
        for replica in replicas:
            replica.advance()
        return all(late[part] <= (1.0 - IN_TIME) * number for part, number in counted.items())

    most = 1
    while most < MOST_REPLICAS and not is_enough(most):
        most *= 2
    return bisect_left(range(most), True, lo=most // 2 + 1, key=is_enough) if most > 2 else most
