"""The SLO of a request, as its tokens come."""

import math

import pytest

from splitfuse.core.request import Request
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.scheduling_options import SchedulingOptions
from splitfuse.core.slo.request_slo import MISSED_ITL_FACTOR
from splitfuse.core.slo.targets import SloTargets, SloViolation
from splitfuse.errors import InvalidRequestError

ITL = 0.25


def request(**targets: float) -> Request:
    scheduling = SchedulingOptions(targets=SloTargets(**targets), arrival_time=10.0)
    return Request("r", (1,) * 8, SamplingParams(), 64, seed=0, scheduling=scheduling)


def come(request: Request, *times: float) -> Request:
    for time in times:
        request.slo.observe_token(time)
    return request


def test_a_first_token_after_its_deadline_misses_the_slo() -> None:
    assert come(request(ttft=1.0), 11.0).slo.met is True
    late = come(request(ttft=1.0, itl=ITL), 11.5)
    assert late.slo.met is False and late.slo.violation == SloViolation(ttft=1.5, ttft_target=1.0)
    assert late.slo.deadline == pytest.approx(11.5 + MISSED_ITL_FACTOR * ITL)


def test_the_first_gap_is_its_own_average() -> None:
    assert come(request(itl=ITL), 11.0, 11.24).slo.met is True
    assert come(request(itl=ITL), 11.0, 11.26).slo.met is False


def test_a_long_gap_is_forgiven_and_a_row_of_them_is_not() -> None:
    stream = come(request(itl=ITL), 11.0, 11.1, 11.2, 11.3, 11.8)  # on average 0.2 s
    assert stream.slo.met is True and stream.slo.violation is None and stream.slo.deadline > 11.8 + ITL
    come(stream, 12.3, 12.8)
    missed = stream.slo.violation
    assert stream.slo.met is False and missed is not None and missed.ttft is None
    assert missed.average_gap is not None
    assert missed.itl_target == ITL < missed.average_gap < missed.longest_gap == pytest.approx(0.5)
    come(stream, *(12.8 + 0.01 * n for n in range(1, 40)))  # what was broken stays so
    assert stream.slo.met is False and stream.slo.violation == missed


def test_without_targets_nothing_is_missed() -> None:
    free = come(request(), 50.0, 90.0)
    assert free.slo.met is None and free.slo.deadline == math.inf and free.slo.violation is None
    assert come(request(ttft=100.0), 50.0, 90.0).slo.met is True


def test_a_mean_may_be_behind_and_catch_up() -> None:
    stream = come(request(ttft=1.0, tpot=0.1), 10.5, 10.75)
    assert stream.slo.met is False and not stream.slo.missed
    assert stream.slo.violation == SloViolation(mean_gap=0.25, tpot_target=0.1)
    assert stream.slo.deadline == pytest.approx(10.7)  # which has passed: no next gap alone mends it
    come(stream, 10.76, 10.77, 10.78)
    assert stream.slo.met is True and stream.slo.violation is None


def test_of_two_targets_the_earlier_deadline_counts() -> None:
    stream = come(request(itl=0.2, tpot=0.05), 11.0)
    assert stream.slo.itl_target == 0.05 and stream.slo.deadline == pytest.approx(11.05)
    come(stream, 11.01)
    assert stream.slo.deadline == pytest.approx(11.10)


def test_a_percentile_without_itl_or_out_of_bounds_is_refused() -> None:
    for targets, words in (({"itl_percentile": 99}, "give both"), ({"itl": 0.1, "itl_percentile": 100}, "not 100")):
        with pytest.raises(InvalidRequestError, match=words):
            SloTargets(**targets)
