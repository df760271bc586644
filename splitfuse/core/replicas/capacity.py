"""Says how many replicas the arrivals of the last minutes need: `replicas_needed`, and `replicas_wanted` with those
that will come while one starts; for servers and for simulations.

They are sent again to virtual replicas (virtual_replica.py), as few as are enough: with so many, nearly all of those
that came in each minute are in time. So a minute in which SLOs break asks for more replicas at once, and one fewer is
enough only once it would have been for all of the minutes.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import fmean
from typing import NamedTuple

from splitfuse.core.replicas.virtual_replica import LEAST_SPEED, Job, VirtualReplica
from splitfuse.core.slo.cost_model import StepTimes
from splitfuse.core.slo.targets import NO_SLO, SloTargets
from splitfuse.core.slo.usual_step import usual_step
from splitfuse.core.slo.work_times import WorkTimes

WINDOW = 300.0
"""Seconds whose arrivals are looked at."""
PART = 60.0
"""Seconds of the window in each of which enough requests are to be in time."""
IN_TIME = 0.99
"""Fraction of the requests that are to be in time with so many replicas as are needed."""
WANTED_IN_TIME = 0.98
"""Fraction of them with so many as there should be, where these follow the load: with 99 % a day took more than
1.15 times the replica-hours of an oracle (benchmarks/results/scale.md).
"""
LONGEST_WAIT = 10.0
"""Seconds that the first token of a request without a TTFT target may take beyond its own time."""
MOST_ARRIVALS = 4096
"""Number of arrivals, the newest, that are looked at."""
MOST_REPLICAS = 1024
LONGEST_FORECAST = 120.0
"""Longest forecast in seconds, however long a replica takes to start: the last minutes say little of what comes later.
"""
CHECKED_EVERY = 128
"""Number of arrivals after which it is looked whether too many are late already."""
SURGE = 15.0
"""Seconds at the end of the window in which more arrivals than before are taken to go on."""
SURE = 2.0
"""Number of standard deviations of a Poisson count by which arrivals must have become more."""


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


class _Expected(NamedTuple):
    """Holds an arrival and the number of tokens that it is expected to generate."""

    arrival: Arrival
    num_generated: float

    def job(self, work_times: WorkTimes) -> Job:
        arrival, targets = self.arrival, self.arrival.targets
        job = Job(
            work_times,
            num_prompt=arrival.num_prompt,
            num_cached=arrival.num_cached,
            num_generated=self.num_generated,
            gap=min((each for each in (targets.itl, targets.tpot) if each is not None), default=None),
        )
        target = targets.ttft_target(arrival.num_prompt)
        job.deadline = arrival.at + (LONGEST_WAIT + job.work if target == math.inf else target)
        return job

    def attainable(self, work_times: WorkTimes) -> _Expected:
        """Return it without its SLO if it would miss that even alone: then it is as one that has none."""
        return self if self.meets_alone(work_times) else self._replace(arrival=replace(self.arrival, targets=NO_SLO))

    def meets_alone(self, work_times: WorkTimes) -> bool:
        """Return whether it would be in time on an idle replica."""
        job = self.job(work_times)
        step = work_times.overhead + work_times.with_floor(job.seconds)
        return self.arrival.at + job.work <= job.deadline and (job.gap is None or step <= (1.0 - LEAST_SPEED) * job.gap)


def replicas_needed(
    arrivals: Iterable[Arrival],
    times: StepTimes,
    *,
    now: float,
    window: float = WINDOW,
    in_time: float = IN_TIME,
    warm_up: float = 0.0,
    guess: int = 1,
    most: int = MOST_REPLICAS,
) -> int:
    """Return the smallest number of replicas with which the fraction `in_time` of the requests that arrived in each
    part of the window would have had their first token in time, and kept their ITL and TPOT targets; `most` if no
    smaller one is enough, 0 if none arrived.

    Requests that would be late even alone count as those without an SLO: no number of replicas lets them keep it, but
    they are computed. Those of the first `warm_up` seconds count only as load. What an unfinished one will generate is
    not known: it is taken to be the mean of those that have ended, or of the most that they may if none has. A `guess`
    that is near saves time.
    """
    start = now - window
    recent = sorted((each for each in arrivals if start <= each.at <= now), key=lambda each: each.at)[-MOST_ARRIVALS:]
    work_times = WorkTimes(times)
    expected = [each.attainable(work_times) for each in _expected(recent)]
    parts = [int((each.arrival.at - start) // PART) if each.arrival.at >= start + warm_up else -1 for each in expected]
    allowed = {part: (1.0 - in_time) * count for part, count in Counter(parts).items() if part >= 0}
    if not allowed:
        return 0
    margins = []
    for each in expected:
        job = each.job(work_times)
        margins.append(times.safety_factor * (job.deadline - each.arrival.at) - job.work)
    # Which part of a step each waits for is chance: one waits for little of it, another for nearly all.
    step = usual_step(work_times, [margin * len(margins) / (n + 0.5) for n, margin in enumerate(margins)])

    def is_enough(count: int) -> bool:
        replicas = [VirtualReplica(work_times, step=step) for _ in range(count)]
        jobs = [each.job(work_times) for each in expected]

        def is_kept() -> bool:
            late = Counter(part for job, part in zip(jobs, parts, strict=True) if job.is_late)
            return all(late[part] <= num_late for part, num_late in allowed.items())

        for number, (job, (arrival, _)) in enumerate(zip(jobs, expected, strict=True)):
            at = arrival.at
            if number % CHECKED_EVERY == 0 and not is_kept():
                return False
            waits = [each.wait(at) for each in replicas]
            replicas[waits.index(min(waits))].add(job, at)
        for replica in replicas:
            replica.advance()
        return is_kept()

    return _smallest(is_enough, guess=max(guess, 1), most=most)


def share_late_alone(arrivals: Iterable[Arrival], times: StepTimes) -> float:
    """Return which fraction of the requests would miss their SLO even alone on an idle replica; 0 if there are none."""
    work_times = WorkTimes(times)
    return fmean([not each.meets_alone(work_times) for each in _expected([*arrivals])] or [0.0])


def replicas_wanted(
    arrivals: Iterable[Arrival],
    times: StepTimes,
    *,
    now: float,
    num_replicas: int,
    start_seconds: float,
    least: int,
    most: int,
    window: float = WINDOW,
    in_time: float = WANTED_IN_TIME,
) -> int:
    """Return how many replicas there should be, from `least` to `most`, where there are `num_replicas` and a new one
    takes `start_seconds` until it is ready.

    They are enough for what arrived in the window and for what is to be expected until one more would be ready: as
    many again as came in as many seconds before, or more if arrivals have just become more. So another one is started
    as soon as SLOs would break before it can help; and one is stopped once it would not have been needed in all of the
    window.
    """
    recent = [each for each in arrivals if now - window <= each.at <= now]
    ahead = min(start_seconds, LONGEST_FORECAST)
    soon = _forecast(recent, now=now, seconds=ahead)
    needed = replicas_needed(
        [*recent, *soon], times, now=now + ahead, window=window + ahead, in_time=in_time, guess=num_replicas, most=most
    )
    return max(least, min(needed, most))


def _forecast(recent: Sequence[Arrival], *, now: float, seconds: float) -> list[Arrival]:
    """Return what is to be expected in the next seconds: what came in as many before, or, as soon as that is surely
    more than usual, what came in the last SURGE seconds, again and again.
    """
    newest = sum(1 for each in recent if each.at > now - SURGE)
    usual = sum(1 for each in recent if now - PART < each.at <= now - SURGE) * SURGE / (PART - SURGE)
    every = SURGE if newest - usual > SURE * math.sqrt(newest + usual) else max(seconds, SURGE)
    copies = (
        replace(each, at=each.at + count * every)
        for count in range(1, math.ceil(seconds / every) + 1)
        for each in recent
        if each.at > now - every
    )
    return [each for each in copies if each.at <= now + seconds]


def _expected(recent: Sequence[Arrival]) -> list[_Expected]:
    ended = [each.num_generated for each in recent if each.has_ended]
    usual = fmean(ended or [each.max_tokens for each in recent]) if recent else 0.0
    return [
        _Expected(each, each.num_generated if each.has_ended else min(max(usual, each.num_generated), each.max_tokens))
        for each in recent
    ]


def _smallest(is_enough: Callable[[int], bool], *, guess: int, most: int) -> int:
    """Return the smallest number that is enough, looking near the guess first; `most` if no smaller one is."""
    is_enough, guess = cache(is_enough), min(guess, most)
    if guess == most or is_enough(guess):
        high, step = guess, 1
        while high > 1 and is_enough(max(high - step, 1)):
            high, step = max(high - step, 1), 2 * step
        low = max(high - step, 0)
    else:
        low, step = guess, 1
        while low + step < most and not is_enough(low + step):
            low, step = low + step, 2 * step
        high = min(low + step, most)
    return bisect_left(range(high), True, lo=low + 1, key=is_enough)
