"""Reads the secret that the machines of a deployment share, and derives its keys: one proves that two ends of a
connection belong together (handshake.py), another names KV blocks (core/kv/names.py).
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from splitfuse.errors import ConfigError

FEWEST_BYTES, MOST_BYTES = 32, 4096
"""Bounds of the length of a secret. 32 hexadecimal digits have 128 bits."""


@dataclass(frozen=True, repr=False)
class Secret:
    """Holds the keys that are derived from a deployment's secret. They mean the same after a restart, of any part."""

    link_key: bytes
    name_key: bytes

    @classmethod
    def of(cls, secret: bytes) -> Secret:
        """Derive the keys."""
        link, names = (blake2b(secret, digest_size=32, person=use).digest() for use in (b"links", b"block names"))
        return cls(link, names)


def read_secret(path: str) -> Secret:
    """Return the keys of the secret in a file, without white space around it. Raises ConfigError if it cannot be read,
    or if it is none: others may read it, it belongs to another user, it is too short.
    """
    try:
        fd = os.open(Path(path).expanduser(), os.O_RDONLY | os.O_NONBLOCK)  # which does not wait at a pipe
        try:
            _check_own(path, os.fstat(fd))
            secret = os.read(fd, MOST_BYTES + 1).strip()
        finally:
            os.close(fd)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"key_file {path} cannot be read: {reason}; make one: {_make(path)}") from error
    if not FEWEST_BYTES <= len(secret) <= MOST_BYTES:
        raise ConfigError(
            f"key_file {path} has a secret of {len(secret)} bytes, and needs {FEWEST_BYTES} to {MOST_BYTES}: "
            f"{_make(path)}"
        )
    return Secret.of(secret)


def _check_own(path: str, status: os.stat_result) -> None:
    """Raise ConfigError for a file that others could have read or written."""
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"key_file {path} is no regular file: {_make(path)}")
    if status.st_uid not in (os.geteuid(), 0):
        raise ConfigError(f"key_file {path} belongs to another user: copy it to a file of your own, with mode 600")
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise ConfigError(f"key_file {path} can be read or changed by others: set its mode to 600 (chmod 600 {path})")


def _make(path: str) -> str:
    return f"(umask 077; openssl rand -hex 32 > {path})"
