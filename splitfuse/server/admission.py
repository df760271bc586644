"""Decides whether a server takes one more request, and when another attempt is worth it if not.

Arithmetic on numbers and a clock that is passed in: it must not know HTTP, the engine, or what is in a request. One
thread: the event loop's.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from splitfuse.config import ServerConfig
from splitfuse.errors import DrainingError, InvalidRequestError, OverloadedError

MEMORY_SECONDS = 10.0
"""A step this long ago counts 1/e of one that has just ended, in the measured rate."""
LONGEST_WAIT = 3600.0
"""Seconds: no estimate is good for longer."""


class Admission:
    """Keeps the requests that are open, and the tokens they may come to, within the bounds of a ServerConfig."""

    def __init__(self, config: ServerConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.num_requests = 0
        self.num_tokens = 0
        self.draining = False
        self._most_requests = config.max_queued_requests
        self._most_tokens = config.max_queued_tokens
        self._replicas = config.replicas
        self._clock = clock
        self._empty = asyncio.Event()
        self._empty.set()
        self._measured_at = clock()
        self._recent_tokens = self._recent_seconds = 0.0  # of steps, those long ago counting less

    @property
    def tokens_per_second(self) -> float | None:
        """What all replicas together compute, in tokens a second of work, by recent passes; None before the first."""
        if not self._recent_seconds:
            return None
        rate = self._replicas * (self._recent_tokens / self._recent_seconds)
        return rate if 0 < rate < math.inf else None

    @contextmanager
    def admit(self, num_tokens: int, num_requests: int = 1) -> Iterator[None]:
        """Hold room for `num_requests` requests (prompts times choices) that come to `num_tokens` tokens at most,
        prompts and what they may generate, while the context lasts.

        Raises on entering: DrainingError after `drain`, OverloadedError if there is no room now, InvalidRequestError
        if there never will be.
        """
        self._check(num_tokens, num_requests)
        self.num_requests += num_requests
        self.num_tokens += num_tokens
        self._empty.clear()
        try:
            yield
        finally:
            self.num_requests -= num_requests
            self.num_tokens -= num_tokens
            if not self.num_requests:
                self._empty.set()

    def progressed(self, num_tokens: int, seconds: float) -> None:
        """An engine has computed `num_tokens` in a step of `seconds`. For every step of every replica."""
        if num_tokens <= 0 or not 0 < seconds < math.inf:  # no step, or one too short for the clock
            return
        now = self._clock()
        kept = math.exp(min(self._measured_at - now, 0.0) / MEMORY_SECONDS)
        self._measured_at = now
        self._recent_tokens = self._recent_tokens * kept + num_tokens
        self._recent_seconds = self._recent_seconds * kept + seconds

    def drain(self) -> None:
        """Take no more requests, ever. Those that are open go on."""
        self.draining = True

    async def wait_empty(self) -> None:
        """Until no request is open."""
        await self._empty.wait()

    def _check(self, num_tokens: int, num_requests: int) -> None:
        if num_tokens < 0 or num_requests < 1:
            raise ValueError(f"room for {num_requests} requests of {num_tokens} tokens makes no sense")
        if self.draining:
            raise DrainingError("the server is ending and takes no new requests")
        if num_requests > self._most_requests:
            raise InvalidRequestError(
                f"prompts times n come to {num_requests} requests, and this server takes at most "
                f"{self._most_requests} at once: send fewer prompts, or a lower n",
                parameter="n",
            )
        if num_tokens > self._most_tokens:
            raise InvalidRequestError(
                f"prompts and what may be generated come to {num_tokens} tokens, and this server takes at most "
                f"{self._most_tokens} at once: lower max_tokens or n, or send fewer prompts",
                parameter="max_tokens",
            )
        requests_over = self.num_requests + num_requests - self._most_requests
        tokens_over = self.num_tokens + num_tokens - self._most_tokens
        if requests_over > 0 or tokens_over > 0:
            wait = self._wait(requests_over, tokens_over)
            what = f"{self.num_requests} requests" if requests_over > 0 else f"requests of {self.num_tokens} tokens"
            raise OverloadedError(
                f"the server has no room for this request now, as it works on {what}; try again in {wait:.0f} s",
                retry_after=wait,
            )

    def _wait(self, requests_over: int, tokens_over: int) -> float:
        """Seconds until that much has been worked off, at least 1. A request is taken to be of the mean size of those
        that are open.
        """
        rate = self.tokens_per_second
        if rate is None:
            return 1.0
        tokens = max(tokens_over, self.num_tokens / max(self.num_requests, 1) * requests_over)
        return min(max(tokens / rate, 1.0), LONGEST_WAIT)
