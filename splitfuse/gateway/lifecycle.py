"""Runs a gateway from its socket to its last request: listen, register, look at the cells, serve, drain, end."""

from __future__ import annotations

import asyncio
import logging
import ssl
from dataclasses import replace

from splitfuse.clients.http_stream import Address
from splitfuse.config.files import bounded_path, check_private, read_text
from splitfuse.config.server import GatewayConfig, ServerConfig
from splitfuse.config.values import parse_url
from splitfuse.errors import ConfigError, ServerError, unreadable
from splitfuse.gateway.app import Gateway
from splitfuse.gateway.cell import Cell
from splitfuse.server.connections import connection_limit, num_newcomers
from splitfuse.server.listen import FLUSH_TIMEOUT, HttpServer, listening_sockets
from splitfuse.server.registration import deployment_of, registered
from splitfuse.server.signals import Signals, wait_first

_logger = logging.getLogger(__name__)


async def run_gateway(config: GatewayConfig) -> None:
    """Pass requests on until a signal ends it: SIGTERM drains, a second one or SIGINT ends at once.

    Returns after a drain; raises ServerError if requests were cut off, KeyboardInterrupt after SIGINT. Raises
    ConfigError or ServerError for what keeps it from serving.
    """
    front = config.front
    cells = make_cells(config)
    signals = Signals()
    with signals.handled(), listening_sockets(front.host, front.port, front.client_timeout) as (listener,):
        front, max_connections = _bounded(front)
        server = HttpServer(front, max_connections=max_connections)
        gateway = Gateway(cells, front)
        deployment = deployment_of(front, listener.getsockname()[1], model=f"{len(cells)} cells", needs_key=False)
        with registered(deployment) as mark_ready:
            for each in cells:
                _logger.info("cell %d is %s", each.number, each.url)
            await asyncio.gather(*(each.look() for each in cells))
            watching = asyncio.create_task(gateway.watch())
            server.app = gateway
            serving = asyncio.create_task(server.serve([listener]))
            try:
                _logger.info("splitfuse passes requests on at %s (name %s)", deployment.url, deployment.name)
                mark_ready()
                await _serve(gateway, front.drain_timeout, serving, watching, signals)
            finally:
                watching.cancel()
                server.end(at_once=signals.now.is_set())
                await asyncio.gather(watching, serving, return_exceptions=True)
    if signals.interrupted:
        raise KeyboardInterrupt


def _bounded(front: ServerConfig) -> tuple[ServerConfig, int]:
    """Return the settings with no more open requests than files allow, each of which takes a connection to its cell
    besides its client's, and the number of connections of clients.
    """
    most = front.max_queued_requests
    total = connection_limit(replace(front, max_queued_requests=2 * most))
    connections = max(total - most, total // 2)
    if (allowed := connections - num_newcomers(connections)) >= most:
        return front, connections
    _logger.warning(
        "the limit of open files allows %d open requests, not %d (max_open_requests); raise it with ulimit -n",
        allowed,
        most,
    )
    return replace(front, max_queued_requests=allowed), connections


def make_cells(config: GatewayConfig) -> list[Cell]:
    """Return the cells. Raises ConfigError for a key or a certificate that cannot be used."""
    key = _key_in(config.server_key_file)
    tls = _trust(config.server_certificate)
    cells = []
    for number, text in enumerate(config.server):
        url = parse_url("server", text)
        address = Address.of(url, key)
        cells.append(Cell(number, url, replace(address, tls=tls) if address.tls is not None and tls else address))
    return cells


async def _serve(
    gateway: Gateway, drain_timeout: float, serving: asyncio.Task[None], watching: asyncio.Task[None], signals: Signals
) -> None:
    """Serve until a signal, then drain. Raises ServerError if requests are cut off."""
    await wait_first(serving, watching, signals.drain.wait())
    for task in (serving, watching):
        if task.done():
            raise ServerError(f"the gateway has ended unexpectedly: {task.exception()!r}")
    admission = gateway.admission
    admission.drain()
    if admission.num_requests and not signals.now.is_set():
        _logger.info("draining: %d requests may end, within %g s", admission.num_requests, drain_timeout)
    await wait_first(admission.wait_empty(), signals.now.wait(), timeout=drain_timeout)
    if num_cut := admission.num_requests:
        gateway.end()
        await wait_first(admission.wait_empty(), timeout=FLUSH_TIMEOUT)
        if not signals.interrupted:
            when = "at a second SIGTERM" if signals.now.is_set() else f"after {drain_timeout:g} s of draining"
            raise ServerError(f"{num_cut} requests were cut off {when}")


def _key_in(path: str | None) -> str | None:
    """Return the key in a file: its first word, so that a file of --api-key-file will do."""
    if path is None:
        return None
    check_private("server_key_file", path)
    try:
        words = read_text(path).split()
    except (OSError, ValueError) as error:
        raise ConfigError(f"server_key_file {path} cannot be read: {unreadable(error)}") from error
    if not words:
        raise ConfigError(f"server_key_file {path} has no key in it: write one in its first line")
    return words[0]


def _trust(path: str | None) -> ssl.SSLContext | None:
    """Return the context that trusts the certificates in a file, whatever name is in them; None: the system's."""
    if path is None:
        return None
    try:
        with bounded_path(path) as file:
            context = ssl.create_default_context(cafile=file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"server_certificate {path} cannot be used: {unreadable(error)}") from error
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context
