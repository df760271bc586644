"""Translates times between two machines, whose monotonic clocks have begun at different moments.

An exchange of messages has four times: sent and received by the one, received and sent by the other. Whatever the way
took is in the round trip, and half of it is how wrong the difference of the clocks can be. Clocks drift apart, so of
the newest exchanges that with the shortest round trip counts.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import msgspec

from splitfuse.core.request_output import RequestOutput
from splitfuse.core.scheduling_options import SchedulingOptions
from splitfuse.engine.messages import Add, Command, Finish, Report, StepReport, Traced
from splitfuse.engine.trace import (
    BlockMap,
    FinishTrace,
    PhaseTrace,
    PreemptTrace,
    RequestTrace,
    StepTrace,
    TraceRecord,
)

NUM_EXCHANGES = 32
"""Number of newest exchanges of which the best counts."""


class ClockDifference:
    """Knows how far the clock of another machine is ahead of ours.

    difference = ClockDifference()
    difference.note(sent=10.0, received=510.1, answered=510.2, back=10.3)
    difference.seconds  # 500.0
    """

    def __init__(self) -> None:
        self._exchanges: deque[tuple[float, float]] = deque(maxlen=NUM_EXCHANGES)  # round trips and differences

    def note(self, *, sent: float, received: float, answered: float, back: float) -> None:
        """Take in an exchange: two times of the other clock between two of ours."""
        self._exchanges.append(((back - sent) - (answered - received), ((received - sent) + (answered - back)) / 2))

    @property
    def seconds(self) -> float:
        """Return the difference; 0 before the first exchange."""
        return min(self._exchanges, default=(0.0, 0.0))[1]


def shift_command(command: Command, seconds: float) -> Command:
    """Return a command with its times later by some seconds."""
    match command:
        case Add(sent=sent, resume_point=point):
            if point is not None:
                times = tuple(time + seconds for time in point.token_times)
                point = msgspec.structs.replace(point, token_times=times)
            return msgspec.structs.replace(
                command,
                sent=_later(sent, seconds),
                scheduling=_shift_scheduling(command.scheduling, seconds),
                resume_point=point,
            )
        case Finish(ended=ended):
            return msgspec.structs.replace(command, ended=_later(ended, seconds))
        case _:
            return command


def shift_report(report: Report, seconds: float) -> Report:
    """Return a report with its times later by some seconds."""
    match report:
        case StepReport(outputs=outputs, traced=traced):
            return msgspec.structs.replace(
                report,
                outputs=tuple(_shift_output(each, seconds) for each in outputs),
                traced=tuple(_shift_trace(each, seconds) for each in traced),
            )
        case Traced(records=records):
            return Traced(tuple(_shift_trace(each, seconds) for each in records))
        case _:
            return report


def _later(time: float | None, seconds: float) -> float | None:
    return None if time is None else time + seconds


def _shift_scheduling(options: SchedulingOptions, seconds: float) -> SchedulingOptions:
    if options.arrival_time is None:
        return options
    return replace(options, arrival_time=options.arrival_time + seconds)


def _shift_output(output: RequestOutput, seconds: float) -> RequestOutput:
    if (breakdown := output.latency_breakdown) is None:
        return output
    moved = replace(breakdown, opened=breakdown.opened + seconds, closed=breakdown.closed + seconds)
    return replace(output, latency_breakdown=moved)


def _shift_trace(record: TraceRecord, seconds: float) -> TraceRecord:
    change = msgspec.structs.replace
    match record:
        case StepTrace():
            return change(record, start_time=record.start_time + seconds, end_time=record.end_time + seconds)
        case RequestTrace(detail=detail):
            if detail is not None:
                detail = change(detail, scheduling=_shift_scheduling(detail.scheduling, seconds))
            return change(
                record,
                sent_time=record.sent_time + seconds,
                time=record.time + seconds,
                arrival_time=_later(record.arrival_time, seconds),
                detail=detail,
            )
        case FinishTrace():
            return change(record, time=record.time + seconds, wanted_until=_later(record.wanted_until, seconds))
        case PhaseTrace() | PreemptTrace() | BlockMap():
            return change(record, time=record.time + seconds)
