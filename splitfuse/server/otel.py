"""Sends a span of each request to an OpenTelemetry collector, with the attributes of the gen_ai conventions.

    spans = RequestSpans("storyteller")
    spans.follow(hub)
    ...
    spans.close()

Where spans go, which are sampled and how many may wait is set by the variables that OpenTelemetry has for it: see
docs/tracing.md. A span is made in the event loop when its request has ended, and sent by a thread of the SDK, some at
once; what a slow collector does not take is dropped and counted.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from typing import Any

from splitfuse.core.latency.phases import AFTER_ENGINE, BEFORE_ENGINE
from splitfuse.engine.client import EngineState, LocalClient
from splitfuse.engine.trace import FinishTrace, PreemptTrace, RequestTrace, TraceLevel
from splitfuse.errors import ConfigError
from splitfuse.server.explain import why_missed
from splitfuse.server.traces import EngineChange, EngineRecords, RequestEnd, TraceEvent, TraceHub
from splitfuse.version import __version__

OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
}
"""Names that the conventions have for what a route does; requests to other routes have no spans."""
QUEUE_SIZE = 2048
"""Number of spans that wait, unless OTEL_BSP_MAX_QUEUE_SIZE says otherwise."""
MAX_PREEMPTED = 4096
"""Number of running requests whose preemptions are remembered."""
SHUTDOWN_SECONDS = 5.0
"""Time to send what waits when the server ends."""


class RequestSpans:
    """Makes the spans of requests, and has them sent. Belongs to the event loop's thread."""

    def __init__(self, model: str, *, instance: str = "splitfuse", exporter: Any = None) -> None:
        """`exporter` takes the place of the one over HTTP.

        Raises ConfigError without the packages of `splitfuse[otel]`, and for variables that cannot be honoured.
        """
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ConfigError(
                f"otel needs OpenTelemetry's SDK and its exporter over HTTP ({error}): pip install 'splitfuse[otel]'"
            ) from error
        _check_variable("OTEL_TRACES_EXPORTER", "otlp")
        _check_variable("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
        _check_variable("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
        names = {"service.version": __version__, "service.instance.id": instance}
        if "OTEL_SERVICE_NAME" not in os.environ and "service.name=" not in os.environ.get(
            "OTEL_RESOURCE_ATTRIBUTES", ""
        ):
            names["service.name"] = "splitfuse"
        self._model = model
        self._queue_size = _queue_size()
        try:
            self._exporter = _CountingExporter(exporter or OTLPSpanExporter())
            processor = BatchSpanProcessor(self._exporter, max_queue_size=self._queue_size)
            provider = TracerProvider(resource=Resource.create(names), shutdown_on_exit=False)
        except ValueError as error:
            raise ConfigError(f"the OTEL_ variables in the environment cannot be used: {error}") from error
        provider.add_span_processor(processor)
        self._processor = processor
        self._tracer = provider.get_tracer("splitfuse", __version__)
        self._num_ended = self._num_overflowed = 0
        self._hub: TraceHub | None = None
        self._ids: dict[tuple[int, int], str] = {}  # of unfinished requests, by engine and number
        self._preempted: dict[str, list[float]] = {}  # times, by a request's id

    def follow(self, hub: TraceHub) -> None:
        """Make spans of the requests that a hub tells of."""
        self._hub = hub
        hub.subscribe(self._take, TraceLevel.REQUESTS)

    @property
    def num_dropped(self) -> int:
        """Return the number of spans that were not sent: too many waited, or the collector did not take them."""
        return self._num_overflowed + self._exporter.num_failed

    def close(self) -> None:
        """Send what waits, for some seconds at most. Blocks."""

        ending = threading.Thread(target=self._processor.shutdown, name="end of spans", daemon=True)
        ending.start()
        ending.join(SHUTDOWN_SECONDS)

    # Events ----------------------------------------------------------------------------------------------------------

    def _take(self, event: TraceEvent) -> None:
        match event:
            case EngineRecords():
                for record in event.records:
                    match record:
                        case RequestTrace():
                            self._ids[event.engine, record.number] = record.request_id.partition("-")[0]
                        case PreemptTrace():
                            self._preempt(self._ids.get((event.engine, record.number)), record.time)
                        case FinishTrace():
                            self._ids.pop((event.engine, record.number), None)
            case EngineChange(state=EngineState.DEAD):
                for place in [place for place in self._ids if place[0] == event.engine]:
                    del self._ids[place]
            case RequestEnd():
                self._end(event)

    def _preempt(self, unique_id: str | None, time: float) -> None:
        if unique_id is not None:
            self._preempted.setdefault(unique_id, []).append(time)
            if len(self._preempted) > MAX_PREEMPTED:
                del self._preempted[next(iter(self._preempted))]

    def _end(self, event: RequestEnd) -> None:
        """Make the spans of a request that has ended."""
        preempted = self._preempted.pop(event.unique_id, [])
        operation = OPERATIONS.get(event.record.route)
        if operation is None or event.context is None:
            return
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        record = event.record
        arrival = event.ended - record.total_seconds
        offset = time.time() - time.monotonic()
        headers = event.context.headers
        carrier = {
            name: headers[name.encode()].decode("latin-1")
            for name in ("traceparent", "tracestate", "baggage")
            if name.encode() in headers
        }
        model = self._model_of(event)
        span = self._tracer.start_span(
            f"{operation} {model}",
            context=extract(carrier),
            kind=SpanKind.SERVER,
            attributes=_attributes(event, operation, model),
            start_time=_nanoseconds(arrival + offset),
        )
        if not span.is_recording():
            return
        if record.time_to_first_token_seconds is not None:
            first = arrival + record.time_to_first_token_seconds
            span.add_event("first token", timestamp=_nanoseconds(first + offset))
        for each in preempted:
            span.add_event("preempted", timestamp=_nanoseconds(each + offset))
        if record.status >= 500 or "error" in record.finish_reasons:
            span.set_status(Status(StatusCode.ERROR, record.error or "a choice failed"))
        within = set_span_in_context(span)
        num_spans = 1
        for name, start, end in _stages(event, arrival):
            child = self._tracer.start_span(name, context=within, start_time=_nanoseconds(start + offset))
            child.end(_nanoseconds(end + offset))
            num_spans += 1
        span.end(_nanoseconds(event.ended + offset))
        if span.get_span_context().trace_flags.sampled:
            self._num_ended += num_spans
            waiting = self._num_ended - self._exporter.num_taken - self._num_overflowed
            self._num_overflowed += max(waiting - self._queue_size, 0)

    def _model_of(self, event: RequestEnd) -> str:
        assert event.context is not None
        adapter = event.context.adapter
        if adapter and self._hub is not None:
            return _adapter_name(self._hub.engines, adapter) or self._model
        return self._model


def _adapter_name(engines: Iterable[LocalClient], adapter: str) -> str | None:
    """Return the name that the adapter of a digest has at the first engine which has it; None if none has."""
    names = ((name, digest) for engine in engines for name, digest in engine.adapters.items())
    return next((name for name, digest in names if digest == adapter), None)


def _stages(event: RequestEnd, arrival: float) -> list[tuple[str, float, float]]:
    """Return the stages of a request at the engine, the first of its choices to reach each: name, start, end."""
    record, breakdown = event.record, event.breakdown
    if breakdown is None:
        return []
    end = event.ended - breakdown.seconds_in(AFTER_ENGINE)
    marks = [
        ("queue", breakdown.seconds_in(BEFORE_ENGINE)),
        ("prefill", record.queue_seconds),
        ("decode", record.time_to_first_token_seconds),
    ]
    begun = [(name, arrival + seconds) for name, seconds in marks if seconds is not None]
    ends = [*(start for _, start in begun[1:]), end]
    return [(name, start, max(start, stop)) for (name, start), stop in zip(begun, ends, strict=True)]


def _attributes(event: RequestEnd, operation: str, model: str) -> dict[str, Any]:
    """Return the attributes of a request's span: those of the conventions for gen_ai and HTTP, and our own."""
    context, record = event.context, event.record
    assert context is not None
    reasons = [reason for reason, count in record.finish_reasons.items() for _ in range(count)]
    params = context.generations[0].request.params if context.generations else None
    counts = context.num_tokens
    num_choices = 1 + max((each.choice for each in context.generations), default=0)
    facts: dict[str, Any] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "splitfuse",
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.request.stream": context.is_stream or None,
        "gen_ai.request.choice.count": num_choices if num_choices > 1 else None,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.generated_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
        "gen_ai.usage.reasoning.output_tokens": counts.reasoning,
        "gen_ai.response.finish_reasons": reasons or None,
        "gen_ai.response.time_to_first_chunk": record.time_to_first_token_seconds if context.is_stream else None,
        "gen_ai.server.time_to_first_token": record.time_to_first_token_seconds,
        "http.request.method": context.scope["method"],
        "http.route": record.route,
        "http.response.status_code": record.status,
        "error.type": record.error,
        "splitfuse.request.id": record.request_id,
        "splitfuse.key": record.key,
        "splitfuse.steps": record.steps,
        "splitfuse.slo.met": record.slo_met,
    }
    if params is not None and operation != "embeddings":
        facts |= {
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": float(params.temperature),
            "gen_ai.request.top_p": float(params.top_p),
            "gen_ai.request.top_k": params.top_k or None,
            "gen_ai.request.seed": params.seed,
            "gen_ai.request.presence_penalty": params.presence_penalty or None,
            "gen_ai.request.frequency_penalty": params.frequency_penalty or None,
        }
    if (breakdown := event.breakdown) is not None:
        facts |= {f"splitfuse.phase.{phase.value}": seconds for phase, seconds in breakdown.phases.items()}
        facts["splitfuse.preemptions"] = breakdown.num_preemptions
        facts["splitfuse.slo.violation"] = why_missed(record, breakdown) or None
    return {name: value for name, value in facts.items() if value is not None}


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)


