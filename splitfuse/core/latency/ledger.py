"""Accounts for the latency of every request, in phases which add up to it.

A request is in exactly one phase from one moment to the next, so each second belongs to one phase and the sum is right
by construction. In a step which computes a chunk of the request, its own share is what the chunk costs of the whole
step; the rest of that step counts as CO_SCHEDULED.

It is cheap because nothing is added up step by step. `LatencyLedger` counts, for all requests at once, the seconds in
steps, between steps, and per unit of cost; a `RequestLatency` remembers what they were when its phase last changed. A
decode which gets its token in every step is not touched until it ends.

All times are the caller's; nothing here reads a clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from splitfuse.core.latency.phases import COMPUTING, LatencyBreakdown, LatencyPhase

MAX_CO_SCHEDULED = 3
"""Number of co-scheduled requests which a breakdown names: those with the most prompt tokens."""
MAX_PROMPT_RUNS = 512
"""Number of runs of prompt chunks, of one request each, which are remembered in order to name them."""


@dataclass(slots=True, eq=False)
class RequestLatency:
    """Holds the state of one request in the ledger."""

    request_id: str = ""
    planned: LatencyPhase = LatencyPhase.JOINING
    """Its phase in the newest step which was composed."""
    opened: float = 0
    phases: dict[LatencyPhase, float] = field(default_factory=dict)
    co_scheduled: dict[str, int] = field(default_factory=dict)
    _phase: LatencyPhase = LatencyPhase.JOINING
    _weight: float = 0
    _at_steps: float = 0
    _at_between: float = 0
    _at_shares: float = 0
    _at_prompt_tokens: int = 0

    def _add(self, phase: LatencyPhase, seconds: float) -> None:
        if seconds:
            self.phases[phase] = self.phases.get(phase, 0) + seconds


class Transition(NamedTuple):
    """Describes a change of phase. `weight` is the cost of the request's chunk, in the unit of the whole step's."""

    latency: RequestLatency
    phase: LatencyPhase
    weight: float = 0
    num_prompt_tokens: int = 0
    """Number of tokens of a prompt's chunk, longer than one, for naming what was co-scheduled."""


class LatencyLedger:
    """Keeps the counters that every request's latency is read from. All times are on one clock and never go back."""

    def __init__(self) -> None:
        self._now: float = 0
        self._steps: float = 0  # seconds in steps
        self._between: float = 0  # seconds between steps
        self._shares: float = 0  # seconds in steps per unit of their cost
        self._prompt_tokens = 0
        self._prompt_runs: deque[tuple[int, str]] = deque(maxlen=MAX_PROMPT_RUNS)  # end among all prompt tokens, id
        self._in_flight: deque[tuple[Sequence[Transition], float]] = deque()  # with the cost; the first one runs
        self._started: float = 0  # the step which runs, or the last one
        self._ended: float = 0

    def open(self, latency: RequestLatency, *, sent: float, now: float) -> None:
        """Start accounting for a request which was sent to the engine at `sent` and is accepted now."""
        self._advance(now)
        latency.opened = sent = min(sent, now)
        joining = max(min(now, now if self._in_flight else self._ended) - max(sent, self._started), 0)
        latency._add(LatencyPhase.JOINING, joining)
        latency._add(LatencyPhase.TO_ENGINE, now - sent - joining)
        self._mark(latency)

    def begin(self, transitions: Sequence[Transition], *, cost: float, now: float) -> None:
        """Record a planned step, which starts now, or when those in flight have ended. `cost` is that of all its
        chunks.
        """
        self._advance(now)
        self._in_flight.append((transitions, cost))
        if len(self._in_flight) == 1:
            self._enter(transitions)

    def end(self, now: float) -> None:
        """Record the end of the oldest step in flight."""
        self._advance(now)
        self._in_flight.popleft()
        self._ended = now
        if self._in_flight:
            self._enter(self._in_flight[0][0])

    def close(self, latency: RequestLatency, now: float, *, wanted_until: float | None = None) -> LatencyBreakdown:
        """Return the breakdown of a request which ends now; the seconds after `wanted_until` do not count."""
        self._advance(now)
        closed = now if wanted_until is None else min(max(wanted_until, latency.opened), now)
        self._settle(latency, unwanted=now - closed)
        largest = sorted(latency.co_scheduled.items(), key=lambda item: -item[1])[:MAX_CO_SCHEDULED]
        return LatencyBreakdown(latency.opened, closed, latency.phases, tuple(largest))

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
        for latency, phase, weight, _ in transitions:
            self._settle(latency)
            latency._phase, latency._weight = phase, weight
        for latency, _, _, count in transitions:
            if count:
                self._prompt_tokens += count
                if self._prompt_runs and self._prompt_runs[-1][1] == latency.request_id:
                    self._prompt_runs.pop()
                self._prompt_runs.append((self._prompt_tokens, latency.request_id))

    def _settle(self, latency: RequestLatency, unwanted: float = 0) -> None:
        """Charge the time since the last mark to the request's phase, but for the last `unwanted` seconds of it."""
        between, steps = self._between - latency._at_between, self._steps - latency._at_steps
        own = steps
        if latency._phase in COMPUTING:
            own = min(latency._weight * (self._shares - latency._at_shares), steps)
            self._count_co_scheduled(latency)
        if unwanted and (stretch := between + steps):
            kept = max(1 - unwanted / stretch, 0)
            unwanted = max(unwanted - stretch, 0)
            between, steps, own = between * kept, steps * kept, own * kept
        latency._add(LatencyPhase.BETWEEN_STEPS, between)
        latency._add(latency._phase, own)
        latency._add(LatencyPhase.CO_SCHEDULED, steps - own)
        if unwanted and (total := sum(latency.phases.values())):  # longer than this phase: take it from all alike
            for phase in latency.phases:
                latency.phases[phase] *= max(1 - unwanted / total, 0)
        self._mark(latency)

    def _mark(self, latency: RequestLatency) -> None:
        latency._at_steps, latency._at_between = self._steps, self._between
        latency._at_shares, latency._at_prompt_tokens = self._shares, self._prompt_tokens

    def _count_co_scheduled(self, latency: RequestLatency) -> None:
        """Add up the prompt tokens of other requests since the last mark, from the newest back."""
        end = self._prompt_tokens
        for start, request_id in _with_starts(self._prompt_runs):
            if end <= latency._at_prompt_tokens:
                break
            if request_id != latency.request_id:
                count = end - max(start, latency._at_prompt_tokens)
                latency.co_scheduled[request_id] = latency.co_scheduled.get(request_id, 0) + count
            end = start


def _with_starts(runs: deque[tuple[int, str]]) -> Iterable[tuple[int, str]]:
    """Yield the start and the request of each run, newest first. The start of the oldest may be forgotten."""
    newest_first = reversed(runs)
    _, request_id = next(newest_first, (0, ""))
    for end, before in newest_first:
        yield end, request_id
        request_id = before
    yield runs[0][0] if len(runs) == MAX_PROMPT_RUNS else 0, request_id
