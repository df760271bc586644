"""Lets servers on other machines reach an engine: accepts connections, lets those in that have the key, and serves one
front at a time.

All of it runs in the event loop of one thread, apart from the engine's: a front is heard, and hears of the engine,
while a step runs.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec

from splitfuse.config.engine import EngineConfig
from splitfuse.config.files import check_private
from splitfuse.config.values import parse_address
from splitfuse.core.kv.fetching import Frame
from splitfuse.engine.messages import Alive, Failed, Heartbeat, Loading, Report, Stop, Welcome, decode_command, encode
from splitfuse.engine.remote.handshake import NO_CERTIFICATE, HandshakeError, Purpose, greet_client, server_context
from splitfuse.engine.remote.launcher import BlockListen
from splitfuse.engine.remote.peers import serve_blocks
from splitfuse.engine.remote.transport import HANDSHAKE_SECONDS, MAX_MESSAGE, frame, read_message
from splitfuse.engine.tiers import Tiers
from splitfuse.errors import ConfigError, SplitfuseError
from splitfuse.version import __version__

HEARTBEAT = 0.25
"""Seconds between two signs of life of an engine."""
SILENCE_SECONDS = 10.0
"""Seconds of silence after which the other end of a connection is taken to be gone."""
MOST_STRANGERS = 32
"""Most connections that have not proved anything yet: for a further one, another is closed."""
BACKLOG = 128
"""Most connections that wait to be accepted."""
SHUTDOWN_SECONDS = 1.0
"""Seconds that TLS has to end."""
STRANGER_BYTES = 2**16
"""Bytes that are read ahead of a connection, about."""
LOG_SECONDS = 60.0
"""Least time between two lines in the log about connections of one host that are refused for one reason."""
MOST_LOGGED = 256
"""Number of hosts and reasons that are remembered for that."""

_logger = logging.getLogger(__name__)


class FrontSession:
    """Connects one front with the engine. `report` may be called from any thread, the rest runs in the listener's."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, address: str) -> None:
        self.address = address
        self.commands: queue.SimpleQueue[Any] = queue.SimpleQueue()
        """Commands that have come, for an EngineLoop. The last one is Stop: the front has left, or asks for it."""
        self.asks_restart = False
        """True if the front has asked for the engine to begin anew."""
        self.alive: Callable[[], Alive] = lambda: Alive(0.0)
        """Function that returns a heartbeat of the engine."""
        self._reader, self._writer = reader, writer
        self._loop = asyncio.get_running_loop()
        self._beat: Heartbeat | None = None  # the newest, and when it came
        self._beat_came = 0.0
        self._held: list[Report] = []  # until the front has said what its clock says
        self._ended = self._reads_nothing = False
        self._patience = asyncio.timeout(None)  # of the message that is awaited

    def report(self, report: Report) -> None:
        """Send a report, some time."""
        with suppress(RuntimeError):  # the event loop has ended
            self._loop.call_soon_threadsafe(self._report, report)

    def _report(self, report: Report) -> None:
        if self._ended or self._reads_nothing or self._writer.is_closing():  # asyncio complains of what is lost
            return
        if self._beat is None:
            self._held.append(report)
            return
        self._writer.write(frame(encode(report)))
        if self._writer.transport.get_write_buffer_size() > MAX_MESSAGE:  # it reads no more
            self._reads_nothing = True
            with suppress(RuntimeError):  # none is awaited at the moment
                self._patience.reschedule(self._loop.time())

    async def run(self) -> str:
        """Take the commands of the front until it leaves, or stops or says nothing for long. Returns what it has done,
        as what follows "it".
        """
        beating = asyncio.create_task(self._send_heartbeats())
        try:
            while True:
                if self._reads_nothing:
                    raise TimeoutError
                async with asyncio.timeout(SILENCE_SECONDS) as self._patience:
                    command = decode_command(await read_message(self._reader))
                if isinstance(command, Heartbeat):
                    self._take_beat(command)
                    continue
                self.commands.put(command)
                if isinstance(command, Stop):
                    self.asks_restart = True
                    return "asks for a restart"
        except TimeoutError:  # which it reads if it was only stopped: no request has caused it
            why = "has read nothing" if self._reads_nothing else f"has been silent for {SILENCE_SECONDS:g} s"
            self._held.append(Failed(f"its server {why}", is_planned=True))
            return why
        except (asyncio.IncompleteReadError, OSError):
            return "has left"
        except (ValueError, msgspec.DecodeError, SplitfuseError) as error:
            self._held.append(Failed(f"its server sent a malformed message: {error}", is_planned=True))
            return f"sent a malformed message: {error}"
        finally:
            beating.cancel()
            self._flush()
            self.commands.put(Stop())

    async def close(self) -> None:
        """Send what is to be sent, as far as the front reads it, and close the connection."""
        await asyncio.sleep(0)  # reports of this moment come first
        self._flush()
        self._ended = True
        self._writer.close()
        with suppress(OSError, TimeoutError, asyncio.CancelledError):
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                await self._writer.wait_closed()

    def _take_beat(self, beat: Heartbeat) -> None:
        is_first = self._beat is None
        self._beat, self._beat_came = beat, time.monotonic()
        if is_first:
            self._report(self._heartbeat())
            self._flush()

    def _flush(self) -> None:
        held, self._held = self._held, []
        for report in held:
            self._writer.write(frame(encode(report)))

    def _heartbeat(self) -> Alive:
        now = time.monotonic()
        return msgspec.structs.replace(self.alive(), beat=self._beat, beat_age=now - self._beat_came, now=now)

    async def _send_heartbeats(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT)
            if self._beat is not None:
                self._report(self._heartbeat())


