"""Several fronts on one port: to a client they are one server, and what a dead one had is given back."""

import asyncio
import http.client
import json
import math
import os
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from patience import PATIENCE
from safetensors.torch import load_file
from server_load import FRONT, children, metrics, wait_until, wait_until_idle
from server_process import ServerProcess, make_certificate, server_process
from tiny_adapters import ATTENTION, module_shapes, save_adapter

import splitfuse
from splitfuse.config.server import ServerConfig
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.structured_outputs import MAX_CHARACTERS, MAX_COMPILED, StructuredOutputs
from splitfuse.engine.client import EngineState
from splitfuse.engine.messages import Add, Loading
from splitfuse.errors import (
    ConfigError,
    DrainingError,
    EngineUnavailableError,
    InvalidRequestError,
    OverloadedError,
    RequestQuarantinedError,
    SloUnattainableError,
    SplitfuseError,
)
from splitfuse.models.sources.hub import BUNDLED_MODEL
from splitfuse.server.fronts import messages
from splitfuse.server.fronts.app import ServerAdmission, ServerStore
from splitfuse.server.fronts.engines import ServerEngines
from splitfuse.server.fronts.kept_files import with_kept_files
from splitfuse.server.fronts.messages import (
    BATCH_BYTES,
    WINDOW,
    Admit,
    Admitted,
    Channel,
    Delivered,
    Failure,
    FromFront,
    FrontSpec,
    Heartbeat,
    Keep,
    Kept,
    Open,
    Piece,
    Release,
    Seen,
    ToFront,
    View,
)
from splitfuse.server.fronts.session import FrontSession
from splitfuse.server.fronts.supervisor import FrontProcesses, _Front, _Request
from splitfuse.server.listen import HttpServer, LateApp, listening_sockets
from splitfuse.server.store import StoredAnswer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux divides connections among sockets")

PROMPT = "Once upon a time"
LONG: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 1900, "ignore_eos": True, "temperature": 0, "stream": True}
SHORTER: dict[str, Any] = {**LONG, "max_tokens": 240, "splitfuse_timing": True}
LEAST_LEFT = 80
ROUTE = "/v1/completions"


@pytest.fixture(autouse=True, scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The place of these tests' deployments."""
    path = tmp_path_factory.mktemp("runtime")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(path))
        yield path


