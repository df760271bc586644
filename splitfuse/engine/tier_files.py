"""Opens the files that KV tiers are kept in. It needs neither torch nor a model: engines are started with them."""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
import time
from dataclasses import dataclass, replace
from pathlib import Path

from splitfuse.config.engine import CacheConfig
from splitfuse.config.values import parse_disk_tier
from splitfuse.core.kv.names import new_key
from splitfuse.errors import ConfigError

KEY_BYTES = 32
LOCK_SECONDS = 2.0
"""Longest wait for a folder that others have, in seconds."""


@dataclass(frozen=True)
class TierFiles:
    """Names the files of the tiers that engines on one machine share, by inherited descriptors."""

    memory: int | None = None
    disk: int | None = None
    part: int = 0
    """Number of the engine, which alone writes its part of the files."""
    num_parts: int = 1
    memory_id: str = ""
    """Random name of the memory, by which engines know that they share it."""
    for_moves: bool = False
    """True if no tier was asked for: the memory is for requests that go on at another engine."""

    @property
    def descriptors(self) -> list[int]:
        """Return the descriptors that an engine's process inherits."""
        return [fd for fd in (self.memory, self.disk) if fd is not None]

    @property
    def filled(self) -> int:
        """Return the bytes of memory that the memory tier takes already."""
        return 0 if self.memory is None else 512 * os.fstat(self.memory).st_blocks

    def split(self, num_parts: int) -> list[TierFiles]:
        """Return the files for so many engines, each with descriptors of its own, and close these."""

        def again(fd: int | None) -> int | None:
            return None if fd is None else os.dup(fd)

        parts = [
            replace(self, memory=again(self.memory), disk=again(self.disk), part=part, num_parts=num_parts)
            for part in range(num_parts)
        ]
        self.close()
        return parts

    def close(self) -> None:
        """Close the descriptors: with the last of a file, others may use its folder, and memory is given back."""
        for fd in self.descriptors:
            os.close(fd)


def open_tiers(cache: CacheConfig, *, for_moves: bool = False) -> tuple[TierFiles | None, bytes]:
    """Open the tiers that the settings ask for, and return the key by which blocks are named: that of the disk tier,
    which its folder keeps, since names must mean the same after a restart; or one at random. Without tiers there is
    None, or with `for_moves` some memory for requests that go on at another engine, where that can be.

    Raises ConfigError if a tier cannot be used.
    """
    if not cache.has_tiers:
        if not for_moves or not cache.enable_prefix_caching or not hasattr(os, "memfd_create"):
            return None, new_key()
        moves = os.memfd_create("splitfuse-kv-moves")
        return TierFiles(moves, memory_id=secrets.token_hex(8), for_moves=True), new_key()
    if not hasattr(os, "memfd_create"):
        raise ConfigError("kv_memory_tier and kv_disk_tier need Linux: leave them out")
    disk, key = None, new_key()
    if cache.kv_disk_tier is not None:
        path, _ = parse_disk_tier(cache.kv_disk_tier)
        try:
            disk, key = _open_folder(Path(path).expanduser())
        except OSError as error:
            raise ConfigError(
                f"kv_disk_tier {path} cannot be used: {error.strerror}; name a folder that can"
            ) from error
    memory = os.memfd_create("splitfuse-kv") if cache.kv_memory_tier is not None else None
    return TierFiles(memory, disk, memory_id=secrets.token_hex(8)), key


def _open_folder(folder: Path) -> tuple[int, bytes]:
    """Return the file of blocks in a folder, which no other server may have open, and its key. Raises ConfigError,
    OSError.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _check_own(folder, folder.stat(), others_may_read=True)
    fd = os.open(folder / "blocks", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        _check_own(folder / "blocks", os.fstat(fd))
        _lock(fd, folder)
        return fd, _read_key(folder / "key")
    except BaseException:
        os.close(fd)
        raise


def _check_own(path: Path, status: os.stat_result, *, others_may_read: bool = False) -> None:
    """Raise ConfigError if another user owns what is at a path, or may change it or, unless that is allowed, read it:
    blocks are what users wrote and were answered, and with the key they can be forged.
    """
    if status.st_uid != os.geteuid():
        raise ConfigError(f"{path} belongs to another user: name a folder of your own for kv_disk_tier")
    forbidden, done, mode = (0o022, "write to", "700") if others_may_read else (0o077, "read", "600")
    if stat.S_IMODE(status.st_mode) & forbidden:
        raise ConfigError(
            f"others may {done} {path}, and KV blocks are what users wrote: set its mode to {mode}, or delete it"
        )
    if not others_may_read and not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{path} is no regular file: delete it, or name another folder for kv_disk_tier")


def _lock(fd: int, folder: Path) -> None:
    """Lock a file for as long as a process has it open. Raises ConfigError if others have it and keep it: the engines
    of a server that was killed end a moment later.
    """
    until = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                reason = f"kv_disk_tier {folder} is used by another server"
                raise ConfigError(f"{reason}: give each its own folder") from None
        time.sleep(0.05)


def _read_key(path: Path) -> bytes:
    """Return the key that a file has, or a new one that is written there for its owner alone."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        pass
    else:
        with os.fdopen(fd, "rb") as file:
            _check_own(path, os.fstat(fd))
            key = file.read(KEY_BYTES + 1)
        if len(key) == KEY_BYTES:
            return key
    key = new_key()
    new = path.with_suffix(".new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(key)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    return key
