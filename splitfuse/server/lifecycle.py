"""The life of a server, from its socket to its last request: bind, register, load, serve, drain, end.

It decides in what order these happen, what a signal means, and what is said of it on standard error. It knows neither
routes nor what an engine does.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import uvicorn

from splitfuse.config import EngineConfig, ServerConfig
from splitfuse.deploy import daemon, registry
from splitfuse.deploy.registry import Deployment
from splitfuse.engine.client import EngineClient, LocalClient
from splitfuse.engine.messages import Loading, StepReport
from splitfuse.engine.replicas import make_replicas
from splitfuse.engine.router import Router
from splitfuse.errors import ConfigError, ServerError
from splitfuse.models.sources.hub import BUNDLED_MODEL, open_model
from splitfuse.server.auth import ApiKeys

if TYPE_CHECKING:
    from splitfuse.server.admission import Admission
    from splitfuse.server.metrics import Metrics

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

FLUSH_TIMEOUT = 2  # seconds that connections have to take what was written to them
BACKLOG = 2048

_Result = TypeVar("_Result")


async def run_server(engine: EngineConfig, config: ServerConfig) -> None:
    """Serve until a signal ends it.

    SIGTERM drains: requests that run may end, new ones are refused. A second one, or SIGINT, ends at once. Returns
    after a drain; raises ServerError if requests were cut off, KeyboardInterrupt after SIGINT. Raises ConfigError,
    ModelError, MemoryPlanError or ServerError for what keeps it from serving.
    """
    ApiKeys(config).check(engine.scheduler)
    model = model_name(engine.model.model)
    config = replace(config, served_model_name=config.served_model_name or model)
    signals = _Signals()
    with signals.handled(), _listen(config.host, config.port, config.client_timeout) as listener:
        front = _Front()
        server = _Server(_uvicorn_config(front, config))
        deployment = Deployment(
            name=config.name,
            host=config.host,
            port=listener.getsockname()[1],
            scheme="http" if config.tls_certificate is None else "https",
            model=config.served_model_name or model,
            needs_key=bool(config.api_key or config.api_key_file),
            drain_timeout=config.drain_timeout,
            tls_certificate=None if config.tls_certificate is None else str(Path(config.tls_certificate).resolve()),
        )
        registry.register(deployment)
        address = listener.getsockname()[0]
        if not deployment.needs_key and not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
            _say(f"splitfuse: whoever reaches {address} may use this server: it asks for no key; --api-key sets one")
        try:
            client = make_replicas(engine, replicas=config.replicas, step_timeout=config.step_timeout)
            serving = asyncio.create_task(server.serve([listener]))
            try:
                await _live(engine, config, client, front, deployment, signals, serving)
            finally:
                await _end(client, server, serving, at_once=signals.now.is_set())
        finally:
            registry.unregister(deployment)
    if signals.interrupted:
        raise KeyboardInterrupt


def model_name(model: str | None) -> str:
    """What clients call a model if nobody named it: its Hub name, or its folder's without the way there."""
    if model is None:
        return BUNDLED_MODEL.name
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model


async def _live(
    engine: EngineConfig,
    config: ServerConfig,
    client: EngineClient,
    front: _Front,
    deployment: Deployment,
    signals: _Signals,
    serving: asyncio.Task[None],
) -> None:
    """Load, serve, drain."""
    starting = asyncio.create_task(_start(engine, config, client, front))
    await wait_first(starting, serving, signals.drain.wait())
    if not starting.done():
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        _check_alive(serving)
        return
    admission = starting.result()
    names = ("ttft", "itl", "tail_share")
    promised = [f"{name} {value}" for name in names if (value := getattr(engine.scheduler, name)) is not None]
    if engine.scheduler.has_targets:
        _say(f"splitfuse promises {', '.join(promised)}")
    _say(f"{daemon.READY.decode()}{deployment.model} on {deployment.url} (name {deployment.name})")
    await wait_first(serving, signals.drain.wait())
    _check_alive(serving)
    admission.drain()
    if admission.num_requests and not signals.now.is_set():
        _say(
            f"splitfuse: draining: {admission.num_requests} requests may end, within {config.drain_timeout:g} s; "
            "a second SIGTERM ends them at once"
        )
    await wait_first(admission.wait_empty(), signals.now.wait(), timeout=config.drain_timeout)
    if admission.num_requests and not signals.interrupted:
        count = admission.num_requests
        why = "at a second SIGTERM" if signals.now.is_set() else f"after {config.drain_timeout:g} s of draining"
        raise ServerError(f"{count} requests were cut off {why}")


