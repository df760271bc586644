"""What `splitfuse engine` refuses at its start, and what it tells servers of its ends."""

from __future__ import annotations

import asyncio
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engine_process import make_key
from router_streams import run
from server_process import make_certificate

from splitfuse.config.engine import EngineConfig
from splitfuse.config.server import ListenConfig
from splitfuse.engine.engine import Engine
from splitfuse.engine.messages import Failed, Loading
from splitfuse.engine.remote import connector, listener
from splitfuse.engine.remote.connector import Agreement, ConnectLauncher
from splitfuse.engine.remote.handshake import server_context
from splitfuse.engine.remote.listener import Listener
from splitfuse.engine.remote.standalone import StandaloneEngine
from splitfuse.engine.replicas import make_replicas
from splitfuse.errors import ConfigError

KEY = b"k" * 32


def standalone(folder: Path, settings: dict[str, Any] | None = None, **listen: Any) -> StandaloneEngine:
    listen = {"listen": "127.0.0.1:0", "key_file": make_key(folder), **listen}
    return StandaloneEngine.of(EngineConfig.from_settings(settings or {}), ListenConfig(**listen))


def test_loans_need_engines_of_one_machine(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kv_loans needs another engine on the same machine"):
        standalone(tmp_path, {"kv_loans": True})


def test_an_address_that_means_another_engine_elsewhere_is_no_source_of_blocks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def sources(*engines: str) -> dict[str, bool]:
        router = make_replicas(EngineConfig(), replicas=0, engines=engines, key_file=make_key(tmp_path))
        launchers = [each._launcher for each in router.replicas]  # type: ignore[attr-defined]
        return {each.address: each._is_source for each in launchers}

    assert sources("127.0.0.1:1", "localhost:2") == {"127.0.0.1:1": True, "localhost:2": True}
    assert not caplog.text
    assert sources("127.0.0.1:1", "10.0.0.2:1") == {"127.0.0.1:1": False, "10.0.0.2:1": True}
    assert "fetch no KV blocks from 127.0.0.1:1: set engine to an address at which they reach it" in caplog.text


def test_a_certificate_may_follow_its_key_which_no_other_user_may_read(tmp_path: Path) -> None:
    if not make_certificate(tmp_path):
        pytest.skip("there is no openssl command to make a certificate with")
    cert, key, both = (tmp_path / name for name in ("cert.pem", "key.pem", "both.pem"))
    both.write_text(key.read_text("ascii") + cert.read_text("ascii"), "ascii")
    assert server_context(str(both), str(both))[1] == server_context(str(cert), str(key))[1]
    key.chmod(0o644)
    with pytest.raises(ConfigError, match=r"tls_key .*key\.pem is open to other users \(mode 0644\): chmod 600"):
        standalone(tmp_path, tls_certificate=str(cert), tls_key=str(key))


def test_a_server_that_waits_is_told_why_an_engine_cannot_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = standalone(tmp_path, {"model": str(tmp_path / "nothing")})
    key, load, connected = engine._secret.link_key, engine._load, threading.Event()
    listens, address = threading.Event(), ""

    def load_when_connected() -> Engine:
        nonlocal address
        address = engine._listener.address
        listens.set()
        connected.wait()
        return load()

    monkeypatch.setattr(engine, "_load", load_when_connected)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    failures: list[Exception] = []

    def serve() -> None:
        try:
            engine.run()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    listens.wait()

    async def test() -> None:
        link = await ConnectLauncher(address, key, Agreement(EngineConfig(), has_local=True)).launch()
        connected.set()
        reports = []
        while (report := await link.receive()) is not None:
            reports.append(report)
        await asyncio.to_thread(thread.join)
        assert isinstance(failed := reports[-1], Failed)
        assert (failed.error, failed.kind, failed.is_planned) == (str(failures[0]), "ModelNotFoundError", True)
        await link.end(0.0)

    try:
        run(test())
    finally:
        connected.set()
        thread.join()
        engine._listener.stop()


@pytest.mark.parametrize("seconds", [0.0, 2.0, 20.0])
def test_who_was_stopped_itself_suspects_no_request(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine then has closed the connection, and what it said last is lost to what was written meanwhile."""
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(connector, "time", clock)
    listening = Listener("127.0.0.1:0", KEY, EngineConfig())
    listening.start()

    async def test() -> None:
        link = await ConnectLauncher(listening.address, KEY, Agreement(EngineConfig(), has_local=True)).launch()
        await link.receive()
        session = listening._session
        assert session is not None
        clock.now += seconds
        session._loop.call_soon_threadsafe(session._writer.transport.abort)
        while await link.receive() is not None:
            pass
        assert link.is_blameless == (seconds > connector.STOPPED_SECONDS)
        await link.end(0.0)

    run(test())
    listening.stop()


def test_a_server_that_reads_nothing_suspects_no_request_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "MAX_MESSAGE", 2**16)
    listening = Listener("127.0.0.1:0", KEY, EngineConfig())
    listening.start()

    async def test() -> None:
        link = await ConnectLauncher(listening.address, KEY, Agreement(EngineConfig(), has_local=True)).launch()
        await link.receive()
        session = listening._session
        assert session is not None
        while listening._session is not None:  # until the buffers of both machines are full
            for _ in range(100):
                session.report(Loading("x" * 2**16))
            await asyncio.sleep(0.01)
        reports = []
        while (report := await link.receive()) is not None:
            reports.append(report)
        assert reports[-1] == Failed("its server has read nothing", is_planned=True)
        await link.end(0.0)

    run(test())
    listening.stop()