def _check_variable(name: str, only: str) -> None:
    value = os.environ.get(name, only)
    if value != only:
        raise ConfigError(f"{name} is {value!r}, but traces are sent by {only} only: unset it, or leave out otel")


def _queue_size() -> int:
    text = os.environ.get("OTEL_BSP_MAX_QUEUE_SIZE", str(QUEUE_SIZE))
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise ConfigError(
            f"OTEL_BSP_MAX_QUEUE_SIZE must be a whole number from 1, such as {QUEUE_SIZE}, not {text!r:.80}"
        )
    return int(text)


class _CountingExporter:
    """Counts the spans that are given to an exporter, and those that it could not send."""

    def __init__(self, exporter: Any) -> None:
        self._exporter = exporter
        self.num_taken = self.num_failed = 0

    def export(self, spans: Any) -> Any:
        """Send spans. Called by the SDK, in its thread."""
        self.num_taken += len(spans)
        sent = False
        try:
            result = self._exporter.export(spans)
            sent = result.name == "SUCCESS"
        finally:
            self.num_failed += 0 if sent else len(spans)
        return result

    def shutdown(self) -> None:
        """End the exporter. Called by the SDK."""
        self._exporter.shutdown()

    def force_flush(self, *_: object) -> bool:
        """Do nothing: nothing waits here. Called by the SDK."""
        return True
