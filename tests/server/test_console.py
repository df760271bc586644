"""The console's server side: who may look, what is sent, and that those who look harm nothing."""

import asyncio
import json
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from running_server import RunningServer, running_server

from splitfuse.config.server import ServerConfig
from splitfuse.config.values import EngineRole
from splitfuse.core.latency.phases import LatencyPhase
from splitfuse.core.request_output import FinishReason
from splitfuse.engine.client import EngineState
from splitfuse.engine.trace import BlockMap, ChunkTrace, FinishTrace, PhaseTrace, RequestTrace, StepTrace
from splitfuse.server.console import endpoints, store
from splitfuse.server.console.frames import FrameBuilder, OpenRequests
from splitfuse.server.console.store import ConsoleStore
from splitfuse.server.traces import EngineChange, EngineRecords, TraceHub

FOLDER = Path(endpoints.__file__).parent / "static"


@pytest.fixture(scope="module")
def console() -> Iterator[RunningServer]:
    with running_server(ServerConfig(console=True)) as server:
        yield server


def read_events(http: httpx.Client, done: Any, **headers: str) -> list[dict[str, Any]]:
    """The events of a stream until `done` of them is true."""
    events: list[dict[str, Any]] = []
    with http.stream("GET", "/console/events", headers=headers) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("data: "):
                events.append(json.loads(line[6:]))
                if done(events):
                    break
    return events


def part(events: list[dict[str, Any]], name: str) -> list[list[Any]]:
    """One part of all frames."""
    return [each for event in events[1:] for each in event.get(name, ())]


# What is sent ---------------------------------------------------------------------------------------------------------


def test_frames_equal_what_the_engine_did(console: RunningServer) -> None:
    with console.http() as http:
        body = {"prompt": "One day", "max_tokens": 6, "n": 2, "ignore_eos": True}
        answer = http.post("/v1/completions", json=body).json()
        events = read_events(http, lambda events: part(events, "answers"))
    start, unique = events[0], answer["id"].removeprefix("cmpl-")
    assert start["start"] and start["model"] == answer["model"] and start["generates"]
    assert start["phases"] == [[phase.value, phase.meaning] for phase in LatencyPhase]
    requests = [each for each in part(events, "requests") if each[2].startswith(unique)]
    numbers = {each[0] for each in requests}
    num_prompt = answer["usage"]["prompt_tokens"]
    assert [(each[4], each[5], each[6]) for each in requests] == [(num_prompt, 6, 0), (num_prompt, 6, 1)]
    tokens = dict.fromkeys(numbers, 0)
    prompt = dict.fromkeys(numbers, 0)
    before: list[int] = []
    for *_, decodes, chunks in part(events, "steps"):
        before = before if decodes is None else decodes
        for number in before:
            tokens[number] += 1
        for number, _, count, chosen in zip(*[iter(chunks)] * 4, strict=True):
            tokens[number] += chosen
            prompt[number] += count
    assert set(tokens.values()) == {6}
    assert max(prompt.values()) <= num_prompt  # less if the second found the first's blocks
    assert {each[0]: each[2:] for each in part(events, "finishes")} == {n: ["length", 6, None] for n in numbers}
    (end,) = [each for each in part(events, "answers") if each[0] == unique]
    assert end[4] == 200 and end[15] is None
    assert sum(seconds for _, seconds in end[16]) == pytest.approx(end[7], abs=1e-3)
    assert {phase for each in part(events, "phases") for phase in each[1][1::2]} >= {
        list(LatencyPhase).index(phase) for phase in (LatencyPhase.PREFILL, LatencyPhase.DECODE)
    }
    assert part(events, "blocks")[0][3].startswith(("f", "c", "h", "s"))


def test_frames_have_no_text_and_no_token(console: RunningServer) -> None:
    with console.http() as http:
        http.post("/v1/completions", json={"prompt": "Zanzibar, a secret", "max_tokens": 2})
        events = read_events(http, lambda events: part(events, "answers"))
    assert "Zanzibar" not in json.dumps(events) and "secret" not in json.dumps(events)


def test_a_page_opened_late_has_history(console: RunningServer) -> None:
    with console.http() as http:
        first = read_events(http, lambda events: part(events, "answers"))
        again = read_events(http, lambda events: len(events) >= len(first))
    assert again[1 : len(first)] == first[1:]