def is_gone(pid: int) -> bool:
    """Whether a process has ended, though its parent may not have asked how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except OSError:
        return True


def has_connection(pid: int, client: socket.socket) -> bool | None:
    """Whether a process has the other end of a connection; None: it was not accepted yet."""
    ports = f":{client.getpeername()[1]:04X} ", f":{client.getsockname()[1]:04X} "
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        local, remote, *rest = line.split()[1:]
        if f"{local} ".endswith(ports[0]) and f"{remote} ".endswith(ports[1]):
            inode = rest[6]
            if inode == "0":
                return None
            links = set()
            for each in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):  # it was closed meanwhile
                    links.add(str(each.readlink()))
            return f"socket:[{inode}]" in links
    return None


def connection_to(front: int, address: tuple[str, int]) -> http.client.HTTPConnection:
    """A connection that the system has given to a front: others are closed."""
    limit = time.monotonic() + PATIENCE
    while True:
        connection = http.client.HTTPConnection(*address, timeout=PATIENCE)
        connection.connect()
        while (found := has_connection(front, connection.sock)) is None:
            assert time.monotonic() < limit, "it was never accepted"
            time.sleep(0.005)
        if found:
            return connection
        connection.close()
        assert time.monotonic() < limit, "the front got none of many connections"


def ask(connection: http.client.HTTPConnection, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """The status and the JSON of an answer."""
    headers = {"content-type": "application/json", **headers}
    connection.request("GET" if body is None else "POST", path, None if body is None else json.dumps(body), headers)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def begin(connection: http.client.HTTPConnection, body: Any) -> http.client.HTTPResponse:
    """A stream whose first event has come."""
    connection.request("POST", ROUTE, json.dumps(body), {"content-type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200 and answer.readline().startswith(b"data: ")
    return answer


def rest_of(stream: http.client.HTTPResponse) -> str:
    """What is left of a stream, which must be whole."""
    rest = stream.read().decode()
    assert rest.endswith("data: [DONE]\n\n"), rest[-300:]
    return rest


def text_of(events: str) -> str:
    """The text of the events of a completion."""
    lines = [line.removeprefix("data: ") for line in events.splitlines() if line.startswith("data: {")]
    return "".join(choice["text"] for line in lines for choice in json.loads(line)["choices"])


@contextmanager
def held(server: ServerProcess) -> Iterator[None]:
    """Stop the engine while the context lasts, so that no generation ends meanwhile."""
    (engine,) = children(server.process.pid)
    os.kill(engine, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):  # after ten seconds it is taken to hang
            os.kill(engine, signal.SIGCONT)


class TwoFronts:
    """A server with two fronts, and a connection to each."""

    def __init__(self, server: ServerProcess, url: str) -> None:
        self.server = server
        self.http = httpx.Client(base_url=url, timeout=PATIENCE, trust_env=False)
        self.address = self.http.base_url.host, self.http.base_url.port or 0
        self.pids = children(server.process.pid, FRONT)
        assert len(self.pids) == 2
        self.first, self.second = (connection_to(pid, self.address) for pid in self.pids)

    @property
    def both(self) -> tuple[http.client.HTTPConnection, http.client.HTTPConnection]:
        return self.first, self.second

    def to(self, index: int) -> http.client.HTTPConnection:
        """A further connection to a front."""
        return connection_to(self.pids[index], self.address)


@contextmanager
def two_fronts(folder: Path, name: str, *flags: str) -> Iterator[TwoFronts]:
    with server_process(folder, name, "--fronts", "2", *flags) as server, server.client() as client:
        yield TwoFronts(server, client.url)


def outstanding(fronts: TwoFronts) -> float:
    return metrics(fronts.http)["splitfuse:outstanding_tokens"]


@contextmanager
def held_streams(fronts: TwoFronts) -> Iterator[list[http.client.HTTPResponse]]:
    """A stream of each front, with its first event, both of which go on when the context ends: the engine stands still
    meanwhile. On a busy machine one may have ended before that: then there are others.
    """
    while True:
        streams = [begin(fronts.to(index), SHORTER) for index in (0, 1)]
        with held(fronts.server):
            if outstanding(fronts) >= SHORTER["max_tokens"] + LEAST_LEFT:  # each has so many left
                yield streams
                return
        for stream in streams:
            stream.read()


def test_two_fronts_are_one_server(folder: Path, pipe: splitfuse.Pipeline) -> None:
    with two_fronts(folder, "fronts", "--max-queued-requests", "2") as fronts:
        _check_texts(fronts, pipe)
        _check_limits(fronts)
        _check_what_is_shared(fronts)
        _check_metrics(fronts)
        _check_a_death(fronts, pipe)
        _check_the_end(fronts, pipe)


def _check_texts(fronts: TwoFronts, pipe: splitfuse.Pipeline) -> None:
    """Texts are those of the pipeline, of each dialect and by each front."""
    wanted = pipe(PROMPT, max_new_tokens=24)[0].generated_text
    body = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    chat = {"messages": [{"role": "user", "content": PROMPT}], "temperature": 0, "max_tokens": 24}
    said = pipe([chat["messages"]], chat=True, max_new_tokens=24)[0].generated_text
    seeded = {**body, "temperature": 1, "seed": 5, "logprobs": 2, "stop": ["the"]}
    whole: list[Any] = []
    for each in fronts.both:
        status, answer = ask(each, ROUTE, body)
        assert (status, answer["choices"][0]["text"]) == (200, wanted)
        each.request("POST", ROUTE, json.dumps({**body, "stream": True}), {"content-type": "application/json"})
        assert text_of(rest_of(each.getresponse())) == wanted
        assert ask(each, "/v1/chat/completions", chat)[1]["choices"][0]["message"]["content"] == said
        assert ask(each, "/v1/messages", {**chat, "model": "storyteller"})[1]["content"][0]["text"] == said
        answer = ask(each, "/v1/responses", {"input": PROMPT, "temperature": 0, "max_output_tokens": 24})[1]
        assert answer["output"][0]["content"][0]["text"] == said
        whole.append(ask(each, ROUTE, seeded)[1]["choices"])
        status, answer = ask(each, ROUTE, {**body, "suffix": "x"})
        assert (status, answer["error"]["param"]) == (400, "suffix")
        assert ask(each, "/v1/nothing")[0] == 404
    assert whole[0] == whole[1]


def _check_limits(fronts: TwoFronts) -> None:
    """Two requests are open, one of each front: both fronts refuse a third one."""
    first, second = fronts.to(0), fronts.to(1)
    with held(fronts.server):
        for each in (first, second):
            each.request("POST", ROUTE, json.dumps(LONG), {"content-type": "application/json"})
        wait_until(lambda: outstanding(fronts) >= 2 * LONG["max_tokens"])
        for each in fronts.both:
            each.request("POST", ROUTE, json.dumps(LONG), {"content-type": "application/json"})
            answer = each.getresponse()
            error = json.loads(answer.read())["error"]
            assert answer.status == 429 and int(answer.headers["retry-after"]) >= 1
            assert re.search(r"at capacity \(2 requests\); try again in \d+ s", error["message"])
    first.close()
    second.close()
    wait_until_idle(fronts.http)


def _check_what_is_shared(fronts: TwoFronts) -> None:
    """What one front has answered, the other one finds."""
    chat = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 4, "store": True}
    for one, other in (fronts.both, fronts.both[::-1]):
        answer = ask(one, "/v1/chat/completions", chat)[1]
        assert ask(other, f"/v1/chat/completions/{answer['id']}") == (200, answer)
        assert ask(other, f"/v1/splitfuse/requests/{answer['id']}")[1]["generated_tokens"] <= 4
        response = ask(one, "/v1/responses", {"input": PROMPT, "max_output_tokens": 4})[1]
        more = {"input": "And then?", "previous_response_id": response["id"], "max_output_tokens": 4}
        status, answer = ask(other, "/v1/responses", more)
        assert (status, answer["previous_response_id"]) == (200, response["id"])
        assert ask(one, f"/v1/responses/{answer['id']}") == (200, answer)
        status, answer = ask(other, "/v1/responses", {**more, "previous_response_id": "resp_none"})
        assert (status, answer["error"]["code"]) == (404, "answer_not_found")
        assert answer["error"]["param"] == "previous_response_id"
        assert ask(other, "/ready") == (200, {"stage": "ready", "fraction": 1.0})


def _check_metrics(fronts: TwoFronts) -> None:
    """The log has a line for each request, and metrics are sums over both fronts, whichever is asked."""

    def statuses() -> list[int]:
        records = [json.loads(line) for line in fronts.server.printed.splitlines()]
        return sorted(record["status"] for record in records if record["route"] == ROUTE)

    wait_until(lambda: statuses() == [200] * 6 + [400] * 2 + [429] * 2 + [499] * 2, statuses)
    done = f'splitfuse:requests_total{{model_name="storyteller",route="{ROUTE}",status="200"}}'
    refused = 'splitfuse:refused_total{kind="rate_limit_exceeded",model_name="storyteller"}'
    for each in fronts.both:
        each.request("GET", "/metrics")
        lines = each.getresponse().read().decode().splitlines()
        samples = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        assert float(samples[done]) == 6
        assert float(samples[refused]) == 2
        assert [float(samples[f'splitfuse:connections{{front="{n}",model_name="storyteller"}}']) > 0 for n in (0, 1)]


def _check_a_death(fronts: TwoFronts, pipe: splitfuse.Pipeline) -> None:
    """A front is killed amid streams: that of the other goes on, its own is aborted, and it is back."""
    server = fronts.server
    with held_streams(fronts) as (cut, going_on):
        before = metrics(fronts.http)
        os.kill(fronts.pids[0], signal.SIGKILL)
        server.wait_for("front 0 died: its process ended with signal 9 (SIGKILL); starting it again in 0.1 s")
    with pytest.raises((http.client.HTTPException, OSError)):
        cut.read()  # a chunked answer without its end
    wanted = pipe(PROMPT, max_new_tokens=SHORTER["max_tokens"], ignore_eos=True)[0].generated_text
    assert wanted.endswith(text_of(rest_of(going_on)))
    wait_until_idle(fronts.http)
    after = metrics(fronts.http)
    generated = after["splitfuse:generated_tokens_total"] - before["splitfuse:generated_tokens_total"]
    assert generated < before["splitfuse:outstanding_tokens"] - LEAST_LEFT / 2, "the killed one's was not aborted"
    assert after["splitfuse:front_restarts_total"] == 1
    wait_until(lambda: len(children(server.process.pid, FRONT)) == 2)
    new = next(pid for pid in children(server.process.pid, FRONT) if pid not in fronts.pids)
    fronts.pids = [new, fronts.pids[1]]
    fronts.first = fronts.to(0)
    body = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    answers = [ask(each, ROUTE, body)[1]["choices"][0]["text"] for each in fronts.both]
    assert answers[0] == answers[1] and wanted.startswith(answers[0])
    wait_until(lambda: "front_died" in server.printed)
    record = next(each for each in map(json.loads, server.printed.splitlines()) if each["error"] == "front_died")
    assert (record["route"], record["status"]) == (ROUTE, 499)


def _check_the_end(fronts: TwoFronts, pipe: splitfuse.Pipeline) -> None:
    """SIGTERM: both fronts refuse new requests, and streams end by themselves."""
    with held_streams(fronts) as streams:
        fronts.server.terminate()
        wait_until(lambda: ask(fronts.first, "/ready")[1]["stage"] == "draining")
        assert [ask(each, ROUTE, SHORTER)[0] for each in fronts.both] == [503, 503]
    wanted = pipe(PROMPT, max_new_tokens=SHORTER["max_tokens"], ignore_eos=True)[0].generated_text
    for stream in streams:
        assert wanted.endswith(text_of(rest_of(stream)))
    assert fronts.server.process.wait(PATIENCE) == 0, fronts.server.said
    assert all(map(is_gone, fronts.pids)) and "Traceback" not in fronts.server.said, fronts.server.said


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fronts": 0}, "fronts must be from 1 to 64, not 0"),
        ({"fronts": 65}, "fronts must be from 1 to 64, not 65"),
        ({"fronts": 2, "otel": True}, "fronts and otel are mutually exclusive"),
    ],
)
def test_bad_numbers_of_fronts_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        ServerConfig(**settings)


@pytest.mark.parametrize(
    "error",
    [
        OverloadedError("full", retry_after=2.5),
        SloUnattainableError("never", retry_after=math.inf),
        InvalidRequestError("no", parameter="n"),
        InvalidRequestError("no"),
        RequestQuarantinedError("it kills engines"),
        DrainingError("over"),
        EngineUnavailableError("dead"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_cross_a_channel(error: SplitfuseError) -> None:
    failure = msgspec.msgpack.decode(msgspec.msgpack.encode(Failure.of(error)), type=Failure)
    assert (type(failure.error), str(failure.error), vars(failure.error)) == (type(error), str(error), vars(error))


def test_a_fault_is_an_engine_that_is_not_there() -> None:
    assert type(Failure.of(AssertionError("x")).error) is EngineUnavailableError


async def channels() -> tuple[Channel[Any, Any], Channel[Any, Any]]:
    """Both ends of a channel: the server's and the front's."""
    ours, theirs = socket.socketpair()
    return await Channel.on(ours, list[FromFront]), await Channel.on(theirs, list[ToFront])


def test_large_messages_of_one_turn_go_in_frames_of_their_own() -> None:
    """A request of many choices opens all of them in one turn of the event loop, each with the form of the answer."""

    async def run() -> None:
        server, front = await channels()
        form = StructuredOutputs("regex", "x" * MAX_CHARACTERS, compiled="x" * MAX_COMPILED)
        assert BATCH_BYTES / 2 < MAX_CHARACTERS + MAX_COMPILED < BATCH_BYTES
        request = Add("r", (1, 2), SamplingParams(structured_outputs=form))
        opened = [Open(number, request) for number in range(4)]
        for each in opened:
            front.send(each)
        front.send(Release(7))
        assert [await server.receive() for _ in range(3)] == [opened[:2], opened[2:], [Release(7)]]
        for channel in (server, front):
            channel.close()

    asyncio.run(run())


def test_a_message_above_the_limit_is_refused_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "LARGEST", 1000)

    async def run() -> None:
        server, front = await channels()
        engines = ServerEngines(front)
        engines.take(View(EngineState.READY, Loading("ready"), None, None, {}, ()))
        with pytest.raises(InvalidRequestError, match=r"\(Open\).*more than the 1000"):
            engines.open(Add("long", tuple(range(1000)), SamplingParams()))
        engines.open(Add("short", (1, 2), SamplingParams()))
        batch = await server.receive()
        assert batch is not None and [each.request.request_id for each in batch] == ["short"]
        for channel in (server, front):
            channel.close()

    asyncio.run(run())


def test_an_answer_waits_until_it_is_kept() -> None:
    """But one that the store has no room for is not sent there, and no answer waits for those of others."""

    async def run() -> None:
        server, front = await channels()
        store = ServerStore(ServerConfig(max_stored_mib=1), front)
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message["name"])

        async def serve(name: str, answer: StoredAnswer | None) -> None:
            sending = store.sender(send)
            if answer is not None:
                await asyncio.to_thread(store.put, "alice", name, answer)
            await sending({"name": name})

        small = StoredAnswer(b"{}", b"[]")
        keeping = asyncio.create_task(serve("small", small))
        assert await server.receive() == [Keep(1, "alice", "small", small)]
        await asyncio.create_task(serve("large", StoredAnswer(b"x" * 2**20, b"[]")))
        await asyncio.create_task(serve("none", None))
        assert sent == ["large", "none"]
        store.take(Kept(1))
        await keeping
        assert sent == ["large", "none", "small"]
        for channel in (server, front):
            channel.close()

    asyncio.run(run())


def test_a_front_is_started_without_keys_and_engines() -> None:
    """Its first message waits in the buffer of a socket, however many engines there are."""
    server = ServerConfig(
        fronts=2,
        api_key=("secret",),
        api_key_file="keys",
        key_file="key",
        engine=tuple(f"10.0.0.1:{port}" for port in range(9000, 13000)),
        engine_tls=True,
        max_replicas=2,
        replicas=1,
        engine_listen="10.0.0.1:9100",
        tls_certificate="cert.pem",
        tls_key="key.pem",
        max_body_mib=2,
    )
    config = FrontSpec.of(server, 5).config
    assert config == ServerConfig(fronts=2, tls_certificate="cert.pem", tls_key="key.pem", max_body_mib=2)


def test_a_front_has_the_certificate_with_which_the_server_started(tmp_path: Path) -> None:
    if not make_certificate(tmp_path):
        pytest.skip("needs openssl")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    key.chmod(0o600)
    config = ServerConfig(fronts=2, tls_certificate=str(cert), tls_key=str(key))
    kept, descriptors = with_kept_files(config)
    said = [path.read_bytes() for path in (cert, key)]
    for path in (cert, key):
        path.unlink()
    assert [Path(each).read_bytes() for each in (kept.tls_certificate, kept.tls_key) if each] == said
    HttpServer(kept, max_connections=1)  # a front that is started now
    with pytest.raises(ConfigError, match=r"tls_certificate .*cert\.pem cannot be read: No such file"):
        with_kept_files(config)
    for each in descriptors:
        os.close(each)
    assert with_kept_files(ServerConfig(fronts=2)) == (ServerConfig(fronts=2), [])


def test_an_answer_waits_for_a_client_that_does_not_read() -> None:
    async def run() -> None:
        server, front = await channels()
        known = asyncio.Event()

        async def tell() -> None:
            await known.wait()

        request = _Request(1, server, tell)
        starting = asyncio.create_task(request.send({"type": "http.response.start", "status": 200, "headers": []}))
        server.send(Admitted(5))
        assert await front.receive() == [Admitted(5)], "all fronts know of the engines before the answer begins"
        known.set()
        await starting
        sending = asyncio.create_task(request.send({"type": "http.response.body", "body": b"x" * 3 * WINDOW}))
        pieces = 0
        while pieces < WINDOW:
            batch = await front.receive()
            assert batch is not None
            pieces += sum(len(message.data) for message in batch if isinstance(message, Piece))
        front.send(Delivered(1, 1000))
        assert await server.receive() == [Delivered(1, 1000)]
        assert pieces == WINDOW and not sending.done()
        request.take(Delivered(1, 1000))
        batch = await front.receive()
        assert batch is not None and [(len(each.data), each.more) for each in batch] == [(WINDOW, True)]
        request.disconnect()
        await sending
        assert (await request.receive())["type"] == "http.disconnect"
        for each in (server, front):
            each.close()

    asyncio.run(run())


def test_an_answer_waits_for_a_front_that_has_not_seen_the_adapters() -> None:
    async def run() -> None:
        server, channel = await channels()
        state: Any = None
        front = _Front(0, FrontSpec.of(ServerConfig(), 0), [], LateApp(), lambda: asyncio.sleep(0))
        await front.knows(3)  # before it generates text it sees the newest view
        front._session, front.ready_at = FrontSession(state, server), 0.0
        listening = asyncio.create_task(front._listen(server, lambda: None))
        knowing = asyncio.create_task(front.knows(3))
        for message in (Seen(2), Heartbeat(7)):
            channel.send(message)
        while front.num_connections != 7:
            await asyncio.sleep(0)
        assert not knowing.done()
        channel.send(Seen(3))
        await knowing
        knowing = asyncio.create_task(front.knows(4))
        await asyncio.sleep(0)
        assert not knowing.done()
        front._cut_off()  # it has died
        await knowing
        channel.close()
        await listening
        server.close()

    asyncio.run(run())


def test_what_is_given_up_while_it_waits_for_admission_is_released() -> None:
    async def run() -> None:
        server, front = await channels()
        admission = ServerAdmission(ServerConfig(), front)
        asking = asyncio.create_task(admission.reserve(10, 1))
        assert await server.receive() == [Admit(1, 10, 1, 0)]
        asking.cancel()
        assert await server.receive() == [Release(1)]
        admission.take(Admitted(1))  # it was granted before that was known
        for each in (server, front):
            each.close()

    asyncio.run(run())


# What takes longer ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fronts_end_with_their_server(folder: Path) -> None:
    with two_fronts(folder, "orphans") as fronts:
        with held_streams(fronts) as streams:
            fronts.server.process.kill()
            wait_until(lambda: all(map(is_gone, fronts.pids)))
        for stream in streams:
            with pytest.raises((http.client.HTTPException, OSError)):
                stream.read()


@pytest.mark.slow
def test_a_front_that_hangs_is_started_again(folder: Path) -> None:
    with two_fronts(folder, "hung") as fronts:
        os.kill(fronts.pids[0], signal.SIGSTOP)
        connections = [http.client.HTTPConnection(*fronts.address, timeout=PATIENCE) for _ in range(40)]
        for each in connections:
            each.connect()
        assert ask(fronts.second, "/health")[0] == 200, "the other one serves on"
        fronts.server.wait_for("front 0 died: it hung: it has been silent for 10 s")
        waiting = [each for each in connections if not has_connection(fronts.pids[1], each.sock)]
        assert waiting, "all of forty connections were given to the other one"
        for each in waiting:
            assert ask(each, "/health")[0] == 200, "what the stopped one had not accepted waits for the next"
        wait_until(lambda: metrics(fronts.http)["splitfuse:front_restarts_total"] == 1)


@pytest.mark.slow
def test_a_front_with_another_tokenizer_passes_all_on(folder: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(BUNDLED_MODEL, tmp_path / "storyteller"))
    with two_fronts(folder, "changed", "--model", str(model)) as fronts:
        chat = {"messages": [{"role": "user", "content": PROMPT}], "temperature": 0, "max_tokens": 8}
        wanted = ask(fronts.second, "/v1/chat/completions", chat)[1]["choices"]
        (model / "chat_template.jinja").write_text("something else")
        os.kill(fronts.pids[0], signal.SIGKILL)
        fronts.server.wait_for("front 0 passes on all requests: it cannot generate text: ")
        assert "its tokenizer is another one than when the server started" in fronts.server.said
        (new,) = set(children(fronts.server.process.pid, FRONT)) - {fronts.pids[1]}
        first = connection_to(new, fronts.address)
        assert ask(first, "/v1/chat/completions", chat)[1]["choices"] == wanted
        assert ask(first, "/ready")[0] == 200
        assert metrics(fronts.http)["splitfuse:front_restarts_total"] == 1


@pytest.mark.slow
def test_a_front_that_dies_before_there_is_a_model_is_started_again() -> None:
    """What the server has for its clients before the model is there: fronts, and no application behind them."""

    async def health(address: tuple[str, int], pid: int) -> int:
        connection = await asyncio.to_thread(connection_to, pid, address)
        try:
            return (await asyncio.to_thread(ask, connection, "/health"))[0]
        finally:
            connection.close()

    async def run() -> None:
        config = ServerConfig(fronts=2)
        with listening_sockets("127.0.0.1", 0, config.client_timeout, count=2) as listeners:
            address = listeners[0].getsockname()[:2]
            fronts = FrontProcesses(config)
            serving = asyncio.create_task(fronts.serve(listeners))
            while len(pids := children(os.getpid(), FRONT)) < 2:
                await asyncio.sleep(0.01)
            assert [await health(address, pid) for pid in pids] == [200, 200]
            os.kill(pids[0], signal.SIGKILL)
            while not fronts.num_restarts or len(again := children(os.getpid(), FRONT)) < 2:
                await asyncio.sleep(0.01)
            assert [await health(address, pid) for pid in again] == [200, 200]
            fronts.end(at_once=False)
            await serving

    asyncio.run(run())


@pytest.mark.slow
def test_a_port_in_use_is_not_shared(folder: Path) -> None:
    with two_fronts(folder, "one") as fronts:
        port = str(fronts.address[1])
        with server_process(folder, "other", "--fronts", "2", "--port", port) as other:
            assert other.process.wait(PATIENCE) == 1
            assert f"port {port} of 127.0.0.1 is in use by the deployment 'one'" in other.said


@pytest.mark.slow
def test_keys_tls_and_cors_hold_at_all_fronts(folder: Path, tmp_path: Path) -> None:
    if not make_certificate(tmp_path):
        pytest.skip("needs openssl")
    keys = tmp_path / "keys"
    keys.write_text("secret name=alice admin=yes\nother name=bob priority=low\n")
    for each in (keys, tmp_path / "key.pem"):
        each.chmod(0o600)
    flags = ["--tls-certificate", str(tmp_path / "cert.pem"), "--tls-key", str(tmp_path / "key.pem")]
    flags += ["--api-key-file", str(keys), "--allow-origin", "https://here.example", "--log-prompts"]
    with server_process(folder, "locked", "--fronts", "2", *flags) as server:
        server.wait_for("splitfuse serves ")
        found = re.search(r"on (https\S+) ", server.said)
        assert found is not None
        body = {"prompt": PROMPT, "max_tokens": 3, "temperature": 0}
        for number in range(12):  # the system gives each new connection to one of two fronts
            with httpx.Client(base_url=found[1], verify=False, timeout=PATIENCE, trust_env=False) as client:
                assert client.post(ROUTE, json=body).status_code == 401
                bob = {"authorization": "Bearer other", "origin": "https://here.example"}
                answer = client.post(ROUTE, json=body, headers=bob)
                assert answer.headers["access-control-allow-origin"] == "https://here.example"
                identity = answer.headers["x-request-id"]
                assert client.get(f"/v1/splitfuse/requests/{identity}", headers=bob).status_code == 200
                alice = {"authorization": "Bearer secret"}
                assert client.get(f"/v1/splitfuse/requests/{identity}", headers=alice).status_code == 404
                high = client.post(ROUTE, json={**body, "splitfuse_priority": "high"}, headers=bob)
                assert (high.status_code, high.json()["error"]["code"]) == (403, "priority_not_allowed")
                assert client.get("/engines", headers=bob).status_code == 403
                assert client.get("/engines", headers=alice).json()["engines"][0]["state"] == "ready", number
        records = [json.loads(line) for line in server.printed.splitlines()]
        done = [record for record in records if record["route"] == ROUTE and record["status"] == 200]
        assert len(done) == 12
        (tmp_path / "cert.pem").unlink()
        with httpx.Client(base_url=found[1], verify=False, timeout=PATIENCE, trust_env=False) as client:
            for pid in children(server.process.pid, FRONT):
                os.kill(pid, signal.SIGKILL)
            for number in range(2):
                server.wait_for(f"front {number} died")
            headers = {"authorization": "Bearer other"}
            answer = client.post(ROUTE, json=body, headers=headers)  # which waits for a front
            assert answer.status_code == 200, "they have the certificate with which the server started"
        assert {(each["key"], each["prompt"], len(each["text"])) for each in done} == {("bob", PROMPT, 1)}


@pytest.mark.slow
def test_adapters_and_replicas_are_known_to_all_fronts(folder: Path, tmp_path: Path) -> None:
    shapes = module_shapes(load_file(BUNDLED_MODEL / "model.safetensors"), ATTENTION)
    first, path = (save_adapter(tmp_path / f"folder-{n}", shapes, seed=n) for n in range(2))
    keys = tmp_path / "keys"
    keys.write_text("secret admin=yes\n")
    keys.chmod(0o600)
    flags = ["--api-key-file", str(keys), "--max-replicas", "2", "--lora", f"first={first}"]
    key = {"authorization": "Bearer secret"}
    with two_fronts(folder, "adapted", *flags) as fronts:
        body = {"prompt": PROMPT, "max_tokens": 3, "model": "fine"}
        for one, other in (fronts.both, fronts.both[::-1]):
            assert ask(other, ROUTE, body, **key)[0] == 404
            loaded = {"lora_name": "fine", "lora_path": str(path)}
            one.request(
                "POST", "/v1/load_lora_adapter", json.dumps(loaded), {"content-type": "application/json", **key}
            )
            assert one.getresponse().read() is not None
            assert ask(other, ROUTE, body, **key)[0] == 200
            one.request(
                "POST",
                "/v1/unload_lora_adapter",
                json.dumps({"lora_name": "fine"}),
                {"content-type": "application/json", **key},
            )
            assert one.getresponse().read() is not None
        assert ask(fronts.first, "/scale", {"replicas": 2}, **key) == (200, {"replicas": 2, "moved": 0})
        assert len(ask(fronts.second, "/engines", **key)[1]["engines"]) == 2
        assert ask(fronts.second, "/drain", {"engine": 0}, **key) == (200, {"moved": 0, "drained": [0]})
        plain = {"prompt": PROMPT, "max_tokens": 3}
        assert [ask(each, ROUTE, plain, **key)[0] for each in fronts.both] == [200, 200]


@pytest.mark.slow
def test_streams_of_all_fronts_outlive_an_engine(folder: Path, pipe: splitfuse.Pipeline) -> None:
    with two_fronts(folder, "resumed") as fronts:
        with held_streams(fronts) as streams:
            (engine,) = children(fronts.server.process.pid)
            os.kill(engine, signal.SIGKILL)
        wanted = pipe(PROMPT, max_new_tokens=SHORTER["max_tokens"], ignore_eos=True)[0].generated_text
        for stream in streams:
            rest = rest_of(stream)
            assert wanted.endswith(text_of(rest)) and '"resumed":1' in rest
        wait_until_idle(fronts.http)
        wait_until(lambda: fronts.server.printed.count('"resumed": 1') == 2)


@pytest.mark.slow
def test_what_is_watched_shows_the_requests_of_all_fronts(folder: Path) -> None:
    with two_fronts(folder, "watched", "--console") as fronts:
        for watching, answering in ((0, 1), (1, 0)):
            watcher = fronts.to(watching)
            watcher.request("GET", "/v1/splitfuse/trace?seconds=600")
            trace = watcher.getresponse()
            assert json.loads(trace.readline())  # what there is; from now on requests are told of
            answer = ask(fronts.to(answering), ROUTE, {"prompt": PROMPT, "max_tokens": 3})[1]
            unique_id = answer["id"].removeprefix("cmpl-")
            while unique_id not in (line := trace.readline().decode()) or '"status"' not in line:
                assert line, "the trace has ended"
            watcher.close()
            console = fronts.to(watching)
            console.request("GET", "/console")
            page = console.getresponse()
            assert page.status == 200 and b"<html" in page.read().lower()
            console.request("GET", "/console/events")
            assert console.getresponse().readline().startswith((b"data: ", b"event: ", b":"))
            console.close()
        wait_until_idle(fronts.http)
