"""Starts the process of an engine, and says what crosses to it: the parsed configuration and its cores, its weights and
the record of the step in flight.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from pathlib import Path

import msgspec

from splitfuse.config import EngineConfig
from splitfuse.kernels.sharing import WeightSharing

WORKER = "splitfuse.engine.remote.worker"
"""Module which the process of an engine runs."""


class WorkerSpec(msgspec.Struct, frozen=True):
    """Holds everything that the process of an engine is started with."""

    config: EngineConfig
    in_flight: int
    """Descriptor of the InFlightRecord."""
    cores: tuple[int, ...] | None = None
    """Cores that it may run on; None: those of the process that starts it."""
    weights: WeightSharing | None = None


async def launch(
    config: EngineConfig, *, in_flight: int, cores: tuple[int, ...] | None, weights: WeightSharing | None
) -> tuple[asyncio.subprocess.Process, socket.socket]:
    """Start an engine's process. Return it with our end of the socket that connects us.

    Raises OSError if the machine has no descriptors, memory or processes left.
    """
    ours, theirs = socket.socketpair()
    spec = WorkerSpec(config, in_flight, cores, weights)
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            WORKER,
            str(theirs.fileno()),
            msgspec.json.encode(spec).decode(),
            pass_fds=[theirs.fileno(), in_flight, *([weights.fd] if weights is not None else [])],
            stdin=asyncio.subprocess.DEVNULL,
            stdout=2,  # what a library prints must not mix with our own output
            cwd=_folder(),
        )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    return process, ours


def _folder() -> str | None:
    """Return where an engine runs: our working directory (None), or the root if that was deleted: MKL reads it."""
    try:
        Path.cwd()
    except FileNotFoundError:
        return "/"
    return None
