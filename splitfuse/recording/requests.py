"""Reads what became of each request from the frames of a recording, or of an engine that is traced now."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from splitfuse.core.request_output import FinishReason
from splitfuse.engine.trace import FinishTrace, PreemptTrace, RequestDetail, RequestTrace, StepTrace
from splitfuse.errors import RecordingError
from splitfuse.recording.format import EngineEnd, EngineStart, Frame, Records


@dataclass
class RecordedRequest:
    """Describes one request, and what it was given while it was recorded. Times are on the monotonic clock."""

    engine: int
    request: RequestTrace
    detail: RequestDetail
    token_ids: list[int] = field(default_factory=list)
    """Tokens that it was given, without those that it had when the file began."""
    token_times: list[float] = field(default_factory=list)
    num_cached: int = 0
    """Tokens of its prompt that it found in the prefix cache."""
    num_preemptions: int = 0
    end: FinishTrace | None = None
    """Its end; None: it was unfinished at the end of the file, or when its engine died."""
    is_begun: bool = False

    @property
    def was_running(self) -> bool:
        """Return whether it had tokens when the file began."""
        return bool(self.detail.output_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Return how many tokens its caller kept of those that it was given while it was recorded."""
        if self.end is None:
            return len(self.token_ids)
        kept = self.end.num_output_tokens - len(self.detail.output_token_ids)
        return min(max(kept, 0), len(self.token_ids))  # a file can say anything

    def go_on(self, output_token_ids: Sequence[int]) -> None:
        """Note that another engine goes on behind these tokens: what is recorded may have more or fewer of them."""
        self.token_ids = list(output_token_ids[len(self.detail.output_token_ids) :])
        last = self.token_times[-1] if self.token_times else self.request.sent_time
        self.token_times += [last] * (len(self.token_ids) - len(self.token_times))
        del self.token_times[len(self.token_ids) :]

    @property
    def given_up_time(self) -> float | None:
        """Return when its caller gave it up; None if that did not happen."""
        if self.end is None or self.end.reason is not FinishReason.ABORT:
            return None
        return self.end.time if self.end.wanted_until is None else self.end.wanted_until


def read_requests(frames: Iterable[Frame]) -> list[RecordedRequest]:
    """Return all requests in the order in which they were told; one that went on at another engine is one. Raises
    RecordingError for frames without plans, or with times that are none.
    """
    found: list[RecordedRequest] = []
    unfinished: dict[tuple[int, int], RecordedRequest] = {}
    left: dict[str, RecordedRequest] = {}  # by id: their engine has died
    for frame in frames:
        if isinstance(frame, EngineStart | EngineEnd):
            for key in [key for key in unfinished if key[0] == frame.engine]:
                dead = unfinished.pop(key)
                left[dead.request.request_id] = dead
        elif isinstance(frame, Records):
            for record in frame.records:
                match record:
                    case RequestTrace():
                        if record.detail is None:
                            raise RecordingError(f"the request {record.request_id!r:.80} has no prompt and parameters")
                        _check_times(record.sent_time)
                        request = left.pop(record.request_id, None)
                        if request is not None and request.detail.prompt_token_ids == record.detail.prompt_token_ids:
                            request.go_on(record.detail.output_token_ids)
                            unfinished[frame.engine, record.number] = request
                            continue
                        found.append(RecordedRequest(frame.engine, record, record.detail))
                        unfinished[frame.engine, record.number] = found[-1]
                    case StepTrace():
                        _take_step(record, frame.engine, unfinished)
                    case PreemptTrace():
                        if (request := unfinished.get((frame.engine, record.number))) is not None:
                            request.num_preemptions += 1
                    case FinishTrace():
                        if (request := unfinished.pop((frame.engine, record.number), None)) is not None:
                            _check_times(record.time, record.wanted_until or 0.0)
                            if record.reason is FinishReason.MOVED:
                                left[request.request.request_id] = request
                            else:
                                request.end = record
    return found


def _check_times(*times: float) -> None:
    for time in times:
        if not math.isfinite(time):
            raise RecordingError(f"a record has the time {time}; it must be a number of seconds")


def _take_step(step: StepTrace, engine: int, unfinished: dict[tuple[int, int], RecordedRequest]) -> None:
    _check_times(step.end_time)
    for chunk in step.chunks:
        if (request := unfinished.get((engine, chunk.number))) is not None:
            if not request.is_begun:
                request.is_begun, request.num_cached = True, 0 if request.was_running else chunk.start
            request.token_ids += chunk.token_ids
            request.token_times += [step.end_time] * len(chunk.token_ids)
