"""Does the arithmetic of a benchmark: inter-token latencies, SLO attainment, goodput, throughput, percentiles.

Pure functions. The SLO is that of DeepSpeed-FastGen (arXiv 2401.08671, section 4.2): the first token arrives within
`prompt tokens / 512` seconds (a slower machine sets a lower prompt speed), and at every token the exponential moving
average of the inter-token latency is below `1 / speed` seconds, for the SLO of a speed in tokens/s. Besides, requests
are judged by any targets, as a server judges them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from splitfuse.core.slo.gaps import SPAN, MovingAverage
from splitfuse.core.slo.request_slo import RequestSlo
from splitfuse.core.slo.targets import SloTargets, SloViolation

if TYPE_CHECKING:
    from splitfuse.bench.results import MeasuredRequest, Point

PROMPT_TOKENS_PER_SECOND = 512.0
"""Prompt speed of the SLO, from which the TTFT target follows."""
SPEEDS = (2.0, 4.0, 6.0)
"""Generation speeds of the SLO, in tokens/s."""


def gaps(record: MeasuredRequest) -> list[float]:
    """Return the inter-token latencies in seconds; k tokens of one event are one gap and k - 1 zeros.

    >>> gaps(MeasuredRequest(0, 0.0, 8, (1.0, 1.5, 1.5)))
    [0.5, 0.0]
    """
    return [later - earlier for earlier, later in pairwise(record.token_times)]


def moving_averages(values: Iterable[float], *, span: int = SPAN) -> list[float]:
    """Return the exponential moving average after each value, as pandas' `ewm(span=span).mean()`."""
    average = MovingAverage(span)
    return [average.add(value) for value in values]


def ttft(record: MeasuredRequest) -> float:
    """Return the time to first token (TTFT) in seconds; infinite if no token arrived."""
    return record.token_times[0] - record.sent if record.token_times else math.inf


def meets_ttft(record: MeasuredRequest, prompt_speed: float = PROMPT_TOKENS_PER_SECOND) -> bool:
    """Return whether the first token arrived within `prompt tokens / prompt_speed` seconds."""
    return ttft(record) <= record.num_prompt_tokens / prompt_speed


def meets_speed(record: MeasuredRequest, speed: float, prompt_speed: float = PROMPT_TOKENS_PER_SECOND) -> bool:
    """Return whether the request met the SLO at `speed` tokens/s; a failed request did not."""
    return (
        record.error is None
        and meets_ttft(record, prompt_speed)
        and all(average < 1.0 / speed for average in moving_averages(gaps(record)))
    )


def meets_slo(record: MeasuredRequest, targets: SloTargets) -> bool:
    """Return whether the request met all of these targets; a failed request did not."""
    if not _succeeded(record):
        return False
    return slo_violation(record, targets) is None


def slo_violation(record: MeasuredRequest, targets: SloTargets) -> SloViolation | None:
    """Return which targets a request missed, and by how much; None if it missed none with the tokens that came."""
    slo = RequestSlo(targets, arrival_time=record.sent, num_prompt_tokens=record.num_prompt_tokens)
    for time in record.token_times:
        slo.observe_token(time)
    return slo.violation


def seconds(point: Point) -> float:
    """Return the length of the window in seconds."""
    return point.window[1] - point.window[0]


def counted(point: Point) -> list[MeasuredRequest]:
    """Return the requests sent in the window, including those which failed."""
    start, end = point.window
    return [record for record in point.records if start <= record.sent < end]


def answered(point: Point) -> list[MeasuredRequest]:
    """Return the requests sent in the window which succeeded."""
    return [record for record in counted(point) if _succeeded(record)]


def throughput(point: Point) -> float:
    """Return requests/s by the clock: those whose last token arrived in the window, whenever they were sent."""
    start, end = point.window
    return sum(_succeeded(record) and start <= record.done < end for record in point.records) / seconds(point)


def token_throughput(point: Point) -> float:
    """Return generated tokens/s: the tokens that arrived in the window."""
    start, end = point.window
    return sum(start <= time < end for record in point.records for time in record.token_times) / seconds(point)


def goodput(point: Point, speed: float, prompt_speed: float = PROMPT_TOKENS_PER_SECOND) -> float:
    """Return the requests/s, of those sent in the window, which met the SLO (the paper's effective throughput).

    In an open loop more requests may arrive than are served: goodput is then SLO attainment times throughput.
    """
    return _per_second(point, lambda record: meets_speed(record, speed, prompt_speed))


def slo_goodput(point: Point, targets: SloTargets) -> float:
    """Return the requests/s, of those sent in the window, which met these targets; counted as by `goodput`."""
    return _per_second(point, lambda record: meets_slo(record, targets))


def _per_second(point: Point, is_met: Callable[[MeasuredRequest], bool]) -> float:
    records = counted(point)
    met = float(sum(map(is_met, records)))
    if point.clients is None and records:
        start, end = point.window
        met *= sum(start <= record.done < end for record in point.records) / len(records)
    return met / seconds(point)


def littles_law(point: Point) -> float | None:
    """Return requests/s as clients / mean latency, which the original reports as throughput.

    None in an open loop, or if no request succeeded. Agrees with the clock if the load is steady and nothing failed.
    """
    records = answered(point)
    if point.clients is None or not records:
        return None
    return point.clients / mean([record.done - record.sent for record in records])


def _succeeded(record: MeasuredRequest) -> bool:
    return record.error is None and bool(record.token_times)


def mean(values: Sequence[float]) -> float:
    """Return the mean; NaN of no values."""
    return math.fsum(values) / len(values) if values else math.nan


def percentile(values: Sequence[float], percent: float) -> float:
    """Return a percentile, interpolated linearly between the two nearest values as numpy does; NaN of no values."""
    if not values:
        return math.nan
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100.0
    low = math.floor(place)
    below, above = ordered[low], ordered[min(low + 1, len(ordered) - 1)]
    return below if below == above else below + (above - below) * (place - low)
