"""Turns a recording into results, as if a client had measured them at the engine."""

from __future__ import annotations

from splitfuse.bench.results import MeasuredRequest, Point, Results
from splitfuse.core.request_output import FinishReason
from splitfuse.core.slo.cost_model import CostModel, StepFeatures
from splitfuse.engine.trace import PLAIN, StepTrace
from splitfuse.recording.format import Recording, Records
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


def step_ratios(recording: Recording, cost: CostModel) -> list[float]:
    """Return the time of each recorded step as a multiple of what a cost model predicts for it."""
    ratios = []
    for frame in recording.frames():
        for step in frame.records if isinstance(frame, Records) else ():
            if isinstance(step, StepTrace) and step.chunks:
                features = StepFeatures()
                for chunk in step.chunks:
                    rows = (chunk.detail or PLAIN).num_logits
                    features = features.plus(start=chunk.start, count=chunk.num_tokens, rows=rows)
                ratios.append((step.end_time - step.start_time) / max(cost.seconds(features), 1e-9))
    return ratios


def _measured(number: int, request: RecordedRequest, first: float) -> MeasuredRequest:
    times = tuple(time - first for time in request.token_times[: request.num_output_tokens])
    failed = request.end is not None and request.end.reason is FinishReason.ERROR
    prompt = request.request.num_prompt_tokens
    return MeasuredRequest(number, request.request.sent_time - first, prompt, times, "it failed" if failed else None)
