"""Decides when requests are sent, and which of them count: a closed loop of clients, or an open loop of arrivals.

Clients start one after the other, and nothing counts until each has been answered once: a common start would decide
every tail latency. The load stays on until the last request that counts is done, so that it runs at the same
concurrency as the others.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from typing import Any

from splitfuse.bench.results import MeasuredRequest, Point
from splitfuse.bench.target import Answer, Target
from splitfuse.bench.workload import LoadRequest, Workload
from splitfuse.errors import ConfigError, ServerError

SPACING = 0.25
"""Time between the starts of two clients, as a fraction of the latency of a lone request."""
WARM_UP = 0.25
"""Arrivals of an open loop before the window, as a fraction of those that count."""
PAUSE_AFTER_ERROR = 0.5
"""Seconds that a client waits after a failed request."""
MAX_FAILURES = 8
"""Failures without a success after which a load is given up."""

OnProgress = Callable[[str, int], None]
"""Callback with the current activity, and the number of requests done which count."""


class _Load:
    """Drives one point."""

    def __init__(self, target: Target, workload: Workload, stream: str, on_progress: OnProgress) -> None:
        self.target, self.workload, self.stream, self.on_progress = target, workload, stream, on_progress
        self.began = asyncio.get_running_loop().time()
        self.records: list[MeasuredRequest] = []
        self.opened = self.closed = math.inf  # the window
        self.counted = asyncio.Event()
        """Event of the end: the window is closed and all requests sent in it are done."""
        self._next = 0
        self._pending = self._num_done = self._num_failed = 0

    @property
    def now(self) -> float:
        return asyncio.get_running_loop().time() - self.began

    def begin_session(self) -> LoadRequest:
        """Return the first request of the next session."""
        self._next += 1
        return self.workload.first(self.stream, self._next - 1)

    async def ask(self, client: int, request: LoadRequest, *, due: float | None = None) -> Answer:
        """Send a request now and record it; its latency counts from now, or from when it was due."""
        sent = self.now if due is None else due
        counts = self.opened <= sent < self.closed
        self._pending += counts
        answer = await self.target.ask(request)
        times = tuple(token_time - self.began for token_time in answer.token_times)
        self.records.append(MeasuredRequest(client, sent, answer.num_prompt_tokens, times, answer.error))
        if answer.error is not None:
            self._num_failed += 1
            if self._num_failed == len(self.records) >= MAX_FAILURES:
                raise ServerError(f"all requests failed, the last with: {answer.error}")
        if counts:
            self._pending -= 1
            self._num_done += 1
            self.on_progress("counting", self._num_done)
        self.check_end()
        return answer

    async def pause(self, request: LoadRequest) -> bool:
        """Wait until a request is to come, after the answer before it. Returns False if the load is over by then."""
        if request.pause and not self.counted.is_set():
            await _either(self.counted.wait(), asyncio.sleep(request.pause))
        return not self.counted.is_set()

    async def ask_session(self, client: int, *, due: float | None = None) -> None:
        """Send the requests of the next session, one after the other, while the load is on."""
        request: LoadRequest | None = self.begin_session()
        while request is not None:
            answer = await self.ask(client, request, due=due)
            if answer.error is not None or self.counted.is_set():
                return
            request, due = self.workload.successor(request, answer.tokens), None
            if request is not None and not await self.pause(request):
                return

    def check_end(self) -> None:
        """Set `counted` once the window is closed and its requests are done."""
        if self.closed < math.inf and not self._pending:
            self.counted.set()

    def point(self, *, clients: int | None, rate: float | None, repetition: int) -> Point:
        records = tuple(sorted(self.records, key=lambda record: record.sent))
        return Point(clients, rate, (self.opened, self.closed), records, repetition)


async def closed_loop(
    target: Target,
    workload: Workload,
    *,
    clients: int,
    requests: int,
    spacing: float | None = None,
    repetition: int = 0,
    on_progress: OnProgress = lambda *_: None,
) -> Point:
    """Run clients that send again as soon as they are answered, until `requests` requests have counted.

    They start `spacing` seconds apart; by default, a quarter of the latency of a lone request, which is sent first.
    Raises ServerError if the server is gone, or if all requests fail.
    """
    if clients < 1 or requests < 1:
        raise ConfigError(f"clients and requests must be at least 1, not {clients} and {requests}")
    load = _Load(target, workload, f"clients {clients} repetition {repetition}", on_progress)
    on_progress("one request alone", 0)
    alone = await load.ask(0, load.begin_session())
    if alone.error is not None:
        raise ServerError(f"the first request failed: {alone.error}")
    space = SPACING * load.now if spacing is None else spacing
    answered: set[int] = set()
    num_sent = 0

    async def run(client: int) -> None:
        nonlocal num_sent
        await asyncio.sleep(client * space)
        request: LoadRequest | None = None
        while not load.counted.is_set():
            if request is None:
                request = load.begin_session()
            if not await load.pause(request):
                return
            if len(answered) == clients:
                num_sent += 1
                if num_sent == 1:
                    load.opened = load.now
                elif num_sent == requests + 1:
                    load.closed = load.now
                    load.check_end()
                    if load.counted.is_set():
                        return
            answer = await load.ask(client, request)
            answered.add(client)
            if len(answered) < clients:
                on_progress(f"warming up, {len(answered)} of {clients} clients answered", 0)
            request = workload.successor(request, answer.tokens) if answer.error is None else None
            if answer.error is not None:
                await asyncio.sleep(PAUSE_AFTER_ERROR)

    async with _together() as group:
        for client in range(clients):
            group.create_task(run(client))
    return load.point(clients=clients, rate=None, repetition=repetition)


async def open_loop(
    target: Target,
    workload: Workload,
    *,
    rate: float | None,
    arrivals: Iterator[float],
    requests: int | None,
    repetition: int = 0,
    on_progress: OnProgress = lambda *_: None,
) -> Point:
    """Start sessions at the times of `arrivals`, in seconds from the beginning, whether or not others are answered.

    A quarter of `requests` more arrive before those that count, and others after them until these are done. If the
    arrivals end, everything counts until the last request is done. Raises what `closed_loop` raises.
    """
    if requests is not None and requests < 1:
        raise ConfigError(f"requests must be at least 1, not {requests}")
    name = f"rate {rate:g}" if rate is not None else "as it came"  # it seeds the prompts of this point
    load = _Load(target, workload, f"{name} repetition {repetition}", on_progress)
    warm_up = 0 if requests is None else math.ceil(WARM_UP * requests)

    async def arrive() -> None:
        for number, due in enumerate(arrivals):
            pause = due - load.now
            if pause > 0:
                await _either(load.counted.wait(), asyncio.sleep(pause))
            if load.counted.is_set():
                return
            if number == warm_up:
                load.opened = due
            if requests is not None and number == warm_up + requests:
                load.closed = due
                load.check_end()
            group.create_task(load.ask_session(number, due=due))
            await asyncio.sleep(0)  # so that it has begun, and is pending, before the window may close
            if number < warm_up:
                on_progress(f"warming up, {number + 1} of {warm_up} arrived", 0)

    async with _together() as group:
        group.create_task(arrive())
    if load.closed == math.inf:
        load.closed = load.now
    if load.opened == math.inf:
        raise ConfigError("the arrivals ended during the warm-up: lower --requests")
    return load.point(clients=None, rate=rate, repetition=repetition)


@asynccontextmanager
async def _together() -> AsyncIterator[asyncio.TaskGroup]:
    """Open a task group that raises the first error itself, not in an exception group."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


async def _either(*work: Coroutine[Any, Any, Any]) -> None:
    """Wait until one of them is done; cancel the others."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
