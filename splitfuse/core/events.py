"""Tells listeners what each step was and what became of each request: for metrics, traces, latency accounting.

    def on_step(step: StepRecord) -> None:
        print(step.plan.num_tokens, "tokens in", step.measured_seconds, "s")

    unsubscribe = engine.events.subscribe(StepRecord, on_step)

Listeners are isolated: an exception of one is logged, and neither fails the step nor reaches another listener. They run
on the engine's thread, in the order of subscription, and must not keep what they are given once they return: requests
and queues change with the next step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from splitfuse.core.latency.phases import LatencyPhase
from splitfuse.core.plan import StepPlan, StepResult
from splitfuse.core.request import Request
from splitfuse.core.step_builder import StepBuilder

logger = logging.getLogger(__name__)


class StepRecord(NamedTuple):
    """Records one step whose results are back, before they are applied: the requests that it ends still count as
    running. All times are seconds on the clock of the scheduler's caller.
    """

    plan: StepPlan
    result: StepResult
    start_time: float
    """Time at which the step was planned, or the step before it ended if that is later."""
    end_time: float
    predicted_seconds: float
    """Seconds that the step was predicted to take; 0: nothing predicts steps."""
    num_running: int
    num_waiting: int

    @property
    def measured_seconds(self) -> float:
        """Return how long the step took."""
        return self.end_time - self.start_time


class StepScheduled(NamedTuple):
    """Tells that a step has been composed; it will run when those in flight have ended."""

    plan: StepPlan
    builder: StepBuilder
    """Grants, in the order of the plan's chunks, what is left of the budgets, and the queue."""
    time: float


class RequestAdded(NamedTuple):
    """Tells that the scheduler has accepted a request."""

    request: Request
    sent_time: float
    """Time at which its sender handed it over, not later than `time`."""
    time: float


class FetchBegun(NamedTuple):
    """Tells that a request waits for KV blocks from elsewhere."""

    request: Request
    time: float


class FetchEnded(NamedTuple):
    """Tells that a request waits for KV blocks no more, whether they have come or not, and has not ended."""

    request: Request
    time: float


class RequestStarted(NamedTuple):
    """Tells that the first chunk of a request has been scheduled: its time in the queue ends. Told once per request."""

    request: Request
    time: float


class RequestPreempted(NamedTuple):
    """Tells that a request is about to lose its blocks and wait again."""

    request: Request
    time: float


class RequestFinished(NamedTuple):
    """Tells that a request has ended, for `request.finish_reason`."""

    request: Request
    time: float
    wanted_until: float | None
    """Time at which its caller gave it up, if that was before `time`; None: just now, or it ended by itself."""


class PhasesEntered(NamedTuple):
    """Tells that requests, by id, have entered another phase of their latency each: see core/latency."""

    phases: Sequence[tuple[str, LatencyPhase]]
    time: float


Event = TypeVar(
    "Event",
    StepRecord,
    StepScheduled,
    RequestAdded,
    FetchBegun,
    FetchEnded,
    RequestStarted,
    RequestPreempted,
    RequestFinished,
    PhasesEntered,
)


class EngineEvents:
    """Passes each event to the listeners of its type."""

    def __init__(self) -> None:
        self._listeners: dict[type[Any], list[Callable[[Any], object]]] = {}

    def subscribe(self, event: type[Event], listener: Callable[[Event], object]) -> Callable[[], None]:
        """Call `listener` with each event of one type. Returns a function which ends the subscription."""
        self._listeners[event] = [*self._listeners.get(event, ()), listener]

        def unsubscribe() -> None:
            self._listeners[event] = [each for each in self._listeners[event] if each is not listener]

        return unsubscribe

    def emit(self, event: Event) -> None:
        """Call every listener of the event's type, and log what they raise."""
        for listener in self._listeners.get(type(event), ()):
            try:
                listener(event)
            except Exception:
                logger.exception("a listener failed on %s: %r", type(event).__name__, listener)
