"""Lets requests go on whose engine has died: at another one, or at their own once it is restarted.

Their tokens are in the front, and the rest is a function of them: what another engine computes is the answer that there
would have been. The client sees a pause.

One of the requests that were in the step in flight, or new at the engine, may have killed it, and would kill the next
one with all the others. So these are suspects, and on trial until they have come past that step: at each engine first
one, the shortest, and with the first output of each one more at once. If an engine dies of several, each of them is
tried alone, and one that kills another engine then is put into quarantine (quarantine.py). docs/decisions/0047 and 0075
say more.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial

from splitfuse.core.latency.phases import LatencyBreakdown
from splitfuse.core.request_output import FinishReason, RequestOutput
from splitfuse.engine.client import DRAINED, LocalClient, died
from splitfuse.engine.messages import Add, Finish
from splitfuse.engine.replica_choice import Choice
from splitfuse.engine.stream import Stream
from splitfuse.errors import SplitfuseError

MAX_RESUMES = 4
"""Largest number of deaths that a request may have caused and still go on."""
MAX_LOANS_LOST = 3
"""Largest number of lost loans after which a request goes on."""
MAX_LOST = 10
"""Largest number of deaths, whatever caused them, after which a request goes on."""
TRIAL_OUTPUTS = 3
"""Number of outputs with tokens after which a trial ends. At its death an engine may have planned a step ahead, and the
output of the one before may not have arrived.
"""
NEXT_OUTPUTS = 1
"""Number of outputs with tokens after which a request on trial keeps no others from theirs, unless it is tried alone.
Mostly the step in flight was to give the first of them; it takes the next ones beside those which are tried then.
"""
TRIAL_SECONDS = 30.0
"""Seconds for which requests on trial keep others from a trial at their engine, from the beginning of the last one."""
MAX_WAIT = 120.0
"""Seconds that a request waits for an engine before it fails."""

_logger = logging.getLogger(__name__)


Choose = Callable[[Add, Collection[LocalClient]], Choice | None]
"""Type of a function that chooses the engine for a request among some that are ready."""


@dataclass
class _Wait:
    """Holds a stream that waits for an engine."""

    stream: Stream
    why: str
    """What its engine died of."""
    cause: str
    is_suspect: bool
    """True if it goes on trial."""
    until: float = math.inf
    """Time of the event loop at which it fails."""


@dataclass
class _Trial:
    """Holds the streams that are on trial at an engine, as far as others heed them."""

    streams: list[Stream] = field(default_factory=list)
    most: int = 1
    """Number of streams that may keep others from their trial at once."""
    until: float = math.inf
    """Time of the event loop from which on none is heeded."""

    def has_place(self, stream: Stream) -> bool:
        """Return whether a stream can be tried too."""
        if any(_is_tried_alone(each) for each in (stream, *self.streams)):
            return not self.streams
        return sum(each.num_outputs_here < NEXT_OUTPUTS for each in self.streams) < self.most

    def end(self, stream: Stream) -> None:
        if stream in self.streams:
            self.streams.remove(stream)


class Recovery:
    """Takes over the streams of `engines` that die. Belongs to the event loop's thread."""

    def __init__(
        self,
        engines: Sequence[LocalClient],
        choose: Choose,
        *,
        prefer: Callable[[Stream, Collection[LocalClient]], Collection[LocalClient]] = lambda _, able: able,
    ) -> None:
        """`prefer` says which of the engines that can go on with a stream are to be chosen from."""
        self.num_resumed: Counter[str] = Counter(death=0, drain=0, hand_over=0, loan=0)
        """Number of times that requests went on, by the cause."""
        self._engines: list[LocalClient] = []
        self._choose = choose
        self._prefer = prefer
        self._waiting: dict[str, _Wait] = {}
        self._trials: dict[LocalClient, _Trial] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        for engine in engines:
            self.add(engine)

    def add(self, engine: LocalClient) -> None:
        """Take over the streams of one more engine if it dies, and let others go on there."""
        self._engines.append(engine)
        self._trials[engine] = _Trial()
        engine.rescue = partial(self._take_over, engine)
        engine.on_moved = partial(self._move, engine)
        engine.on_available = self._advance

    def close(self) -> None:
        """Let all requests fail that wait, and those of engines that end from now on."""
        self._closed = True
        for wait in list(self._waiting.values()):
            self._fail(wait, wait.why)
        self._set_timer()

    def _take_over(self, engine: LocalClient, streams: Sequence[Stream], suspects: Sequence[Stream], why: str) -> None:
        """Take over the streams of an engine that has died."""
        self._trials[engine] = _Trial()
        suspicious = {id(stream) for stream in suspects}
        for stream in suspects:
            stream.num_deaths += 1
            stream.is_cleared = False
        for stream in streams:
            stream.end_trial()
            stream.num_lost += 1
            if stream.num_deaths > MAX_RESUMES or stream.num_lost > MAX_LOST:
                stream.fail(died(why))
            else:
                self._wait(_Wait(stream, why, "death", id(stream) in suspicious))
        self._advance()
        if streams and self._waiting:
            _logger.warning(
                "requests that go on once an engine is ready: %d, of which %d a few at a time, since it may have died "
                "of them",
                len(self._waiting),
                sum(wait.is_suspect for wait in self._waiting.values()),
            )

    def _move(self, engine: LocalClient, stream: Stream, breakdown: LatencyBreakdown | None, why: str) -> None:
        """Let a request go on that a drained engine had, or one that was for its prompt, or one that lost its loan; one
        on trial is tried elsewhere.
        """
        is_suspect = stream.on_trial
        self._end_trial(engine, stream)
        if why:
            stream.num_loans_lost += 1
        if stream.num_loans_lost > MAX_LOANS_LOST:
            stream.leave(self._forget, breakdown)
            stream.fail(died(why))
        else:
            cause = "loan" if why else "drain" if engine.is_drained else "hand_over"
            self._wait(_Wait(stream, why or DRAINED, cause, is_suspect), breakdown)
        self._advance()

    def _wait(self, wait: _Wait, breakdown: LatencyBreakdown | None = None) -> None:
        wait.stream.leave(self._forget, breakdown)
        if self._closed:
            wait.stream.fail(died(wait.why))
        else:
            self._waiting[wait.stream.request.request_id] = wait

    def _advance(self) -> None:
        """Let requests go on for which there is an engine now."""
        waits = sorted(self._waiting.values(), key=_rank)
        for wait in waits:
            trials = self._trials.items()
            free = [engine for engine, trial in trials if not wait.is_suspect or trial.has_place(wait.stream)]
            if not free:
                break  # those of a higher rank have their places
            if (engine := self._place(wait, free)) is not None and wait.is_suspect:
                self._try(engine, wait.stream)
        if not self._suspects:
            for trial in self._trials.values():
                trial.most = 1  # for the next death of another engine
        self._set_timer()

    def _place(self, wait: _Wait, engines: Collection[LocalClient]) -> LocalClient | None:
        """Let a request go on at one of some engines, and return that; None if none can have it now. One that none ever
        will fails, and so does one for which anything else goes wrong: this runs among the reports of another engine.
        """
        stream = wait.stream
        try:
            able = [engine for engine in engines if engine.can_go_on_with(stream)]
            choice = self._choose(stream.resumption(0.0), self._prefer(stream, able)) if able else None
            if choice is None:
                if not any(each.will_go_on_with(stream) for each in self._engines):
                    adapter = stream.request.adapter
                    is_lacking = adapter and not any(each.has_adapter(adapter) for each in self._engines)
                    self._fail(wait, f"{wait.why}; its adapter is not loaded any more" if is_lacking else wait.why)
                return None
            choice.engine.resume(stream, choice.loan)
            choice.taken()
        except SplitfuseError as error:  # of a request in quarantine
            self._drop(stream)
            stream.fail(error)
            return None
        except Exception as error:
            _logger.exception("request %s cannot go on", stream.request.request_id)
            self._fail(wait, f"{wait.why}; it cannot go on: {error!r}")
            return None
        self._drop(stream)
        self.num_resumed[wait.cause] += 1
        return choice.engine

    def _try(self, engine: LocalClient, stream: Stream) -> None:
        """Put a request on trial, which has gone on at an engine."""
        trial = self._trials[engine]

        is_counted = False

        def heard(output: RequestOutput) -> None:
            nonlocal is_counted
            has_answered = output.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
            is_past = has_answered or stream.num_outputs_here >= TRIAL_OUTPUTS
            is_next = not is_counted and (has_answered or stream.num_outputs_here >= NEXT_OUTPUTS)
            if is_next:
                is_counted, trial.most = True, trial.most + 1
            if is_past or output.finish_reason is not None:
                self._end_trial(engine, stream)
                if is_past:
                    stream.is_cleared = True
                    engine.absolve(stream.request)
            if is_next or is_past or output.finish_reason is not None:
                self._advance()

        trial.streams.append(stream)
        trial.until = asyncio.get_running_loop().time() + TRIAL_SECONDS
        stream.on_trial, stream.on_output = True, heard

    def _end_trial(self, engine: LocalClient, stream: Stream) -> None:
        self._trials[engine].end(stream)
        stream.end_trial()

    def _forget(self, command: Finish) -> None:
        """End a request that waits, since its client is gone or has enough."""
        if (wait := self._waiting.pop(command.request_id, None)) is not None:
            wait.stream.push(RequestOutput(command.request_id, finish_reason=command.reason), 0.0)
            self._set_timer()

    def _drop(self, stream: Stream) -> None:
        self._waiting.pop(stream.request.request_id, None)

    def _fail(self, wait: _Wait, why: str) -> None:
        self._drop(wait.stream)
        wait.stream.fail(died(why))

    @property
    def _suspects(self) -> list[Stream]:
        """Return the streams that wait for a trial, or are on one."""
        waiting = [wait.stream for wait in self._waiting.values() if wait.is_suspect]
        return [*waiting, *(stream for trial in self._trials.values() for stream in trial.streams)]

    def _set_timer(self) -> None:
        """Let each request fail that waits for MAX_WAIT, and trials keep others no longer than TRIAL_SECONDS. While one
        is on trial there is an engine, for which the others wait.
        """
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._waiting:
            return
        trials = [trial.until for trial in self._trials.values() if trial.streams]
        limit = asyncio.get_running_loop().time() + MAX_WAIT
        for wait in self._waiting.values():
            wait.until = math.inf if trials else min(wait.until, limit)
        first = min(trials or [wait.until for wait in self._waiting.values()])
        self._timer = asyncio.get_running_loop().call_at(first, self._end_late, first)

    def _end_late(self, now: float) -> None:
        """Let requests fail that have waited for too long, and others be tried beside those that take too long."""
        for wait in [wait for wait in self._waiting.values() if wait.until <= now]:
            self._fail(wait, f"{wait.why}; no engine was ready within {MAX_WAIT:g} s")
        for trial in self._trials.values():
            if trial.until <= now:
                trial.streams.clear()  # they stay on trial: a death may be theirs
        self._advance()


def _is_tried_alone(stream: Stream) -> bool:
    """Return whether a request was on trial with others when an engine died, or alone."""
    return stream.num_deaths > 1


def _rank(wait: _Wait) -> tuple[bool, bool, int, int]:
    """Return a key: suspects come last, of these the ones that are tried alone, and before that the shortest of the
    highest priority.
    """
    if not wait.is_suspect:
        return False, False, 0, 0
    stream, request = wait.stream, wait.stream.request
    length = len(request.prompt_token_ids) + stream.num_tokens
    return True, _is_tried_alone(stream), request.scheduling.priority, length
