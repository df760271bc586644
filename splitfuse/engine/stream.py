"""Iterates over the outputs of one request, whichever engine computes it: an engine may die, and another go on."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from array import array
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import replace
from typing import Self

import msgspec

from splitfuse.core.latency.phases import LatencyBreakdown, LatencyPhase
from splitfuse.core.replicas.capacity import Arrival
from splitfuse.core.request_output import FinishReason, RequestOutput
from splitfuse.engine.messages import Add, Finish, ResumePoint

_logger = logging.getLogger(__name__)


class Stream:
    """Iterates over the outputs of one request; the last one has a finish_reason.

    Read it to its end or close it: `async with client.open(request) as stream`. Iterating raises EngineUnavailableError
    if the engine is gone, and no other goes on with the request.
    """

    def __init__(self, request: Add, finish: Callable[[Finish], None]) -> None:
        self.request = request
        self.arrival: Arrival | None = None
        """Account of the request for the number of replicas, which is kept while it runs."""
        self.continuity: tuple[object, ...] = ()
        """Value that is equal at all engines which would go on with it as its own does."""
        self.num_resumed = 0
        """Number of times that it went on at another engine, or at its own after that was restarted."""
        self.num_deaths = 0
        """Number of deaths of an engine that it may have caused."""
        self.num_lost = 0
        """Number of deaths of an engine that had it, whatever caused them."""
        self.on_loan = False
        """True if another engine holds a part of its keys and values: it finishes while that one lives."""
        self.num_loans_lost = 0
        """Number of times that it could not go on since another engine did not lend to it, or no longer."""
        self.num_outputs_here = 0
        """Number of outputs with tokens that its present engine has given."""
        self.num_computed = 0
        """Number of its leading tokens whose keys and values its present engine has."""
        self.block_sources: tuple[str, ...] = ()
        """Addresses where the engine that it has just left has laid its blocks ready."""
        self.on_trial = False
        """True while it may be what killed an engine, until it has come past that step at its present one."""
        self.is_cleared = False
        """True once it has come past that step, until it may be what has killed another engine."""
        self.on_output: Callable[[RequestOutput], object] = lambda _: None
        """Listener that is called after each output."""
        self.deliver: Callable[[RequestOutput, float], object] | None = None
        """Function that takes each output, with the seconds of its step, in place of an iteration."""
        self.began: float | None = None
        """Time at which its first step began, on the monotonic clock."""
        self.ended_at = math.inf
        """Time at which the request finished or was abandoned."""
        self.breakdown: asyncio.Future[LatencyBreakdown] = asyncio.get_running_loop().create_future()
        """Breakdown of its latency, which the engine may report after `ended_at`."""
        self._finish = finish
        self._opened = time.monotonic()
        self._token_ids, self._token_times = array("i"), array("d")  # received so far, and when
        self._num_prompt_logprobs = 0
        self._num_cached: int | None = None
        # Its seconds in engines that it has left, and between them.
        self._phases: defaultdict[LatencyPhase, float] = defaultdict(float)
        self._num_preemptions = 0  # there
        self._since = self._opened if request.sent is None else request.sent  # time up to which `_phases` has them
        self._is_between = False  # two engines
        self._outputs: deque[RequestOutput] = deque()
        self._error: Exception | None = None
        self._news = asyncio.Event()
        self._ended = False  # nothing more will come
        self._released = False  # nothing more is wanted

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RequestOutput:
        while not self._outputs:
            if self._error is not None:
                raise self._error
            if self._ended or self._released:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        return self._outputs.popleft()

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens received so far."""
        return len(self._token_ids)

    @property
    def has_output(self) -> bool:
        """Return whether anything of the answer was received, behind which another engine would have to go on."""
        return bool(self._token_ids or self._num_prompt_logprobs)

    @property
    def error(self) -> Exception | None:
        """Return the error that has ended it, if one has."""
        return self._error

    @property
    def is_over(self) -> bool:
        """Return whether nothing more will come, or is wanted."""
        return self._ended or self._released

    def stop(self, num_tokens: int) -> None:
        """End the request after its first `num_tokens` tokens, because a stop string was found, and the stream here."""
        self._release(FinishReason.STOP, num_tokens)

    def close(self) -> None:
        """Stop reading, and abort the request if it has not ended."""
        self._release(FinishReason.ABORT, None)

    # Called by the client that opened it, and what lets it go on ------------------------------------------------------

    def push(self, output: RequestOutput, step_seconds: float) -> None:
        """Add an output; of one that is not wanted any more, only that it has ended counts."""
        if (arrival := self.arrival) is not None:
            if output.num_cached_tokens > arrival.num_cached:
                arrival.num_cached = min(output.num_cached_tokens, arrival.num_prompt)
            arrival.num_generated += len(output.token_ids)
            arrival.has_ended = output.finish_reason is not None
        self.num_outputs_here += bool(output.token_ids)
        self.num_computed = output.num_computed or self.num_computed
        if output.finish_reason is not None:
            self._ended = True
            self._settle(output.latency_breakdown)
        if not self._released:
            now = time.monotonic()
            if self.began is None:
                self.began = max(self._opened, now - step_seconds)
            self._token_ids.extend(output.token_ids)
            self._token_times.extend([now] * len(output.token_ids))
            if output.prompt_logprobs is not None:
                self._num_prompt_logprobs += len(output.prompt_logprobs)
            if self._num_cached is None or not self.num_resumed:
                self._num_cached = output.num_cached_tokens
            output.num_cached_tokens = self._num_cached  # of its prompt, as its first engine has found it
            if self.deliver is not None:
                self.deliver(output, step_seconds)
            else:
                self._outputs.append(output)
                self._news.set()
        try:
            self.on_output(output)
        except Exception:
            _logger.exception("a listener failed on an output")

    def fail(self, error: Exception) -> None:
        """End the stream with an error."""
        self._error = error
        self._ended = True
        self._settle(None)
        self._news.set()

    def leave(self, finish: Callable[[Finish], None], breakdown: LatencyBreakdown | None = None) -> None:
        """Note that the engine is gone, or that it has ended the request and reports where its time went. If the stream
        is closed before another engine goes on, `finish` is called.
        """
        now = time.monotonic()
        self._charge(breakdown, until=now)
        self._finish, self._is_between = finish, True

    def go_on(self, finish: Callable[[Finish], None]) -> Add:
        """Note that another engine takes the request. Returns what it is to be sent."""
        now = time.monotonic()
        self._charge(None, until=now)
        self._finish, self._is_between = finish, False
        self.num_resumed += 1
        self.num_outputs_here = self.num_computed = 0
        request, self.block_sources = self.resumption(now), ()
        return request

    def resumption(self, now: float) -> Add:
        """Return the request as it goes on at another engine from `now` on: as a new one if it had not begun."""
        changes = {"sent": now, "block_sources": self.block_sources, "hands_over": False, "loan": None}
        if self.began is None:
            return msgspec.structs.replace(self.request, **changes)
        point = ResumePoint(tuple(self._token_ids), tuple(self._token_times), self._num_prompt_logprobs)
        return msgspec.structs.replace(self.request, **changes, resume_point=point)

    def end_trial(self) -> None:
        """Note that it is not on trial any more."""
        self.on_trial, self.on_output = False, lambda _: None

    def _charge(self, breakdown: LatencyBreakdown | None, *, until: float) -> None:
        """Add up the phases from `_since` on: those of a breakdown, as far as there is one."""
        if breakdown is not None:
            for phase, seconds in breakdown.phases.items():
                self._phases[phase] += seconds
            self._num_preemptions += breakdown.num_preemptions
            until = breakdown.closed
        else:
            phase = LatencyPhase.BETWEEN_ENGINES if self._is_between else LatencyPhase.FAILED
            self._phases[phase] += max(until - self._since, 0.0)
        self._since = until

    def _settle(self, breakdown: LatencyBreakdown | None) -> None:
        """Note that no engine holds the request any more."""
        self.ended_at = min(self.ended_at, time.monotonic())
        if self.breakdown.done():
            return
        if breakdown is not None and not self.num_resumed:
            self.breakdown.set_result(breakdown)
            return
        opened = self._opened if self.request.sent is None else self.request.sent
        self._charge(breakdown, until=self.ended_at)
        last = breakdown or LatencyBreakdown(opened, self.ended_at)
        self.breakdown.set_result(
            replace(last, opened=opened, phases=dict(self._phases), num_preemptions=self._num_preemptions)
        )

    def _release(self, reason: FinishReason, num_tokens: int | None) -> None:
        if not self._released:
            self._released = True
            self._outputs.clear()
            self.deliver = None
            if not self._ended:
                self.ended_at = time.monotonic()
                self._finish(Finish(self.request.request_id, reason, num_tokens, self.ended_at))
        self._news.set()
