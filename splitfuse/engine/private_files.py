"""Refuses files with keys that other users can read, as ssh does."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from splitfuse.errors import ConfigError


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
