"""Accounts for the latency of every request, in phases which add up to it. Listens to an engine's events.

A request is in exactly one phase from one moment to the next, so each second belongs to one phase and the sum is right
by construction. In a step which computes a chunk of the request, its own share is what the chunk costs of the whole
step; the rest of that step counts as CO_SCHEDULED.

It is cheap because nothing is added up step by step. `LatencyLedger` counts, for all requests at once, the seconds in
steps, between steps, and per unit of cost; a `RequestLatency` remembers what they were when its phase last changed. A
decode which gets its token in every step is not touched, nor looked at, until it ends.

All times are those of the events; nothing here reads a clock.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from splitfuse.core.events import (
    EngineEvents,
    FetchBegun,
    FetchEnded,
    PhasesEntered,
    RequestAdded,
    RequestFinished,
    RequestPreempted,
    StepRecord,
    StepScheduled,
)
from splitfuse.core.latency.phases import COMPUTING, LatencyBreakdown, LatencyPhase
from splitfuse.core.latency.reasons import IdlePhases, computing_phase
from splitfuse.core.plan import Chunk
from splitfuse.core.request import Request
from splitfuse.core.slo.cost_model import CostModel, StepFeatures

MAX_CO_SCHEDULED = 3
"""Number of co-scheduled requests which a breakdown names: those with the most prompt tokens."""
MAX_PROMPT_RUNS = 512
"""Number of runs of prompt chunks, of one request each, which are remembered in order to name them."""
REFRESH_STEPS = 64
"""Number of steps after which the cost of running decodes is looked at again."""


@dataclass(slots=True, eq=False)
class RequestLatency:
    """Holds the state of one request in the ledger."""

    request_id: str
    opened: float
    phases: defaultdict[LatencyPhase, float] = field(default_factory=lambda: defaultdict(int))
    co_scheduled: Counter[str] = field(default_factory=Counter)
    planned: LatencyPhase = LatencyPhase.JOINING
    """Its phase in the newest step which was composed."""
    phase: LatencyPhase = LatencyPhase.JOINING
    """Its phase in the step which runs, or the last one."""
    weight: float = 0
    mark: tuple[float, float, float, int] = (0, 0, 0, 0)
    """Counters of the ledger up to which its seconds are charged."""

    def add(self, phase: LatencyPhase, seconds: float) -> None:
        """Charge seconds to a phase."""
        if seconds:
            self.phases[phase] += seconds


class Transition(NamedTuple):
    """Describes a change of phase. `weight` is the cost of the request's chunk, in the unit of the whole step's."""

    latency: RequestLatency
    phase: LatencyPhase
    weight: float = 0
    num_prompt_tokens: int = 0
    """Number of tokens of a prompt's chunk, longer than one, for naming what was co-scheduled."""


