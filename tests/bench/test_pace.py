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


@pytest.mark.parametrize("start", [0.0, 0.3, 1.7])
def test_a_whole_run_takes_as_long_from_anywhere_in_any_pieces(start: float) -> None:
    steps = steps_of([1.0, 1.2, 0.8, 3.0, 1.0])
    pace = MeasuredPace([COST.seconds(each.features) for each in steps], [each.seconds for each in steps], start)
    whole = sum(pace.usual)
    for pieces in (1, 7, 100):
        seconds_of = pace.begin(number=2)
        assert sum(seconds_of(whole / pieces) for _ in range(pieces)) == pytest.approx(sum(pace.measured))


def test_usual_times_are_those_of_the_run_whatever_was_calibrated() -> None:
    slow = COST.slower(2.0)
    steps = [Sample(each.features, 2.0 * each.seconds) for each in steps_of([1.0] * 40)]
    for calibrated in (COST, slow):
        fitted = MeasuredMachine.of(steps, calibrated).step_times
        assert all(fitted.seconds(each.features) == pytest.approx(each.seconds, rel=0.02) for each in steps)
    assert MeasuredMachine.of(steps[:3], COST).step_times is COST, "too few steps to fit a cost model"


def test_engines_begin_at_places_of_their_own() -> None:
    pace = MeasuredPace([1.0] * 8, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    assert len({pace.begin(number)(0.5) for number in range(4)}) == 4
