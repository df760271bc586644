"""Turns a recording into results, as if a client had measured them at the engine."""

from __future__ import annotations

from splitfuse.bench.results import MeasuredRequest, Point, Results
from splitfuse.core.request import FinishReason
from splitfuse.recording.format import Recording
from splitfuse.recording.requests import RecordedRequest, read_requests


def recorded_results(recording: Recording, *, prompt_speed: float) -> Results:
    """Return the results of the requests that came and generated while a recording was written.

    Raises RecordingError.
    """
    found = read_requests(recording.frames())
    requests = [each for each in found if each.detail.pooling is None and not each.was_running]
    first = min((each.request.sent_time for each in requests), default=0.0)
    records = tuple(_measured(number, each, first) for number, each in enumerate(requests))
    end = max((record.done for record in records), default=0.0)
    point = Point(None, None, (0.0, max(end, 1e-9) * (1 + 1e-9)), records)
    about = {"engine": recording.header.settings, "machine": recording.header.machine}
    system = f"{recording.path.name}, recorded"
    return Results(system, {"kind": "recording"}, (point,), prompt_speed=prompt_speed, about=about)


def _measured(number: int, request: RecordedRequest, first: float) -> MeasuredRequest:
    times = tuple(time - first for time in request.token_times[: request.num_output_tokens])
    failed = request.end is not None and request.end.reason is FinishReason.ERROR
    prompt = request.request.num_prompt_tokens
    return MeasuredRequest(number, request.request.sent_time - first, prompt, times, "it failed" if failed else None)
