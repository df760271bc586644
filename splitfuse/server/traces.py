"""Hands what engines trace, and what the server knows of requests, to subscribers.

Decides how much is traced: what the most demanding subscriber asks for, and nothing without one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

from splitfuse.core.latency.phases import LatencyBreakdown
from splitfuse.engine.client import EngineState, LocalClient
from splitfuse.engine.trace import FinishTrace, PhaseTrace, RequestTrace, TraceLevel, TraceRecord
from splitfuse.recording.recorder import Recorder
from splitfuse.server.access_log import RequestRecord
from splitfuse.server.context import RequestContext

_logger = logging.getLogger(__name__)


class EngineRecords(NamedTuple):
    """Holds what an engine, by its index, has traced in a step or between two."""

    engine: int
    records: tuple[TraceRecord, ...]


class EngineChange(NamedTuple):
    """Tells that an engine has changed its state, with the reason if it is DEAD. What it traced before is over: no
    request of it goes on, and numbers begin again.
    """

    engine: int
    state: EngineState
    reason: str
    time: float


class RequestEnd(NamedTuple):
    """Tells that an HTTP request has been answered, refused or given up.

    Its requests at the engine, one a choice, have ids that begin with `unique_id`.
    """

    unique_id: str
    record: RequestRecord
    breakdown: LatencyBreakdown | None
    """Where its time went; None if no engine had it."""
    ended: float
    """Time on the monotonic clock."""
    context: RequestContext | None = None
    """Headers and parameters, for a subscriber that keeps none of it."""


TraceEvent: TypeAlias = EngineRecords | EngineChange | RequestEnd


class TraceHub:
    """Passes trace events to subscribers. Belongs to the event loop's thread.

        hub = TraceHub(client.engines)
        unsubscribe = hub.subscribe(print, TraceLevel.STEPS)

    A subscriber is called in the event loop and must not block it; one that raises is logged, and harms nothing else.
    """

    def __init__(self, engines: Sequence[LocalClient] = ()) -> None:
        self.engines: list[LocalClient] = []
        """Engines by their numbers: `add` adds one more."""
        self._subscribers: dict[Callable[[TraceEvent], object], TraceLevel] = {}
        self._level = TraceLevel.OFF
        self._open: list[dict[int, tuple[TraceRecord, ...]]] = []  # unfinished requests of each engine, by number
        for engine in engines:
            self.add(engine)

    def add(self, engine: LocalClient) -> None:
        """Pass on what one more engine traces."""
        index = len(self.engines)
        self.engines.append(engine)
        self._open.append({})
        engine.on_trace = partial(self._take, index)
        engine.on_state = partial(self._change, index)
        engine.set_tracing(self._level)

    @property
    def is_watched(self) -> bool:
        """Return whether anything subscribes."""
        return bool(self._subscribers)

    def subscribe(self, subscriber: Callable[[TraceEvent], object], level: TraceLevel) -> Callable[[], None]:
        """Call `subscriber` with each event from now on, and first with the requests that are unfinished. Returns a
        function that ends the subscription.

        When the level rises, engines tell of them again, to all subscribers.
        """
        if level <= self._level:
            for engine, requests in enumerate(self._open):
                if requests:
                    records = tuple(record for each in requests.values() for record in each)
                    self._call(subscriber, EngineRecords(engine, records))
        self._subscribers[subscriber] = level
        self._set_level()

        def unsubscribe() -> None:
            self._subscribers.pop(subscriber, None)
            self._set_level()

        return unsubscribe

    def publish(self, event: TraceEvent) -> None:
        """Call all subscribers."""
        for subscriber in list(self._subscribers):
            self._call(subscriber, event)

    def _call(self, subscriber: Callable[[TraceEvent], object], event: TraceEvent) -> None:
        try:
            subscriber(event)
        except Exception:
            _logger.exception("a subscriber failed on a trace: %r", subscriber)

    def _take(self, engine: int, records: tuple[TraceRecord, ...]) -> None:
        requests = self._open[engine]
        for record in records:
            match record:
                case RequestTrace():
                    requests[record.number] = (record,)
                case PhaseTrace():
                    for number, phase in record.phases:
                        if number in requests:
                            requests[number] = requests[number][0], PhaseTrace(record.time, ((number, phase),))
                case FinishTrace():
                    requests.pop(record.number, None)
        self.publish(EngineRecords(engine, records))

    def _change(self, index: int) -> None:
        engine = self.engines[index]
        self._open[index].clear()
        reason = engine.death if engine.state is EngineState.DEAD else ""
        self.publish(EngineChange(index, engine.state, reason, time.monotonic()))

    def _set_level(self) -> None:
        self._level = max(self._subscribers.values(), default=TraceLevel.OFF)
        for engine, requests in zip(self.engines, self._open, strict=True):
            engine.set_tracing(self._level)
            if self._level is TraceLevel.OFF:
                requests.clear()


def record(hub: TraceHub, recorder: Recorder) -> None:
    """Record all engines of a hub until the recorder ends. Call it before they start: then a recording is complete."""

    def take(event: TraceEvent) -> None:
        match event:
            case EngineRecords():
                recorder.take(event.engine, event.records)
            case EngineChange(state=EngineState.READY):
                recorder.start_engine(event.engine, hub.engines[event.engine].info)
            case EngineChange(state=EngineState.DEAD):
                recorder.end_engine(event.engine, event.reason)
        if recorder.ended:
            unsubscribe()

    unsubscribe = hub.subscribe(take, TraceLevel.PLANS)
