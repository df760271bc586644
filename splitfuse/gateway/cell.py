"""Follows a cell: a server to which requests are passed on, whether it takes any, and what it has to do.

It is asked every second for what servers publish: /ready and /metrics. What it has to do is counted in seconds of a
replica: its open requests, by what a request took it lately.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from splitfuse.clients.http_stream import Address, get
from splitfuse.errors import RequestFailedError, ServerError

LOOK_SECONDS = 1.0
"""Seconds from one look at a cell to the next."""
ANSWER_SECONDS = 2.0
"""Seconds that a cell has to say its state."""
GONE_SECONDS = 10.0
"""Seconds of silence after which the requests of a cell are given up, as those of an engine are."""
FULL_SECONDS = 1.0
"""Longest time in seconds that a cell which had no room for a request is sent no other."""
KEPT = 0.99
"""Fraction of what was counted before that counts after a look: some hundred looks are remembered."""
MOST_COUNTED = 1e18
"""Number that no counter of a server comes to."""
WINDOW_LOOKS = 60
"""Number of looks whose requests count for its requests/s."""

_SUMS = (
    "step_seconds_sum",
    "request_seconds_count",
    "time_to_first_token_seconds_sum",
    "queue_seconds_sum",
    "prompt_tokens_total",
    "cached_tokens_total",
)
"""Counters of /metrics of which recent changes are looked at."""
_NOW = ("engine_ready", "num_requests_running", "num_requests_waiting", "kv_cache_usage_ratio")
_METRIC = re.compile(
    rb"^splitfuse:(" + "|".join((*_SUMS, *_NOW)).encode() + rb")(?:\{.*\})? ([-+.\deE]+|\+Inf|NaN)$", re.MULTILINE
)

_logger = logging.getLogger(__name__)


class Cell:
    """Holds what is known of a server. `number` is its place among the cells."""

    def __init__(self, number: int, url: str, address: Address, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.number, self.url, self.address = number, url, address
        self.state = "not asked yet"
        """State that its /ready tells; `ready` if it takes requests."""
        self.num_ready_engines = self.num_running = self.num_waiting = 0
        self.kv_usage = 0.0
        self.request_seconds = self.token_seconds = 0.0
        """Seconds of a replica that a request took lately, and those of a token of a prompt."""
        self.on_change: Callable[[Cell], object] = lambda _: None
        """Function that is called after each look."""
        self._clock = clock
        self._heard_at = clock()
        self._full_until = 0.0
        self._open: set[asyncio.Timeout] = set()
        self._totals = defaultdict[str, float](float)
        self._recent = defaultdict[str, float](float)
        self._ended: deque[tuple[float, float]] = deque(maxlen=WINDOW_LOOKS)  # time, and requests that have ended
        self._wake = asyncio.Event()

    @property
    def is_ready(self) -> bool:
        """Return whether it takes requests."""
        return self.state == "ready"

    @property
    def is_full(self) -> bool:
        """Return whether it said a moment ago that it has no room."""
        return self.full_seconds > 0.0

    @property
    def full_seconds(self) -> float:
        """Return the seconds until it may have room again."""
        return self._full_until - self._clock()

    @property
    def num_open(self) -> int:
        """Return the number of requests of this gateway that it has."""
        return len(self._open)

    @property
    def load(self) -> float:
        """Return the seconds of a replica that it has to do."""
        return (self.num_running + self.num_waiting) * self.request_seconds

    @property
    def requests_per_second(self) -> float:
        """Return the requests/s that have ended in the last minute."""
        (began, before), (now, count) = (self._ended[0], self._ended[-1]) if self._ended else ((0.0, 0.0),) * 2
        return max(count - before, 0.0) / (now - began) if now > began else 0.0

    @contextmanager
    def lent(self) -> Iterator[asyncio.Timeout]:
        """Give the limit under which one request is answered: it ends once the cell has been silent for too long."""
        limit = asyncio.timeout(None)
        self._open.add(limit)
        try:
            yield limit
        finally:
            self._open.discard(limit)

    def note_full(self, seconds: float) -> None:
        """Take note that it had no room for a request, and may have in so many seconds."""
        self._full_until = self._clock() + min(seconds, FULL_SECONDS)

    def look_soon(self) -> None:
        """Look at it now."""
        self._wake.set()

    def doubt(self, why: str) -> None:
        """Take it to accept no requests until it has been looked at, which is now."""
        self._enter(why)
        self.look_soon()

    def hear(self) -> None:
        """Take note that something of it has come."""
        self._heard_at = self._clock()

    def give_up(self) -> None:
        """End the limits of all requests that it has."""
        for limit in [each for each in self._open if not each.expired()]:
            limit.reschedule(0.0)

    async def watch(self) -> None:
        """Look at the cell every second, until cancelled."""
        while True:
            try:
                await self.look()
            except Exception:  # one cell must not end the others' requests
                _logger.exception("cell %d cannot be looked at", self.number)
                self._enter("its answers cannot be read")
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._wake.wait()
            self._wake.clear()

    async def look(self) -> None:
        """Ask the cell for its state and its load."""
        try:
            status, body = await self._get("/ready")
        except (ServerError, RequestFailedError, TimeoutError) as error:
            if self._clock() - self._heard_at >= GONE_SECONDS:
                self.give_up()
            if self.state != "unreachable":
                _logger.info("cell %d: %s", self.number, error or f"no answer within {ANSWER_SECONDS:g} s")
            self._enter("unreachable")
            return
        self.hear()
        state = "ready" if status == 200 else _stage_in(status, body)
        if state == "ready":
            try:
                state = self._take(*await self._get("/metrics"))
            except (ServerError, RequestFailedError, TimeoutError):  # a cell with much to do: its last load stands
                state = "ready" if self.num_ready_engines else "its /metrics do not come"
        self._enter(state)

    async def _get(self, path: str) -> tuple[int, bytes]:
        async with asyncio.timeout(ANSWER_SECONDS):
            return await get(self.address, path, timeout=ANSWER_SECONDS)

    def _take(self, status: int, metrics: bytes) -> str:
        """Take note of metrics, and return the state of which they are."""
        if status in (401, 403):
            return f"it refuses /metrics with status {status}: give the gateway a key of it with --server-key-file"
        found = defaultdict[str, float](float)
        for name, value in _METRIC.findall(metrics):
            found[name.decode()] += _number(value)
        if status != 200 or "engine_ready" not in found:
            return f"its /metrics, with status {status}, are not those of a splitfuse server"
        for name in _SUMS:  # those of a server that was started again begin anew
            new = found[name] - self._totals[name] if found[name] >= self._totals[name] else found[name]
            self._recent[name] = KEPT * self._recent[name] + new
        self._totals = found
        self._ended.append((self._clock(), found["request_seconds_count"]))
        recent = self._recent
        self.request_seconds = recent["step_seconds_sum"] / max(recent["request_seconds_count"], 1)
        prompts = recent["time_to_first_token_seconds_sum"] - recent["queue_seconds_sum"]
        self.token_seconds = max(prompts, 0.0) / max(recent["prompt_tokens_total"] - recent["cached_tokens_total"], 1)
        self.num_ready_engines = int(found["engine_ready"])
        self.num_running, self.num_waiting = int(found["num_requests_running"]), int(found["num_requests_waiting"])
        self.kv_usage = found["kv_cache_usage_ratio"]
        return "ready" if self.num_ready_engines else "no engine is ready"

    def _enter(self, state: str) -> None:
        if state != self.state:
            level = logging.INFO if state == "ready" else logging.WARNING
            _logger.log(level, "cell %d (%s): %s, was %s", self.number, self.url, state, self.state)
            self.state = state
        self.on_change(self)


def _number(text: bytes) -> float:
    """Return a number of metrics; 0 for what is none, or none that a server counts to."""
    try:
        number = float(text)
    except ValueError:
        return 0.0
    return number if 0.0 <= number < MOST_COUNTED else 0.0


def _stage_in(status: int, body: bytes) -> str:
    try:
        return str(json.loads(body)["stage"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"its /ready has status {status}"
