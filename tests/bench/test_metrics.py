"""Metrics of benchmarks: properties, and definitions that are computed in another way."""

import math
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitfuse.bench import metrics
from splitfuse.bench.results import MeasuredRequest, Point
from splitfuse.core.slo.gaps import SPAN

SECONDS = st.floats(0.0, 100.0)
GAPS = st.lists(SECONDS, max_size=60)


def record(gaps: list[float], *, first: float = 0.1, prompt: int = 512, sent: float = 0.0) -> MeasuredRequest:
    times = [sent + first]
    for gap in gaps:
        times.append(times[-1] + gap)
    return MeasuredRequest(0, sent, prompt, tuple(times))


def average_by_definition(values: list[float], span: int) -> list[float]:
    """The weighted mean of all values so far, each sum from nothing."""
    keep = 1 - 2 / (span + 1)
    averages = []
    for end in range(1, len(values) + 1):
        weights = [keep ** (end - 1 - i) for i in range(end)]
        averages.append(math.fsum(w * v for w, v in zip(weights, values, strict=False)) / math.fsum(weights))
    return averages


@given(GAPS, st.integers(1, 40))
def test_moving_average_equals_its_definition(values: list[float], span: int) -> None:
    assert metrics.moving_averages(values, span=span) == pytest.approx(average_by_definition(values, span), abs=1e-9)


def test_moving_average_of_known_numbers() -> None:
    # As pandas.Series([1, 0, 0, 4]).ewm(span=3).mean() prints them: weights 1, 1/2, 1/4, 1/8.
    assert metrics.moving_averages([1, 0, 0, 4], span=3) == pytest.approx([1, 1 / 3, 1 / 7, (4 + 1 / 8) / (15 / 8)])


def random_trace(random: Random) -> MeasuredRequest:
    """Lengths from 1, bursts of several tokens in one event, pauses."""
    times = [random.expovariate(1.0)]
    scale = math.exp(random.uniform(-4, 0))
    for _ in range(random.randint(0, 200)):
        pause = random.expovariate(1 / scale) + (random.random() < 0.03) * random.expovariate(1.0)
        times.append(times[-1] + pause * (random.random() < 0.8))
    return MeasuredRequest(0, 0.0, random.randint(1, 3000), tuple(times))


def test_moving_average_equals_pandas() -> None:
    pandas = pytest.importorskip("pandas", reason="the oracle is pandas, which is not one of our dependencies")
    random = Random(0)
    for _ in range(1000):
        record = random_trace(random)
        gaps = metrics.gaps(record)
        expected = pandas.Series(gaps, dtype=float).ewm(span=SPAN).mean()
        assert metrics.moving_averages(gaps) == pytest.approx(list(expected), abs=1e-9)
        first_token_in_time = record.token_times[0] <= record.num_prompt_tokens / 512
        for speed in metrics.SPEEDS:
            assert metrics.meets_speed(record, speed) == (first_token_in_time and bool((expected < 1 / speed).all())), (
                record
            )


@given(GAPS)
def test_moving_average_lies_between_the_values(values: list[float]) -> None:
    for end, average in enumerate(metrics.moving_averages(values), start=1):
        assert min(values[:end]) - 1e-9 <= average <= max(values[:end]) + 1e-9


@given(GAPS, st.floats(0.1, 20), st.floats(0.1, 20))
def test_meeting_an_slo_implies_meeting_a_lower_one(values: list[float], one: float, other: float) -> None:
    low, high = sorted((one, other))
    request = record(values)
    assert metrics.meets_speed(request, low) or not metrics.meets_speed(request, high)


@given(GAPS)
def test_tokens_of_one_event_are_one_gap_and_zeros(values: list[float]) -> None:
    times = tuple(time for time in record(values).token_times for _ in range(3))
    gaps = metrics.gaps(MeasuredRequest(0, 0.0, 512, times))
    one_by_one = [later - earlier for earlier, later in pairwise(record(values).token_times)]
    assert gaps == [0.0, 0.0, *(part for gap in one_by_one for part in (gap, 0.0, 0.0))]


