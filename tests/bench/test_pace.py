"""simulator/pace.py: simulated steps take what the steps of a run did."""

from random import Random

import pytest

from splitfuse.core.slo.cost_model import CostModel, Sample, StepFeatures
from splitfuse.simulator.pace import MeasuredMachine, MeasuredPace

COST = CostModel(floor=0.02, per_token=0.001, per_token_beyond=0.002, knee=8)


def steps_of(pace: list[float], seed: int = 0) -> list[Sample]:
    """Return steps of random sizes that took so many times what the cost model says."""
    random = Random(seed)
    steps = []
    for each in pace:
        features = StepFeatures().plus(start=0, count=random.randint(1, 200), rows=1)
        steps.append(Sample(features, each * COST.seconds(features)))
    return steps


def test_the_same_steps_take_what_they_took() -> None:
    steps = steps_of([Random(1).lognormvariate(0.0, 0.3) for _ in range(50)] + [5.0, 0.2])
    machine = MeasuredMachine.of(steps, COST)
    seconds_of = machine.pace.begin()
    for _ in range(3):  # behind its end the run begins again
        for step in steps:
            assert seconds_of(machine.step_times.seconds(step.features)) == pytest.approx(step.seconds)


@pytest.mark.parametrize("start", [0.0, 0.03, 0.26, 1.74])
def test_equal_steps_are_as_uneven_from_anywhere(start: float) -> None:
    """A step is not averaged with the next one of the run because it begins in the middle of it."""
    seconds_of = MeasuredPace([1.0] * 8, [1.0, 1.0, 3.0, 1.0, 0.5, 1.0, 1.0, 1.0], start).begin()
    for _ in range(2):
        assert sorted(seconds_of(1.0) for _ in range(8)) == [0.5, *[1.0] * 6, 3.0]


@pytest.mark.parametrize("start", [0.0, 0.3, 1.7])
def test_a_whole_run_takes_as_long_from_anywhere_in_any_pieces(start: float) -> None:
    random = Random(1)
    steps = steps_of([random.choice((0.8, 1.0, 1.2, 3.0)) for _ in range(1000)])
    pace = MeasuredPace([COST.seconds(each.features) for each in steps], [each.seconds for each in steps], start)
    whole = sum(pace.usual)
    for pieces in (1, 70, 1000, 10_000):
        seconds_of = pace.begin(number=2)
        sizes = [random.uniform(0.5, 1.5) for _ in range(pieces)]
        taken = sum(seconds_of(whole * size / sum(sizes)) for size in sizes)
        assert taken == pytest.approx(sum(pace.measured), rel=0.03)


def test_usual_times_are_those_of_the_run_whatever_was_calibrated() -> None:
    slow = COST.slower(2.0)
    steps = [Sample(each.features, 2.0 * each.seconds) for each in steps_of([1.0] * 40)]
    for calibrated in (COST, slow):
        fitted = MeasuredMachine.of(steps, calibrated).step_times
        assert all(fitted.seconds(each.features) == pytest.approx(each.seconds, rel=0.02) for each in steps)
    assert MeasuredMachine.of(steps[:3], COST).step_times is COST, "too few steps to fit a cost model"


def test_usual_times_are_those_of_long_steps_too() -> None:
    """Nine of 300 steps are long, and took half as long again as a fit to all says."""
    steps = steps_of([1.0] * 300)
    features = StepFeatures().plus(start=0, count=1000, rows=1)
    long = [Sample(features, 1.5 * COST.seconds(features))] * 9
    times = MeasuredMachine.of(steps + long, COST).step_times
    assert times.seconds(features) == pytest.approx(long[0].seconds, rel=0.03)
    assert sum(times.seconds(each.features) for each in steps) == pytest.approx(sum(s.seconds for s in steps), rel=0.03)


def test_engines_begin_at_places_of_their_own() -> None:
    pace = MeasuredPace([1.0] * 8, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    assert len({pace.begin(number)(0.5) for number in range(4)}) == 4
