"""Keeps what the files of a TLS certificate say, so that a front which is started again needs them no more: they may be
gone by then, or renewed, and all fronts have the certificate with which the server started.
"""

from __future__ import annotations

from dataclasses import replace

from splitfuse.config.files import copy_to_memory
from splitfuse.config.server import ServerConfig
from splitfuse.errors import ConfigError, unreadable


def with_kept_files(config: ServerConfig) -> tuple[ServerConfig, list[int]]:
    """Return the settings of fronts, with the names of files in memory, and the descriptors of these, which fronts
    inherit. Raises ConfigError for a file that cannot be read.
    """
    if config.tls_certificate is None or config.tls_key is None:
        return config, []
    certificate, key = _kept("tls_certificate", config.tls_certificate), _kept("tls_key", config.tls_key)
    kept = replace(config, tls_certificate=f"/proc/self/fd/{certificate}", tls_key=f"/proc/self/fd/{key}")
    return kept, [certificate, key]


def _kept(setting: str, path: str) -> int:
    """Return the descriptor of a file in memory that says what a file says."""
    try:
        return copy_to_memory(path)
    except OSError as error:
        raise ConfigError(f"{setting} {path} cannot be read: {unreadable(error)}") from error
