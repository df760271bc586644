"""Lists the running deployments of this user, by name: a JSON file each, in a folder that only this user can read.

Decides where the files are and which of them belong to a living process. An entry has no API key. Every function raises
RegistryError where there is no such folder, or no way to write to it.
"""

from __future__ import annotations

import fcntl
import ipaddress
import json
import os
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import msgspec

from splitfuse.errors import RegistryError, ServerError

WILDCARDS = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
"""Addresses to listen on that are not addresses to call, with the one to call from the same machine."""

LOCK_SECONDS = 3.0
"""Time to wait for another process that uses the list."""
POLL_SECONDS = 0.02


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """Describes one running server; made in its own process.

    `process_start` tells that process from a later one of the same number; `started` is Unix time.
    """

    name: str
    host: str
    port: int
    scheme: str
    model: str
    needs_key: bool
    drain_timeout: float  # seconds
    tls_certificate: str | None = None
    pid: int = field(default_factory=os.getpid)
    process_start: str | None = field(default_factory=lambda: process_start(os.getpid()))
    started: float = field(default_factory=time.time)
    ready: bool = False
    """State of the server: it has begun to accept requests."""

    @property
    def url(self) -> str:
        """Return its URL on this machine, without a slash at the end."""
        return url_of(self.scheme, WILDCARDS.get(self.host, self.host), self.port)

    @property
    def is_alive(self) -> bool:
        """Return whether its process still runs."""
        return self.process_start is not None and process_start(self.pid) == self.process_start


def url_of(scheme: str, host: str, port: int) -> str:
    """Return `http://127.0.0.1:8000`; an IPv6 address gets its brackets."""
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine by its name or address.

    >>> is_loopback("localhost"), is_loopback("127.0.0.2"), is_loopback("example.org")
    (True, True, False)
    """
    try:
        return host == "localhost" or ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def process_start(pid: int) -> str | None:
    """Return when the process of that number began, for comparing only; None if there is none, or only a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        return _exists(pid)
    return None if fields[0] in ("Z", "X") else fields[19]


def _exists(pid: int) -> str | None:
    """Return the same where there is no /proc: only whether the process exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # of another user
        return None
    return "unknown"


def register(deployment: Deployment) -> None:
    """Add a deployment. Raises ServerError if its name belongs to a running server."""
    with _locked() as folder:
        _check_free(folder, deployment.name)
        _write(folder, deployment)


def mark_ready(deployment: Deployment) -> None:
    """Note that a registered deployment accepts requests. No lock is needed: while it lives, the name is its own."""
    _write(_folder(), replace(deployment, ready=True))


def _write(folder: Path, deployment: Deployment) -> None:
    with _as_registry_error(folder):
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=".new-")  # mode 0600
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(asdict(deployment), file)
            Path(temporary).replace(folder / f"{deployment.name}.json")
        except OSError:  # the disk is full
            Path(temporary).unlink(missing_ok=True)
            raise


def check_free(name: str) -> None:
    """Raise ServerError if the name belongs to a running server."""
    with _locked() as folder:
        _check_free(folder, name)


def _check_free(folder: Path, name: str) -> None:
    other = _read(folder / f"{name}.json")
    if other is not None and other.is_alive:
        raise ServerError(
            f"the name {name!r} is in use: process {other.pid} serves {other.model} at {other.url}; choose another "
            f"with --name, or end it with: splitfuse stop {name}"
        )


def unregister(deployment: Deployment) -> None:
    """Remove a deployment; another one that has taken its name meanwhile stays."""
    with _locked() as folder:
        file = folder / f"{deployment.name}.json"
        entry = _read(file)
        if entry is not None and replace(entry, ready=deployment.ready) == deployment:
            with _as_registry_error(folder):
                file.unlink(missing_ok=True)


def deployments() -> list[Deployment]:
    """Return all running deployments, by name. Entries of dead processes are removed."""
    living = []
    with _locked() as folder:
        for file in sorted(folder.glob("[!.]*.json")):
            deployment = _read(file)
            if deployment is not None and deployment.is_alive:
                living.append(deployment)
            else:
                with suppress(OSError):  # a folder, or the disk cannot be written now
                    file.unlink()
    return living


def find(name: str) -> Deployment:
    """Return the running deployment of that name. Raises ServerError, with the names there are, if there is none."""
    living = deployments()
    for deployment in living:
        if deployment.name == name:
            return deployment
    there_are = f"running: {', '.join(d.name for d in living)}" if living else "none is running"
    raise ServerError(f"there is no deployment named {name!r} of this user on this machine; {there_are}")


def _folder() -> Path:
    """Return $XDG_RUNTIME_DIR/splitfuse or, without it, a folder named after this machine in the cache, which several
    machines may share. It is created if necessary.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.access(runtime, os.W_OK | os.X_OK):
        return _private(Path(runtime) / "splitfuse")
    return _private(cache_folder("run") / (socket.gethostname() or "localhost"))


def cache_folder(name: str) -> Path:
    """Return `~/.cache/splitfuse/NAME`, or that in XDG_CACHE_HOME, readable by this user only."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise RegistryError("no home folder for the list of deployments: set XDG_RUNTIME_DIR") from error
    return _private(home / "splitfuse" / name)


def _private(folder: Path) -> Path:
    with _as_registry_error(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if status.st_uid != os.getuid():
            raise RegistryError(
                f"{folder} belongs to another user: remove it, or set XDG_RUNTIME_DIR to a folder of your own"
            )
        if stat.S_IMODE(status.st_mode) != 0o700:
            folder.chmod(0o700)
    return folder


@contextmanager
def _locked() -> Iterator[Path]:
    """Yield the folder to one process at a time; the lock ends with the process that holds it."""
    folder = _folder()
    with _as_registry_error(folder):
        file = (folder / ".lock").open("w")
    with file:
        limit = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > limit:
                    raise RegistryError(
                        f"another process has held {folder / '.lock'} for {LOCK_SECONDS:g} s: end it, or set "
                        "XDG_RUNTIME_DIR to another folder"
                    ) from None
                time.sleep(POLL_SECONDS)
            except OSError:  # this file system has no locks
                break
        yield folder


@contextmanager
def _as_registry_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RegistryError(
            f"the list of deployments in {folder} cannot be written: {error.strerror or error}; set XDG_RUNTIME_DIR to "
            "a writable folder"
        ) from error


def _read(file: Path) -> Deployment | None:
    """Return the entry in a file; None if the file does not exist or has no entry."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=Deployment) if file.is_file() else None
    except (OSError, msgspec.DecodeError):
        return None
