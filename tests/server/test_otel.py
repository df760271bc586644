"""Spans of requests, as a collector gets them from the exporter over HTTP."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec
import pytest
from patience import PATIENCE
from running_server import RunningServer
from told_replicas import INFO, Told

from splitfuse.core.request_output import FinishReason
from splitfuse.engine.trace import FinishTrace, PreemptTrace, RequestTrace
from splitfuse.errors import ConfigError
from splitfuse.server.otel import RequestSpans, _adapter_name
from splitfuse.server.traces import EngineRecords

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
BODY = {"prompt": "One day", "max_tokens": 4, "ignore_eos": True, "temperature": 0.5, "seed": 7}


class Collector(ThreadingHTTPServer):
    """Keeps the spans that it is sent; one that `hangs` answers when it is closed."""

    def __init__(self, *, hangs: bool = False) -> None:
        self.requests: list[Any] = []
        self.came, self.may_answer = threading.Event(), threading.Event()
        if not hangs:
            self.may_answer.set()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def spans(self) -> list[Any]:
        return [span for r in self.requests for rs in r.resource_spans for ss in rs.scope_spans for span in ss.spans]


class Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        assert self.path == "/v1/traces"
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.requests.append(ExportTraceServiceRequest.FromString(body))
        self.server.came.set()
        self.server.may_answer.wait(PATIENCE)
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def collecting(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Iterator[Collector]:
    collector = Collector(**settings)
    serving = threading.Thread(target=collector.serve_forever)
    serving.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
    try:
        yield collector
    finally:
        collector.may_answer.set()
        collector.shutdown()
        serving.join()
        collector.server_close()


@contextmanager
def following(server: RunningServer) -> Iterator[RequestSpans]:
    """Spans of the requests to a server which has begun already."""
    spans = RequestSpans("storyteller")

    async def call(work: Callable[[], object]) -> object:
        return work()

    server.call(call(lambda: spans.follow(server.traces)))
    try:
        yield spans
    finally:
        server.call(call(server.traces._subscribers.clear))
        server.call(call(server.traces._set_level))


def attributes(span: Any) -> dict[str, Any]:
    def value(each: Any) -> Any:
        kind = each.WhichOneof("value")
        return [value(item) for item in each.array_value.values] if kind == "array_value" else getattr(each, kind)

    return {each.key: value(each.value) for each in span.attributes}


def post(server: RunningServer, spans: RequestSpans, count: int = 1, path: str = "/v1/completions", **body: Any) -> int:
    """Send a request, and wait until its span is made."""
    with server.http() as http:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine"}
        status = http.post(path, json={**BODY, **body}, headers=headers).status_code
    server.wait_until(lambda: spans._num_ended >= count)
    return status


@pytest.mark.extras
def test_span_of_a_request_has_its_parent_and_attributes(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with collecting(monkeypatch) as collector, following(server) as spans:
        assert post(server, spans, stream=True) == 200
        spans.close()
    children = [span for span in collector.spans if span.parent_span_id.hex() != PARENT]
    (span,) = (span for span in collector.spans if span.parent_span_id.hex() == PARENT)
    assert span.name == "text_completion storyteller" and span.kind == span.SPAN_KIND_SERVER
    assert {each.trace_id.hex() for each in collector.spans} == {TRACE}
    assert [child.name for child in children] == ["queue", "prefill", "decode"]
    assert all(child.parent_span_id == span.span_id for child in children)
    times = [span.start_time_unix_nano]
    for child in children:
        times += [child.start_time_unix_nano, child.end_time_unix_nano]
    assert [*times, span.end_time_unix_nano] == sorted([*times, span.end_time_unix_nano])
    (first,) = span.events
    assert first.name == "first token" and first.time_unix_nano == pytest.approx(
        children[1].end_time_unix_nano, abs=1000
    )
    found = attributes(span)
    wanted = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "splitfuse",
        "gen_ai.request.model": "storyteller",
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.seed": 7,
        "gen_ai.request.stream": True,
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.output_tokens": 4,
        "http.response.status_code": 200,
        "splitfuse.request.id": "mine",
        "splitfuse.preemptions": 0,
    }
    assert {name: found.get(name) for name in wanted} == wanted
    assert found["gen_ai.usage.input_tokens"] > 0
    assert found["gen_ai.response.time_to_first_chunk"] == found["gen_ai.server.time_to_first_token"] > 0
    phases = sum(value for name, value in found.items() if name.startswith("splitfuse.phase."))
    assert phases == pytest.approx((span.end_time_unix_nano - span.start_time_unix_nano) / 1e9, abs=1e-4)
    (resource,) = {each.SerializeToString() for r in collector.requests for each in (r.resource_spans[0].resource,)}
    assert b"splitfuse" in resource and spans.num_dropped == 0


@pytest.mark.extras
def test_choices_and_a_refused_request(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with collecting(monkeypatch) as collector, following(server) as spans:
        assert post(server, spans, n=2) == 200
        assert post(server, spans, count=5, n=-1) == 400
        with server.http() as http:
            assert http.get("/v1/models").status_code == 200  # has no span
        spans.close()
    answered, refused = (span for span in collector.spans if span.parent_span_id.hex() == PARENT)
    assert attributes(answered)["gen_ai.response.finish_reasons"] == ["length", "length"]
    assert attributes(answered)["gen_ai.request.choice.count"] == 2
    found = attributes(refused)
    assert (found["http.response.status_code"], found["error.type"]) == (400, "invalid_type")
    assert refused.status.code == refused.status.STATUS_CODE_UNSET, "a client's mistake"
    assert len(collector.spans) == 5


@pytest.mark.extras
def test_collector_that_hangs_slows_no_request(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "8")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    with collecting(monkeypatch, hangs=True) as collector, following(server) as spans:
        assert post(server, spans) == 200
        assert collector.came.wait(PATIENCE)  # it has the first four spans, and does not answer
        for count in range(2, 6):
            assert post(server, spans, count=4 * count) == 200
        server.wait_until(lambda: spans.num_dropped >= 8)  # 16 more for a queue of 8; the four fail later
        assert spans.num_dropped <= 12


@pytest.mark.extras
def test_absent_collector_drops_spans_and_counts_them(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    with following(server) as spans:
        assert post(server, spans) == 200
        spans.close()
    assert spans.num_dropped == 4


@pytest.mark.extras
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ("OTEL_TRACES_EXPORTER", "zipkin"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "many"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "1"),
    ],
)
def test_variable_that_cannot_be_honoured_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="OTEL_"):
        RequestSpans("storyteller")


@pytest.mark.extras
def test_preemptions_are_remembered_until_their_request_ends() -> None:
    spans = RequestSpans("storyteller", exporter=object())
    request = RequestTrace(3, "abc-0.0", 1.0, 1.0, 4, 8, 0, 0, None)
    finish = FinishTrace(3, 4.0, FinishReason.LENGTH, 8, None, None)
    spans._take(EngineRecords(0, (request, PreemptTrace(3, 2.0), PreemptTrace(4, 2.5), PreemptTrace(3, 3.0))))
    assert spans._preempted == {"abc": [2.0, 3.0]}
    spans._take(EngineRecords(0, (finish,)))
    assert not spans._ids


def test_an_adapter_has_its_name_from_an_engine_that_lives() -> None:
    ended, living = Told(), Told()
    living.tell(msgspec.structs.replace(INFO, adapters={"tales": "d1", "poems": "d2"}))
    assert _adapter_name([ended, living], "d2") == "poems"
    assert _adapter_name([ended, living], "d3") is None


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"pip install 'splitfuse\[otel\]'"):
        RequestSpans("storyteller")
