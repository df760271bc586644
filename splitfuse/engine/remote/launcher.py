"""Starts the process of an engine, and says what crosses to it: the parsed configuration and its cores, its weights,
its KV tiers and the record of the step in flight.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from pathlib import Path

import msgspec

from splitfuse.config import EngineConfig
from splitfuse.engine.remote.transport import frame
from splitfuse.engine.tier_files import TierFiles
from splitfuse.kernels.sharing import WeightSharing

WORKER = "splitfuse.engine.remote.worker"
"""Module which the process of an engine runs."""


class WorkerSpec(msgspec.Struct, frozen=True):
    """Holds everything that the process of an engine is started with."""

    config: EngineConfig
    name_key: bytes
    """Key by which KV blocks are named: it goes through the socket, since any user may read arguments."""
    in_flight: int
    """Descriptor of the InFlightRecord."""
    cores: tuple[int, ...] | None = None
    """Cores that it may run on; None: those of the process that starts it."""
    weights: WeightSharing | None = None
    tiers: TierFiles | None = None


async def launch(spec: WorkerSpec) -> tuple[asyncio.subprocess.Process, socket.socket]:
    """Start an engine's process. Return it with our end of the socket that connects us.

    Raises OSError if the machine has no descriptors, memory or processes left.
    """
    ours, theirs = socket.socketpair()
    shared = [spec.in_flight, *([spec.weights.fd] if spec.weights is not None else [])]
    shared += spec.tiers.descriptors if spec.tiers is not None else []
    try:
        ours.sendall(frame(msgspec.msgpack.encode(spec)))  # it fits into the socket's buffer
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            WORKER,
            str(theirs.fileno()),
            pass_fds=[theirs.fileno(), *shared],
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
