"""Says how an engine comes to be: a launcher brings one up, again and again, and gives the link that connects us to it.

SubprocessLauncher starts a process on this machine. What an engine does, wherever it runs, is the supervisor's matter.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

import msgspec

from splitfuse.config.engine import EngineConfig
from splitfuse.core.kv.names import new_key
from splitfuse.engine.messages import Command, EngineInfo, Report, Stop, decode_report, encode
from splitfuse.engine.remote.in_flight import InFlightRecord
from splitfuse.engine.remote.lifeline import Lifeline, can_be_had
from splitfuse.engine.remote.transport import READ_AHEAD, frame, read_message
from splitfuse.engine.tier_files import TierFiles
from splitfuse.errors import EngineUnavailableError, SplitfuseError
from splitfuse.interrupts import held_back
from splitfuse.kernels.sharing import WeightSharing

WORKER = "splitfuse.engine.remote.worker"
"""Module which the process of an engine runs."""
TIME_TO_DUMP = 1.0
"""Seconds that a hung process has to write its stacks."""


class Link(ABC):
    """Connects us to an engine, for one life of it. Belongs to the event loop."""

    is_local = True
    """True if silence can have no other cause than the engine."""
    lifeline: Lifeline | None = None
    """Lifeline that its process holds once it has sent something."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.is_blameless = False
        """True if the end of the link was caused by no request, as far as is known."""

    @property
    def pid(self) -> int | None:
        """Return the id of the engine's process, if it is one of this machine."""
        return None

    def send(self, command: Command) -> None:
        """Send a command without waiting."""
        self._writer.write(frame(encode(command)))

    async def receive(self) -> Report | None:
        """Return the next report; None if the other side has closed. Raises ValueError for what is none."""
        try:
            message = await read_message(self._reader)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        except OSError:  # of a network
            self.is_blameless = True
            return None
        try:
            return decode_report(message)
        except (msgspec.DecodeError, SplitfuseError) as error:
            raise ValueError(str(error)) from error

    @abstractmethod
    def in_flight(self) -> Collection[str]:
        """Return the ids of the requests in the engine's last step, as far as is known."""

    def follow_end(self) -> None:
        """Let `receive` return None as soon as the process has ended, behind what it has sent. Without a lifeline that
        is when the system has closed its end.
        """
        if self.lifeline is None:
            return
        loop, connection = asyncio.get_running_loop(), self._writer.get_extra_info("socket")

        def stop_reading() -> None:
            with suppress(OSError):  # it is closed
                connection.shutdown(socket.SHUT_RD)

        def tell() -> None:
            with suppress(RuntimeError):  # the event loop has ended
                loop.call_soon_threadsafe(stop_reading)

        self.lifeline.follow(tell)

    @abstractmethod
    def leave(self) -> None:
        """Tell an engine that is ready that it is not needed any more."""

    @abstractmethod
    async def end(self, seconds: float) -> str:
        """Wait for the engine to end by itself, at most some seconds, and close the link. Returns how it ended."""

    @abstractmethod
    async def end_hung(self) -> None:
        """End an engine that hangs, and let it write where it is, if that is possible."""


class Launcher(ABC):
    """Brings up one engine."""

    name = "the engine"
    """Name of the engine in messages."""
    ends, begins = "died", "starting it"
    """Words for the end of an engine, and for what `launch` does."""
    address = ""
    """Address of an engine on another machine; empty for one of this machine."""

    @property
    def keeps_trying(self) -> bool:
        """Return whether an engine that cannot be used now is waited for at the start too."""
        return bool(self.address)

    @abstractmethod
    async def launch(self) -> Link:
        """Bring the engine up; it reports by itself how far it has come. Raises EngineUnavailableError if that cannot
        be done now, ConfigError if it never can.
        """

    @abstractmethod
    def accept(self, info: EngineInfo) -> None:
        """Take note of what an engine says of itself once it is ready. Raises ConfigError if it cannot be used."""

    @abstractmethod
    def close(self) -> None:
        """Release what the launcher keeps between two lives of its engine."""


class BlockListen(msgspec.Struct, frozen=True):
    """Says where engines on other machines fetch KV blocks from one of this machine."""

    address: str
    tls_certificate: str | None = None
    """PEM file; None: connections are not TLS."""
    tls_key: str | None = None

    def of_engine(self, index: int) -> BlockListen:
        """Return where one of several engines listens, of which this is the first.

        >>> BlockListen("10.0.0.1:9100").of_engine(2).address
        '10.0.0.1:9102'
        """
        host, _, port = self.address.rpartition(":")
        return msgspec.structs.replace(self, address=f"{host}:{int(port) + index}")


class WorkerSpec(msgspec.Struct, frozen=True):
    """Holds everything that the process of an engine is started with."""

    config: EngineConfig
    name_key: bytes
    """Key by which KV blocks are named: it goes through the socket, since any user may read arguments."""
    in_flight: int
    """Descriptor of the InFlightRecord."""
    lifeline: int | None = None
    """Descriptor of its Lifeline; None: the system has none."""
    is_restart: bool = False
    """True if it takes the place of a process that was ready, and has ended."""
    cores: tuple[int, ...] | None = None
    """Cores that it may run on; None: those of the process that starts it."""
    weights: WeightSharing | None = None
    tiers: TierFiles | None = None
    link_key: bytes | None = None
    """Key by which engines on other machines let it have KV blocks; None: there are none."""
    listen: BlockListen | None = None
    """Where it lets them have its own, with the same key; None: it does not."""

    @property
    def descriptors(self) -> list[int]:
        """Return the descriptors that the process inherits."""
        shared = [self.in_flight] if self.lifeline is None else [self.in_flight, self.lifeline]
        if self.weights is not None:
            shared.append(self.weights.fd)
        if self.tiers is not None:
            shared += self.tiers.descriptors
        return shared


