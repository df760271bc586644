"""Says how much longer or shorter than usual steps take: by chance, or as those of a run did.

Log-normal noise makes each step longer or shorter by itself. What disturbs the steps of a real machine lasts for some
of them, and holds a few up for long. Both are in the steps of a run: a simulation at its pace takes for each piece of
work what the run took for the piece of work at that place, whatever steps it was divided into.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import Self

from splitfuse.core.slo.cost_model import MIN_SAMPLES, CostModel, Sample, fit

GOLDEN = (5**0.5 - 1) / 2
"""Fraction of a run between the places where engines of different numbers begin: the multiples of it are far apart."""
MOST_FITTED = 1024
"""Number of steps of a run that are fitted at most, evenly chosen: it takes some seconds."""

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
    >>> seconds_of(1.5), seconds_of(0.5), seconds_of(1.0)
    (2.5, 1.5, 1.0)
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
        place = usual[-1] * ((self.start + number * GOLDEN) % 1.0)

        def until(place: float) -> float:
            """Return the measured seconds from the beginning of the run to a place in it, in usual seconds."""
            rounds, rest = divmod(place, usual[-1])
            index = bisect_right(usual, rest) - 1
            of_step = (rest - usual[index]) * self.measured[index] / self.usual[index]
            return rounds * measured[-1] + measured[index] + of_step

        def seconds_of(seconds: float) -> float:
            nonlocal place
            before, place = place, place + seconds
            return until(place) - until(before)

        return seconds_of


@dataclass(frozen=True)
class MeasuredMachine:
    """Is a machine as it was in a run: the usual times of its steps, and its pace."""

    step_times: CostModel
    pace: MeasuredPace

    @classmethod
    def of(cls, steps: Sequence[Sample], cost: CostModel) -> Self:
        """Return the machine that took these steps, of which there must be some. The usual times are fitted to them;
        with too few for that they are those of `cost`.
        """
        if len(steps) >= MIN_SAMPLES:
            some = steps[:: len(steps) // MOST_FITTED + 1]
            cost = fit(some, held_out=some)
        return cls(cost, MeasuredPace([cost.seconds(each.features) for each in steps], [s.seconds for s in steps]))
