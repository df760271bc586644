"""Connections to engines elsewhere, without an engine: secret, handshake, clocks, and which connections it accepts."""

from __future__ import annotations

import asyncio
import random
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from engine_process import make_key
from patience import PATIENCE
from router_streams import run
from server_process import make_certificate

from splitfuse.config.engine import EngineConfig
from splitfuse.config.server import ListenConfig, ServerConfig
from splitfuse.config.values import parse_address
from splitfuse.core.latency.phases import LatencyBreakdown
from splitfuse.core.limits import EngineLimits
from splitfuse.core.request_output import FinishReason, RequestOutput
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.scheduling_options import SchedulingOptions
from splitfuse.engine.messages import (
    Add,
    EngineInfo,
    EngineStats,
    Failed,
    Finish,
    Heartbeat,
    ResumePoint,
    StepReport,
    Stop,
    Traced,
)
from splitfuse.engine.remote import dial, listener
from splitfuse.engine.remote.clock import ClockDifference, shift_command, shift_report
from splitfuse.engine.remote.connector import Agreement, ConnectLauncher
from splitfuse.engine.remote.dial import connect, read_welcome
from splitfuse.engine.remote.handshake import (
    MAC_BYTES,
    MAGIC,
    NO_CERTIFICATE,
    NONCE_BYTES,
    HandshakeError,
    Purpose,
    client_context,
    greet_client,
    greet_server,
    server_context,
)
from splitfuse.engine.remote.listener import Listener
from splitfuse.engine.trace import FinishTrace, PhaseTrace, RequestTrace, StepTrace
from splitfuse.errors import ConfigError, EngineUnavailableError
from splitfuse.runtime.secret import read_secret

CONFIG = EngineConfig.from_settings({"num_blocks": 256})
KEY, OTHER_KEY = b"k" * 32, b"o" * 32
BESIDE = {"engine": ["10.0.0.2:9000"], "key_file": "k", "replicas": 2}


# --- the secret -------------------------------------------------------------------------------------------------------


def test_a_secret_gives_two_keys_that_outlive_its_process(tmp_path: Path) -> None:
    secret = read_secret(make_key(tmp_path))
    assert secret == read_secret(make_key(tmp_path))
    assert secret.link_key != secret.name_key
    assert secret != read_secret(make_key(tmp_path, "another secret of many characters"))
    assert "link_key" not in repr(secret)


def test_a_key_file_that_cannot_be_used_is_refused_by_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing cannot be read: No such file.*openssl rand -hex 32 > "):
        read_secret(str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match="is no regular file"):
        read_secret(str(tmp_path))
    path = make_key(tmp_path, "short")
    with pytest.raises(ConfigError, match="has a secret of 5 bytes, and needs 32 to 4096"):
        read_secret(path)
    Path(make_key(tmp_path)).chmod(0o640)
    with pytest.raises(ConfigError, match=f"can be read or changed by others: set its mode to 600 .chmod 600 {path}"):
        read_secret(path)


