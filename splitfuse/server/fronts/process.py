"""Runs the process of one front: `python -m splitfuse.server.fronts.process FD`, started by supervisor.py.

FD is a connected socket that it inherits; the first message on it is a FrontSpec. A front speaks HTTP, with TLS if
there is any, and generates text with the engines of the server's process (app.py). All other requests go to that
process, which answers them. When it ends, so does the front.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections import deque

import msgspec

from splitfuse import interrupts
from splitfuse.engine import garbage
from splitfuse.engine.line_writer import LineWriter
from splitfuse.engine.memory import return_large_blocks
from splitfuse.engine.remote.transport import BEAT_SECONDS, receive
from splitfuse.server.connections import connection_limit
from splitfuse.server.fronts.app import FrontApp, load_tokenizer
from splitfuse.server.fronts.messages import (
    WINDOW,
    Admitted,
    Body,
    BreakOff,
    Channel,
    Closed,
    Delivered,
    Disconnected,
    End,
    Failure,
    Fault,
    Found,
    FromFront,
    FrontSpec,
    Generate,
    Head,
    Heartbeat,
    Kept,
    Output,
    Piece,
    Read,
    Ready,
    Seen,
    Start,
    ToExchange,
    ToFront,
    View,
)
from splitfuse.server.listen import SWITCH_INTERVAL, HttpServer, Receive, Scope, Send

_logger = logging.getLogger(__name__)


def main() -> None:
    """Serve until the server's process ends it, or is gone."""
    interrupts.ignore()
    logging.basicConfig(format="%(message)s", stream=LineWriter(sys.stderr))
    connection = socket.socket(fileno=int(sys.argv[1]))
    if (message := receive(connection)) is None:  # the server has ended meanwhile
        return
    return_large_blocks()
    sys.setswitchinterval(SWITCH_INTERVAL)
    asyncio.run(_serve(connection, msgspec.msgpack.decode(message, type=FrontSpec)))


async def _serve(connection: socket.socket, spec: FrontSpec) -> None:
    channel: Channel[ToFront, FromFront] = await Channel.on(connection, list[ToFront])
    front = Front(channel, spec)
    await front.run(socket.socket(fileno=spec.listener))


class Front:
    """Runs one front from its first connection to its last."""

    def __init__(self, channel: Channel[ToFront, FromFront], spec: FrontSpec) -> None:
        """Raise ConfigError for settings with which no HTTP can be spoken."""
        self._channel, self._spec = channel, spec
        self._relay = Relay(channel)
        self._app = FrontApp(channel, self._relay)
        self._server = HttpServer(spec.config, max_connections=connection_limit(spec.config))
        self._server.app = self._app

    async def run(self, listener: socket.socket) -> None:
        """Serve until the server's process ends it. If that is gone, so is this process."""
        serving = asyncio.create_task(self._server.serve([listener]))
        serving.add_done_callback(self._note_end)
        helping = [asyncio.create_task(self._beat())]
        end: End | None = None
        while end is None:
            batch = await self._channel.receive()
            if batch is None:
                os._exit(1)  # and with it all answers
            for message in batch:
                if isinstance(message, End):
                    end = message
                elif isinstance(message, Generate):
                    helping.append(asyncio.create_task(self._begin(message)))
                else:
                    self._take(message)
        serving.remove_done_callback(self._note_end)
        self._server.end(at_once=end.at_once)
        await serving
        for task in helping:
            task.cancel()
        self._app.close()
        self._channel.close()

    def _note_end(self, serving: asyncio.Task[None]) -> None:
        """Report that HTTP has ended by itself: the server's process ends this one, and starts another."""
        error = None if serving.cancelled() else serving.exception()
        _logger.error("the HTTP server of a front has ended unexpectedly", exc_info=error)
        self._channel.send(Fault(f"its HTTP server has ended: {error!r}"))

    def _take(self, message: ToExchange | View | Admitted | Kept | Found | Output | Closed) -> None:
        if isinstance(message, Output | Closed | View):
            self._app.engines.take(message)
            if isinstance(message, View):
                self._channel.send(Seen(message.number))
        elif isinstance(message, Admitted | Kept | Found):
            self._app.take(message)
        else:
            self._relay.take(message)

    async def _begin(self, generate: Generate) -> None:
        """Generate text by itself, from now on, or pass all requests on if that cannot be."""
        try:
            tokenizer = await asyncio.to_thread(load_tokenizer, generate.tokenizer)
            await self._app.begin(self._spec.config, generate, tokenizer)
        except Exception as error:
            _logger.exception("a front cannot generate text")
            self._channel.send(Ready(Failure.of(error)))
            return
        garbage.freeze()
        self._channel.send(Ready())

    async def _beat(self) -> None:
        while True:
            self._channel.send(Heartbeat(len(self._server.connections), self._app.num_text_restarts))
            await asyncio.sleep(BEAT_SECONDS)


class Relay:
    """Passes requests on to the server's process, and its answers back: an ASGI application."""

    def __init__(self, channel: Channel[ToFront, FromFront]) -> None:
        self.channel = channel
        self._exchanges: dict[int, _Exchange] = {}
        self._num_requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request. Returns once its answer is written, or broken off."""
        self._num_requests += 1
        exchange = _Exchange(self._num_requests, self.channel)
        self._exchanges[exchange.number] = exchange
        self.channel.send(Head.of(exchange.number, scope))
        reading = asyncio.create_task(exchange.read(receive))
        try:
            await exchange.write(send)
        finally:
            reading.cancel()
            del self._exchanges[exchange.number]

    def take(self, message: ToExchange) -> None:
        """Hand what comes to its request."""
        if (exchange := self._exchanges.get(message.number)) is not None:  # else its client has left
            exchange.take(message)


class _Exchange:
    """Follows one request and its answer."""

    def __init__(self, number: int, channel: Channel[ToFront, FromFront]) -> None:
        self.number = number
        self._channel = channel
        self._answer: deque[Start | Piece | BreakOff] = deque()
        self._news = asyncio.Event()  # of the answer
        self._wanted = asyncio.Event()  # the next part of the body

    def take(self, message: ToExchange) -> None:
        """Take in what the server's process says of it."""
        if isinstance(message, Read):
            self._wanted.set()
        else:
            self._answer.append(message)
            self._news.set()

    async def read(self, receive: Receive) -> None:
        """Pass on the body as it is asked for, and then the client's leaving."""
        more = True
        while True:
            if more:
                await self._wanted.wait()
                self._wanted.clear()
            message = await receive()
            if message["type"] != "http.request":
                self._channel.send(Disconnected(self.number))
                return
            if more:
                body, more = message.get("body", b""), message.get("more_body", False)
                self._channel.send(Body(self.number, body, more))

    async def write(self, send: Send) -> None:
        """Write the answer as it comes. What has come meanwhile is written at once."""
        num_taken, more = 0, True
        while more:
            while not self._answer:
                self._news.clear()
                await self._news.wait()
            message = self._answer.popleft()
            if isinstance(message, BreakOff):
                return  # uvicorn closes the connection of an answer that is not whole
            if isinstance(message, Start):
                await send({"type": "http.response.start", "status": message.status, "headers": message.headers})
                continue
            data, more = message.data, message.more
            while self._answer and isinstance(following := self._answer[0], Piece):
                self._answer.popleft()
                data, more = data + following.data, following.more
            await send({"type": "http.response.body", "body": data, "more_body": more})
            num_taken += len(data)
            if more and num_taken >= WINDOW // 2:
                self._channel.send(Delivered(self.number, num_taken))
                num_taken = 0


if __name__ == "__main__":
    main()
