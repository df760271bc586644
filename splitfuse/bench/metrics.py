"""The arithmetic of a benchmark: gaps, promises kept, throughput by the clock, percentiles. Pure functions.

The promises are those of DeepSpeed-FastGen (arXiv 2401.08671, section 4.2): the first token comes within
`prompt tokens / 512` seconds (or another speed: slower machines promise less), and at every token the exponential
moving average of the gaps between tokens stays below `1 / SLA` seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from splitfuse.core.slo.targets import SPAN, MovingAverage, SloTargets

if TYPE_CHECKING:
    from splitfuse.bench.results import Point, RequestRecord

PROMPT_TOKENS_PER_SECOND = 512.0
SLAS = (2.0, 4.0, 6.0)
"""Tokens a second that a reader is promised."""


def gaps(record: RequestRecord) -> list[float]:
    """Seconds between each token and the next. k tokens that came in one event are one gap and k - 1 zeros."""
    times = record.token_times
    return [later - earlier for earlier, later in pairwise(times)]


def moving_averages(values: Iterable[float], *, span: int = SPAN) -> list[float]:
    """The exponential moving average after each value."""
    average = MovingAverage(span)
    return [average.add(value) for value in values]


def first_token_seconds(record: RequestRecord) -> float:
    """From sending to the first token; infinite if none came."""
    return record.token_times[0] - record.sent if record.token_times else math.inf


def meets_ttft(record: RequestRecord, prompt_speed: float = PROMPT_TOKENS_PER_SECOND) -> bool:
    """Whether the first token came within `prompt tokens / prompt_speed` seconds."""
    return first_token_seconds(record) <= record.num_prompt_tokens / prompt_speed


def meets_sla(record: RequestRecord, sla: float, prompt_speed: float = PROMPT_TOKENS_PER_SECOND) -> bool:
    """Whether the request kept both promises at `sla` tokens a second. One that failed kept none."""
    return (
        record.error is None
        and meets_ttft(record, prompt_speed)
        and all(average < 1.0 / sla for average in moving_averages(gaps(record)))
    )


def meets_slo(record: RequestRecord, targets: SloTargets) -> bool:
    """Whether the request met all of its targets. One that failed did not."""
    return (
        _succeeded(record)
        and first_token_seconds(record) <= targets.ttft_target(record.num_prompt_tokens)
        and (targets.itl is None or all(average <= targets.itl for average in moving_averages(gaps(record))))
    )


def seconds(point: Point) -> float:
    """Length of the window."""
    return point.window[1] - point.window[0]


def counted(point: Point) -> list[RequestRecord]:
    """The requests that were sent in the window, those that failed among them."""
    start, end = point.window
    return [record for record in point.records if start <= record.sent < end]


def answered(point: Point) -> list[RequestRecord]:
    """Those of them that did not fail."""
    return [record for record in counted(point) if _succeeded(record)]


def throughput(point: Point) -> float:
    """Requests a second by the clock: those whose last token came in the window, whenever they were sent."""
    start, end = point.window
    return sum(_succeeded(record) and start <= record.done < end for record in point.records) / seconds(point)


def token_throughput(point: Point) -> float:
    """Generated tokens a second: those that came in the window."""
    start, end = point.window
    return sum(start <= time < end for record in point.records for time in record.token_times) / seconds(point)


def goodput(point: Point, sla: float, prompt_speed: float = PROMPT_TOKENS_PER_SECOND) -> float:
    """Requests a second that kept both promises, of those sent in the window.

    In an open loop more may be sent than are served: there it is the share that kept them, of as many as ended.
    """
    records = counted(point)
    kept = float(sum(meets_sla(record, sla, prompt_speed) for record in records))
    if point.clients is None and records:
        start, end = point.window
        kept *= sum(start <= record.done < end for record in point.records) / len(records)
    return kept / seconds(point)


def littles_law(point: Point) -> float | None:
    """Requests a second as clients / mean latency, which the original reports as throughput; None in an open loop, or
    if nothing was answered. It agrees with the clock if the load was steady and nothing failed.
    """
    records = answered(point)
    if point.clients is None or not records:
        return None
    return point.clients / mean([record.done - record.sent for record in records])


def _succeeded(record: RequestRecord) -> bool:
    return record.error is None and bool(record.token_times)


def mean(values: Sequence[float]) -> float:
    """NaN for none."""
    return math.fsum(values) / len(values) if values else math.nan


def percentile(values: Sequence[float], percent: float) -> float:
    """Between the two nearest values in proportion, as numpy's default; NaN for none."""
    if not values:
        return math.nan
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100.0
    low = math.floor(place)
    below, above = ordered[low], ordered[min(low + 1, len(ordered) - 1)]
    return below if below == above else below + (above - below) * (place - low)
