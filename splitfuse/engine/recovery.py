"""Lets requests go on whose engine has died: at another one, or at their own once it is restarted.

Their tokens are in the front, and the rest is a function of them: what another engine computes is the answer that there
would have been. The client sees a pause.

One of the requests that were in the step in flight may have killed the engine, and would kill the next one with all the
others. So these go on one at a time for each engine, the shortest first: each is on trial until it has come past that
step. One that kills another engine meanwhile is put into quarantine (quarantine.py), and the others have used up none
of their MAX_RESUMES for it. docs/decisions/0047 says more.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import NamedTuple

from splitfuse.core.latency.phases import LatencyBreakdown
from splitfuse.core.request_output import RequestOutput
from splitfuse.engine.client import LocalClient, died
from splitfuse.engine.messages import Add, Finish
from splitfuse.engine.stream import Stream
from splitfuse.errors import SplitfuseError

MAX_RESUMES = 3
"""Number of deaths after which a request goes on that was in the step in flight."""
TRIAL_OUTPUTS = 3
"""Number of outputs with tokens after which a trial ends. At its death an engine may have planned a step ahead, and the
output of the one before may not have arrived.
"""
MAX_WAIT = 120.0
"""Seconds after which requests fail that no engine was there for."""

_logger = logging.getLogger(__name__)


class Choice(NamedTuple):
    """Holds the engine for a request, and a function to be called once it has taken it."""

    engine: LocalClient
    taken: Callable[[], object]


Choose = Callable[[Add, Collection[LocalClient]], Choice | None]
"""Type of a function that chooses the engine for a request among some that are ready."""


class Recovery:
    """Takes over the streams of `engines` that die. Belongs to the event loop's thread."""

    def __init__(self, engines: Sequence[LocalClient], choose: Choose) -> None:
        self.num_resumed: Counter[str] = Counter(death=0, drain=0)
        """Number of times that requests went on, by the cause."""
        self._engines = engines
        self._choose = choose
        self._waiting: dict[str, Stream] = {}  # of which none has killed an engine
        self._suspects: dict[str, Stream] = {}  # which go on one at a time
        self._trials: dict[LocalClient, Stream] = {}
        self._why: dict[str, str] = {}  # the engine of each died
        self._drained: set[str] = set()  # those whose engine was drained instead
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        for engine in engines:
            engine.rescue = partial(self._take_over, engine)
            engine.on_moved = self._move
            engine.on_available = self._advance

    def close(self) -> None:
        """Let all requests fail that wait, and those of engines that end from now on."""
        self._closed = True
        self._fail_all()

    def _take_over(self, engine: LocalClient, streams: Sequence[Stream], suspects: Sequence[Stream], why: str) -> None:
        """Take over the streams of an engine that has died."""
        self._trials.pop(engine, None)
        for stream in suspects or streams:
            stream.num_deaths += 1
        for stream in streams:
            stream.on_trial, stream.on_output = False, lambda: None
            if self._closed or stream.num_deaths > MAX_RESUMES:
                stream.fail(died(why))
                continue
            request_id = stream.request.request_id
            stream.leave(self._forget)
            self._why[request_id] = why
            (self._suspects if stream in suspects else self._waiting)[request_id] = stream
        if self._why:
            _logger.warning(
                "requests that go on once an engine is ready: %d, of which %d one at a time, since it may have died of "
                "them",
                len(self._why),
                len(self._suspects),
            )
        self._advance()

    def _move(self, stream: Stream, breakdown: LatencyBreakdown | None) -> None:
        """Let a request go on that a drained engine had."""
        request_id = stream.request.request_id
        stream.leave(self._forget, breakdown)
        self._why[request_id] = "it was drained"
        self._drained.add(request_id)
        self._waiting[request_id] = stream
        self._advance()

    def _advance(self) -> None:
        """Let requests go on for which there is an engine now."""
        if not self._waiting and not self._suspects:
            return
        for stream in list(self._waiting.values()):
            self._place(stream, self._engines)
        for stream in sorted(self._suspects.values(), key=_length):
            if not (free := [engine for engine in self._engines if engine not in self._trials]):
                break
            if (engine := self._place(stream, free)) is not None:
                self._try(engine, stream)
        if (self._waiting or self._suspects) and not self._trials:
            if self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(MAX_WAIT, self._fail_all)
        elif self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _place(self, stream: Stream, engines: Collection[LocalClient]) -> LocalClient | None:
        """Let a request go on at one of some engines, and return that; None if none can have it now. One that none ever
        will fails.
        """
        able = [engine for engine in engines if engine.can_go_on_with(stream)]
        choice = self._choose(stream.resumption(0.0), able) if able else None
        request_id = stream.request.request_id
        if choice is None:
            if not any(each.will_go_on_with(stream) for each in self._engines):
                stream.fail(died(self._drop(request_id)))
            return None
        cause = "drain" if request_id in self._drained else "death"
        self._drop(request_id)
        try:
            choice.engine.resume(stream)
        except SplitfuseError as error:  # of a request in quarantine
            stream.fail(error)
            return None
        choice.taken()
        self.num_resumed[cause] += 1
        return choice.engine

    def _try(self, engine: LocalClient, stream: Stream) -> None:
        """Put a request on trial, which has gone on at an engine."""
        outputs = {stream.num_tokens}  # tokens after each output

        def heard() -> None:
            outputs.add(stream.num_tokens)
            if not stream.is_over and len(outputs) <= TRIAL_OUTPUTS:
                return
            del self._trials[engine]
            stream.on_trial, stream.on_output = False, lambda: None
            engine.absolve(stream.request)
            self._advance()

        self._trials[engine] = stream
        stream.on_trial, stream.on_output = True, heard

    def _forget(self, command: Finish) -> None:
        """End a request that waits, since its client is gone or has enough."""
        stream = self._waiting.get(command.request_id) or self._suspects.get(command.request_id)
        if stream is not None:
            self._drop(command.request_id)
            stream.push(RequestOutput(command.request_id, finish_reason=command.reason), 0.0)

    def _drop(self, request_id: str) -> str:
        """Forget a request that waits. Returns what its engine died of."""
        self._waiting.pop(request_id, None)
        self._suspects.pop(request_id, None)
        self._drained.discard(request_id)
        return self._why.pop(request_id)

    def _fail_all(self) -> None:
        """Let all requests fail that wait."""
        waited = "" if self._closed else f"; no engine was ready within {MAX_WAIT:g} s"
        streams, why = [*self._waiting.values(), *self._suspects.values()], self._why
        self._waiting, self._suspects, self._why, self._drained, self._timer = {}, {}, {}, set(), None
        for stream in streams:
            stream.fail(died(f"{why[stream.request.request_id]}{waited}"))


def _length(stream: Stream) -> int:
    return len(stream.request.prompt_token_ids) + stream.num_tokens