@pytest.mark.parametrize(
    ("gaps", "speed", "met"),
    [
        ([], 2.0, True),  # one token: there is nothing between tokens
        ([0.49] * 20, 2.0, True),
        ([0.5] * 20, 2.0, False),  # below, not at
        ([0.51], 2.0, False),  # at every token, the first gap too
        ([0.01] * 60 + [5.0], 2.0, False),
        ([0.01] * 60 + [4.0], 2.0, True),  # 2/17 of 4 s and 15/17 of 0.01 s are 0.479 s
        ([0.01] * 60 + [4.0] + [0.01] * 60, 2.0, True),
    ],
)
def test_slo_of_inter_token_latency(gaps: list[float], speed: float, met: bool) -> None:
    assert metrics.meets_speed(record(gaps), speed) is met


def test_slo_of_ttft() -> None:
    assert metrics.meets_ttft(record([], first=2.0, prompt=1024))
    assert not metrics.meets_ttft(record([], first=2.001, prompt=1024))
    assert not metrics.meets_speed(MeasuredRequest(0, 0.0, 1024, ()), 2.0)
    assert not metrics.meets_speed(MeasuredRequest(0, 0.0, 1024, (0.1,), "status 500"), 2.0)


def point(*records: MeasuredRequest, window: tuple[float, float], clients: int | None = 1) -> Point:
    return Point(clients, None if clients else 1.0, window, records)


@given(st.integers(1, 8), st.lists(st.floats(0.05, 5.0), min_size=4, max_size=40), st.data())
def test_steady_closed_loop_has_goodput_equal_to_throughput(
    clients: int, latencies: list[float], data: st.DataObject
) -> None:
    """Each client sends when it is answered: sent and done are as many, in any window between two sendings."""
    records = []
    for client in range(clients):
        now = data.draw(st.floats(0.0, 1.0))
        for latency in latencies:
            records.append(MeasuredRequest(client, now, 512 * 100, (now + latency,)))
            now += latency
    sent = sorted({r.sent for r in records if r.sent > max(x.sent for x in records[:: len(latencies)])})
    last = min(r.done for r in records[len(latencies) - 1 :: len(latencies)])  # until the first client stops
    sent = [time for time in sent if time < last]
    if len(sent) < 2:
        return
    one = point(*records, window=(sent[0], sent[-1]), clients=clients)
    assert metrics.throughput(one) == pytest.approx(len(metrics.counted(one)) / metrics.seconds(one))
    assert metrics.goodput(one, 2.0) == pytest.approx(metrics.throughput(one))


def test_throughput_by_the_clock_and_by_littles_law() -> None:
    records = [MeasuredRequest(0, float(i), 512, (i + 0.5, i + 1.0)) for i in range(10)]
    steady = point(*records, window=(2.0, 6.0))
    assert metrics.throughput(steady) == 1.0
    assert metrics.littles_law(steady) == 1.0
    assert metrics.token_throughput(steady) == 2.0
    assert metrics.goodput(steady, 1.0) == 1.0
    assert metrics.goodput(steady, 2.0) == 0.0  # gaps of half a second
    failed = point(*records[:5], MeasuredRequest(0, 5.0, 512, (), "status 500"), window=(2.0, 6.0))
    assert metrics.goodput(failed, 1.0) == 0.75
    assert len(metrics.counted(failed)) == 4 and len(metrics.answered(failed)) == 3


def test_open_loop_that_falls_behind() -> None:
    """Ten requests arrive in ten seconds and two finish in them: two are served, though all meet the SLO in the end."""
    records = [MeasuredRequest(i, float(i), 512 * 60, (5.0 * (i + 1) - 1,)) for i in range(10)]
    overloaded = point(*records, window=(0.0, 10.0), clients=None)
    assert metrics.throughput(overloaded) == metrics.goodput(overloaded, 2.0) == 0.2
    assert metrics.littles_law(overloaded) is None


@given(st.lists(SECONDS, min_size=1), st.floats(0, 100))
def test_percentiles_lie_between_the_values_and_grow(values: list[float], percent: float) -> None:
    here = metrics.percentile(values, percent)
    assert min(values) <= here <= max(values)
    assert metrics.percentile(values, 0) <= here <= metrics.percentile(values, 100)
    below = sum(value < here for value in values)
    assert below <= percent / 100 * (len(values) - 1) + 1


def test_percentiles_of_known_numbers() -> None:
    assert metrics.percentile([4, 1, 3, 2], 50) == 2.5
    assert metrics.percentile([1, 2, 3, 4, 5], 95) == pytest.approx(4.8)
    assert math.isnan(metrics.percentile([], 50)) and math.isnan(metrics.mean([]))
