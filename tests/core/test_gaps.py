"""How the gaps of a request are judged, and how much slack they leave."""

import math
from collections.abc import Callable
from copy import deepcopy
from random import Random

import pytest

from splitfuse.core.slo.gaps import GapTarget, MeanTarget, MovingAverageTarget, PercentileTarget
from splitfuse.core.slo.targets import SloViolation

MEASURES: list[Callable[[], GapTarget]] = [
    lambda: MovingAverageTarget(0.1),
    lambda: PercentileTarget(0.1, 75.0),
    lambda: MeanTarget(0.1),
]


@pytest.mark.interpreted
@pytest.mark.parametrize("make", MEASURES)
@pytest.mark.parametrize("seed", range(20))
def test_the_next_gap_may_be_exactly_as_long_as_the_slack(make: Callable[[], GapTarget], seed: int) -> None:
    rng, target = Random(seed), make()
    for _ in range(60):
        longest = target.longest_next()
        if not target.is_missed and longest > 0.0:
            for gap, missed in ((0.999 * min(longest, 1e6), False), (1.001 * longest, True)):
                if gap < math.inf:
                    after = deepcopy(target)
                    after.add(gap)
                    assert after.is_missed is missed
        target.add(rng.uniform(0.0, 0.15))


def test_early_tokens_give_a_moving_average_room_for_one_long_gap() -> None:
    target = MovingAverageTarget(0.1)
    assert target.longest_next() == pytest.approx(0.1)
    for _ in range(100):
        target.add(0.01)
    assert 0.7 < target.longest_next() < 0.8  # 1 - 2 / 17 of 8.5 gaps, each 0.09 early


def test_a_percentile_forgives_its_share_of_gaps_however_long() -> None:
    target = PercentileTarget(0.1, 90.0)
    for _ in range(9):
        assert target.longest_next() == 0.1
        target.add(0.05)
    assert target.longest_next() == math.inf
    target.add(7.0)
    assert not target.is_missed and target.longest_next() == 0.1
    target.add(0.2)
    assert target.is_missed and not target.is_lost
    before = SloViolation(ttft=2.0, ttft_target=1.0)
    assert target.violation(before) == SloViolation(
        2.0, 1.0, longest_gap=7.0, itl_target=0.1, percent_in_time=pytest.approx(100 * 9 / 11), itl_percentile=90.0
    )


def test_rounding_misses_no_target() -> None:
    for make in (MovingAverageTarget, MeanTarget):
        target = make(0.1)
        for number in range(100):
            target.add(0.1 * (number + 1) - 0.1 * number)  # 0.1 but for the last digits
        assert not target.is_missed