class SubprocessLauncher(Launcher):
    """Starts an engine in a process of its own on this machine.

    It runs on `cores`, if they are given, and shares `weights` and the key of the names of KV blocks with other
    engines.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        cores: tuple[int, ...] | None = None,
        weights: WeightSharing | None = None,
        name_key: bytes | None = None,
        tiers: TierFiles | None = None,
        link_key: bytes | None = None,
        listen: BlockListen | None = None,
        on_ready: Callable[[EngineInfo], None] = lambda _: None,
    ) -> None:
        """`tiers` are closed with the launcher. `on_ready` is called with what the engine says of itself."""
        self._config, self._name_key, self._on_ready = config, name_key or new_key(), on_ready
        self._cores, self._weights, self._tiers, self._link_key = cores, weights, tiers, link_key
        self._listen = listen
        self._in_flight: InFlightRecord | None = None
        self._was_ready = False

    async def launch(self) -> Link:
        line = None
        try:
            if self._in_flight is None:
                self._in_flight = InFlightRecord()
            self._in_flight.clear()  # of what the process before has died of
            if can_be_had():
                line = Lifeline()
            spec = WorkerSpec(
                config=self._config,
                name_key=self._name_key,
                in_flight=self._in_flight.fd,
                lifeline=None if line is None else line.fd,
                is_restart=self._was_ready,
                cores=self._cores,
                weights=self._weights,
                tiers=self._tiers,
                link_key=self._link_key,
                listen=self._listen,
            )
            process, connection = await start_process(WORKER, spec, spec.descriptors)
        except OSError as error:  # no descriptors, memory or processes now: there may be later
            raise EngineUnavailableError(f"its process could not be started: {error.strerror}") from error
        finally:
            if line is not None:
                line.close()
        reader, writer = await asyncio.open_unix_connection(sock=connection, limit=READ_AHEAD)
        return _SubprocessLink(reader, writer, process, self._in_flight, line)

    def accept(self, info: EngineInfo) -> None:
        self._was_ready = True
        if self._weights is not None and not self._weights.filled:
            self._weights.filled, self._weights.share = True, info.planned_bytes
        self._on_ready(info)

    def close(self) -> None:
        if self._in_flight is not None:
            self._in_flight.close()
            self._in_flight = None
        if self._tiers is not None:
            self._tiers.close()
            self._tiers = None


class _SubprocessLink(Link):
    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        process: asyncio.subprocess.Process,
        in_flight: InFlightRecord,
        line: Lifeline | None,
    ) -> None:
        super().__init__(reader, writer)
        self._process, self._in_flight, self.lifeline = process, in_flight, line

    @property
    def pid(self) -> int:
        return self._process.pid

    def in_flight(self) -> Collection[str]:
        return self._in_flight.read()

    def leave(self) -> None:
        self.send(Stop())

    async def end(self, seconds: float) -> str:
        try:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), seconds)
        finally:
            send_signal(self._process, signal.SIGKILL)
            await self._process.wait()
            self._writer.close()
        return f"its process ended with {exit_text(self._process.returncode)}"

    async def end_hung(self) -> None:
        send_signal(self._process, signal.SIGUSR1)
        send_signal(self._process, signal.SIGCONT)  # it can only write when it runs
        await asyncio.sleep(TIME_TO_DUMP)
        send_signal(self._process, signal.SIGKILL)


async def start_process(
    module: str, spec: msgspec.Struct, descriptors: Collection[int]
) -> tuple[asyncio.subprocess.Process, socket.socket]:
    """Start a process of ours that runs a module, with its `spec` as the first message and with descriptors that it
    inherits. Return it with our end of the socket that connects us.

    Raises OSError if the machine has no descriptors, memory or processes left.
    """
    ours, theirs = socket.socketpair()
    try:
        ours.sendall(frame(msgspec.msgpack.encode(spec)))  # it fits into the socket's buffer
        with held_back():
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", module, str(theirs.fileno())),
                pass_fds=[theirs.fileno(), *descriptors],
                stdin=asyncio.subprocess.DEVNULL,
                stdout=2,  # what a library prints must not mix with our own output
                cwd=_working_folder(),
            )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    return process, ours


def _working_folder() -> str | None:
    """Return where a process of ours runs: in our working directory (None), or the root if that was deleted: MKL needs
    one.
    """
    try:
        Path.cwd()
    except FileNotFoundError:
        return "/"
    return None


def send_signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    """Send a process of ours a signal, unless it has ended."""
    with suppress(ProcessLookupError):
        process.send_signal(number)


def exit_text(code: int | None) -> str:
    """Return how a process has ended, in words."""
    if code is not None and code < 0:
        return f"signal {-code} ({signal.Signals(-code).name})"
    return f"status {code}"
