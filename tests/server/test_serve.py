"""The life of a server: what it logs, what signals do, how it fails, and how other processes see it."""

import asyncio
import dataclasses
import io
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from command_line import Run
from server_load import children
from server_process import PATIENCE, ServerProcess, make_certificate, server_process, wait_until

import splitfuse
from splitfuse.clients.client import AsyncClient, server_state
from splitfuse.config.engine import EngineConfig
from splitfuse.config.server import ServerConfig
from splitfuse.deploy import daemon, registry
from splitfuse.deploy.registry import Deployment
from splitfuse.engine.messages import Loading
from splitfuse.errors import ConfigError, DrainingError, EngineUnavailableError, ModelNotFoundError, ServerError
from splitfuse.server.lifecycle import describe, model_name, run_server

LONG = {"max_new_tokens": 1500, "n": 8, "ignore_eos": True}
LONG_ENOUGH = {"max_new_tokens": 50, "n": 4, "ignore_eos": True}


@pytest.fixture(autouse=True, scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The place of these tests' deployments: none of the user's own is seen or touched."""
    path = tmp_path_factory.mktemp("runtime")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(path))
        yield path


def deployment(**changes: Any) -> Deployment:
    """This process, as if it were a server."""
    fields: dict[str, Any] = {"host": "127.0.0.1", "port": 1, "scheme": "http", "model": "m", "needs_key": False}
    return Deployment(**{"name": "fake", "drain_timeout": 1.0, **fields, **changes})


@contextmanager
def held(server: ServerProcess) -> Iterator[None]:
    """Stop the server's engine while the context lasts, so that no generation ends meanwhile. Ten seconds of it are
    taken for a fault.
    """
    (engine,) = children(server.process.pid)
    os.kill(engine, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(engine, signal.SIGCONT)


# From start to end ---------------------------------------------------------------------------------------------------


def test_a_server_logs_its_start_is_listed_and_drains(folder: Path, run: Run) -> None:
    with server_process(folder, "drained") as server, server.client() as client:
        assert server.said.index("starting\n") < server.said.index("need ") < server.said.index("splitfuse serves")
        assert f"splitfuse serves storyteller on {client.url} (name drained)\n" in server.said
        assert client.health() and client.state() == "ready"

        status, out, _ = run("ps")
        heading, row, _, engine_heading, engine_row = out.splitlines()
        assert (status, heading.split()) == (0, ["NAME", "MODEL", "URL", "PID", "UP", "SINCE", "STATE"])
        pid = str(server.process.pid)
        assert re.fullmatch(rf"drained +storyteller +{client.url} +{pid} +\d+-\d+-\d+ \d+:\d+:\d+ +ready", row)
        assert engine_heading.split()[:4] == ["ENGINE", "MACHINE", "ROLE", "STATE"]
        assert re.fullmatch(r"drained/0 +here +mixed +ready +0 +0 +0% +0\.00 +- +-", engine_row)

        with pytest.raises(ServerError, match=r"^the name 'drained' is in use: process \d+ serves storyteller at http"):
            asyncio.run(run_server(EngineConfig(), ServerConfig(name="drained", port=0)))
        status, out, err = run("serve", "--port", client.url.rpartition(":")[2], "--name", "other")
        assert (status, out) == (1, "")
        assert re.match(r"splitfuse: port \d+ of 127.0.0.1 is in use by the deployment .drained., which ends with", err)

        with ThreadPoolExecutor(2) as pool:
            with held(server):
                reading = pool.submit(lambda: list(client("Once upon a time", stream=True, **LONG_ENOUGH)))
                wait_until(lambda: client.stats()["outstanding_tokens"])
                stopping = pool.submit(run, "stop", "drained")
                wait_until(lambda: client.state() == "draining")
                with pytest.raises(DrainingError, match="accepts no new requests"):
                    client("hello", max_new_tokens=1)
                assert not stopping.done(), "stop did not wait for what ran"
            pieces = reading.result()
        texts = ["".join(piece.text for piece in pieces if piece.choice == choice) for choice in range(4)]
        responses = [piece.response for piece in pieces if piece.response is not None]
        assert [response.generated_text for response in responses] == texts
        assert [response.generated_length for response in responses] == [50] * 4
        assert stopping.result() == (0, f"drained (process {pid}) has ended\n", "")
        assert server.process.wait(PATIENCE) == 0
        assert "draining: 4 requests may end, within 60 s" in server.said and "Traceback" not in server.said
        assert registry.deployments() == []


@pytest.mark.parametrize(("host", "keys", "warned"), [("0.0.0.0", (), True), ("0.0.0.0", ("k",), False)])
def test_listening_without_a_key_is_warned_of(
    host: str, keys: tuple[str, ...], warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    config = ServerConfig(name="open", host=host, port=0, api_key=keys)
    with pytest.raises(ModelNotFoundError):
        asyncio.run(run_server(EngineConfig.from_settings({"model": "/nowhere/at/all"}), config))
    warning = "listening on 0.0.0.0 without authentication; set SPLITFUSE_API_KEY or --api-key-file"
    assert (warning in caplog.text) is warned


def test_a_folder_without_config_is_called_no_model(tmp_path: Path) -> None:
    with pytest.raises(
        ModelNotFoundError, match=r"has no config\.json: it is neither a model folder .* nor one of GGUF"
    ):
        asyncio.run(run_server(EngineConfig.from_settings({"model": str(tmp_path)}), ServerConfig(name="no", port=0)))


def test_a_second_sigterm_cuts_streams_off_with_an_error(folder: Path) -> None:
    with server_process(folder, "cut") as server, server.client() as client:
        pieces = client("Once upon a time", stream=True, **LONG)
        next(pieces)
        with held(server):
            server.terminate()
            wait_until(lambda: client.state() == "draining")
            server.terminate()
        with pytest.raises(EngineUnavailableError):
            list(pieces)
        assert server.process.wait(PATIENCE) == 1
        assert server.said.endswith("splitfuse: 8 requests were cut off at a second SIGTERM\n")
        assert "Traceback" not in server.said and registry.deployments() == []


def test_requests_are_cut_off_after_the_drain_timeout(folder: Path) -> None:
    with server_process(folder, "slow", "--drain-timeout", "0.01") as server, server.client() as client:
        pieces = client("Once upon a time", stream=True, **LONG)
        next(pieces)
        server.terminate()
        with pytest.raises(EngineUnavailableError):
            list(pieces)
        assert server.process.wait(PATIENCE) == 1
        assert server.said.endswith("splitfuse: 8 requests were cut off after 0.01 s of draining\n")


def test_sigterm_during_loading_ends_a_server(folder: Path) -> None:
    with server_process(folder, "early") as server:
        server.wait_for("starting\n")
        server.terminate()
        assert server.process.wait(PATIENCE) == 0
        assert "splitfuse serves" not in server.said and "Traceback" not in server.said
        assert registry.deployments() == []


def test_stop_now_and_stop_of_an_unknown_name(folder: Path, run: Run) -> None:
    with server_process(folder, "now") as server:
        wait_until(lambda: [d.name for d in registry.deployments()] == ["now"])
        assert run("stop", "nobody") == (
            1,
            "",
            "splitfuse: there is no deployment named 'nobody' of this user on this machine; running: now\n",
        )
        status, out, _ = run("stop", "now", "--now")
        assert (status, out) == (0, f"now (process {server.process.pid}) has ended\n")
        assert server.process.wait(PATIENCE) == 130
        assert server.said.endswith("splitfuse: interrupted\n")
    assert run("stop", "now")[2].endswith("; none is running\n")
    assert run("ps") == (0, "NAME  MODEL  URL  PID  UP SINCE  STATE\n", "")


# What keeps it from serving ------------------------------------------------------------------------------------------


def test_a_missing_model_ends_a_server_with_a_sentence(run: Run) -> None:
    status, out, err = run("serve", "/no/such/folder", "--port", 0)
    assert (status, out) == (1, "")
    assert "splitfuse: there is no folder /no/such/folder: name a model folder" in err and "Traceback" not in err
    assert registry.deployments() == []


def test_an_engine_that_cannot_load_ends_the_server(run: Run) -> None:
    status, out, err = run("serve", "--port", 0, "--num-blocks", 10**9)
    assert (status, out) == (1, "")
    assert "does not fit" in err and "need" in err and "Traceback" not in err
    assert registry.deployments() == []


def test_invalid_settings(run: Run, tmp_path: Path) -> None:
    def refused(*arguments: object) -> str:
        status, out, err = run("serve", *arguments)
        assert (status, out) == (1, "") and err.startswith("splitfuse: ") and err.count("\n") == 1
        return err

    assert "max_num_seqs must be at least 1, not 0" in refused("--max-num-seqs", 0)
    assert "port must be from 0 to 65535" in refused("--port", 70000)
    assert "name must be made of letters" in refused("--name", "../x")
    assert "MODEL a and --model b are mutually exclusive" in refused("a", "--model", "b")
    assert "tls_certificate and tls_key go together" in refused("--tls-key", "x")
    nothing = tmp_path / "nothing"
    assert "cannot be used: " in refused("--port", 0, "--tls-certificate", nothing, "--tls-key", nothing)
    assert "replicas is 10000, but this process may use" in refused("--port", 0, "--replicas", 10_000)
    assert "203.0.113.7" in refused("--host", "203.0.113.7")
    assert registry.deployments() == []


def test_a_port_in_use_is_found_in_ipv6() -> None:
    try:
        taken = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("no IPv6 here")
    with taken, pytest.raises(ServerError, match=r"^port \d+ of ::1 is in use"):
        asyncio.run(run_server(EngineConfig(), ServerConfig(host="::1", port=taken.getsockname()[1])))


def test_help_lists_every_setting(run: Run) -> None:
    status, out, _ = run("serve", "--help")
    assert status == 0
    for field in dataclasses.fields(ServerConfig):
        assert f"--{field.name.replace('_', '-')} " in out
    for name in splitfuse.EngineConfig.setting_fields():
        assert f"--{name.replace('_', '-')} " in out
    assert "SPLITFUSE_API_KEY" in out
    assert run("--version") == (0, f"splitfuse {splitfuse.__version__}\n", "")


def test_names_and_stages() -> None:
    assert model_name(None) == "storyteller" and model_name("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert model_name(str(Path(__file__).parent)) == "server", "a folder's name shows the way there"
    assert describe(Loading("loading", 0.439)) == "loading 43 %" and describe(Loading("importing")) == "importing"
    assert describe(Loading("loading", 0.6), steps=4) == "loading 50 %"


# The registry --------------------------------------------------------------------------------------------------------


def test_an_entry_is_private_and_a_used_name_refused(folder: Path) -> None:
    own = deployment()
    registry.register(own)
    try:
        files = list((folder / "splitfuse").glob("*.json"))
        assert [file.name for file in files] == ["fake.json"]
        assert stat.S_IMODE(files[0].stat().st_mode) == 0o600
        assert stat.S_IMODE(files[0].parent.stat().st_mode) == 0o700
        assert registry.find("fake") == own and own.is_alive
        with pytest.raises(ServerError, match="is in use"):
            registry.register(deployment(port=2))
        registry.unregister(deployment(port=2))  # not the one that is there
        assert registry.find("fake") == own
    finally:
        registry.unregister(own)
    assert registry.deployments() == []


def test_entries_of_dead_processes_are_removed(folder: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child_start = None
    while child_start is None and child.poll() is None:
        child_start = registry.process_start(child.pid)
    child.wait()
    dead = deployment(name="dead", pid=child.pid, process_start=child_start or "1")
    recycled = deployment(name="recycled", process_start="1")  # our own number, in an earlier life
    for gone in (dead, recycled):
        registry.register(gone)
        assert not gone.is_alive
    entries = folder / "splitfuse"
    (entries / "broken.json").write_text("{")
    (entries / "foreign.json").write_text(json.dumps({"name": "foreign"}))
    registry.register(deployment(name="dead", port=7))  # the name is free again
    assert [(d.name, d.port) for d in registry.deployments()] == [("dead", 7)]
    assert [file.name for file in entries.glob("*.json")] == ["dead.json"]
    registry.unregister(registry.find("dead"))


def test_a_zombie_is_not_alive() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    start = registry.process_start(child.pid)
    assert start is not None
    child.kill()
    wait_until(lambda: registry.process_start(child.pid) is None)
    assert child.wait() == -9


def test_urls_are_addresses_to_call() -> None:
    assert deployment(host="0.0.0.0", port=80).url == "http://127.0.0.1:80"
    assert deployment(host="::", port=80, scheme="https").url == "https://[::1]:80"
    assert deployment(host="10.0.0.1", port=80).url == "http://10.0.0.1:80"


def test_without_a_runtime_folder_the_cache_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    registry.register(deployment())
    assert [file.name for file in (tmp_path / "splitfuse" / "run" / socket.gethostname()).glob("*.json")] == [
        "fake.json"
    ]
    assert registry.find("fake").pid == os.getpid()
    (tmp_path / "splitfuse2").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "splitfuse2"))
    with pytest.raises(ServerError, match="set XDG_RUNTIME_DIR to a writable folder"):
        registry.deployments()


# Detached ------------------------------------------------------------------------------------------------------------


def test_a_detached_server_that_fails_shows_its_last_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    echo = io.StringIO()
    with pytest.raises(
        ServerError,
        match=r"(?s)^the server ended with status 1 .*there is no folder /no/such/folder: name a model folder.*$",
    ):
        daemon.start({"model": "/no/such/folder", "port": 0, "name": "ended"}, wait=True, echo=echo)
    assert "there is no folder /no/such/folder" in echo.getvalue()
    assert registry.deployments() == [] and not daemon._children


def test_an_invalid_setting_is_refused_before_the_start() -> None:
    for settings, message in (
        ({"poort": 1}, "unknown setting 'poort'; did you mean 'port'"),
        ({"api_keys": "k"}, "unknown setting 'api_keys'; did you mean 'api_key'"),
        ({"port": -1}, "port must be"),
        ({"api_key": "a b"}, "api_key must have no white space"),
        ({"api_key": ("fine", "line\n")}, "api_key must have no line end"),
    ):
        with pytest.raises(ConfigError, match=message):
            splitfuse.serve(deployment_name="refused", **settings)
    with pytest.raises(ConfigError, match="use deployment_name instead of name"):
        splitfuse.serve(name="x")
    assert not daemon._children


def test_a_detached_server_takes_its_key_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings = {"port": 0, "num_blocks": 100, "enable_prefix_caching": False, "allow_origin": ["http://a", "http://b"]}
    with splitfuse.serve(deployment_name="detached", api_key="open-sesame", **settings) as client:
        said = capsys.readouterr().err
        assert "need" in said and f"splitfuse serves storyteller on {client.url} (name detached)" in said
        assert client("Once upon a time", max_new_tokens=3)[0].generated_length == 3
        assert client.stats()["kv_blocks"] == 100
        assert client.deployment is not None
        pid = client.deployment.pid
        assert os.getsid(pid) == pid, "Ctrl-C here would end it"
        command = Path(f"/proc/{pid}/cmdline")
        if command.exists():
            flags = command.read_text().split("\0")
            assert "--no-enable-prefix-caching" in flags
            assert {("--allow-origin", "http://a"), ("--allow-origin", "http://b")} <= set(pairwise(flags))
            assert not any("open-sesame" in flag for flag in flags)
        with pytest.raises(ServerError, match="API key"):
            splitfuse.client("detached")("hello")
        monkeypatch.setenv("SPLITFUSE_API_KEY", "open-sesame other")
        assert len(splitfuse.client("detached")("hello", max_new_tokens=1)) == 1
        client.terminate_server()
        with pytest.raises(ServerError, match="no server answers at"):
            client("hello")
    with pytest.raises(ServerError, match=r"there is no deployment named 'detached' .*; none is running"):
        splitfuse.client("detached")
    log = tmp_path / "splitfuse" / "log" / "detached.log"
    assert "open-sesame" not in log.read_text() and stat.S_IMODE(log.stat().st_mode) == 0o600
    assert '"route": "/v1/completions"' in log.read_text()


def test_a_detached_server_with_a_certificate_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings: dict[str, Any] = {"tls_certificate": str(tmp_path / "cert.pem"), "tls_key": str(tmp_path / "key.pem")}
    if not make_certificate(tmp_path):
        settings = {}
    with splitfuse.serve(deployment_name="brief", port=0, num_blocks=100, wait=False, **settings) as client:
        assert client.url.startswith("https://" if settings else "http://")
        assert client.health()
        wait_until(lambda: client.state() == "ready")
        assert client("Once", max_new_tokens=2, stream=False)[0].generated_length == 2
        (running,) = registry.deployments()
        assert server_state(running) == "ready"
        if settings:
            untrusting = AsyncClient(client.url)  # without the certificate from the registry
            with pytest.raises(ServerError, match="certificate"):
                asyncio.run(untrusting.health())
        client.terminate_server()
    assert registry.deployments() == [] and server_state(running) == "unreachable"
