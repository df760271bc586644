"""`splitfuse engine` in a process of its own."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from server_process import wait_until


def make_key(folder: Path, secret: str = "0123456789abcdef" * 2) -> str:
    """A key file, and its path."""
    path = folder / "key"
    path.write_text(f"{secret}\n", encoding="ascii")
    path.chmod(0o600)
    return str(path)


class EngineProcess:
    """The process, and what it says."""

    def __init__(self, folder: Path, *flags: str, listen: str = "127.0.0.1:0", prefix: tuple[str, ...] = ()) -> None:
        folder.mkdir(exist_ok=True)
        self.log = folder / "engine.err"
        command = [*prefix, sys.executable, "-m", "splitfuse.cli", "engine", "--listen", listen, "--num-threads=1"]
        with self.log.open("ab") as err:
            before = self.log.stat().st_size
            self.process = subprocess.Popen([*command, *flags], stdout=err, stderr=err)
        self._before = before

    @property
    def said(self) -> str:
        return self.log.read_bytes()[self._before :].decode()

    @property
    def address(self) -> str:
        """Where it listens, once it does."""
        wait_until(lambda: "listens on" in self.said or self.process.poll() is not None)
        found = re.search(r"listens on (\S+)", self.said)
        assert found is not None, self.said
        return found[1]

    def send(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)


@contextmanager
def engine_process(
    folder: Path, *flags: str, listen: str = "127.0.0.1:0", prefix: tuple[str, ...] = ()
) -> Iterator[EngineProcess]:
    """An engine that is gone afterwards, whatever happens."""
    engine = EngineProcess(folder, *flags, listen=listen, prefix=prefix)
    try:
        yield engine
    finally:
        with suppress(ProcessLookupError):
            engine.send(signal.SIGCONT)
        engine.process.kill()
        engine.process.wait()