@pytest.mark.parametrize("text", ["9000", "host", "host:", ":9000", "host:99999", "::1:9000", "a b:1", "host:1/x"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"engine must be an address and a port, such as 10\.0\.0\.2:9000, not "):
        parse_address("engine", text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": ["h:1"]}, "engine needs key_file"),
        ({"key_file": "k"}, "key_file is for engines elsewhere"),
        ({"engine_tls": True}, "engine_tls is for engines elsewhere"),
        ({"engine": ["h:1", "h:1"], "key_file": "k"}, "engine h:1 is given twice"),
        ({"engine": ["h:0"], "key_file": "k"}, "must have the port"),
        ({"replicas": 0}, "replicas must be at least 1"),
        ({"engine_listen": "10.0.0.1:9100"}, "engine_listen is for engines of this machine beside others elsewhere"),
        ({**BESIDE, "replicas": 0, "engine_listen": "10.0.0.1:9100"}, "engine_listen is for engines of this machine"),
        ({**BESIDE, "engine_listen": "10.0.0.1:0"}, "must have a port with 1 more behind it"),
        ({**BESIDE, "engine_listen": "0.0.0.0:9100"}, "must be an address at which engines elsewhere reach"),
        ({**BESIDE, "engine_listen": "127.0.0.1:9100"}, "cannot be reached from other machines"),
        ({**BESIDE, "engine_listen": "10.0.0.1:9100", "engine_tls": True}, "needs tls_certificate and tls_key"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServerConfig.from_settings(settings)


def test_an_engine_needs_an_address_and_a_key() -> None:
    with pytest.raises(ConfigError, match="listen is missing"):
        ListenConfig(key_file="k")
    with pytest.raises(ConfigError, match="key_file is missing"):
        ListenConfig(listen="127.0.0.1:0")
    assert ServerConfig(engine=("h:1", "h:2"), key_file="k").num_engines == 2
    assert ServerConfig(engine=("h:1",), key_file="k", replicas=2).num_engines == 3
    assert ServerConfig().num_engines == 1


# --- the handshake ----------------------------------------------------------------------------------------------------

Meet = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[Any]]


@asynccontextmanager
async def server(meet: Meet, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    made = await asyncio.start_server(meet, "127.0.0.1", 0, ssl=tls)
    async with made:
        yield made.sockets[0].getsockname()[1]


async def shake(key: bytes, *, tls: ssl.SSLContext | None = None, certificate: bytes = NO_CERTIFICATE) -> list[Any]:
    """What a server with KEY and a client with `key` make of each other."""
    outcomes: list[Any] = []

    async def meet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            outcomes.append(await greet_client(reader, writer, KEY, certificate))
        except (HandshakeError, asyncio.IncompleteReadError) as error:
            outcomes.append(str(error))
        writer.close()

    async with server(meet, tls) as port:
        context = client_context() if tls is not None else None
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
        try:
            await greet_server(reader, writer, key, Purpose.BLOCKS)
            outcomes.append("let in")
        except HandshakeError as error:
            outcomes.append(str(error))
        writer.close()
        while len(outcomes) < 2:
            await asyncio.sleep(0)
    return outcomes


def test_both_ends_prove_that_they_have_the_key() -> None:
    async def test() -> None:
        assert sorted(map(str, await shake(KEY))) == ["Purpose.BLOCKS", "let in"]
        assert sorted(await shake(OTHER_KEY)) == ["has another key", "has another key: give both the same key_file"]

    run(test())


def test_a_server_without_the_key_is_found_out() -> None:
    async def test() -> None:
        async def lie(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(MAGIC + bytes(NONCE_BYTES))
            heard = await reader.readexactly(len(MAGIC) + 1 + NONCE_BYTES + MAC_BYTES)
            writer.write(b"\1" + heard[-MAC_BYTES:])  # it sends the client's own proof back
            writer.close()

        async with server(lie) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with pytest.raises(HandshakeError, match="has another key"):
                await greet_server(reader, writer, KEY, Purpose.FRONT)
            writer.close()

    run(test())


def test_what_was_recorded_opens_nothing() -> None:
    async def test() -> None:
        outcomes: list[str] = []

        async def meet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await greet_client(reader, writer, KEY)
                outcomes.append("let in")
            except HandshakeError as error:
                outcomes.append(str(error))
            writer.close()

        recorded = bytearray()
        async with server(meet) as port:

            async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                up, down = await asyncio.open_connection("127.0.0.1", port)
                writer.write(await up.readexactly(len(MAGIC) + NONCE_BYTES))
                recorded.extend(await reader.readexactly(len(MAGIC) + 1 + NONCE_BYTES + MAC_BYTES))
                down.write(recorded)
                writer.write(await up.readexactly(1 + MAC_BYTES))
                down.close()
                writer.close()

            async with server(relay) as between:
                reader, writer = await asyncio.open_connection("127.0.0.1", between)
                await greet_server(reader, writer, KEY, Purpose.FRONT)
                writer.close()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(recorded)
            await reader.read()
            writer.close()
            while len(outcomes) < 2:
                await asyncio.sleep(0)
        assert outcomes == ["let in", "has another key"]

    run(test())


def test_nobody_can_stand_between_two_ends_that_speak_tls(tmp_path: Path) -> None:
    if not make_certificate(tmp_path):
        pytest.skip("there is no openssl command to make a certificate with")
    context, digest = server_context(str(tmp_path / "cert.pem"), str(tmp_path / "key.pem"))

    async def test() -> None:
        assert sorted(map(str, await shake(KEY, tls=context, certificate=digest))) == ["Purpose.BLOCKS", "let in"]
        # One in the middle has a certificate of its own, so what the server has signed is not what the client sees.
        outcomes = await shake(KEY, tls=context, certificate=bytes(range(32)))
        assert sorted(outcomes) == ["has another key", "has another key: give both the same key_file"]

    run(test())


# --- which connections an engine accepts ------------------------------------------------------------------------------


@pytest.fixture
def listening() -> Iterator[Listener]:
    made = Listener("127.0.0.1:0", KEY, CONFIG)
    made.start()
    yield made
    made.stop()


def launcher(address: str, key: bytes = KEY, **settings: Any) -> ConnectLauncher:
    config = EngineConfig.from_settings({"num_blocks": 256, **settings})
    return ConnectLauncher(address, key, Agreement(config, has_local=False))


def refusal(made: ConnectLauncher, error: type[Exception]) -> str:
    async def test() -> str:
        with pytest.raises(error) as caught:
            await made.launch()
        return str(caught.value)

    return asyncio.run(asyncio.wait_for(test(), PATIENCE))


def test_a_wrong_key_version_or_setting_is_a_sentence(listening: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    address = listening.address
    assert "it has another key" in refusal(launcher(address, OTHER_KEY), ConfigError)
    said = refusal(launcher(address, block_size=16), ConfigError)
    assert said.startswith("it was started with block_size 32, and this server with block_size 16: give both the same")
    said = refusal(launcher(address, quantization="int8"), ConfigError)
    assert "it was started with no quantization, and this server with quantization int8" in said
    monkeypatch.setattr(dial, "__version__", "99.0")
    assert "and this is 99.0: use the same version" in refusal(launcher(address), ConfigError)


def test_settings_of_engines_beside_it_are_not_compared(listening: Listener) -> None:
    config = EngineConfig.from_settings({"num_blocks": 17})

    async def test() -> None:
        link = await ConnectLauncher(listening.address, KEY, Agreement(config, has_local=True)).launch()
        await link.end(0.0)

    run(test())


def test_one_front_at_a_time(listening: Listener) -> None:
    async def test() -> None:
        first = await launcher(listening.address).launch()
        with pytest.raises(EngineUnavailableError, match=r"the server at 127.0.0.1:\d+ has it: end that"):
            await launcher(listening.address).launch()
        await first.end(0.0)
        while True:  # the engine hears of the end a moment later
            try:
                second = await launcher(listening.address).launch()
                break
            except EngineUnavailableError:
                await asyncio.sleep(0.01)
        await second.end(0.0)

    run(test())


def test_a_front_that_says_nothing_loses_the_engine(listening: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "SILENCE_SECONDS", 0.05)

    async def test() -> None:
        reader, writer = await connect(listening.address, KEY, Purpose.FRONT, tls=None)
        await read_welcome(reader)
        await reader.read()  # to the end
        writer.close()
        while listening._session is not None:
            await asyncio.sleep(0.01)
        link = await launcher(listening.address).launch()  # one that is stopped for a while
        link._beating.cancel()  # type: ignore[attr-defined]
        reports = []
        while (report := await link.receive()) is not None:
            reports.append(report)
        failed = reports[-1]
        assert isinstance(failed, Failed) and "its server has been silent for" in failed.error
        assert failed.is_planned  # so none of its requests is suspected
        await link.end(0.0)

    run(test())
    session = listening.next_front()
    assert session.commands.get() == Stop() and not session.asks_restart


def test_strangers_are_heard_for_a_while_and_little(listening: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "MOST_STRANGERS", 3)
    host, port = parse_address("listen", listening.address)

    async def crowd() -> None:
        """A further one takes the place of the oldest, so that one with the key comes in."""
        meet = [await asyncio.open_connection(host, port) for _ in range(3)]
        for reader, _ in meet:
            await reader.readexactly(len(MAGIC) + NONCE_BYTES)
        for _ in range(2):
            link = await launcher(listening.address).launch()
            await link.end(0.0)
            while listening._session is not None:
                await asyncio.sleep(0.01)
        assert await meet[0][0].read() == b""
        meet[2][1].write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await meet[2][0].read() == b""  # refused at its first bytes
        for _, writer in meet:
            writer.close()

    async def silent() -> None:
        reader, writer = await asyncio.open_connection(host, port)
        await reader.readexactly(len(MAGIC) + NONCE_BYTES)
        assert await reader.read() == b""
        writer.close()

    run(crowd())
    monkeypatch.setattr(listener, "HANDSHAKE_SECONDS", 0.05)
    run(silent())


def test_strangers_are_bounded_within_the_handshake_of_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not make_certificate(tmp_path):
        pytest.skip("there is no openssl command to make a certificate with")
    monkeypatch.setattr(listener, "MOST_STRANGERS", 3)
    context, digest = server_context(str(tmp_path / "cert.pem"), str(tmp_path / "key.pem"))
    secured = Listener("127.0.0.1:0", KEY, CONFIG, tls=context, certificate=digest)
    secured.start()
    host, port = parse_address("listen", secured.address)

    async def test() -> None:
        silent = [await asyncio.open_connection(host, port) for _ in range(8)]
        for reader, _ in silent[:5]:
            with suppress(ConnectionError):
                assert await reader.read() == b""
        link = await ConnectLauncher(secured.address, KEY, Agreement(CONFIG, has_local=False), tls=True).launch()
        await link.end(0.0)
        for _, writer in silent:
            writer.close()

    run(test())
    secured.stop()


def test_what_is_no_engine_is_a_sentence_and_no_hang(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(dial, "HANDSHAKE_SECONDS", PATIENCE)

    async def say(text: bytes) -> str:
        async def meet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(text)
            if not text:
                await reader.read()  # it accepts, and says nothing
            writer.close()

        async with server(meet) as port:
            with pytest.raises((ConfigError, EngineUnavailableError)) as caught:
                await launcher(f"127.0.0.1:{port}").launch()
        return str(caught.value)

    async def test() -> None:
        assert "it is no splitfuse engine" in await say(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        assert "it has closed the connection within the handshake" in await say(b"splitfuse")
        with monkeypatch.context() as patched:
            patched.setattr(dial, "HANDSHAKE_SECONDS", 0.05)
            said = await say(b"")
        assert "it accepts connections, but has said nothing for 0.05 s; if it speaks TLS, set engine_tls" in said

    run(test())
    free = Listener("127.0.0.1:0", KEY, CONFIG)
    free.start()
    free.stop()
    assert "nothing listens there: start it with splitfuse engine" in refusal(
        launcher(free.address), EngineUnavailableError
    )
    with pytest.raises(ConfigError, match=r"listen 192.0.2.1:9000 cannot be listened on: .+"):
        Listener("192.0.2.1:9000", KEY, CONFIG).start()
    if make_certificate(tmp_path):
        context, digest = server_context(str(tmp_path / "cert.pem"), str(tmp_path / "key.pem"))
        plain, secured = (
            Listener("127.0.0.1:0", KEY, CONFIG),
            Listener("127.0.0.1:0", KEY, CONFIG, tls=context, certificate=digest),
        )
        for each in (plain, secured):
            each.start()
        agreement = Agreement(CONFIG, has_local=False)
        said = refusal(ConnectLauncher(plain.address, KEY, agreement, tls=True), ConfigError)
        assert "it speaks no TLS" in said
        with monkeypatch.context() as patched:
            patched.setattr(dial, "HANDSHAKE_SECONDS", 0.05)
            assert "set engine_tls" in refusal(launcher(secured.address), EngineUnavailableError)

        async def meet_by_tls() -> None:
            link = await ConnectLauncher(secured.address, KEY, agreement, tls=True).launch()
            await link.end(0.0)

        run(meet_by_tls())
        for each in (plain, secured):
            each.stop()


# --- what engines must have in common ---------------------------------------------------------------------------------


def info(**changes: Any) -> EngineInfo:
    identity = {"model": "a", "kernels": "avx2", "max_model_len": "100"}
    made = EngineInfo("m", EngineLimits(100, 100, 10, 32), 64, "", identity=identity, kv_fingerprint=b"k")
    return msgspec.structs.replace(made, **changes)


def test_engines_whose_answers_may_differ_are_refused() -> None:
    agreement = Agreement(CONFIG, has_local=True)
    agreement.note(info())
    agreement.check(info(identity={"model": "a", "kernels": "avx2", "max_model_len": "50"}))
    for name, message in (("model", "model is 'b', not 'a'"), ("kernels", "kernels is 'b', not 'avx2'")):
        with pytest.raises(ConfigError, match=message):
            agreement.check(info(identity={**info().identity, name: "b"}))
    with pytest.raises(ConfigError, match="give all the same block_size"):
        agreement.check(info(kv_fingerprint=b"l"))
    with pytest.raises(ConfigError, match="another SLO than this server"):
        agreement.check(info(slo_enabled=True))
    agreement.model_files = "files"
    with pytest.raises(ConfigError, match="another model or tokenizer, in m"):
        agreement.check(info())
    adapters = Agreement(EngineConfig.from_settings({"lora": ["sql=/a"]}), has_local=False)
    with pytest.raises(ConfigError, match="lacks the LoRA adapter sql"):
        adapters.check(info())
    adapters.check(info(adapters={"sql": "digest"}))


# --- clocks -----------------------------------------------------------------------------------------------------------


def test_the_difference_of_two_clocks_is_known_to_half_the_shortest_round_trip() -> None:
    rng = random.Random(51)
    clocks, best = ClockDifference(), 1e9
    for _ in range(200):
        there, held, back = rng.expovariate(100), rng.random(), rng.expovariate(100)
        sent = rng.uniform(0.0, 1e5)
        received = sent + there + 5000.0
        clocks.note(sent=sent, received=received, answered=received + held, back=sent + there + held + back)
        best = min(best, there + back)
        assert abs(clocks.seconds - 5000.0) <= 0.5  # the newest count alone, so the best of all is not kept
    assert abs(clocks.seconds - 5000.0) < 0.05
    slow = ClockDifference()
    assert slow.seconds == 0.0
    slow.note(sent=1.0, received=1.0, answered=1.0, back=3.0)
    slow.note(sent=3.0, received=3.1, answered=3.1, back=3.2)
    assert slow.seconds == pytest.approx(0.0)


def test_all_times_of_messages_are_translated_and_nothing_else() -> None:
    request = Add(
        "a",
        (1, 2),
        SamplingParams(),
        scheduling=SchedulingOptions(arrival_time=1.0),
        sent=2.0,
        resume_point=ResumePoint((7,), (3.0,)),
    )
    later = shift_command(request, 100.0)
    assert isinstance(later, Add) and later.resume_point is not None
    assert (later.scheduling.arrival_time, later.sent, later.resume_point.token_times) == (101.0, 102.0, (103.0,))
    assert shift_command(later, -100.0) == request
    assert shift_command(Finish("a", FinishReason.ABORT, ended=1.0), 1.0) == Finish("a", FinishReason.ABORT, ended=2.0)
    assert shift_command(Add("b", (1,), SamplingParams()), 5.0) == Add("b", (1,), SamplingParams())
    assert shift_command(Heartbeat(1.0), 5.0) == Heartbeat(1.0)
    output = RequestOutput("a", (1,), latency_breakdown=LatencyBreakdown(1.0, 2.0))
    records = (
        RequestTrace(1, "a", 1.0, 2.0, 2, 3, 0, 1, None, arrival_time=0.5),
        PhaseTrace(3.0, ()),
        StepTrace(1, 2, 4.0, 5.0, 0.25, 1, 0, 1, 1, ()),
        FinishTrace(1, 6.0, FinishReason.STOP, 1, None, None, 7.0),
    )
    report = StepReport((output,), EngineStats(step_seconds=9.0), records)
    moved = shift_report(report, 100.0)
    assert moved != report and shift_report(moved, -100.0) == report
    assert isinstance(moved, StepReport)
    assert moved.outputs[0].latency_breakdown == LatencyBreakdown(101.0, 102.0)
    assert moved.stats.step_seconds == 9.0
    first, phase, step, finish = moved.traced
    assert isinstance(first, RequestTrace) and (first.sent_time, first.time, first.arrival_time) == (101, 102, 100.5)
    assert isinstance(step, StepTrace) and (step.start_time, step.end_time, step.predicted_seconds) == (104, 105, 0.25)
    assert isinstance(finish, FinishTrace) and (finish.time, finish.wanted_until) == (106, 107)
    assert phase == PhaseTrace(103.0, ()) and shift_report(Traced(records), 100.0) == Traced(moved.traced)