async def _start(engine: EngineConfig, config: ServerConfig, client: EngineClient, front: _Front) -> Admission:
    """Everything up to the first request. /health and /ready answer meanwhile."""
    show = asyncio.create_task(_show_progress(client))
    try:
        app, admission = await run_in_daemon_thread(lambda: _make_app(engine, config, client))
        front.app = app
        await client.start()
        return admission
    finally:
        show.cancel()
        await asyncio.gather(show, return_exceptions=True)


def _make_app(engine: EngineConfig, config: ServerConfig, client: EngineClient) -> tuple[App, Admission]:
    """On a thread of its own: the imports take a second, fetching a model from the Hub takes as long as it takes."""
    from splitfuse.server.access_log import RequestLog
    from splitfuse.server.admission import Admission
    from splitfuse.server.app import make_app
    from splitfuse.server.metrics import Metrics
    from splitfuse.text.service import TextService
    from splitfuse.text.tokenizer import Tokenizer

    model = engine.model
    source = open_model(model.model, model.revision)  # fetched once, before several engines ask for it
    if model.tokenizer is not None:
        source = open_model(model.tokenizer, model.revision)
    tokenizer = Tokenizer.from_source(source)
    admission, metrics = Admission(config), Metrics(client, model_name=config.served_model_name)
    plans: set[str] = set()
    for each in client.replicas if isinstance(client, Router) else [client]:
        if isinstance(each, LocalClient):
            each.on_step = _Watch(each, admission, metrics)
            each.on_planned = lambda plan: _say_plan(plan, plans)
    log = RequestLog(sys.stdout, log_prompts=config.log_prompts)
    service = TextService(client, tokenizer)
    return make_app(service, config, admission=admission, metrics=metrics, log=log), admission


def _say_plan(plan: str, said: set[str]) -> None:
    """The memory plan of the first engine: those of others, and of one that starts again, are like it."""
    if not said:
        said.add(plan)
        _say(("\r\033[K" if sys.stderr.isatty() else "") + plan)


class _Watch:
    """Tells of an engine's passes those who count them."""

    def __init__(self, engine: LocalClient, admission: Admission, metrics: Metrics) -> None:
        self._engine, self._admission, self._metrics = engine, admission, metrics
        self._num_steps = 0

    def __call__(self, report: StepReport) -> None:
        self._metrics.step_ended(report, self._engine.info.max_num_batched_tokens)
        if report.stats.num_steps != self._num_steps:  # else it tells of requests that ended between two steps
            self._num_steps = report.stats.num_steps
            self._admission.progressed(report.stats.step_tokens, report.stats.step_seconds)


async def _end(client: EngineClient, server: _Server, serving: asyncio.Task[None], *, at_once: bool) -> None:
    """Close the engine first, so that whoever still waits for it gets an error, and not a broken connection."""
    await client.close()
    server.should_exit = True
    server.force_exit = at_once
    await asyncio.gather(serving, return_exceptions=True)


def _check_alive(serving: asyncio.Task[None]) -> None:
    if serving.done():
        raise ServerError(f"the HTTP server has ended by itself: {serving.exception()!r}")


async def wait_first(*events: Awaitable[Any], timeout: float | None = None) -> None:
    """Wait for one of these, or for so many seconds. Tasks go on; what was made for this call is cancelled."""
    tasks = [asyncio.ensure_future(event) for event in events]
    await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    for event, task in zip(events, tasks, strict=True):
        if event is not task:
            task.cancel()