class Listener:
    """Accepts the connections of an engine, in a thread of its own.

    listener = Listener("0.0.0.0:9000", key, config)
    listener.start()
    session = listener.next_front()
    """

    def __init__(
        self,
        address: str,
        key: bytes,
        config: EngineConfig,
        *,
        tls: ssl.SSLContext | None = None,
        certificate: bytes = NO_CERTIFICATE,
        serves_fronts: bool = True,
    ) -> None:
        """`certificate` is the digest of that of `tls`, `config` what fronts are told that the engine has. Unless it
        serves fronts, others fetch KV blocks alone.
        """
        self.address = address
        """Address to listen on; once it has started, with the port that it has."""
        self.read_block: Callable[[bytes], Frame | None] = lambda _: None
        """Function that returns a KV block for engines on other machines, by its name; any thread may call it."""
        self._host, self._port = parse_address("listen", address)
        self._key, self._config, self._tls, self._certificate = key, config, tls, certificate
        self._serves_fronts = serves_fronts
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="listener", daemon=True)
        self._socket: socket.socket | None = None
        self._session: FrontSession | None = None
        self._stage: Report = Loading("starting")
        self._fronts: queue.SimpleQueue[FrontSession] = queue.SimpleQueue()
        self._strangers: dict[asyncio.Task[None], str] = {}  # connections that have proved nothing, and their hosts
        self._logged: dict[tuple[str, str], float] = {}  # hosts and reasons, and when a line was last written of them

    def start(self) -> None:
        """Listen. Raises ConfigError if that cannot be done."""
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        except OSError as error:
            raise ConfigError(f"listen {self.address} cannot be listened on: {error.strerror or error}") from error

    def fail(self, report: Failed) -> None:
        """Tell the front that there is, if any, why there will be no engine."""
        if (session := self._session) is not None:
            session.report(report)
            self.end(session)

    def stop(self) -> None:
        """Stop listening, and close all connections."""

        async def stop() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            if self._socket is not None:
                self._socket.close()
            self._loop.call_soon(self._loop.stop)

        asyncio.run_coroutine_threadsafe(stop(), self._loop)
        self._thread.join()
        self._loop.close()

    def next_front(self, timeout: float | None = None) -> FrontSession:
        """Return the next front, once there is one. Raises queue.Empty if there is none for `timeout` seconds."""
        return self._fronts.get(timeout=timeout)

    def show(self, stage: Loading) -> None:
        """Report a stage of start-up to the front that there is, or that comes."""
        self._stage = stage
        if (session := self._session) is not None:
            session.report(stage)

    def end(self, session: FrontSession) -> None:
        """Send a front what is left to be sent, and close its connection."""
        asyncio.run_coroutine_threadsafe(session.close(), self._loop).result()

    async def _listen(self) -> None:
        info = await self._loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = info[0]
        listening = self._socket = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
        listening.setblocking(False)
        self.address = format_address(*listening.getsockname()[:2])
        self._accepting = asyncio.create_task(self._accept(listening))

    async def _accept(self, listening: socket.socket) -> None:
        """Accept connections. Those that have proved nothing are bounded, within the handshake of TLS too."""
        while True:
            try:
                connection, address = await self._loop.sock_accept(listening)
            except OSError as error:  # no descriptors now
                _logger.warning("a connection could not be accepted: %s", error.strerror)
                await asyncio.sleep(HEARTBEAT)
                continue
            if len(self._strangers) >= MOST_STRANGERS:
                self._refuse_one()
            task = asyncio.create_task(self._meet(connection))
            self._strangers[task] = address[0]
            task.add_done_callback(lambda task: self._strangers.pop(task, None))

    def _refuse_one(self) -> None:
        """Refuse the oldest connection that has proved nothing, of the host that has most of them: one that has the key
        takes a round trip for it.
        """
        (host, _), *_ = Counter(self._strangers.values()).most_common(1)
        oldest = next(task for task, each in self._strangers.items() if each == host)
        del self._strangers[oldest]
        oldest.cancel()
        self._log_refused(host, "too many connections at once prove nothing")

    async def _meet(self, connection: socket.socket) -> None:
        """Let a connection in, and serve it."""
        if (let_in := await self._let_in(connection)) is None:
            return
        purpose, reader, writer = let_in
        try:
            self._strangers.pop(_this_task(), None)
            if purpose is Purpose.FRONT and not self._serves_fronts:
                self._log_refused(_peer(writer).rpartition(":")[0], "another server has the engine")
            elif purpose is Purpose.FRONT:
                await self._serve_front(reader, writer)
            else:
                await serve_blocks(reader, writer, self.read_block)
        finally:
            writer.close()

    async def _let_in(
        self, connection: socket.socket
    ) -> tuple[Purpose, asyncio.StreamReader, asyncio.StreamWriter] | None:
        """Return what a connection is for, and its ends; None if it is refused."""
        host = _host(connection)
        reader = asyncio.StreamReader(limit=STRANGER_BYTES)
        protocol = asyncio.StreamReaderProtocol(reader)
        seconds = {"ssl_handshake_timeout": HANDSHAKE_SECONDS, "ssl_shutdown_timeout": SHUTDOWN_SECONDS}
        transport: asyncio.Transport | None = None
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                transport, _ = await self._loop.connect_accepted_socket(
                    lambda: protocol, connection, ssl=self._tls, **({} if self._tls is None else seconds)
                )
                writer = asyncio.StreamWriter(transport, protocol, reader, self._loop)
                purpose = await self._greet(reader, writer)
            transport = None
            return purpose, reader, writer
        except HandshakeError as error:
            self._log_refused(host, f"it {error}")
        except TimeoutError:
            self._log_refused(host, "it says too little")
        except asyncio.IncompleteReadError:
            self._log_refused(host, "it has left within the handshake")
        except OSError as error:  # of the network, or of TLS
            self._log_refused(host, f"its connection has failed: {error.strerror or error}")
        finally:
            if transport is not None:
                transport.abort()
        return None

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Purpose:
        purpose = await greet_client(reader, writer, self._key, self._certificate)
        writer.write(frame(__version__.encode()) + frame(msgspec.msgpack.encode(self._welcome(purpose))))
        await writer.drain()
        return purpose

    def _welcome(self, purpose: Purpose) -> Welcome:
        front = self._session.address if self._session is not None and purpose is Purpose.FRONT else ""
        return Welcome(self._config, front)

    async def _serve_front(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve a front until it leaves, unless another one is served."""
        address = _peer(writer)
        if self._session is not None:
            host = address.rpartition(":")[0]
            self._log_refused(host, f"the server at {self._session.address} has the engine")
            return
        session = self._session = FrontSession(reader, writer, address)
        session.report(self._stage)
        self._fronts.put(session)
        _logger.info("the server at %s has come", address)
        try:
            _logger.info("the server at %s %s", address, await session.run())
        finally:
            self._session = None  # the next one waits while the engine ends the requests of this one

    def _log_refused(self, host: str, why: str) -> None:
        what, now = (host, why), time.monotonic()
        if now - self._logged.get(what, -LOG_SECONDS) >= LOG_SECONDS:
            if len(self._logged) >= MOST_LOGGED:
                self._logged.clear()
            self._logged[what] = now
            _logger.warning("a connection from %s is refused: %s", host, why)


def let_blocks_be_fetched(tiers: Tiers, listen: BlockListen, key: bytes, config: EngineConfig) -> None:
    """Let engines on other machines fetch the blocks of tiers, as long as the process lives. Raises ConfigError if that
    cannot be listened for.
    """
    tls, certificate = None, NO_CERTIFICATE
    if listen.tls_certificate is not None and listen.tls_key is not None:
        tls, certificate = load_certificate(listen.tls_certificate, listen.tls_key)
    listener = Listener(listen.address, key, config, tls=tls, certificate=certificate, serves_fronts=False)
    listener.read_block = tiers.give
    listener.start()
    scheme = "tcp" if tls is None else "tls"
    tiers.block_sources = (*tiers.block_sources, f"{scheme}://{listener.address}")


def load_certificate(certificate: str, key: str) -> tuple[ssl.SSLContext, bytes]:
    """Return what TLS needs of a certificate and its key, and the digest of the certificate. Raises ConfigError."""
    check_private("tls_key", key)
    try:
        return server_context(certificate, key)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"tls_certificate {certificate} and tls_key {key} cannot be used: {error}; they must be a certificate and "
            "its private key, in PEM files"
        ) from error


def format_address(host: str, port: int) -> str:
    """Return an address as it is written in settings.

    >>> format_address("::1", 9000)
    '[::1]:9000'
    """
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _peer(writer: asyncio.StreamWriter) -> str:
    name = writer.get_extra_info("peername")
    return format_address(*name[:2]) if name else "an unknown address"


def _host(connection: socket.socket) -> str:
    try:
        return str(connection.getpeername()[0])
    except OSError:
        return "a host that has left"


def _this_task() -> asyncio.Task[None]:
    task = asyncio.current_task()
    assert task is not None
    return task
