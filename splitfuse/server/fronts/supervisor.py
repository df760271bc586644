"""Keeps the fronts of a server running, and answers the requests that they pass on (process.py).

All that a server decides is decided here, in its own process: keys, limits, routing, metrics, what is stored. A front
that dies, or hangs, takes its own connections with it; their requests are aborted, and it is started again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import msgspec

from splitfuse.config.server import ServerConfig
from splitfuse.engine.remote.launcher import exit_text, send_signal, start_process
from splitfuse.errors import ServerError
from splitfuse.models.sources.source import ModelSource
from splitfuse.server.auth import ApiKeys
from splitfuse.server.fronts.kept_files import with_kept_files
from splitfuse.server.fronts.messages import (
    WINDOW,
    Body,
    BreakOff,
    Channel,
    Delivered,
    Disconnected,
    End,
    Fault,
    FromFront,
    FrontSpec,
    Generate,
    Head,
    Heartbeat,
    Piece,
    Read,
    Ready,
    Seen,
    Start,
    ToFront,
    TokenizerFiles,
    View,
)
from splitfuse.server.fronts.session import FrontSession, view_of
from splitfuse.server.listen import FLUSH_TIMEOUT, App, HttpServer, LateApp
from splitfuse.server.state import AppState

PROCESS = "splitfuse.server.fronts.process"
"""Module which the process of a front runs."""
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0
"""Seconds before a front is started again: doubled each time."""
STABLE_SECONDS = 10.0
"""Seconds for which a front has been ready if its death is the first of a series again."""
SILENCE_SECONDS = 10.0
"""Seconds of silence after which a front is taken to hang."""
START_SECONDS = 120.0
"""Seconds for which a front may be silent while it imports the server or reads the tokenizer, as engines load."""
WATCH_SECONDS = 0.5
"""Seconds between two checks of that."""
TELL_SECONDS = 0.05
"""Seconds between two checks whether fronts must be told of the engines."""
TIME_TO_END = FLUSH_TIMEOUT + 3.0
"""Seconds that a front has to end when it is told to."""

Tell = Callable[[], Awaitable[None]]
"""Function that tells the fronts of the engines, and returns once they know."""

_logger = logging.getLogger(__name__)


class FrontProcesses:
    """Speaks a server's HTTP by several processes, in the place of HttpServer.

    Each front accepts connections on a socket of its own, which stays open while it is started again: clients that the
    system sends there meanwhile wait for it.
    """

    def __init__(self, config: ServerConfig) -> None:
        """Raise ConfigError for a TLS certificate or key that cannot be used."""
        HttpServer(config, max_connections=1)  # it says what is wrong with these settings
        self._answer = LateApp()
        self._config, self._files = with_kept_files(config)
        self._generation: Generation | None = None
        self._fronts: list[_Front] = []
        self._sockets: Sequence[socket.socket] = ()
        self._ready = asyncio.Event()
        self._ending = asyncio.Event()
        self.num_restarts = 0
        """Number of times that a front was started again."""

    async def begin(self, app: App, state: AppState, keys: ApiKeys, tokenizer: ModelSource) -> None:
        """Answer with an application from now on, and let fronts generate text by what its state says, with the
        tokenizer of a model.
        """
        self._answer.app = app
        files = await asyncio.to_thread(TokenizerFiles.of, tokenizer)
        generate = Generate(files, keys.secret, keys.owners, state.started)
        self._generation = Generation(state, generate, view_of(state))
        for front in self._fronts:
            front.begin(self._generation)

    @property
    def num_connections(self) -> list[int]:
        """Return the number of open connections of each front."""
        return [front.num_connections for front in self._fronts]

    @property
    def num_text_restarts(self) -> int:
        """Return how many processes for texts of fronts were ended at a limit, or killed by others."""
        return sum(front.num_text_restarts for front in self._fronts)

    async def serve(self, sockets: Sequence[socket.socket]) -> None:
        """Serve with a front on each of these sockets until `end`. Raises ServerError if one cannot be started."""
        self._sockets = sockets
        specs = [FrontSpec.of(self._config, each.fileno()) for each in sockets]
        self._fronts = [_Front(n, spec, self._files, self._answer, self.tell) for n, spec in enumerate(specs)]
        telling = asyncio.create_task(self._tell_often())
        try:
            async with asyncio.TaskGroup() as group:
                for front in self._fronts:
                    group.create_task(self._keep(front))
        except* ServerError as errors:
            raise errors.exceptions[0] from None
        finally:
            telling.cancel()
            for each in self._files:
                os.close(each)

    async def ready(self) -> None:
        """Return once all fronts generate text, and know of the engines what is known here."""
        await self._ready.wait()
        self._tell()

    def end(self, *, at_once: bool) -> None:
        """End all fronts: `serve` returns when they have ended."""
        self._ending.set()
        for each in self._sockets:
            each.close()
        for front in self._fronts:
            front.end(End(at_once))

    async def _keep(self, front: _Front) -> None:
        """Keep a front running. Raises ServerError if what prevents its first start would prevent any."""
        pause = FIRST_PAUSE
        while True:
            why = await front.live(self._note_ready)
            if self._ending.is_set():
                return
            if front.cannot_start:
                raise ServerError(f"front {front.index} could not be started: {why}")
            if front.ready_at is not None and time.monotonic() - front.ready_at >= STABLE_SECONDS:
                pause = FIRST_PAUSE
            _logger.error("front %d died: %s; starting it again in %g s", front.index, why, pause)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), pause)
                return
            pause = min(2 * pause, LONGEST_PAUSE)
            self.num_restarts += 1

    async def tell(self) -> None:
        """Tell the fronts of the engines, if anything has changed, and return once all know which adapters there are:
        one that has much to do may serve the next request before it reads of them.
        """
        self._tell()
        if self._generation is not None:
            for front in self._fronts:
                await front.knows(self._generation.adapters_number)

    def _tell(self) -> None:
        if (generation := self._generation) is None:
            return
        old, view = generation.view, view_of(generation.state)
        if msgspec.structs.replace(view, number=old.number) != old:
            generation.view = msgspec.structs.replace(view, number=old.number + 1)
            if view.adapters != old.adapters:
                generation.adapters_number = old.number + 1
            for front in self._fronts:
                front.send(generation.view)

    async def _tell_often(self) -> None:
        while True:
            await asyncio.sleep(TELL_SECONDS)
            self._tell()

    def _note_ready(self) -> None:
        if all(front.was_ready for front in self._fronts):
            self._ready.set()


@dataclass
class Generation:
    """Holds what fronts need to generate text."""

    state: AppState
    generate: Generate
    view: View
    """What they were told of the engines."""
    adapters_number: int = 0
    """Number of the view in which the adapters have changed last."""


class _Front:
    """Runs one front, life after life, and the requests that it passes on."""

    def __init__(self, index: int, spec: FrontSpec, files: Collection[int], app: App, tell: Tell) -> None:
        """`files` are descriptors that it inherits besides its listener."""
        self.index = index
        self.num_connections = 0
        self.num_text_restarts = 0
        """Number of its processes for texts that were ended at a limit or killed, in all its lives."""
        self.was_ready = False
        """True once it was ready for the first time."""
        self.ready_at: float | None = None
        """Time at which it was ready in this life, or knew that it passes all requests on; None: it was not yet."""
        self._spec, self._app, self._tell = spec, app, tell
        self._descriptors = [spec.listener, *files]
        self._channel: Channel[FromFront, ToFront] | None = None
        self._generation: Generation | None = None
        self._session: FrontSession | None = None
        self._requests: dict[int, _Request] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._text_restarts = 0  # in this life
        self._last_heard = 0.0
        self._has_spoken = False  # in this life
        self._has_started = False  # and spoken, in any life
        self._seen, self._has_seen = 0, asyncio.Event()  # number of a view
        self._is_refused = False  # by the front itself, before it was ready in any life
        self._fault = ""
        self._end: End | None = None

    @property
    def cannot_start(self) -> bool:
        """Return whether it is of no use to start it again: it was never ready, and has said why, or never a word."""
        return not self.was_ready and (self._is_refused or not self._has_started)

    async def live(self, on_ready: Callable[[], None]) -> str:
        """Let the front live once; return why it has ended."""
        self._fault, self.ready_at, self._text_restarts, self._has_spoken = "", None, 0, False
        self._seen = 0
        try:
            process, connection = await start_process(PROCESS, self._spec, self._descriptors)
        except OSError as error:  # no descriptors, memory or processes now
            return f"its process could not be started: {error.strerror}"
        channel: Channel[FromFront, ToFront] = await Channel.on(connection, list[FromFront])
        self._channel, self._last_heard = channel, time.monotonic()
        watching = asyncio.create_task(self._watch(process))
        if self._end is not None:  # it came meanwhile
            channel.send(self._end)
        elif self._generation is not None:
            self.begin(self._generation)
        try:
            await self._listen(channel, on_ready)
        except ValueError as error:
            self._fault = f"malformed message from a front: {error}"
        finally:
            watching.cancel()
            self._channel, self.num_connections = None, 0
            channel.close()
            self._cut_off()
            if not self._fault:
                with suppress(TimeoutError):
                    await asyncio.wait_for(process.wait(), TIME_TO_END)
            send_signal(process, signal.SIGKILL)
            await process.wait()
        return self._fault or f"its process ended with {exit_text(process.returncode)}"

    def begin(self, generation: Generation) -> None:
        """Let the front generate text."""
        self._generation = generation
        if self._channel is not None and self._session is None:
            self._session = FrontSession(generation.state, self._channel)
            self._channel.send(generation.view)
            self._channel.send(generation.generate)

    def send(self, message: ToFront) -> None:
        """Send a message, if the front lives."""
        if self._channel is not None and self._session is not None:
            self._channel.send(message)

    async def knows(self, number: int) -> None:
        """Return once it knows of a view, or has ended. One that does not generate text yet knows before it does."""
        while self._session is not None and self.ready_at is not None and self._end is None and self._seen < number:
            self._has_seen.clear()
            await self._has_seen.wait()

    def end(self, end: End) -> None:
        """End the front for good."""
        self._end = end
        self._has_seen.set()
        if self._channel is not None:
            self._channel.send(end)

    async def _listen(self, channel: Channel[FromFront, ToFront], on_ready: Callable[[], None]) -> None:
        """Take in what the front says until it has ended."""
        while (batch := await channel.receive()) is not None:
            self._last_heard = time.monotonic()
            self._has_spoken = self._has_started = True
            for message in batch:
                if isinstance(message, Fault):
                    self._fault, self._is_refused = message.reason, True
                    return
                if isinstance(message, Ready):
                    if message.failure is not None:
                        why = message.failure.message
                        if not self.was_ready:
                            self._fault, self._is_refused = why, True
                            return
                        _logger.error("front %d passes on all requests: it cannot generate text: %s", self.index, why)
                    self.ready_at, self.was_ready = time.monotonic(), True
                    on_ready()
                elif isinstance(message, Heartbeat):
                    self.num_connections = message.num_connections
                    self.num_text_restarts += message.num_text_restarts - self._text_restarts
                    self._text_restarts = message.num_text_restarts
                elif isinstance(message, Seen):
                    self._seen = message.number
                    self._has_seen.set()
                elif isinstance(message, Head | Body | Disconnected | Delivered):
                    self._pass_on(channel, message)
                elif self._session is not None:
                    self._session.take(message)

    def _cut_off(self) -> None:
        """Abort all requests of a front that has ended."""
        requests, self._requests = self._requests, {}
        for request in requests.values():
            request.disconnect()
        if self._session is not None:
            self._session.close()
            self._session = None
        self._has_seen.set()

    def _pass_on(self, channel: Channel[FromFront, ToFront], message: Head | Body | Disconnected | Delivered) -> None:
        """Pass on to the application what a front does not serve by itself."""
        if isinstance(message, Head):
            new = self._requests[message.number] = _Request(message.number, channel, self._tell)
            task = asyncio.create_task(self._answer(new, message.scope))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif (request := self._requests.get(message.number)) is not None:
            request.take(message)

    async def _answer(self, request: _Request, scope: dict[str, Any]) -> None:
        try:
            await self._app(scope, request.receive, request.send)
        except Exception:
            _logger.exception("a request failed")
        finally:
            if self._requests.get(request.number) is request:  # else it is of an earlier life
                del self._requests[request.number]
            request.finish()

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        """End a front that says nothing for too long."""
        while True:
            slept = time.monotonic()
            await asyncio.sleep(WATCH_SECONDS)
            if time.monotonic() - slept > 2 * WATCH_SECONDS:  # we were stopped ourselves, so silence means nothing
                self._last_heard = time.monotonic()
            reads_tokenizer = self._session is not None and self.ready_at is None
            most = START_SECONDS if reads_tokenizer or not self._has_spoken else SILENCE_SECONDS
            if (silent := time.monotonic() - self._last_heard) > most:
                self._fault = f"it hung: it has been silent for {silent:.0f} s"
                send_signal(process, signal.SIGKILL)
                return


class _Request:
    """Represents one request to the application: `receive` and `send` of ASGI, with uvicorn's meanings."""

    def __init__(self, number: int, channel: Channel[FromFront, ToFront], tell: Tell) -> None:
        """`tell` tells the fronts of the engines: before the answer to a request which has changed something there."""
        self.number = number
        self._channel, self._tell = channel, tell
        self._parts: deque[Body] = deque()
        self._news = asyncio.Event()
        self._is_asked = False  # for the next part of the body
        self._is_read = False
        self._is_over = False  # its client has left, or its answer is whole
        self._is_whole = False
        self._num_sent = 0  # bytes that were not taken yet

    def take(self, message: Body | Disconnected | Delivered) -> None:
        """Take in what the front says of it."""
        if isinstance(message, Body):
            self._parts.append(message)
        elif isinstance(message, Delivered):
            self._num_sent -= message.num_bytes
        else:
            self._is_over = True
        self._news.set()

    def disconnect(self) -> None:
        """Note that its front has died."""
        self._is_over = True
        self._news.set()

    def finish(self) -> None:
        """Note that the application has returned."""
        if not self._is_whole:  # also where the client has left: the front waits for it
            self._channel.send(BreakOff(self.number))
        self._is_over = True

    async def receive(self) -> MutableMapping[str, Any]:
        """Return the next part of the body, or say that the client has left."""
        while not self._is_over:
            if self._parts:
                part = self._parts.popleft()
                self._is_asked, self._is_read = False, not part.more
                return {"type": "http.request", "body": part.data, "more_body": part.more}
            if not self._is_read and not self._is_asked:
                self._is_asked = True
                self._channel.send(Read(self.number))
            await self._wait()
        return {"type": "http.disconnect"}

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Send a part of the answer, once the client has taken enough of what was sent before."""
        if self._is_over:
            return
        if message["type"] == "http.response.start":
            await self._tell()
            self._channel.send(Start(self.number, message["status"], [*message.get("headers", ())]))
            return
        data, more = message.get("body", b""), message.get("more_body", False)
        for start in range(0, max(len(data), 1), WINDOW):
            while self._num_sent >= WINDOW:
                await self._wait()
                if self._is_over:
                    return
            piece = data[start : start + WINDOW]
            is_last = not more and start + WINDOW >= len(data)
            self._num_sent += len(piece)
            self._channel.send(Piece(self.number, piece, not is_last))
        if not more:
            self._is_whole = self._is_over = True
            self._news.set()

    async def _wait(self) -> None:
        self._news.clear()
        await self._news.wait()
