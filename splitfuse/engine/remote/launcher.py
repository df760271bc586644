"""Starts the process of an engine, and says what crosses to it: the parsed configuration, its cores and its weights."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from typing import Any

import msgspec

from splitfuse.config import EngineConfig


class WorkerSpec(msgspec.Struct, frozen=True):
    """Holds everything that the process of an engine is started with."""

    config: EngineConfig
    cores: tuple[int, ...] | None = None
    """Cores that it may run on; None: those of the process that starts it."""
    weights: dict[str, Any] | None = None
    """Arguments of WeightSharing where engines share their packed weights."""


class WeightsFile:
    """Allocates memory for the packed weights of `num_sharers` engines: the first packs them, the others map them."""

    def __init__(self, num_sharers: int) -> None:
        self.num_sharers = num_sharers
        self.fd = os.memfd_create("splitfuse-weights")
        self.filled = False

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the arguments of WeightSharing, for an engine that inherits the descriptor."""
        return {"fd": self.fd, "filled": self.filled, "num_sharers": self.num_sharers}

    def close(self) -> None:
        """Release the memory once no further engine will be started; those that run keep it."""
        os.close(self.fd)


async def launch(
    config: EngineConfig, *, cores: tuple[int, ...] | None, weights: WeightsFile | None
) -> tuple[asyncio.subprocess.Process, socket.socket]:
    """Start an engine's process. Return it with our end of the socket that connects us.

    Raises OSError if the machine has no descriptors, memory or processes left.
    """
    ours, theirs = socket.socketpair()
    spec = WorkerSpec(config, cores, None if weights is None else weights.arguments)
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "splitfuse.engine.remote.worker",
            str(theirs.fileno()),
            msgspec.json.encode(spec).decode(),
            pass_fds=[theirs.fileno(), *([weights.fd] if weights is not None else [])],
            stdin=asyncio.subprocess.DEVNULL,
            stdout=2,  # what a library prints must not mix with our own output
        )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    return process, ours
