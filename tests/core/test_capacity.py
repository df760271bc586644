"""The number of replicas that arrivals need."""

from dataclasses import replace
from random import Random
from typing import Any

import pytest

from splitfuse.core.replicas import capacity
from splitfuse.core.replicas.capacity import (
    LONGEST_WAIT,
    PART,
    SURGE,
    WINDOW,
    Arrival,
    replicas_needed,
    replicas_wanted,
    share_late_alone,
)
from splitfuse.core.replicas.virtual_replica import VirtualReplica
from splitfuse.core.slo.cost_model import CostModel, StepTimes
from splitfuse.core.slo.targets import NO_SLO, SloTargets

TIMES = StepTimes(CostModel(floor=0.01, per_token=0.001))
SOON = SloTargets(ttft=0.25)
NOW = 1000.0


def arrival(at: float, *, prompt: int = 90, generated: int = 1, targets: SloTargets = SOON) -> Arrival:
    return Arrival(at, prompt, generated, targets, num_generated=generated, has_ended=True)


def needed(*arrivals: Arrival, now: float = NOW) -> int:
    return replicas_needed(arrivals, TIMES, now=now)


def test_nothing_needs_nothing() -> None:
    assert needed() == needed(arrival(NOW - WINDOW - 1.0)) == needed(arrival(NOW + 1.0)) == 0
    assert needed(arrival(NOW - 1.0)) == 1