# Who may look ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "rebound.example:8000"},
        {"host": "192.168.0.7"},
        {"host": ""},
        {"origin": "http://elsewhere.example"},
        {"x-forwarded-for": "10.0.0.1"},
        {"x-forwarded-proto": "https"},
        {"forwarded": "for=10.0.0.1"},
        {"via": "1.1 proxy"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors", "sec-fetch-dest": "image"},
        {"sec-fetch-site": "same-site", "sec-fetch-mode": "cors", "sec-fetch-dest": "empty"},
    ],
)
def test_without_keys_only_this_machine(console: RunningServer, headers: dict[str, str]) -> None:
    with console.http() as http:
        for path in ("/console", "/console/events", "/console/console.js"):
            refused = http.get(path, headers=headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "no_administrator")
        own = http.get("/console", headers={"host": "localhost:8000", "origin": "http://localhost:8000"})
        assert own.status_code == 200


def test_a_link_leads_to_the_page_but_not_to_its_stream(console: RunningServer) -> None:
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    with console.http() as http:
        assert http.get("/console", headers=link).status_code == 200
        assert http.get("/console/events", headers=link).status_code == 403


def test_parameters_of_the_stream_are_refused(console: RunningServer) -> None:
    with console.http() as http:
        refused = http.get("/console/events?foo=1")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "unknown_parameter")


def test_streams_are_for_no_other_origin(console: RunningServer) -> None:
    with console.http() as http:
        for path in ("/console/events", "/v1/splitfuse/trace"):
            with http.stream("GET", path, headers={"sec-fetch-site": "same-origin"}) as answer:
                assert answer.headers["x-content-type-options"] == "nosniff"
                assert answer.headers["cross-origin-resource-policy"] == "same-origin"


