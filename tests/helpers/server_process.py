"""`splitfuse serve` in a process of its own."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from patience import PATIENCE

import splitfuse

SMALL = ["--port", "0", "--num-blocks", "400"]


def wait_until(condition: Callable[[], object]) -> None:
    """Until `condition` holds."""
    limit = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < limit, "it never came true"
        time.sleep(0.01)


class ServerProcess:
    """The process, and what it says."""

    def __init__(self, folder: Path, name: str, *flags: str, prefix: tuple[str, ...] = ()) -> None:
        self.name = name
        self.out, self.log = folder / f"{name}.out", folder / f"{name}.err"
        with self.out.open("wb") as out, self.log.open("wb") as err:
            command = [*prefix, sys.executable, "-m", "splitfuse.cli", "serve", "--name", name, *SMALL, *flags]
            self.process = subprocess.Popen(command, stdout=out, stderr=err)

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")

    @property
    def printed(self) -> str:
        """A line of JSON for each request."""
        return self.out.read_text(encoding="utf-8")

    def wait_for(self, text: str) -> None:
        """Until it has said so; it fails at once if it has ended before."""
        wait_until(lambda: text in self.said or self.process.poll() is not None)
        assert text in self.said, self.said

    def client(self) -> splitfuse.Client:
        self.wait_for("splitfuse serves ")
        found = re.search(r"on (http\S+) ", self.said)
        assert found is not None
        return splitfuse.client(found[1])

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)


@contextmanager
def server_process(folder: Path, name: str, *flags: str, prefix: tuple[str, ...] = ()) -> Iterator[ServerProcess]:
    """A server that is gone afterwards, whatever happens. `prefix` is a command that runs it."""
    server = ServerProcess(folder, name, *flags, prefix=prefix)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()


def make_certificate(folder: Path) -> bool:
    """Make a self-signed certificate for a name that is not the server's. Return False if there is no openssl."""
    command = "openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem -days 2 -subj /CN=elsewhere"
    try:
        subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    except FileNotFoundError:
        return False
    return True
