"""Says how much longer or shorter than usual steps take: by chance, or as those of a run did.

Log-normal noise makes each step longer or shorter by itself. What disturbs the steps of a real machine lasts for some
of them, and holds a few up for long. Both are in the steps of a run: a step of a simulation at its pace is as much
longer as those which the run made of the same piece of work.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from random import Random
from typing import Self

import numpy as np

from splitfuse.core.slo.cost_model import MIN_SAMPLES, CostModel, Sample, StepFeatures, fit

GOLDEN = (5**0.5 - 1) / 2
"""Fraction of a run between the places where engines of different numbers begin: the multiples of it are far apart."""
MOST_FITTED = 1024
"""Number of steps of a run that are fitted at most, evenly chosen: it takes some seconds."""
NUM_LENGTHS = 8
"""Number of lengths of steps that are corrected apart: those of each took an eighth of the time of a run."""

SecondsOf = Callable[[float], float]
"""Function that returns the seconds of the next step, which takes as many as it is given at the usual pace."""


def by_chance(noise: float, seed: int) -> SecondsOf:
    """Return steps with log-normal noise, of which `noise` is the standard deviation of the logarithm."""
    random = Random(seed)
    return lambda seconds: seconds * random.lognormvariate(0.0, noise)


@dataclass(frozen=True)
class MeasuredPace:
    """Holds how long the steps of a run took, in order.

    >>> seconds_of = MeasuredPace([1.0, 1.0], [1.0, 3.0]).begin()  # the second of two equal steps took thrice as long
    >>> seconds_of(0.75), seconds_of(1.0), seconds_of(0.25)
    (0.75, 3.0, 0.75)
    """

    usual: Sequence[float]
    """Seconds that each step would have taken at the usual pace, all positive."""
    measured: Sequence[float]
    """Seconds that each step took."""
    start: float = 0.0
    """Where in the run a simulation begins, as a fraction of it. Behind its end it begins again."""

    def begin(self, number: int = 0) -> SecondsOf:
        """Return the steps of a simulation. Engines of different numbers begin at different places of the run."""
        usual, measured = ([0.0, *accumulate(part)] for part in (self.usual, self.measured))
        middles = [(begin + end) / 2 for begin, end in pairwise(usual)]
        place = usual[-1] * ((self.start + number * GOLDEN) % 1.0)

        def until(place: float) -> tuple[float, float]:
            """Return the usual and the measured seconds of all steps whose middle lies before a place."""
            rounds, rest = divmod(place, usual[-1])
            index = bisect_right(middles, rest)
            return rounds * usual[-1] + usual[index], rounds * measured[-1] + measured[index]

        def seconds_of(seconds: float) -> float:
            """Return the time of a step: as much longer as the steps whose middles are in it, all together. Parts of
            steps would make each an average of two, and all of them too much alike. Where there is no middle, it is a
            part of one.
            """
            nonlocal place
            (usual_before, measured_before), begin = until(place), place
            place += seconds
            usual_after, measured_after = until(place)
            if usual_after > usual_before:
                return seconds * (measured_after - measured_before) / (usual_after - usual_before)
            index = bisect_right(usual, begin % usual[-1]) - 1
            return seconds * self.measured[index] / self.usual[index]

        return seconds_of


@dataclass(frozen=True)
class UsualTimes:
    """Says what the steps of a run usually took: what a cost model says, times a factor for steps of that length.

    A fit goes by relative errors, to which the few long steps add little, but their time is much of the whole.
    """

    cost: CostModel
    logs: Sequence[float]
    """Logarithms of some lengths in seconds, ascending; lengths between two of them have a factor between theirs."""
    factors: Sequence[float]

    @classmethod
    def of(cls, cost: CostModel, steps: Sequence[Sample]) -> Self:
        """Return the times of these steps, of which there must be some."""
        pairs = sorted((cost.seconds(each.features), each.seconds) for each in steps)
        before, whole = 0.0, sum(seconds for _, seconds in pairs)
        groups: dict[int, list[tuple[float, float]]] = {}
        for usual, seconds in pairs:
            groups.setdefault(int(NUM_LENGTHS * before / whole), []).append((usual, seconds))
            before += seconds
        sums = [(len(some), *map(sum, zip(*some, strict=True))) for some in groups.values()]
        return cls(
            cost, [math.log(usual / count) for count, usual, _ in sums], [taken / usual for _, usual, taken in sums]
        )

    def seconds(self, step: StepFeatures) -> float:
        """Return the usual time of a step."""
        usual = self.cost.seconds(step)
        return usual * float(np.interp(math.log(usual), self.logs, self.factors))


@dataclass(frozen=True)
class MeasuredMachine:
    """Holds the usual times of the steps of a machine in a run, and its pace."""

    step_times: CostModel | UsualTimes
    pace: MeasuredPace

    @classmethod
    def of(cls, steps: Sequence[Sample], cost: CostModel) -> Self:
        """Return the machine that took these steps, of which there must be some. The usual times are fitted to them;
        with too few for that they are those of `cost`.
        """
        times: CostModel | UsualTimes = cost
        if len(steps) >= MIN_SAMPLES:
            some = steps[:: len(steps) // MOST_FITTED + 1]
            times = UsualTimes.of(fit(some, held_out=some), steps)
        return cls(times, MeasuredPace([times.seconds(each.features) for each in steps], [s.seconds for s in steps]))
