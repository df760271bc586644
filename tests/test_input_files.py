"""Files that settings and arguments name: pipes and devices among them, and how much of them is read."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from server_process import make_certificate

from splitfuse.bench import results, workload
from splitfuse.bench.results import Results
from splitfuse.bench.workload import TokenIds
from splitfuse.cli import generate
from splitfuse.config import files
from splitfuse.config.files import MIB, bounded_path, read_bytes, read_text
from splitfuse.config.server import ServerConfig
from splitfuse.errors import SplitfuseError
from splitfuse.gateway.lifecycle import _key_in, _trust
from splitfuse.recording.format import Recording
from splitfuse.runtime import calibration
from splitfuse.server.auth import ApiKeys
from splitfuse.server.listen import HttpServer

ENDLESS = "/dev/zero"


def piped(content: bytes) -> Path:
    """A pipe as a shell's <(command) names it, whose writer writes and ends."""
    reader, writer = os.pipe()

    def write() -> None:
        with os.fdopen(writer, "wb") as file:
            file.write(content)

    threading.Thread(target=write, daemon=True).start()
    return Path(f"/proc/self/fd/{reader}")


def test_a_pipe_is_read_to_its_end() -> None:
    content = bytes(range(256)) * 1000  # more than fits into a pipe
    assert read_bytes(piped(content)) == content
    assert read_text(piped(b"one\r\ntwo\n")) == "one\ntwo\n"


def test_no_more_is_read_than_allowed(tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.write_bytes(b"")
    os.truncate(large, MIB)
    assert len(read_bytes(large, MIB)) == MIB
    os.truncate(large, MIB + 1)
    for path in (large, ENDLESS, piped(bytes(MIB + 1))):
        with pytest.raises(OSError, match="it has more than 1 MiB, the most that is read"):
            read_bytes(path, MIB)
    assert read_bytes("/dev/null") == b""


def test_a_pipe_that_nothing_writes_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PATIENCE", 0.01)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match=r"nothing was written to it for 0\.01 s"):
        read_bytes(tmp_path / "pipe")


def test_a_library_gets_the_path_of_a_file_or_of_a_copy(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"text")
    with bounded_path(str(tmp_path / "file")) as path:
        assert path == str(tmp_path / "file")
    with bounded_path(str(piped(b"text"))) as path:
        assert [Path(path).read_bytes() for _ in range(2)] == [b"text", b"text"]


def test_a_certificate_may_come_from_a_pipe(tmp_path: Path) -> None:
    if not make_certificate(tmp_path):
        pytest.skip("needs openssl")
    cert, key = (str(piped((tmp_path / name).read_bytes())) for name in ("cert.pem", "key.pem"))
    assert HttpServer(ServerConfig(tls_certificate=cert, tls_key=key), max_connections=1).config.ssl is not None


READERS: dict[str, Callable[[], object]] = {
    "api_key_file": lambda: ApiKeys(ServerConfig(api_key_file=ENDLESS)),
    "tls_certificate": lambda: HttpServer(ServerConfig(tls_certificate=ENDLESS, tls_key=ENDLESS), max_connections=1),
    "server_key_file": lambda: _key_in(ENDLESS),
    "server_certificate": lambda: _trust(ENDLESS),
    "cost model": lambda: calibration.load(Path(ENDLESS)),
    "results": lambda: results.load(Path(ENDLESS)),
    "trace": lambda: workload.Trace.read(Path(ENDLESS), TokenIds(10)),
    "prompts": lambda: generate._read(ENDLESS),
    "recording": lambda: Recording.open(Path(ENDLESS)),
}


@pytest.mark.parametrize("name", READERS)
def test_what_never_ends_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (results, workload, generate):
        monkeypatch.setattr(module, "LARGE_BYTES", MIB)
    with pytest.raises(SplitfuseError, match=f"^(?=.*{ENDLESS}).*(the most that is read|ends within|is no recording)"):
        READERS[name]()


def test_results_are_written_to_a_pipe_and_not_in_its_place(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    results.save(Results("none", {}, ()), pipe)
    assert msgspec.json.decode(os.read(reader, MIB), type=Results) == Results("none", {}, ())
    os.close(reader)
    assert pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]
