"""What a process finds around it: no home, no standard streams, stuck logs, proxies, locks, keys that others read."""

import asyncio
import fcntl
import hashlib
import http.server
import io
import os
import pwd
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from running_server import RunningServer
from server_process import PATIENCE, make_certificate, wait_until

import splitfuse
from splitfuse import cli
from splitfuse.config.engine import EngineConfig
from splitfuse.config.server import ServerConfig
from splitfuse.deploy import health, registry
from splitfuse.deploy.registry import Deployment
from splitfuse.engine.tier_files import open_tiers
from splitfuse.errors import ConfigError, CostModelError, ModelNotFoundError, RegistryError, ServerError
from splitfuse.runtime.calibration import cache_path
from splitfuse.server.auth import ApiKeys
from splitfuse.server.lifecycle import run_server
from splitfuse.server.listen import HttpServer, listening_sockets

DEAD_PROXY = "http://127.0.0.1:9"  # nothing listens there
NO_MODEL = EngineConfig.from_settings({"model": "/no/such/folder"})


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of deployments: none of the user's own is seen or touched."""
    folder = tmp_path / "runtime"
    folder.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    return folder


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user unknown to the system, without a folder to write to."""

    def unknown(_: int) -> Any:
        raise KeyError

    for name in ("HOME", "XDG_RUNTIME_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def deployment(**changes: Any) -> Deployment:
    """This process, as if it were a server."""
    fields: dict[str, Any] = {"host": "127.0.0.1", "port": 1, "scheme": "http", "model": "m", "needs_key": False}
    return Deployment(**{"name": "fake", "drain_timeout": 1.0, **fields, **changes})


def full_pipe() -> tuple[int, int]:
    """A pipe that holds no byte more: what writes to it waits for ever."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, bytes(65536))
    except BlockingIOError:
        os.set_blocking(writer, True)
    return reader, writer


# A whole server ------------------------------------------------------------------------------------------------------


def test_a_server_runs_without_home_streams_or_log_reader(tmp_path: Path) -> None:
    """Its input and errors are closed, its log is a pipe that is full, and proxies lead nowhere."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    reader, writer = full_pipe()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "HTTP"))}
    environment |= {"HOME": "/dev/null/none", "http_proxy": DEAD_PROXY, "ALL_PROXY": "socks5://127.0.0.1:9"}
    environment |= {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "WEB_CONCURRENCY": "auto"}
    serve = [sys.executable, "-m", "splitfuse.cli", "serve", "--port", str(port), "--num-blocks", "200"]
    process = subprocess.Popen(
        ["sh", "-c", 'exec "$@" <&- 2>&-', "sh", *serve], stdout=writer, env=environment, cwd=tmp_path
    )
    os.close(writer)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=PATIENCE) as http:

            def is_ready() -> bool:
                assert process.poll() is None
                try:
                    return http.get("/ready").status_code == 200
                except httpx.ConnectError:
                    return False

            wait_until(is_ready)
            descriptors = [str(Path(f"/proc/{process.pid}/fd/{fd}").readlink()) for fd in (0, 2)]
            assert descriptors == ["/dev/null"] * 2, "a connection may take the place of a standard stream"
            for _ in range(3):
                assert http.post("/v1/completions", json={"prompt": "Erik", "max_tokens": 2}).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()
        os.close(reader)


def test_health_checks_and_clients_take_no_proxy(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.register(deployment(name="listed", port=server.port))
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, DEAD_PROXY)
    command = [sys.executable, "-m", "splitfuse.deploy.health"]
    assert subprocess.run(command, check=False).returncode == 0
    with splitfuse.client(server.url) as by_url, splitfuse.client("listed") as by_name:
        assert by_url.health() and by_name.health()
    monkeypatch.setattr(registry, "deployments", lambda: [deployment()])
    with pytest.raises(SystemExit, match="no answer from fake"):
        health.main()
    monkeypatch.setattr(registry, "deployments", list)
    with pytest.raises(SystemExit, match="no deployment is running"):
        health.main()


# The list of deployments ---------------------------------------------------------------------------------------------


def starts_unlisted(caplog: pytest.LogCaptureFixture) -> str:
    """The warning of a server that comes as far as its model."""
    with pytest.raises(ModelNotFoundError):
        asyncio.run(run_server(NO_MODEL, ServerConfig(port=0, name="unlisted")))
    return next(record.getMessage() for record in caplog.records if "do not find it" in record.getMessage())


@pytest.mark.usefixtures("homeless")
def test_a_user_without_a_home_can_serve(caplog: pytest.LogCaptureFixture) -> None:
    assert "no home folder for the list of deployments: set XDG_RUNTIME_DIR" in starts_unlisted(caplog)
    with pytest.raises(CostModelError, match="set XDG_CACHE_HOME"):
        cache_path({"model": "m"})
    assert splitfuse.client("http://127.0.0.1:9").url == "http://127.0.0.1:9"
    with pytest.raises(RegistryError):
        registry.deployments()


def test_a_full_disk_leaves_no_file_and_a_server_runs(
    runtime: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(registry.json, "dump", full)
        assert "cannot be written: No space left on device" in starts_unlisted(caplog)
    assert [file.name for file in (runtime / "splitfuse").iterdir()] == [".lock"]


def test_a_list_that_is_locked_is_given_up(
    runtime: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registry.register(deployment())
    monkeypatch.setattr(registry, "LOCK_SECONDS", 0.0)
    with (runtime / "splitfuse" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        registry.mark_ready(deployment())  # needs no lock
        with pytest.raises(RegistryError, match=r"another process has held .*\.lock for 0 s"):
            registry.deployments()
        assert "another process has held" in starts_unlisted(caplog)
    assert registry.find("fake").ready


def test_entries_that_are_no_files_are_passed_over(runtime: Path) -> None:
    registry.register(deployment())
    entries = runtime / "splitfuse"
    (entries / "folder.json").mkdir()
    os.mkfifo(entries / "pipe.json")
    (entries / "link.json").symlink_to(entries / "nothing")
    assert [each.name for each in registry.deployments()] == ["fake"]
    assert sorted(file.name for file in entries.glob("*.json")) == ["fake.json", "folder.json"]


# Proxies -------------------------------------------------------------------------------------------------------------


class Recorder(http.server.BaseHTTPRequestHandler):
    """A proxy that answers itself."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def proxy() -> Iterator[str]:
    with http.server.HTTPServer(("127.0.0.1", 0), Recorder) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