async def run_in_daemon_thread(work: Callable[[], _Result]) -> _Result:
    """The result of `work`, done on a thread that nobody waits for if we are to end before."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_Result] = loop.create_future()

    def settle(result: _Result | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        try:
            result, error = work(), None
        except BaseException as raised:
            result, error = None, raised
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="start-up", daemon=True).start()
    return await future


# The socket ----------------------------------------------------------------------------------------------------------


@contextmanager
def _listen(host: str, port: int, client_timeout: float) -> Iterator[socket.socket]:
    """A listening socket. Raises ServerError, saying what would do."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except socket.gaierror as error:
        raise ServerError(f"host {host!r} is no address of this machine: {error.strerror}") from error
    except PermissionError as error:
        raise ServerError(f"port {port} is reserved for the system: take one from 1024 with --port") from error
    except OSError as error:
        if error.errno == 98 or "in use" in (error.strerror or ""):
            raise ServerError(
                f"port {port} of {host} is in use by another program: choose another with --port; 0 takes a free one"
            ) from error
        raise ServerError(f"cannot listen on {host!r}, port {port}: {error.strerror}") from error
    with listener:
        # Each connection inherits these. asyncio sets the first only on sockets made with the protocol's number, which
        # this is not; without it, every second write of an answer waits 40 ms for the client's delayed acknowledgement.
        # By the second the system breaks off a connection of which the other end takes nothing.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * client_timeout))
        yield listener


def _uvicorn_config(front: _Front, config: ServerConfig) -> uvicorn.Config:
    made = uvicorn.Config(
        front,
        log_config=None,
        log_level="error",  # what a stranger sends is no news
        access_log=False,
        lifespan="off",
        server_header=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=FLUSH_TIMEOUT,
        ssl_certfile=config.tls_certificate,
        ssl_keyfile=config.tls_key,
    )
    try:
        made.load()
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"tls_certificate {config.tls_certificate} and tls_key {config.tls_key} cannot be used: {error}; they must "
            "be a certificate and its private key, in PEM files"
        ) from error
    return made


class _Server(uvicorn.Server):
    """Leaves the signals to us."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Front:
    """Answers while there is no application yet."""

    def __init__(self) -> None:
        self.app: App | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.app is not None:
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(scope["path"], send)

    async def _answer(self, path: str, send: Send) -> None:
        status, body = 503, {"stage": "starting", "fraction": 0.0}
        if path == "/health":
            status, body = 200, {"status": "ok"}
        elif path != "/ready":
            message = "the server is starting; /ready says how far it has come"
            error = {"message": message, "type": "server_error", "param": None, "code": "engine_unavailable"}
            body = {"error": error}
        content = json.dumps(body).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})


# Signals -------------------------------------------------------------------------------------------------------------


class _Signals:
    """What we have been told to do. `drain` is set whenever we are to end, `now` if without waiting for requests."""

    def __init__(self) -> None:
        self.drain = asyncio.Event()
        self.now = asyncio.Event()
        self.interrupted = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._terminate)
        loop.add_signal_handler(signal.SIGINT, self._interrupt)
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGTERM)
            loop.remove_signal_handler(signal.SIGINT)

    def _terminate(self) -> None:
        if self.drain.is_set():
            self.now.set()
        self.drain.set()

    def _interrupt(self) -> None:
        self.interrupted = True
        self.drain.set()
        self.now.set()


# What is said --------------------------------------------------------------------------------------------------------


async def _show_progress(client: EngineClient) -> None:
    """The stages of start-up, as they come: one line that grows on a terminal, else one for every quarter."""
    shown, is_terminal = "", sys.stderr.isatty()
    try:
        while True:
            line = describe(client.stage, steps=100 if is_terminal else 4)
            if line != shown:
                print(
                    f"\r\033[K{line}" if is_terminal else line,
                    end="" if is_terminal else "\n",
                    file=sys.stderr,
                    flush=True,
                )
                shown = line
            await asyncio.sleep(0.1)
    finally:
        if is_terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def describe(stage: Loading, *, steps: int = 100) -> str:
    """`loading 43 %`; the percentage is rounded down to one of so many steps."""
    percent = int(stage.fraction * steps) * 100 // steps
    return f"{stage.stage} {percent} %" if stage.stage == "loading" else stage.stage


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
