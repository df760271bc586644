"""A real server on a real socket, in a thread of the test's process, over an engine in another thread."""

import asyncio
import io
import json
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import httpx
from patience import PATIENCE

from splitfuse.config.engine import EngineConfig
from splitfuse.config.server import ServerConfig
from splitfuse.engine.engine import Engine
from splitfuse.engine.thread import AsyncEngine
from splitfuse.models.sources.hub import open_model
from splitfuse.server.access_log import RequestLog
from splitfuse.server.admission import Admission
from splitfuse.server.app import app_of, make_state
from splitfuse.server.auth import ApiKeys
from splitfuse.server.listen import HttpServer, listening_sockets
from splitfuse.server.metrics import Metrics
from splitfuse.server.traces import TraceHub
from splitfuse.text.service import TextService
from splitfuse.text.tokenizer import Tokenizer

MAX_CONNECTIONS = 1000


class RunningServer:
    """The server and everything behind it."""

    def __init__(self, config: ServerConfig, **settings: Any) -> None:
        self.config = config
        self.engine = Engine.load(EngineConfig.from_settings(settings))
        self.client = AsyncEngine(self.engine)
        self.service = TextService(self.client, Tokenizer.from_source(open_model(settings.get("model"))))
        self.admission = Admission(config)
        self.metrics = Metrics(self.client)
        self.traces = TraceHub(self.client.engines)
        self.log = io.StringIO()
        state = make_state(
            self.service,
            config,
            admission=self.admission,
            metrics=self.metrics,
            log=RequestLog(self.log.write, log_prompts=config.log_prompts),
            traces=self.traces,
        )
        self.app = app_of(state, ApiKeys(config))
        self.server = HttpServer(config, max_connections=MAX_CONNECTIONS)
        self.server.app = self.app
        self.loop = asyncio.new_event_loop()
        self.num_available_blocks = self.engine.allocator.num_available
        self._thread = threading.Thread(target=self.loop.run_until_complete, args=(self._run(),))

    async def _run(self) -> None:
        await self.client.start()
        self._serving = asyncio.current_task()
        with listening_sockets("127.0.0.1", 0, self.config.client_timeout) as (listener,):
            self.port = listener.getsockname()[1]
            await self.server.serve([listener])
        await self.client.close()
        self.service.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def http(self, **settings: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=PATIENCE, trust_env=False, **settings)

    def call(self, work: Coroutine[Any, Any, Any]) -> Any:
        """The result of `work`, done in the server's event loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(PATIENCE)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        async def wait() -> None:
            async with asyncio.timeout(PATIENCE):
                while not condition():
                    await asyncio.sleep(0.005)

        self.call(wait())

    def wait_until_running(self, count: int = 1) -> None:
        self.wait_until(lambda: self.client.stats[0].num_running >= count)

    @contextmanager
    def held(self, until: Callable[[], object], *, num_steps: int = 50) -> Iterator[None]:
        """Let the engine make so many steps, and then wait until a condition holds, at the longest to the end of the
        context: so nothing longer has ended before, on however fast a machine.
        """
        submit, num_made, is_over = self.engine.executor.submit, count(1), threading.Event()

        def wait_and_submit(plan: Any) -> Any:
            held = next(num_made) > num_steps
            while held and not is_over.wait(0.001):
                if until():
                    is_over.set()
            return submit(plan)

        self.engine.executor.submit = wait_and_submit  # type: ignore[method-assign]
        try:
            yield
        finally:
            is_over.set()
            self.engine.executor.submit = submit  # type: ignore[method-assign]

    def nothing_runs(self) -> bool:
        """Return whether the server wants nothing of its engine: all is answered, or its client has gone."""
        return not self.client.num_open

    def assert_idle(self) -> None:
        """Wait until no request, block or task is left."""

        def is_empty() -> bool:
            (stats,) = self.client.stats
            if not stats.num_steps:
                return True
            return (
                stats.num_running == stats.num_waiting == 0 and stats.num_available_blocks == self.num_available_blocks
            )

        self.wait_until(is_empty)
        self.wait_until(lambda: self.admission.num_requests == 0 and self.client.outstanding_tokens == 0)
        self.wait_until(lambda: self.admission.bodies.used == 0)
        self.wait_until(lambda: not self.server.server_state.tasks)

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.getvalue().splitlines()]

    def wait_for_record(self, **wanted: Any) -> dict[str, Any]:
        def found() -> list[dict[str, Any]]:
            return [record for record in self.records if all(record[name] == value for name, value in wanted.items())]

        self.wait_until(lambda: bool(found()))
        return found()[-1]


@contextmanager
def running_server(config: ServerConfig | None = None, **settings: Any) -> Iterator[RunningServer]:
    server = RunningServer(config or ServerConfig(), **settings)
    server._thread.start()
    try:
        deadline = threading.Event()
        for _ in range(int(PATIENCE / 0.01)):
            if server.server.started:
                break
            deadline.wait(0.01)
        assert server.server.started
        yield server
    finally:
        server.server.should_exit = True
        server._thread.join(PATIENCE)
        server.loop.close()