def test_only_other_machines_are_reached_through_a_proxy(
    variable: str, proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, proxy)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with splitfuse.client("http://machine.example") as remote:
        assert remote.health()
    for here in ("127.0.0.1", "localhost", "[::1]"):
        with splitfuse.client(f"http://{here}:9") as client, pytest.raises(ServerError, match="no server answers at"):
            client.health()
    monkeypatch.setenv(variable, "nonsense://proxy")
    with pytest.raises(ServerError, match="the proxy in the environment cannot be used"):
        splitfuse.client("http://machine.example")
    with splitfuse.client("http://127.0.0.1:9") as client:
        assert client.url == "http://127.0.0.1:9"


# Keys ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["", " ", "\n\t"])
def test_an_empty_key_in_the_environment_is_refused(
    value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPLITFUSE_API_KEY", value)
    monkeypatch.setattr(sys, "argv", ["splitfuse", "serve", "/no/such/folder", "--port", "0"])
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    assert capsys.readouterr().err == (
        "splitfuse: SPLITFUSE_API_KEY is set but has no key in it: set one, or unset it to serve without\n"
    )


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o622])
def test_key_files_that_others_can_open_are_refused(mode: int, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("k\n")
    keys.chmod(mode)
    message = re.escape(f"{keys} is open to other users (mode {mode:04o}): chmod 600 {keys}")
    with pytest.raises(ConfigError, match=f"api_key_file {message}"):
        ApiKeys(ServerConfig(api_key_file=str(keys)))
    with pytest.raises(ConfigError, match=f"tls_key {message}"):
        HttpServer(ServerConfig(tls_certificate="x", tls_key=str(keys)), max_connections=10)
    keys.chmod(0o400)
    assert ApiKeys(ServerConfig(api_key_file=str(keys))).identify(b"k").name == "key 1"


def test_salts_of_a_key_outlive_the_server_with_the_folder_of_its_disk_tier(tmp_path: Path) -> None:
    def salt(folder: str, key: str = "given") -> str:
        engine = EngineConfig.from_settings({"kv_disk_tier": f"{tmp_path}/{folder}:1MiB"})
        files, name_key = open_tiers(engine.cache)
        assert files is not None
        files.close()
        return ApiKeys(ServerConfig(api_key=(key,)), name_key=name_key).identify(key.encode()).cache_salt

    assert salt("one") == salt("one")
    assert len({salt("one"), salt("another"), salt("one", "of another user")}) == 3
    for alone in (hashlib.blake2b(b"given", digest_size=32), hashlib.sha256(b"given")):
        assert salt("one") != alone.hexdigest(), "who reads a recording could guess the key"
    without = [ApiKeys(ServerConfig(api_key=("k",))).identify(b"k").cache_salt for _ in range(2)]
    assert without[0] != without[1]


def test_health_follows_port_and_tls(tmp_path: Path) -> None:
    if not make_certificate(tmp_path):
        pytest.skip("no openssl here")
    tls = {"tls_certificate": str(tmp_path / "cert.pem"), "tls_key": str(tmp_path / "key.pem")}

    async def run() -> None:
        with listening_sockets("127.0.0.1", 0, 1.0) as (listener,):
            server = HttpServer(ServerConfig(**tls), max_connections=10)
            serving = asyncio.create_task(server.serve([listener]))
            here = deployment(port=listener.getsockname()[1], scheme="https")
            assert await asyncio.to_thread(health.is_healthy, here)
            assert not await asyncio.to_thread(health.is_healthy, deployment(port=here.port))
            server.should_exit = True
            await serving

    asyncio.run(run())


def test_a_server_started_with_signals_blocked_ends_on_sigterm() -> None:
    program = (
        "import signal, sys; from splitfuse.cli import main\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})\n"
        "sys.argv = ['splitfuse', 'serve', '--port', '0', '--load-format', 'dummy']; main()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any("starting" in line for line in process.stderr)  # signals are handled now
        process.terminate()
        try:
            assert process.communicate(timeout=PATIENCE) and process.returncode == 0
        finally:
            process.kill()
