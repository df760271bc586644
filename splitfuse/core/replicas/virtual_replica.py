"""Models a replica as a fluid, to predict what becomes of its requests: `VirtualReplica` has no steps, only seconds
that prompts take one after the other, by deadline, while every decode has its part of each of them.

capacity.py sends arrivals to such replicas to say how many they need, and simulations of more than full ones can
be simulated (simulator/fluid.py). What requests take is counted as claims are (core/slo/work_times.py).
"""

from __future__ import annotations

import heapq
import math

from splitfuse.core.slo.work_times import WorkTimes

LEAST_SPEED = 1 / 16
"""Fraction of its time that a replica must have left for prompts, if its decodes are to be in time."""
LAST_BIT = 1e-9
"""Fraction of a token, or of a second, that is as good as none."""


class Job:
    """Holds what a request takes of a virtual replica, and what became of it."""

    __slots__ = ("deadline", "ended_at", "first_token_at", "gap", "is_late", "seconds", "tokens", "work")

    def __init__(
        self,
        work_times: WorkTimes,
        *,
        num_prompt: int,
        num_cached: int,
        num_generated: float,
        deadline: float = math.inf,
        gap: float | None = None,
    ) -> None:
        """`deadline` is the first token's, and `gap` the most seconds from token to token."""
        count = max(num_prompt - num_cached, 1)
        self.work = work_times.overhead + work_times.with_floor(work_times.seconds_of(num_cached, count))
        """Seconds of the prompt that are left."""
        self.deadline = deadline
        self.tokens = max(num_generated - 1.0, 0.0)
        """Tokens after the first that are left."""
        self.seconds = work_times.seconds_of(num_prompt + round(num_generated / 2), 1)
        """Seconds by which one of them makes a step longer."""
        self.gap = gap
        self.is_late = False
        self.first_token_at = self.ended_at = math.inf


class VirtualReplica:
    """Serves jobs: prompts by deadline, and those last that would be late."""

    def __init__(self, work_times: WorkTimes, *, step: float) -> None:
        """`step` are the seconds of a usual step."""
        self._work_times = work_times
        self._usual_step = self._step = step
        self._now = 0.0
        self._backlog = 0.0
        self._due: list[tuple[float, int, Job]] = []
        self._overdue: list[tuple[float, int, Job]] = []
        self._num_jobs = 0
        self._decodes: list[Job] = []
        self._decode_seconds = 0.0
        self._speed = 1.0
        """Seconds of prompts that are done in a second."""

    @property
    def is_idle(self) -> bool:
        """Return whether it had nothing to do when it last advanced."""
        return not (self._due or self._overdue or self._decodes)

    def wait(self, now: float) -> float:
        """Return about how long a new prompt waits, as the router counts it."""
        return max(self._backlog - (now - self._now) * self._speed, 0.0) + self._decode_seconds

    def add(self, job: Job, now: float) -> None:
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
            first = prompts[0][2].work / self._speed if prompts and self._speed else math.inf
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
                for each in self._decodes:
                    if each.tokens <= LAST_BIT:
                        each.ended_at = self._now
                self._decodes = [each for each in self._decodes if each.tokens > LAST_BIT]
            self._settle()

    def _begin_decode(self, job: Job) -> None:
        job.first_token_at = self._now
        job.is_late = self._now > job.deadline + LAST_BIT
        if job.tokens > 0.0:
            self._decodes.append(job)
            self._settle()
            job.is_late |= self._speed < LEAST_SPEED
        else:
            job.ended_at = self._now

    @property
    def _step_of_decodes(self) -> float:
        return self._work_times.overhead + self._work_times.with_floor(self._decode_seconds)

    @property
    def _gaps(self) -> list[float]:
        """Return the seconds from token to token of each decode while there are prompts."""
        return [self._step if each.gap is None else each.gap for each in self._decodes]

    def _settle(self) -> None:
        """Set what a step is like, and put those prompts aside which would be late if they were next."""
        self._decode_seconds = sum([each.seconds for each in self._decodes])
        self._step = min([self._usual_step, *(each.gap for each in self._decodes if each.gap is not None)])
        used = sum([each.seconds / gap for each, gap in zip(self._decodes, self._gaps, strict=True)])
        self._speed = max(1.0 - self._work_times.overhead / self._step - used, 0.0)
        while self._due and self._now + self._due[0][2].work / max(self._speed, LEAST_SPEED) > self._due[0][0]:
            heapq.heappush(self._overdue, heapq.heappop(self._due))