class LatencyLedger:
    """Accounts for the latency of one scheduler's requests, as a listener of its events.

        ledger = LatencyLedger(scheduler.events)
        ...                                # the request finishes
        ledger.pop("a").phases             # {LatencyPhase.PREFILL: 0.8, LatencyPhase.DECODE: 1.2, ...}

    A step is divided by what the cost model predicts of its chunks; without one, by tokens.
    """

    def __init__(self, events: EngineEvents, *, cost: CostModel | None = None) -> None:
        self._events = events
        self._cost = cost
        self._latencies: dict[str, RequestLatency] = {}  # of unfinished requests
        self._breakdowns: dict[str, LatencyBreakdown] = {}  # of finished ones, until `pop`
        self._decoding: set[Request] = set()  # the decodes of the last step, and some that have finished
        self._idle = IdlePhases()
        self._num_steps = 0
        self._in_flight: deque[tuple[Sequence[Transition], float]] = deque()  # with the cost; the first one runs
        self._started: float = 0  # the step which runs, or the last one
        self._ended: float = 0
        self._now: float = 0
        self._steps: float = 0  # seconds in steps
        self._between: float = 0  # seconds between steps
        self._shares: float = 0  # seconds in steps per unit of their cost
        self._prompt_tokens = 0
        self._prompt_runs: deque[tuple[int, int, str]] = deque(maxlen=MAX_PROMPT_RUNS)  # of all of them, by request
        events.subscribe(RequestAdded, self._open)
        events.subscribe(FetchBegun, lambda event: self._change(event.request, LatencyPhase.FETCHING, event.time))
        events.subscribe(FetchEnded, lambda event: self._change(event.request, LatencyPhase.JOINING, event.time))
        events.subscribe(StepScheduled, self._begin_step)
        events.subscribe(StepRecord, self._end_step)
        events.subscribe(RequestPreempted, lambda event: self._decoding.discard(event.request))
        events.subscribe(RequestFinished, self._close)

    def pop(self, request_id: str) -> LatencyBreakdown | None:
        """Return the breakdown of a finished request, and forget it."""
        return self._breakdowns.pop(request_id, None)

    @property
    def phases(self) -> PhasesEntered:
        """Return the phase of each unfinished request, at the time of the last event."""
        return PhasesEntered([(name, latency.phase) for name, latency in self._latencies.items()], self._now)

    # Events ----------------------------------------------------------------------------------------------------------

    def _open(self, event: RequestAdded) -> None:
        now, sent = event.time, event.sent_time
        self._advance(now)
        latency = self._latencies[event.request.request_id] = RequestLatency(event.request.request_id, sent)
        joining = max(min(now, now if self._in_flight else self._ended) - max(sent, self._started), 0)
        latency.add(LatencyPhase.JOINING, joining)
        latency.add(LatencyPhase.TO_ENGINE, now - sent - joining)
        latency.mark = self._counters

    def _change(self, request: Request, phase: LatencyPhase, now: float) -> None:
        """Let a request that waits enter another phase at once, whatever runs."""
        latency = self._latencies[request.request_id]
        self._advance(now)
        self._settle(latency)
        latency.phase = phase
        self._events.emit(PhasesEntered([(request.request_id, phase)], self._now))

    def _begin_step(self, step: StepScheduled) -> None:
        """Find the requests whose phase changes with a step, which starts now, or when those in flight have ended."""
        self._num_steps += 1
        if self._num_steps % REFRESH_STEPS == 0:
            self._decoding.clear()
        granted = step.builder.granted
        transitions: list[Transition] = []
        for index, request in [(n, request) for n, request in enumerate(granted) if request not in self._decoding]:
            transitions.append(self._compute(request, step.plan.chunks[index]))
        for request, phase in self._idle.of(step):
            latency = self._latencies[request.request_id]
            if latency.planned is not phase:
                latency.planned = phase
                transitions.append(Transition(latency, phase))
                self._decoding.discard(request)
        cost = sum(granted.values()) if self._cost is None else self._cost.seconds(step.builder.features)
        self._advance(step.time)
        self._in_flight.append((transitions, cost or 1))
        if len(self._in_flight) == 1:
            self._enter(transitions)

    def _compute(self, request: Request, chunk: Chunk) -> Transition:
        granted = len(chunk.token_ids) - chunk.num_drafts  # drafts count as all that the step is longer for: for all
        weight: float = granted
        if self._cost is not None:  # what the step would take with this chunk alone
            weight = self._cost.seconds(StepFeatures().plus(start=chunk.start, count=granted, rows=1))
        latency = self._latencies[request.request_id]
        latency.planned = computing_phase(request, chunk)
        if latency.planned is LatencyPhase.DECODE:
            self._decoding.add(request)
        return Transition(latency, latency.planned, weight, granted if granted > 1 else 0)

    def _end_step(self, step: StepRecord) -> None:
        self._advance(step.end_time)
        self._in_flight.popleft()
        self._ended = step.end_time
        if self._in_flight:
            self._enter(self._in_flight[0][0])

    def _close(self, event: RequestFinished) -> None:
        """Keep the breakdown of a request which ends now; the seconds after `wanted_until` do not count."""
        request, now = event.request, event.time
        latency = self._latencies.pop(request.request_id)
        self._advance(now)
        closed = now if event.wanted_until is None else min(max(event.wanted_until, latency.opened), now)
        self._settle(latency, unwanted=now - closed)
        self._breakdowns[request.request_id] = LatencyBreakdown(
            latency.opened,
            closed,
            dict(latency.phases),
            tuple(latency.co_scheduled.most_common(MAX_CO_SCHEDULED)),
            num_preemptions=request.kv.num_preemptions,
            slo_violation=request.slo.violation,
        )

    # Counters --------------------------------------------------------------------------------------------------------

    @property
    def _counters(self) -> tuple[float, float, float, int]:
        return self._steps, self._between, self._shares, self._prompt_tokens

    def _advance(self, now: float) -> None:
        seconds = max(now - self._now, 0)
        self._now += seconds
        if self._in_flight:
            self._steps += seconds
            self._shares += seconds / self._in_flight[0][1]
        else:
            self._between += seconds

    def _enter(self, transitions: Sequence[Transition]) -> None:
        self._started = self._now
        entered = [(each.latency.request_id, each.phase) for each in transitions if each.latency.phase != each.phase]
        for latency, phase, weight, _ in transitions:
            self._settle(latency)
            latency.phase, latency.weight = phase, weight
        if entered:
            self._events.emit(PhasesEntered(entered, self._now))
        for latency, _, _, count in transitions:
            if count:
                start = self._prompt_tokens
                self._prompt_tokens += count
                if self._prompt_runs and self._prompt_runs[-1][2] == latency.request_id:
                    start, _, _ = self._prompt_runs.pop()
                self._prompt_runs.append((start, self._prompt_tokens, latency.request_id))

    def _settle(self, latency: RequestLatency, unwanted: float = 0) -> None:
        """Charge the time since the last mark to the request's phase, but for the last `unwanted` seconds of it."""
        at_steps, at_between, at_shares, at_prompt_tokens = latency.mark
        between, steps = self._between - at_between, self._steps - at_steps
        own = steps
        if latency.phase in COMPUTING:
            own = min(latency.weight * (self._shares - at_shares), steps)
            self._count_co_scheduled(latency, at_prompt_tokens)
        if unwanted and (stretch := between + steps):
            kept = max(1 - unwanted / stretch, 0)
            unwanted = max(unwanted - stretch, 0)
            between, steps, own = between * kept, steps * kept, own * kept
        is_fetching = latency.phase is LatencyPhase.FETCHING  # which goes on between steps, and without any
        latency.add(latency.phase if is_fetching else LatencyPhase.BETWEEN_STEPS, between)
        latency.add(latency.phase, own)
        latency.add(LatencyPhase.CO_SCHEDULED, steps - own)
        if unwanted and (total := sum(latency.phases.values())):  # longer than this phase: take it from all alike
            for phase in latency.phases:
                latency.phases[phase] *= max(1 - unwanted / total, 0)
        latency.mark = self._counters

    def _count_co_scheduled(self, latency: RequestLatency, since: int) -> None:
        """Add up the prompt tokens of other requests after the first `since`, from the newest back."""
        for start, end, request_id in reversed(self._prompt_runs):
            if end <= since:
                break
            if request_id != latency.request_id:
                latency.co_scheduled[request_id] += end - max(start, since)
