"""Runs a server from its socket to its last request: listen, register, load, serve, drain, end.

Decides in what order these happen, what a signal means, and what is logged of it.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from splitfuse.config.engine import EngineConfig, SchedulerConfig
from splitfuse.config.server import ServerConfig
from splitfuse.config.values import parse_adapter, parse_autoscale
from splitfuse.deploy.registry import is_loopback
from splitfuse.engine import garbage
from splitfuse.engine.client import EngineClient, EngineState, LocalClient
from splitfuse.engine.line_writer import LineWriter
from splitfuse.engine.memory import return_large_blocks
from splitfuse.engine.messages import EngineStats, Loading
from splitfuse.engine.remote.launcher import BlockListen
from splitfuse.engine.replicas import make_replicas
from splitfuse.engine.router import Router
from splitfuse.errors import ConfigError, ServerError
from splitfuse.models.sources.hub import BUNDLED_MODEL, check_revision, open_model
from splitfuse.server.access_log import note_dropped
from splitfuse.server.auth import ApiKeys
from splitfuse.server.connections import connection_limit, num_newcomers
from splitfuse.server.listen import SWITCH_INTERVAL, App, HttpServer, listening_sockets
from splitfuse.server.registration import deployment_of, registered
from splitfuse.server.signals import Signals, wait_first

if TYPE_CHECKING:
    from splitfuse.models.sources.source import ModelSource
    from splitfuse.recording.recorder import Recorder
    from splitfuse.server.admission import Admission
    from splitfuse.server.fronts.supervisor import FrontProcesses
    from splitfuse.server.metrics import Metrics
    from splitfuse.server.otel import RequestSpans
    from splitfuse.server.state import AppState
    from splitfuse.text.service import TextService

ShowStage = Callable[[Loading], None]
"""Function that shows a stage of start-up."""

_Result = TypeVar("_Result")
_logger = logging.getLogger(__name__)


async def run_server(
    engine: EngineConfig, config: ServerConfig, *, given: Collection[str] = (), show_stage: ShowStage | None = None
) -> None:
    """Serve until a signal ends it. `given` are the names of the engine's settings that were chosen, though they are
    the defaults perhaps. `show_stage` shows the stages of start-up, which are logged if it is None.

    SIGTERM drains: requests that run may end, new ones are refused. A second one, or SIGINT, ends at once. Returns
    after a drain; raises ServerError if requests were cut off, KeyboardInterrupt after SIGINT. Raises ConfigError,
    ModelError, MemoryPlanError or ServerError for what keeps it from serving.
    """
    return_large_blocks()
    sys.setswitchinterval(SWITCH_INTERVAL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # no pool of threads in this process: it tokenizes nothing
    ApiKeys(config).check(engine.scheduler)
    _check_autoscale(engine, config)
    model = config.served_model_name or model_name(engine.model.model)
    config = replace(config, served_model_name=model)
    if model in (parse_adapter(each)[0] for each in engine.model.lora):
        raise ConfigError(f"lora gives an adapter the name {model!r} of the model itself: choose another")
    signals = Signals()
    with (
        signals.handled(),
        LineWriter(sys.stdout, note=note_dropped) as log,
        listening_sockets(config.host, config.port, config.client_timeout, count=config.fronts) as listeners,
        _recorder(engine, config) as recorder,
        _request_spans(config) as spans,
    ):
        max_connections = connection_limit(config)
        server = _http_server(config, max_connections)
        address, port = listeners[0].getsockname()[:2]
        needs_key = bool(config.api_key or config.api_key_file)
        deployment = deployment_of(config, port, model=model, needs_key=needs_key)
        with registered(deployment) as mark_ready:
            if not needs_key and not is_loopback(address):
                _logger.warning(
                    "listening on %s without authentication; set SPLITFUSE_API_KEY or --api-key-file", address
                )
            client = _make_client(engine, config, given)
            config = _bounded(config, max_connections)
            make_app = functools.partial(_make_app, engine, config, client, server, log.write, recorder, spans)
            serving = asyncio.create_task(server.serve(listeners))
            try:
                starting = asyncio.create_task(_start(make_app, client, server, show_stage or log_stages()))
                if (started := await _started(starting, serving, signals)) is not None:
                    admission, service = started
                    with closing(service):
                        _log_slo(engine.scheduler, client)
                        _log_budget(engine.scheduler, client)
                        _logger.info("splitfuse serves %s on %s (name %s)", model, deployment.url, deployment.name)
                        garbage.freeze()
                        mark_ready()
                        await _serve(admission, client, config, serving, signals)
            finally:
                await _end(client, server, serving, at_once=signals.now.is_set())
    if signals.interrupted:
        raise KeyboardInterrupt


def model_name(model: str | None) -> str:
    """Return the name of a model for clients: its name on the Hub, or that of its folder without the path."""
    if model is None:
        return BUNDLED_MODEL.name
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model


def _make_client(engine: EngineConfig, config: ServerConfig, given: Collection[str]) -> Router:
    """Return a client of all engines that the settings name. They are not started yet."""
    return make_replicas(
        engine,
        replicas=config.num_replicas,
        max_replicas=config.most_replicas,
        step_timeout=config.step_timeout,
        engines=config.engine,
        key_file=config.key_file,
        engine_tls=config.engine_tls,
        listen=_block_listen(config),
        roles=config.engine_roles,
        given=given,
        ray=config.ray,
        ray_memory=config.ray_memory,
        ray_timeout=config.ray_timeout,
    )


def _block_listen(config: ServerConfig) -> BlockListen | None:
    """Return where engines elsewhere fetch KV blocks; None: they do not."""
    if config.engine_listen is None:
        return None
    return BlockListen(config.engine_listen, *((config.tls_certificate, config.tls_key) if config.engine_tls else ()))


def _http_server(config: ServerConfig, max_connections: int) -> HttpServer | FrontProcesses:
    """Return what speaks HTTP: this process, or several others."""
    if config.fronts == 1:
        return HttpServer(config, max_connections=max_connections)
    from splitfuse.server.fronts.supervisor import FrontProcesses

    return FrontProcesses(config)


@contextmanager
def _recorder(engine: EngineConfig, config: ServerConfig) -> Iterator[Recorder | None]:
    """Give what records the engines, if the settings ask for it. Raises ConfigError if its file cannot be written, or
    if steps would be recorded that cannot be replayed.
    """
    if config.record is not None and engine.cache.kv_loans:
        raise ConfigError("steps with kv_loans cannot be replayed: leave out record or kv_loans")
    if config.record is None:
        yield None
        return
    from splitfuse.recording.recorder import Recorder

    recorder = Recorder(Path(config.record), engine, max_mib=config.record_max_mib, keep_texts=config.log_prompts)
    with closing(recorder):
        yield recorder


@contextmanager
def _request_spans(config: ServerConfig) -> Iterator[RequestSpans | None]:
    """Give what sends spans of requests, if the settings ask for it. Raises ConfigError if it cannot."""
    if not config.otel:
        yield None
        return
    from splitfuse.server.otel import RequestSpans

    with closing(RequestSpans(config.served_model_name or "", instance=config.name)) as spans:
        yield spans


@contextmanager
def _autoscaled(client: Router, config: ServerConfig) -> Iterator[None]:
    """Change the number of replicas by their load while the context lasts, if the settings ask for it."""
    if config.autoscale is None:
        yield
        return
    from splitfuse.server.autoscaler import Autoscaler

    with Autoscaler(client, *parse_autoscale(config.autoscale)).running():
        yield


def _check_autoscale(engine: EngineConfig, config: ServerConfig) -> None:
    """Raise ConfigError if the number of replicas cannot follow the load."""
    if config.autoscale is None:
        return
    if not engine.scheduler.slo_enabled:
        raise ConfigError("autoscale needs an SLO, by which it knows what is enough: set ttft, itl, tpot or enable_slo")
    if engine.cache.kv_loans:
        raise ConfigError("autoscale and kv_loans are mutually exclusive: leave one of them out")


def _bounded(config: ServerConfig, max_connections: int) -> ServerConfig:
    """Return the settings with no more requests at once than connections, of which new clients get their share. Each
    front can have `max_connections`.
    """
    most = config.fronts * (max_connections - num_newcomers(max_connections))
    if most >= config.max_queued_requests:
        return config
    _logger.warning(
        "the limit of open files allows %d connections: max_queued_requests is %d, not %d; raise it with ulimit -n",
        config.fronts * max_connections,
        most,
        config.max_queued_requests,
    )
    return replace(config, max_queued_requests=most)


async def _start(
    make_app: Callable[[], tuple[App, AppState, ApiKeys, ModelSource]],
    client: Router,
    server: HttpServer | FrontProcesses,
    show_stage: ShowStage,
) -> tuple[Admission, TextService]:
    """Do everything up to the first request. /health and /ready answer meanwhile."""
    watching = asyncio.create_task(_watch_stage(client, show_stage))
    try:
        app, state, keys, tokenizer = await run_in_daemon_thread(make_app)
        admission, service = state.admission, state.service
        if isinstance(server, HttpServer):
            server.app = app
        else:
            await server.begin(app, state, keys, tokenizer)
        with ExitStack() as undo:
            undo.callback(service.close)
            await service.start()
            await server.ready()
            undo.pop_all()
        return admission, service
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def _started(
    starting: asyncio.Task[tuple[Admission, TextService]], serving: asyncio.Task[None], signals: Signals
) -> tuple[Admission, TextService] | None:
    """Return the result of starting; None if a signal comes first."""
    await wait_first(starting, serving, signals.drain.wait())
    if starting.done():
        return starting.result()
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    _check_alive(serving)
    return None


async def _serve(
    admission: Admission, client: Router, config: ServerConfig, serving: asyncio.Task[None], signals: Signals
) -> None:
    """Serve until a signal, then drain. Raises ServerError if requests are cut off."""
    with _autoscaled(client, config):
        await wait_first(serving, signals.drain.wait())
    _check_alive(serving)
    admission.drain()
    client.end_soon()
    if admission.num_requests and not signals.now.is_set():
        _logger.info(
            "draining: %d requests may end, within %g s; a second SIGTERM ends them at once",
            admission.num_requests,
            config.drain_timeout,
        )
    await wait_first(admission.wait_empty(), signals.now.wait(), timeout=config.drain_timeout)
    if admission.num_requests and not signals.interrupted:
        when = "at a second SIGTERM" if signals.now.is_set() else f"after {config.drain_timeout:g} s of draining"
        raise ServerError(f"{admission.num_requests} requests were cut off {when}")


def _make_app(
    engine: EngineConfig,
    config: ServerConfig,
    client: Router,
    server: HttpServer | FrontProcesses,
    write_log: Callable[[str], None],
    recorder: Recorder | None,
    spans: RequestSpans | None,
) -> tuple[App, AppState, ApiKeys, ModelSource]:
    """Return the application, and the model that its tokenizer is of. It takes a thread: imports take a second,
    fetching a model from the Hub much longer.
    """
    from splitfuse.server.access_log import RequestLog
    from splitfuse.server.admission import Admission
    from splitfuse.server.app import app_of, make_state
    from splitfuse.server.metrics import Metrics
    from splitfuse.server.traces import TraceHub, record
    from splitfuse.text.service import TextService
    from splitfuse.text.tokenizer import Tokenizer

    model = engine.model
    # Fetched once, before several engines ask for it.
    needs_weights = config.num_replicas > 0 and config.ray is None and model.load_format != "dummy"
    check_revision(model.revision, model.model, model.tokenizer)
    source = open_model(model.model, model.revision, gguf_file=model.gguf_file, weights=needs_weights)
    source.config()  # before the tokenizer: a folder that is no model should be called that
    if client.agreement is not None:
        client.agreement.model_files = source.digest(weights=False)
    if model.tokenizer is not None:
        source = open_model(model.tokenizer, model.revision, weights=False)
    tokenizer = Tokenizer.from_source(source)
    admission = Admission(config, num_engines=lambda: _num_engines(client))
    metrics = Metrics(client, model_name=config.served_model_name)
    plans: list[str] = []

    def log_plan(plan: str) -> None:
        """Log the first memory plan: those of other engines, and of a restarted one, are like it."""
        if not plans:
            plans.append(plan)
            _logger.info("%s", plan)

    def follow(engine: LocalClient) -> None:
        engine.on_step = functools.partial(_note_step, admission, metrics)
        engine.on_planned = log_plan

    client.follow_engines(follow)
    log = RequestLog(write_log, log_prompts=config.log_prompts)
    service = TextService(client, tokenizer)
    traces = TraceHub()
    client.follow_engines(traces.add)
    if recorder is not None:
        record(traces, recorder)
        metrics.recorder = recorder
    if spans is not None:
        spans.follow(traces)
        metrics.num_dropped_spans = lambda: spans.num_dropped
    state = make_state(service, config, admission=admission, metrics=metrics, log=log, traces=traces)
    metrics.connections = lambda: server.num_connections
    metrics.num_front_restarts = lambda: server.num_restarts
    metrics.num_text_restarts = lambda: service.num_ended_processes + server.num_text_restarts
    keys = ApiKeys(config, name_key=client.name_key)
    return app_of(state, keys), state, keys, source


def _num_engines(client: EngineClient) -> int:
    return sum(each.state is not EngineState.STOPPED for each in client.engines)


def _note_step(admission: Admission, metrics: Metrics, stats: EngineStats) -> None:
    """Let admission and metrics know of an engine's step."""
    metrics.step_ended(stats)
    admission.progressed(stats.step_tokens, stats.step_seconds)


