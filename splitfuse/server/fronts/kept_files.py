"""Keeps what the files of a TLS certificate say, so that a front which is started again needs them no more: they may be
gone by then, or renewed, and all fronts have the certificate with which the server started.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from splitfuse.config.server import ServerConfig
from splitfuse.errors import ConfigError

FILES = ("tls_certificate", "tls_key")
"""Settings that name the files."""


def with_kept_files(config: ServerConfig) -> tuple[ServerConfig, list[int]]:
    """Return the settings of fronts, with the names of files in memory, and the descriptors of these, which fronts
    inherit. Raises ConfigError for a file that cannot be read.
    """
    descriptors: list[int] = []
    for name in FILES:
        if (path := getattr(config, name)) is None:
            continue
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(f"{name} {path} cannot be read: {error.strerror}") from error
        descriptor = os.memfd_create(name)
        os.fchmod(descriptor, 0o600)  # else any user could read the key through /proc
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        descriptors.append(descriptor)
        config = replace(config, **{name: f"/proc/self/fd/{descriptor}"})
    return config, descriptors
