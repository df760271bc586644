"""Opens the socket of a server and speaks HTTP on it, which answers before there is an application."""

from __future__ import annotations

import asyncio
import errno
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager, suppress
from math import ceil
from typing import Any

import uvicorn

from splitfuse.config.files import bounded_path, check_private
from splitfuse.config.server import ServerConfig
from splitfuse.deploy import registry
from splitfuse.errors import ConfigError, EngineUnavailableError, RegistryError, ServerError
from splitfuse.server.connections import Connection, Connections
from splitfuse.server.dialect import encode_json
from splitfuse.server.errors import answer_to
from splitfuse.server.openai.dialect import OPENAI

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

FLUSH_TIMEOUT = 2
"""Seconds that connections have to take what was written to them, when the server ends."""
BACKLOG = 2048
"""Number of connections that the system keeps until they are accepted."""
SWITCH_INTERVAL = 0.0005
"""Seconds for which a thread of a process that speaks HTTP computes before another that waits gets its turn.

The event loop gives the interpreter away at each read and write, and waits this long to have it back from a thread that
counts the values of a large body: with Python's 5 ms, a hundred reads and writes took half a second.
"""


@contextmanager
def listening_sockets(host: str, port: int, client_timeout: float, *, count: int = 1) -> Iterator[list[socket.socket]]:
    """Yield so many listening sockets of one port, among which the system divides connections. Raises ServerError if
    there can be none, with the remedy.
    """
    with ExitStack() as opened:
        listeners = [opened.enter_context(_first_socket(host, port))]
        for _ in range(count - 1):
            listeners.append(opened.enter_context(_another_socket(listeners[0])))
        for each in listeners:
            _set_options(each, client_timeout)
        yield listeners


def _first_socket(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except socket.gaierror as error:
        raise ServerError(f"host {host!r} is not an address of this machine: {error.strerror}") from error
    except PermissionError as error:
        raise ServerError(f"port {port} is reserved for the system: take one from 1024 with --port") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ServerError(
                f"port {port} of {host} is in use by {_holder(port)}: choose another with --port; 0 takes a free one"
            ) from error
        raise ServerError(f"cannot listen on {host!r}, port {port}: {error.strerror}") from error


def _another_socket(first: socket.socket) -> socket.socket:
    """Return one more socket that listens on a port. The first one was alone when it began to listen, so that a port
    which another program has is an error and not shared.
    """
    try:
        first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener = socket.socket(first.family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if first.family is socket.AF_INET6:
                only_v6 = first.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only_v6)
            listener.bind(first.getsockname())
            listener.listen(BACKLOG)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise ServerError(
            f"several fronts cannot listen on one port here: {error.strerror}; leave out fronts"
        ) from error
    return listener


def _set_options(listener: socket.socket, client_timeout: float) -> None:
    """Set what each connection inherits. asyncio sets the first option only on sockets made with the protocol's number,
    which this is not; without it, every second write of an answer waits 40 ms for the client's delayed acknowledgement.
    By the others the system closes a connection whose other end accepts nothing, or is no longer there.
    """
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * client_timeout))


def _holder(port: int) -> str:
    """Return what holds a port of this machine."""
    with suppress(RegistryError):
        for each in registry.deployments():
            if each.port == port:
                return f"the deployment {each.name!r}, which ends with splitfuse stop {each.name}"
    return "another program"


class LateApp:
    """Stands for an application that may come later: until then it answers that the server is starting."""

    def __init__(self) -> None:
        self.app: App | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if self.app is not None:
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await _answer_starting(scope["path"], send)


class HttpServer(uvicorn.Server):
    """Speaks HTTP for an application that may come later. Leaves signals to its owner."""

    num_restarts = 0
    """Number of times that it was started again: it ends with its process."""
    num_text_restarts = 0
    """Number of processes for texts of its own that were ended at a limit: it has none."""

    def __init__(
        self, config: ServerConfig, *, max_connections: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Raise ConfigError for a TLS certificate or key that cannot be used, or a key that others can read."""
        if config.tls_key is not None:
            check_private("tls_key", config.tls_key)
        self._answer = LateApp()
        self.connections = Connections(
            max_connections,
            client_timeout=config.client_timeout,
            keep_alive_timeout=config.keep_alive_timeout,
            clock=clock,
        )
        self._accepting: asyncio.Task[None] | None = None
        settings = uvicorn.Config(
            self._answer,
            interface="asgi3",
            http="h11",
            ws="none",
            log_config=None,
            log_level="error",  # malformed requests are no news
            access_log=False,
            lifespan="off",
            server_header=False,
            proxy_headers=False,
            workers=1,  # else WEB_CONCURRENCY is read
            timeout_keep_alive=ceil(config.keep_alive_timeout),
            timeout_graceful_shutdown=FLUSH_TIMEOUT,
        )
        try:
            _load(settings, config.tls_certificate, config.tls_key)
        except OSError as error:
            raise ConfigError(
                f"tls_certificate {config.tls_certificate} and tls_key {config.tls_key} cannot be used: {error}; they "
                "must be a certificate and its private key, in PEM files"
            ) from error
        super().__init__(settings)

    @property
    def app(self) -> App | None:
        """Return the application, once there is one."""
        return self._answer.app

    @app.setter
    def app(self, app: App) -> None:
        self._answer.app = app

    @property
    def num_connections(self) -> list[int]:
        """Return the number of open connections, as the only front."""
        return [len(self.connections)]

    async def ready(self) -> None:
        """Return once connections are accepted: from the start on."""

    def end(self, *, at_once: bool) -> None:
        """Accept nothing more, and let `serve` return once answers are written; `at_once`: without waiting for that."""
        self.should_exit, self.force_exit = True, at_once

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none: see lifecycle.py."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept connections, in place of uvicorn, which accepts more than the system has descriptors for."""
        assert sockets is not None
        (listener,) = sockets
        listener.setblocking(False)

        def make() -> Connection:
            return Connection(self.config, self.server_state, self.connections)

        self.servers = []
        self._accepting = asyncio.create_task(self.connections.accept(listener, make, self.config.ssl))
        self.started = True

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second."""
        assert self._accepting is not None
        if self._accepting.done():
            self._accepting.result()
        self.connections.close_silent()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn at the end."""
        assert self._accepting is not None
        self._accepting.cancel()
        await super().shutdown(sockets)


def _load(settings: uvicorn.Config, certificate: str | None, key: str | None) -> None:
    """Load the settings, with the certificate and its key. Raises OSError, which ssl.SSLError is too."""
    if certificate is None or key is None:
        settings.load()
        return
    with bounded_path(certificate) as settings.ssl_certfile, bounded_path(key) as settings.ssl_keyfile:
        settings.load()


async def _answer_starting(path: str, send: Send) -> None:
    status: int = 503
    body: Any = {"stage": "starting", "fraction": 0.0}
    if path == "/health":
        status, body = 200, {"status": "ok"}
    elif path != "/ready":
        body = OPENAI.error(answer_to(EngineUnavailableError("the server is starting: /ready says how far it is")))
    content = encode_json(body)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