async def _end(
    client: EngineClient, server: HttpServer | FrontProcesses, serving: asyncio.Task[None], *, at_once: bool
) -> None:
    """Close the engine first, so that its requests get an error and not a broken connection."""
    await client.close()
    server.end(at_once=at_once)
    await asyncio.gather(serving, return_exceptions=True)


def _check_alive(serving: asyncio.Task[None]) -> None:
    if serving.done():
        if isinstance(error := serving.exception(), ServerError):
            raise error
        raise ServerError(f"the HTTP server has ended unexpectedly: {error!r}")


async def run_in_daemon_thread(work: Callable[[], _Result]) -> _Result:
    """Return the result of `work`, done in a thread that does not keep the process from ending."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_Result] = loop.create_future()

    def settle(set_outcome: Callable[[Any], None], outcome: Any) -> None:
        if not future.done():
            set_outcome(outcome)

    def run() -> None:
        try:
            set_outcome, outcome = future.set_result, work()
        except BaseException as error:
            set_outcome, outcome = future.set_exception, error  # type: ignore[assignment]
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, set_outcome, outcome)

    threading.Thread(target=run, name="start-up", daemon=True).start()
    return await future


# Stages of start-up --------------------------------------------------------------------------------------------------


async def _watch_stage(client: EngineClient, show_stage: ShowStage) -> None:
    """Show each new stage."""
    shown = None
    while True:
        if client.stage != shown:
            shown = client.stage
            show_stage(shown)
        await asyncio.sleep(0.1)


def log_stages() -> ShowStage:
    """Return a function that logs stages, and of loading every quarter."""
    logged = ""

    def show(stage: Loading) -> None:
        nonlocal logged
        if (line := describe(stage, steps=4)) != logged:
            logged = line
            _logger.info("%s", line)

    return show


def describe(stage: Loading, *, steps: int = 100) -> str:
    """Return `loading 43 %`, with the percentage rounded down to one of so many steps."""
    percent = int(stage.fraction * steps) * 100 // steps
    return f"{stage.stage} {percent} %" if stage.stage == "loading" else stage.stage


def _log_slo(scheduler: SchedulerConfig, client: EngineClient) -> None:
    if scheduler.has_targets:
        settings = {**scheduler.targets, "tail_share": scheduler.tail_share}
        _logger.info("SLO: %s", ", ".join(f"{name} {value}" for name, value in settings.items()))
    if (found := client.info.attainable) is not None:
        found = found.times(len(client.engines))
        _logger.log(logging.WARNING if found.is_concern else logging.INFO, "%s", found)


def _log_budget(scheduler: SchedulerConfig, client: EngineClient) -> None:
    if scheduler.max_num_batched_tokens is None:
        how = "limited by time" if scheduler.has_targets else "chosen"
        _logger.info("token budget of a step: %s, at most %d", how, client.info.max_num_batched_tokens)
