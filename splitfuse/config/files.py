"""Reads files that settings and arguments name, within bounds: the name may be that of a pipe or of a device."""

from __future__ import annotations

import io
import os
import select
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from splitfuse.errors import ConfigError

MIB = 2**20
SMALL_BYTES = 16 * MIB
"""Size of the largest file of keys, certificates or the like that is read."""
LARGE_BYTES = 1024 * MIB
"""Size of the largest file of prompts, requests or results that is read."""
PATIENCE = 60.0
"""Longest wait, in seconds, for a pipe or a device to give something, but for a terminal."""


def read_bytes(path: str | Path, most: int = SMALL_BYTES) -> bytes:
    """Return the content of a file, a pipe or a device. Raises OSError, also for more than `most` bytes and for a pipe
    that nothing is written to.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # which does not wait for a writer of a pipe
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size <= most:
            content = bytearray()
            while len(content) <= most:
                _wait(fd)
                try:
                    piece = os.read(fd, min(MIB, most + 1 - len(content)))
                except BlockingIOError:
                    continue
                if not piece:
                    return bytes(content)
                content += piece
    finally:
        os.close(fd)
    raise OSError(f"it has more than {most // MIB} MiB, the most that is read")


def read_text(path: str | Path, most: int = SMALL_BYTES) -> str:
    """Return the text of a file, as `read_bytes` does. Raises UnicodeDecodeError too."""
    return io.TextIOWrapper(io.BytesIO(read_bytes(path, most)), encoding="utf-8").read()


@contextmanager
def bounded_path(path: str) -> Iterator[str]:
    """Yield the path of a file of at most SMALL_BYTES for a library that opens it by itself: that of a copy in memory
    unless `path` is one. Raises OSError.
    """
    status = Path(path).stat()
    if stat.S_ISREG(status.st_mode) and status.st_size <= SMALL_BYTES:
        yield path
        return
    descriptor = copy_to_memory(path)
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def copy_to_memory(path: str) -> int:
    """Return the descriptor of a file in memory with the content of another, at most SMALL_BYTES. Raises OSError."""
    content = read_bytes(path)
    descriptor = os.memfd_create(Path(path).name)
    os.fchmod(descriptor, 0o600)  # else any user could read a key through /proc
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    return descriptor


def check_private(setting: str, path: str) -> None:
    """Raise ConfigError if other users can read a file of this user with keys in it, which ssh refuses too."""
    try:
        status = Path(path).stat()
    except OSError:
        return  # its reader says why
    if stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid() and status.st_mode & 0o077:
        raise ConfigError(
            f"{setting} {path} is open to other users (mode {stat.S_IMODE(status.st_mode):04o}): chmod 600 {path}"
        )


def _wait(fd: int) -> None:
    """Wait until a descriptor can be read. Raises OSError after PATIENCE."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    if not poll.poll(None if os.isatty(fd) else 1000 * PATIENCE):
        raise OSError(f"nothing was written to it for {PATIENCE:g} s")