def test_with_keys_an_administrator(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("boss admin=yes\nclerk\n")
    keys.chmod(0o600)
    with running_server(ServerConfig(console=True, api_key_file=str(keys))) as server, server.http() as http:
        assert http.get("/console", headers={"host": "public.example"}).status_code == 200
        assert http.get("/console/events").status_code == 401
        refused = http.get("/console/events", headers={"authorization": "Bearer clerk"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "no_administrator")
        assert read_events(http, bool, authorization="Bearer boss")[0]["start"]


def test_no_console_unless_asked_for(server: RunningServer) -> None:
    with server.http() as http:
        for path in ("/console", "/console/events", "/console/console.js"):
            refused = http.get(path)
            assert refused.status_code == 404 and "--console" in refused.json()["error"]["message"]
    assert not server.traces.is_watched


# The files ------------------------------------------------------------------------------------------------------------


def test_files_are_small_and_ours(console: RunningServer) -> None:
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert sizes.keys() == endpoints.FILES.keys() and sum(sizes.values()) < 100_000
    for path in FOLDER.iterdir():
        text = path.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|//[a-z]|@import|eval\(|innerHTML", text), path.name
    with console.http() as http:
        assert http.get("/console").text == (FOLDER / "console.html").read_text("utf-8")
        for name, kind in endpoints.FILES.items():
            answer = http.get(f"/console/{name}")
            assert answer.headers["content-type"] == kind
            assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert http.get("/console/store.py").status_code == 404
        assert http.head("/console/events").status_code == 200


# Many, and slow ones --------------------------------------------------------------------------------------------------


def test_a_hundred_consoles_and_stuck_ones(console: RunningServer) -> None:
    """Each gets the frames, one that never reads holds up no other, and all are gone at the end."""
    sockets = [socket.create_connection(("127.0.0.1", console.port)) for _ in range(100)]
    for each in sockets:
        each.sendall(b"GET /console/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
    with console.http() as http:
        console.wait_until(lambda: b"splitfuse:consoles" in console.metrics.render() and _consoles(console) == 100)
        answer = http.post("/v1/completions", json={"prompt": "One day", "max_tokens": 8, "ignore_eos": True})
        assert answer.status_code == 200
        unique = answer.json()["id"].removeprefix("cmpl-").encode()
    for each in sockets[::33]:
        each.settimeout(60)
        read = b""
        while b'"answers":[["' + unique not in read:
            read = read[-100_000:] + each.recv(65536)
    for each in sockets:
        each.close()
    console.wait_until(lambda: _consoles(console) == 0)
    console.assert_idle()


def _consoles(server: RunningServer) -> int:
    return int(server.metrics.consoles()[0])


class Engines:
    """Stands for an engine, of which only the traces count."""

    state = EngineState.READY
    is_drained = False
    death = ""
    role = EngineRole.MIXED

    def __init__(self) -> None:
        self.on_trace: Any = None
        self.on_state: Any = None
        self.levels: list[Any] = []

    def set_tracing(self, level: Any) -> None:
        self.levels.append(level)

    @property
    def stage(self) -> Any:
        return type("Stage", (), {"stage": "ready", "fraction": 1.0})

    @property
    def info(self) -> Any:
        limits = type("Limits", (), {"num_blocks": 8, "block_size": 16})
        return type("Info", (), {"max_num_batched_tokens": 64, "limits": limits})


class Clock:
    """Stands still until it is moved."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def fed_store(num_frames: int, seconds: float) -> tuple[ConsoleStore, TraceHub, Clock]:
    """A store with frames of a step each, and its clock."""
    clock, hub = Clock(), TraceHub([Engines()])  # type: ignore[list-item]
    kept = ConsoleStore(hub, lambda: {"model": "m", "has_chat": True, "generates": True}, clock=clock)
    hub.publish(EngineRecords(0, (request(0), PhaseTrace(clock.now, ((0, LatencyPhase.DECODE),)))))
    feed(kept, hub, clock, num_frames, seconds)
    return kept, hub, clock


def feed(kept: ConsoleStore, hub: TraceHub, clock: Clock, num_frames: int, seconds: float) -> None:
    for step in range(num_frames):
        clock.now += seconds
        hub.publish(EngineRecords(0, (step_of(step, clock.now),)))
        if not kept._builder.is_empty:  # else the event has ended a frame
            kept._flush()


def request(number: int) -> RequestTrace:
    return RequestTrace(number, f"{number:032x}-0.0", 99.0, 99.0, 4, 900_000, 0, 0, None)


def step_of(step: int, now: float, *chunks: ChunkTrace) -> StepTrace:
    chunks = chunks or (ChunkTrace(0, 4 + step, 1, (7,)),)
    return StepTrace(step, 64, now - 0.05, now, 0.04, 1, 0, 6, 1, chunks)


def events_of(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(event.removeprefix(b"data: ")) for event in data.split(b"\n\n") if event]


def run(work: Any) -> None:
    async def main() -> None:
        work()

    asyncio.run(main())


def test_only_the_last_minutes_are_kept() -> None:
    def work() -> None:
        kept, _, _ = fed_store(num_frames=1000, seconds=1.0)
        assert kept.end == 1000 and kept.end - kept.begin == store.KEPT_SECONDS + 1
        start, *frames = events_of(kept.open().take())
        assert [frame["frame"] for frame in frames] == list(range(kept.begin, kept.end))
        ((shown, phase, since),) = start["requests"]  # accepted before the oldest frame, and open
        assert shown[0] == 0 and list(LatencyPhase)[phase] is LatencyPhase.DECODE and since == 0.0

    run(work)


def test_only_so_many_bytes_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_BYTES", 5000)

    def work() -> None:
        kept, _, _ = fed_store(num_frames=200, seconds=0.1)
        assert kept.end == 200 and sum(len(kept.frame(n)) for n in range(kept.begin, kept.end)) <= 5000

    run(work)


def test_a_frame_above_all_that_is_kept_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_BYTES", 10)

    def work() -> None:
        kept, hub, clock = fed_store(num_frames=0, seconds=0.1)
        viewer = kept.open()
        viewer.take()
        feed(kept, hub, clock, 2, 0.1)
        assert kept.begin == kept.end == 2
        (start,) = events_of(viewer.take())
        assert start["num_dropped"] == kept.num_dropped == 2
        assert [each[0][0] for each in start["requests"]] == [0]

    run(work)


def test_frames_are_dropped_and_counted_for_slow_readers() -> None:
    def work() -> None:
        kept, hub, clock = fed_store(num_frames=10, seconds=0.1)
        slow, quick = kept.open(), kept.open()
        slow.take()
        feed(kept, hub, clock, store.MAX_BEHIND, 0.1)
        quick.take()
        assert kept.num_dropped == 0
        feed(kept, hub, clock, 1, 0.1)
        (start,) = events_of(slow.take())
        assert start["num_dropped"] == kept.num_dropped == store.MAX_BEHIND + 1
        assert start["next_frame"] == kept.end and [each[0][0] for each in start["requests"]] == [0]
        assert [event["frame"] for event in events_of(quick.take())] == [kept.end - 1]
        assert not slow.is_late and not quick.is_late
        feed(kept, hub, clock, 1, 0.1)
        assert [event["frame"] for event in events_of(slow.take())] == [kept.end - 1]

    run(work)


def test_many_consoles_are_sent_more_at_a_time_less_often() -> None:
    def work() -> None:
        kept, _, _ = fed_store(num_frames=1, seconds=0.1)
        assert kept.pause == store.FRAME_SECONDS
        viewers = [kept.open() for _ in range(100)]
        assert kept.pause == pytest.approx(len(viewers) / store.SENDS_PER_SECOND)
        for each in viewers:
            kept.close(each)
        assert kept.num_viewers == 0

    run(work)


def test_history_is_sent_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "PIECE_BYTES", 2000)

    def work() -> None:
        kept, _, _ = fed_store(num_frames=100, seconds=0.1)
        viewer, taken = kept.open(), []
        while viewer.is_late:
            piece = viewer.take()
            assert len(piece) < 6000
            taken += events_of(piece)
        assert [event["frame"] for event in taken[1:]] == list(range(100))

    run(work)


def test_numbers_of_requests_go_on_after_an_engine_died() -> None:
    builder, opened = FrameBuilder(origin=0.0), OpenRequests()
    engine: Any = Engines()

    def add(*records: Any) -> Any:
        builder.add(EngineRecords(0, records), [engine])
        frame = builder.take(0, 1.0)
        opened.apply(frame)
        return frame

    assert [each.request for each in add(request(0), request(1)).requests] == [0, 1]
    assert [each.request for each in add(FinishTrace(0, 1.0, FinishReason.STOP, 3, None, None)).finishes] == [0]
    assert [each.request.request for each in opened.all] == [1]
    builder.add(EngineChange(0, EngineState.DEAD, "killed", 2.0), [engine])
    engine.state = EngineState.DEAD
    builder.add_engine(0, engine, 2.0, "killed")
    opened.apply(builder.take(1, 2.0))
    assert opened.all == []
    assert [each.request for each in add(request(0)).requests] == [2]


def test_a_chunk_is_a_decode_only_behind_the_prompt() -> None:
    builder = FrameBuilder(origin=0.0)
    records = (
        request(0),
        step_of(1, 1.0, ChunkTrace(0, 0, 3, ())),
        step_of(2, 2.0, ChunkTrace(0, 3, 1, (9,))),  # the last token of the prompt
        step_of(3, 3.0, ChunkTrace(0, 4, 1, (8,))),
        step_of(4, 4.0, ChunkTrace(0, 5, 1, (8,))),
        step_of(5, 5.0, ChunkTrace(0, 0, 6, (5,))),  # recomputed
        BlockMap(5.0, 1, bytes([0, 0, 0, 1, 2, 3])),
    )
    builder.add(EngineRecords(0, records), [])
    frame = builder.take(0, 6.0)
    assert [(step.decodes, step.chunks) for step in frame.steps] == [
        ((), (0, 0, 3, 0)),
        (None, (0, 3, 1, 1)),
        ((0,), ()),
        (None, ()),
        ((), (0, 0, 6, 1)),
    ]
    assert frame.blocks[0].states == "f3chs"


def test_streams_end_with_the_server() -> None:
    with running_server(ServerConfig(console=True)) as server, server.http() as http:
        ended = threading.Event()

        def read() -> None:
            with http.stream("GET", "/console/events") as answer:
                for _ in answer.iter_lines():
                    pass
            ended.set()

        thread = threading.Thread(target=read)
        thread.start()
        server.wait_until(lambda: _consoles(server) == 1)

        async def drain() -> None:
            server.admission.drain()
            await server.client.close()

        server.call(drain())
        thread.join(60)
        assert ended.is_set()