@pytest.mark.parametrize("count", range(1, 12))
def test_each_replica_serves_two_at_once(count: int) -> None:
    """A prompt takes 0.1 s, and half a step may pass before it: the third would be late."""
    assert needed(*[arrival(NOW - 1.0)] * count) == -(-count // 2)
    assert needed(*(arrival(NOW - 250.0 + 0.2 * number) for number in range(count))) == 1


def test_what_is_cached_is_not_computed() -> None:
    cached = replace(arrival(NOW - 1.0), num_cached=80)
    assert needed(*[cached] * 8) == 1


def test_a_minute_in_which_slos_break_counts_for_five() -> None:
    calm = [arrival(float(at)) for at in range(2000)]
    burst = [arrival(1000.0 + 0.001 * number) for number in range(12)]
    assert needed(*calm, now=NOW - 1.0) == 1
    assert needed(*calm, *burst, now=NOW + 1.0) == 7, "13 at once"
    assert needed(*calm, *burst, now=NOW + WINDOW - 1.0) == 7
    assert needed(*calm, *burst, now=NOW + WINDOW + 1.0) == 1


def test_one_in_a_hundred_may_be_late() -> None:
    twice = [arrival(NOW - 0.5 * number) for number in range(int(PART / 0.5))]
    assert needed(*twice, *[arrival(NOW - 10.0)] * 2) == 1, "one of 122 is late"
    assert needed(*twice, *[arrival(NOW - 10.0), arrival(NOW - 20.0)] * 2) == 2, "two of 124 are"


def test_what_is_late_even_alone_counts_as_without_an_slo() -> None:
    late = [arrival(NOW - 30.0, prompt=490)] * 30  # 0.5 s each
    assert needed(*late) == needed(*[replace(each, targets=NO_SLO) for each in late]) == 2
    assert needed(*late[:5], arrival(NOW - 40.0)) == 1
    slow = arrival(NOW - 1.0, generated=9, targets=SloTargets(tpot=0.01))
    assert needed(slow) == 1
    assert share_late_alone([slow, *late, *[arrival(NOW)] * 31], TIMES) == 0.5 and share_late_alone([], TIMES) == 0.0


def test_decodes_that_cannot_keep_their_target_together_need_more() -> None:
    """A token adds 1 ms to a step of 10 ms: ten are the most within 20 ms."""
    targets = SloTargets(ttft=5.0, itl=0.02)
    assert needed(*[arrival(NOW - 60.0, prompt=10, generated=500, targets=targets)] * 6) == 1
    assert needed(*[arrival(NOW - 60.0, prompt=10, generated=500, targets=targets)] * 30) > 2


def test_without_an_slo_the_wait_is_bounded() -> None:
    prompts = [arrival(NOW - 30.0, prompt=990, targets=NO_SLO)] * 10  # 1 s each
    assert LONGEST_WAIT == 10.0 and needed(*prompts) == 1
    assert needed(*prompts * 2) == 2


def test_unfinished_requests_are_taken_to_be_as_long_as_others() -> None:
    ended = [arrival(NOW - 299.0, prompt=10, generated=200, targets=SloTargets(ttft=5.0, itl=0.02))]
    begun = [
        Arrival(NOW - 60.0 + 0.5 * number, 10, max_tokens=4000, targets=SloTargets(ttft=5.0, itl=0.02), num_generated=3)
        for number in range(20)
    ]
    assert needed(*ended, *begun) < needed(*begun), "without any that has ended, as long as they may be"


@pytest.mark.parametrize("seed", range(5))
def test_more_arrivals_never_need_fewer(seed: int) -> None:
    random = Random(seed)
    arrivals = [
        arrival(NOW - random.uniform(0.0, 60.0), prompt=random.randint(1, 180), generated=random.randint(1, 40))
        for _ in range(400)
    ]
    counts = [needed(*arrivals[:most]) for most in (50, 100, 200, 400)]
    assert counts == sorted(counts) and counts[0] < counts[-1]


@pytest.mark.parametrize("seed", range(5))
def test_a_guess_changes_nothing(seed: int) -> None:
    random = Random(seed)
    arrivals = [arrival(NOW - random.uniform(0.0, 60.0), prompt=random.randint(1, 180)) for _ in range(300)]
    counts = {replicas_needed(arrivals, TIMES, now=NOW, guess=guess) for guess in (1, 2, 5, 9, 40)}
    assert len(counts) == 1


@pytest.mark.parametrize("most", range(1, 6))
@pytest.mark.parametrize("guess", [1, 3, 9])
def test_a_bound_changes_nothing_below_it(most: int, guess: int) -> None:
    for count in range(1, 14):
        crowd = [arrival(NOW - 1.0)] * count
        assert replicas_needed(crowd, TIMES, now=NOW, guess=guess, most=most) == min(-(-count // 2), most)


def test_decodes_that_leave_no_time_for_prompts_end_first() -> None:
    targets = SloTargets(ttft=5.0, itl=0.0205)  # ten decodes leave a little of a step, eleven nothing
    assert needed(*[arrival(NOW - 60.0, prompt=10, generated=500, targets=targets)] * 30) > 2


def test_the_minute_that_warms_up_is_not_judged() -> None:
    crowd = [arrival(NOW - 100.0)] * 9
    calm = [arrival(NOW - 50.0 + number) for number in range(40)]
    assert replicas_needed([*crowd, *calm], TIMES, now=NOW, window=120.0) == 5
    assert replicas_needed([*crowd, *calm], TIMES, now=NOW, window=120.0, warm_up=60.0) == 1
    assert replicas_needed(crowd, TIMES, now=NOW, window=120.0, warm_up=60.0) == 0


# With those that will come while one starts ---------------------------------------------------------------------------


def steady(rate: float, *, since: float, until: float, ttft: float = 2.5) -> list[Arrival]:
    """Prompts of 0.9 s, evenly."""
    times = (since + number / rate for number in range(int(rate * (until - since))))
    return [arrival(at, prompt=890, targets=SloTargets(ttft=ttft)) for at in times]


def wanted(arrivals: list[Arrival], *, now: float = NOW, least: int = 1, most: int = 99, start: float = 60.0) -> int:
    return replicas_wanted(
        arrivals, TIMES, now=now, num_replicas=2, start_seconds=start, least=least, most=most, in_time=0.95
    )


def test_a_steady_load_needs_what_it_needed() -> None:
    arrivals = steady(2.5, since=NOW - WINDOW, until=NOW)
    assert wanted(arrivals) == replicas_needed(arrivals, TIMES, now=NOW) == 3


def test_between_the_bounds() -> None:
    assert wanted([]) == 1 and wanted([], least=2) == 2
    arrivals = steady(2.5, since=NOW - WINDOW, until=NOW)
    assert (wanted(arrivals, most=2), wanted(arrivals, least=5)) == (2, 5)


def test_a_load_that_is_late_even_alone_has_its_replicas() -> None:
    assert wanted(steady(2.5, since=NOW - WINDOW, until=NOW, ttft=0.3)) == 3


def test_no_more_are_tried_than_there_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    num_made = 0

    def make(*arguments: Any, **how: Any) -> VirtualReplica:
        nonlocal num_made
        num_made += 1
        return VirtualReplica(*arguments, **how)

    monkeypatch.setattr(capacity, "VirtualReplica", make)
    crowd = [arrival(NOW - 1.0)] * 99
    assert wanted(crowd, most=4) == 4
    assert num_made == 2 + 3, "two by the guess, then one more, and four are enough or the most"


def test_a_surge_is_met_before_it_breaks_the_slo() -> None:
    """Two replicas serve 2.1/s: at 2.6 the first are late after some time, and one more takes longer to start."""
    before = steady(1.0, since=NOW - WINDOW, until=NOW - SURGE, ttft=4.5)
    arrivals = [*before, *steady(2.6, since=NOW - SURGE, until=NOW, ttft=4.5)]
    assert replicas_needed(arrivals, TIMES, now=NOW, in_time=0.95) == 2 < wanted(arrivals) == 3
    assert wanted(arrivals, start=1.0) == 2, "if one starts at once, there is time"


def test_a_few_more_by_chance_are_no_surge() -> None:
    random, more = Random(1), 0
    for _ in range(8):
        times = [random.uniform(NOW - WINDOW, NOW) for _ in range(int(0.8 * WINDOW))]
        arrivals = [arrival(at, prompt=890, targets=SloTargets(ttft=5.0)) for at in times]
        more += wanted(arrivals) - replicas_needed(arrivals, TIMES, now=NOW, in_time=0.95)
    assert more <= 2


def test_one_fewer_is_wanted_only_after_the_window() -> None:
    arrivals = [*steady(2.5, since=NOW - WINDOW, until=NOW), *steady(0.5, since=NOW, until=NOW + 2 * WINDOW)]
    for later, count in ((0.0, 3), (200.0, 3), (WINDOW + 1.0, 1)):
        assert wanted([each for each in arrivals if each.at <= NOW + later], now=NOW + later) == count
