"""Asks a Ray cluster for places to run engines, through a process of its own (ray_driver.py).

So nothing of Ray is in a server's process: neither its threads and signal handlers, nor its end when the cluster is
lost. With that process all its engines end, and it ends with the server.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from itertools import count

import msgspec

from splitfuse import errors
from splitfuse.config.engine import EngineConfig
from splitfuse.engine.remote.transport import READ_AHEAD, frame, read_message
from splitfuse.errors import EngineUnavailableError, SplitfuseError

DRIVER = "splitfuse.engine.remote.ray_driver"
"""Module which the process runs."""
LOCAL = "local"
"""Address that stands for a cluster of this machine alone, which is started and ends with the server."""
LONGEST_CALL = 100.0
"""Longest time in seconds to connect to a cluster and until the process of an engine listens, besides its place."""
TIME_TO_END = 5.0
"""Seconds that the process has to release what it has placed."""

_logger = logging.getLogger(__name__)


class EngineSpec(msgspec.Struct, frozen=True):
    """Says what runs in a place, and what it takes."""

    config: EngineConfig
    link_key: bytes
    name_key: bytes
    step_timeout: float
    cpus: int
    gpus: int = 0
    memory: int = 0
    """Bytes of memory that Ray keeps for it; 0: it is not asked for any."""
    seconds: float = 2.0
    """Longest time in seconds until Ray has a place."""


class Place(msgspec.Struct, frozen=True, tag=True):
    """Asks for a place, and for an engine there."""

    number: int
    spec: EngineSpec


class Release(msgspec.Struct, frozen=True, tag=True):
    """Ends the engine in a place, and gives that back."""

    number: int


class Placed(msgspec.Struct, frozen=True, tag=True):
    """Reports that an engine listens at an address."""

    number: int
    address: str
    pid: int
    """Number of its process, on its machine."""


class NotPlaced(msgspec.Struct, frozen=True, tag=True):
    """Reports why there is no engine in a place."""

    number: int
    error: str
    kind: str
    """Name of the class of the error, one of errors.py."""


Order = Place | Release
Answer = Placed | NotPlaced
decode_order: Callable[[bytes], Order] = msgspec.msgpack.Decoder(Order).decode
_decode_answer: Callable[[bytes], Answer] = msgspec.msgpack.Decoder(Answer).decode
encode: Callable[[Order | Answer], bytes] = msgspec.msgpack.Encoder().encode


class RayCluster:
    """Gives places on the Ray cluster at an address. Belongs to the event loop's thread."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._numbers = count(1)
        self._newest = 0
        self._waiting: dict[int, asyncio.Future[Placed]] = {}
        self._driver: _Driver | None = None
        self._oldest = 1  # of the engines that the process has placed
        self._starting = asyncio.Lock()

    async def place(self, spec: EngineSpec) -> Placed:
        """Return the place of a new engine. Raises EngineUnavailableError if there is none now, or the error that keeps
        the engine from listening.
        """
        async with self._starting:
            if self._driver is None:
                self._driver = await _Driver.start(self._address, self._take, self._end)
        number = self._newest = next(self._numbers)
        placed: asyncio.Future[Placed] = asyncio.get_running_loop().create_future()
        self._waiting[number] = placed
        self._driver.send(Place(number, spec))
        try:
            async with asyncio.timeout(spec.seconds + LONGEST_CALL):
                return await placed
        except TimeoutError:
            self.release(number)
            message = f"Ray has not answered for {spec.seconds + LONGEST_CALL:g} s"
            raise EngineUnavailableError(message) from None
        except BaseException:
            self.release(number)  # if it comes later
            raise
        finally:
            self._waiting.pop(number, None)

    def release(self, number: int) -> None:
        """End the engine of a place, if that is not gone."""
        if self._driver is not None:
            self._driver.send(Release(number))

    def has_lost(self, number: int) -> bool:
        """Return whether an engine has ended with the process that had it placed."""
        return number < self._oldest

    async def close(self) -> None:
        """End all engines that were placed."""
        if (driver := self._driver) is not None:
            self._driver = None
            await driver.close()

    def _take(self, answer: Answer) -> None:
        placed = self._waiting.pop(answer.number, None)
        if placed is None or placed.done():
            return
        if isinstance(answer, Placed):
            placed.set_result(answer)
            return
        kind = getattr(errors, answer.kind, EngineUnavailableError)
        is_ours = isinstance(kind, type) and issubclass(kind, SplitfuseError)
        placed.set_exception((kind if is_ours else EngineUnavailableError)(answer.error))

    def _end(self, driver: _Driver, how: str) -> None:
        """Note that the process has ended: another one is started for the next engine."""
        if self._driver is driver:
            self._driver, self._oldest = None, self._newest + 1
            _logger.warning(
                "the process that speaks with Ray has ended (%s); another one is started for the next engine", how
            )
        waiting, self._waiting = self._waiting, {}
        for placed in waiting.values():
            if not placed.done():
                placed.set_exception(EngineUnavailableError(f"the process that speaks with Ray has ended: {how}"))


class _Driver:
    """Owns the process that talks to Ray, and its connection."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        take: Callable[[Answer], None],
        ended: Callable[[_Driver, str], None],
    ) -> None:
        self._process, self._reader, self._writer = process, reader, writer
        self._take, self._ended = take, ended
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def start(
        cls, address: str, take: Callable[[Answer], None], ended: Callable[[_Driver, str], None]
    ) -> _Driver:
        """Start the process. Raises EngineUnavailableError if that is not possible now."""
        ours, theirs = socket.socketpair()
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", DRIVER, str(theirs.fileno()), address),
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                stdout=2,  # what Ray prints must not mix with our own output
                start_new_session=True,  # a terminal signals all of us: the server decides
            )
        except OSError as error:
            ours.close()
            raise EngineUnavailableError(f"the process for Ray could not be started: {error.strerror}") from error
        finally:
            theirs.close()
        reader, writer = await asyncio.open_unix_connection(sock=ours, limit=READ_AHEAD)
        return cls(process, reader, writer, take, ended)

    def send(self, order: Order) -> None:
        """Send an order without waiting."""
        self._writer.write(frame(encode(order)))

    async def close(self) -> None:
        """End the process, within TIME_TO_END."""
        self._writer.close()
        try:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), TIME_TO_END)
        finally:
            with suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)

    async def _read(self) -> None:
        with suppress(asyncio.IncompleteReadError, OSError, ValueError, msgspec.DecodeError):
            while True:
                self._take(_decode_answer(await read_message(self._reader)))
        with suppress(ProcessLookupError):
            self._process.kill()
        status = await self._process.wait()
        self._writer.close()
        self._ended(self, f"signal {-status}" if status < 0 else f"status {status}")
