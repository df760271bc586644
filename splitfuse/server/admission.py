"""Decides whether a server accepts one more request and, if not, when to try again.

Only arithmetic on numbers and on a clock that is passed in, and an event for draining. It belongs to the event
loop's thread.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from splitfuse.config.server import ServerConfig
from splitfuse.errors import MAX_WAIT, DrainingError, InvalidRequestError, OverloadedError, whole_seconds
from splitfuse.server.bodies import BodyBudget

MEMORY_SECONDS = 10.0
"""Time constant, in seconds, of the throughput average."""


class Admission:
    """Keeps the open requests, and the tokens they may come to, within the bounds of a ServerConfig."""

    def __init__(
        self,
        config: ServerConfig,
        clock: Callable[[], float] = time.monotonic,
        *,
        num_engines: Callable[[], int] | None = None,
    ) -> None:
        """`num_engines` returns how many engines there are; left out, those of the configuration."""
        self.num_requests = 0
        self.num_tokens = 0
        self.num_logprobs = 0
        self.draining = False
        self.bodies = BodyBudget.of(config)
        self._max_requests = config.max_queued_requests
        self._max_tokens = config.max_queued_tokens
        self._num_engines = num_engines or (lambda: config.num_engines)
        self._clock = clock
        self._empty = asyncio.Event()
        self._empty.set()
        self._measured_at = clock()
        self._recent_tokens = self._recent_seconds = 0.0  # of steps, those long ago counting less

    @property
    def tokens_per_second(self) -> float | None:
        """Return what all engines together compute, in tokens a second, by recent steps; None before the first one."""
        if not self._recent_seconds:
            return None
        rate = self._num_engines() * (self._recent_tokens / self._recent_seconds)
        return rate if 0 < rate < math.inf else None

    @contextmanager
    def admit(self, num_tokens: int, num_requests: int = 1, *, num_logprobs: int = 0) -> Iterator[None]:
        """Count `num_requests` requests (prompts times choices) as open while the context lasts. They come to at most
        `num_tokens` tokens, of prompts and of what they may generate, and to `num_logprobs` log-probabilities.

        Enter it with the requests before they are encoded, and again with their tokens and no further request. Entering
        it raises DrainingError after `drain` (with requests), OverloadedError if there is no room now,
        InvalidRequestError if there never will be.
        """
        self._check(num_tokens, num_requests, num_logprobs)
        self.num_requests += num_requests
        self.num_tokens += num_tokens
        self.num_logprobs += num_logprobs
        self._empty.clear()
        try:
            yield
        finally:
            self.num_requests -= num_requests
            self.num_tokens -= num_tokens
            self.num_logprobs -= num_logprobs
            if not self.num_requests:
                self._empty.set()

    async def reserve(self, num_tokens: int, num_requests: int = 1, *, num_logprobs: int = 0) -> Callable[[], None]:
        """Enter `admit`, and return what leaves it. A front asks the server's process: see fronts/app.py."""
        entered = ExitStack()
        entered.enter_context(self.admit(num_tokens, num_requests, num_logprobs=num_logprobs))
        return entered.close

    def progressed(self, num_tokens: int, seconds: float) -> None:
        """Note that an engine has computed `num_tokens` in a step of `seconds`."""
        if num_tokens <= 0 or not 0 < seconds < math.inf:  # no step, or one too short for the clock
            return
        now = self._clock()
        kept = math.exp(min(self._measured_at - now, 0.0) / MEMORY_SECONDS)
        self._measured_at = now
        self._recent_tokens = self._recent_tokens * kept + num_tokens
        self._recent_seconds = self._recent_seconds * kept + seconds

    def drain(self) -> None:
        """Refuse all requests from now on. Those that are open continue."""
        self.draining = True

    async def wait_empty(self) -> None:
        """Wait until no request is open."""
        await self._empty.wait()

    def _check(self, num_tokens: int, num_requests: int, num_logprobs: int) -> None:
        if min(num_tokens, num_requests, num_logprobs) < 0:
            raise ValueError(
                f"numbers must be at least 0, not {num_tokens} tokens, {num_requests} requests, {num_logprobs} logprobs"
            )
        if self.draining and num_requests:
            raise DrainingError("the server is shutting down and accepts no new requests")
        if num_requests > self._max_requests:
            raise InvalidRequestError(
                f"n x prompts = {num_requests} requests, but this server accepts at most {self._max_requests} "
                "at once: send fewer prompts, or a lower n",
                parameter="n",
            )
        for number, what, parameter in (
            (num_tokens, "tokens", "max_tokens"),
            (num_logprobs, "log-probabilities", "logprobs"),
        ):
            if number > self._max_tokens:
                raise InvalidRequestError(
                    f"prompts and max_tokens come to {number} {what}, but this server accepts at most "
                    f"{self._max_tokens} at once: lower max_tokens{', logprobs' * (parameter == 'logprobs')} or n, or "
                    "send fewer prompts",
                    parameter=parameter,
                )
        requests_over = self.num_requests + num_requests - self._max_requests
        tokens_over = self.num_tokens + num_tokens - self._max_tokens
        logprobs_over = self.num_logprobs + num_logprobs - self._max_tokens
        for over, what in (
            (requests_over if num_requests else 0, f"{self.num_requests} requests"),
            (tokens_over, f"{self.num_tokens} tokens"),
            (logprobs_over, f"{self.num_logprobs} log-probabilities"),
        ):
            if over > 0:
                wait = self._wait(max(requests_over, 0), tokens_over)
                raise OverloadedError(
                    f"the server is at capacity ({what}); try again in {whole_seconds(wait)} s", retry_after=wait
                )

    def _wait(self, requests_over: int, tokens_over: int) -> float:
        """Return the seconds until that much is done, at least 1. Requests are assumed to have the mean size of those
        that are open.
        """
        rate = self.tokens_per_second
        if rate is None:
            return 1.0
        tokens = max(tokens_over, self.num_tokens / max(self.num_requests, 1) * requests_over)
        return min(max(tokens / rate, 1.0), MAX_WAIT)
