"""Follows a server from the lines of its trace: what `splitfuse top` shows."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from splitfuse.core.latency.phases import LatencyPhase
from splitfuse.core.slo.request_slo import RequestSlo
from splitfuse.engine.client import EngineState
from splitfuse.engine.trace import FinishTrace, PhaseTrace, PreemptTrace, RequestTrace, StepTrace, TraceRecord
from splitfuse.server.trace_feed import (
    TraceBegin,
    TracedChange,
    TracedRecords,
    TracedRequest,
    TraceEnd,
    TraceLine,
    TraceStatus,
)

NUM_STEPS = 40
"""Number of steps whose use of the budget is shown."""
RATE_SECONDS = 5.0
"""Time over which tokens a second are counted."""
WINDOW_SECONDS = 60.0
"""Time over which latencies and SLOs are counted."""
MAX_GAPS = 20_000
"""Number of times between tokens that are kept at most."""


@dataclass
class LiveRequest:
    """Holds what is known of an unfinished request of an engine."""

    engine: int
    trace: RequestTrace
    phase: LatencyPhase | None = None
    """Phase that it is in; None: it began before the trace, and has not told yet."""
    num_tokens: int = 0
    """Tokens since the trace began."""
    ttft: float | None = None
    last_token: float | None = None
    preemptions: int = 0
    judged: RequestSlo | None = None
    """How it meets its SLO; None without one, and before its first token."""

    def slo(self, now: float) -> str:
        """Return `ok`, `missed`, or `-` without an SLO: by what has come so far."""
        targets = self.trace.targets
        if targets is None:
            return "-"
        limit = targets.ttft_target(self.trace.num_prompt_tokens)
        late = now - self.trace.arrival > limit if self.ttft is None and not self.num_tokens else False
        return "missed" if late or (self.judged is not None and self.judged.met is False) else "ok"


@dataclass
class LiveEngine:
    """Holds the state of an engine."""

    state: EngineState = EngineState.STARTING
    num_running: int = 0
    num_waiting: int = 0
    num_free: int = 0
    num_cached: int | None = None
    """KV blocks with content that may be used again; None before the first step that is seen."""
    step: StepTrace | None = None
    budget_use: deque[float] = field(default_factory=lambda: deque(maxlen=NUM_STEPS))
    """Tokens of the last steps, as fractions of their budgets."""


class LiveState:
    """Follows a server."""

    def __init__(self) -> None:
        self.model = ""
        self.num_blocks = self.dropped = 0
        self.now = 0.0
        self.is_draining = self.has_ended = False
        self.engines: list[LiveEngine] = []
        self.requests: dict[tuple[int, int], LiveRequest] = {}
        self._began = 0.0
        self._tokens: deque[tuple[float, int, int]] = deque()  # time, prompt tokens, generated tokens of each step
        self._first: deque[tuple[float, float]] = deque()  # time, TTFT
        self._gaps: deque[tuple[float, float]] = deque(maxlen=MAX_GAPS)
        self._ended: deque[tuple[float, bool | None]] = deque()  # time, whether the SLO was met

    def _expect_engines(self, count: int) -> None:
        """Follow so many engines at least: a server may start more."""
        while len(self.engines) < count:
            self.engines.append(LiveEngine(num_free=self.num_blocks))

    def take(self, line: TraceLine) -> None:
        """Follow a line."""
        match line:
            case TraceBegin():
                self.model, self.num_blocks = line.model, line.num_blocks
                self.now = self._began = line.time
                self.engines = [LiveEngine(state, num_free=line.num_blocks) for state in line.engines]
            case TracedRecords():
                self._expect_engines(line.engine + 1)
                for record in line.records:
                    self._record(line.engine, record)
            case TracedChange():
                self._expect_engines(line.engine + 1)
                self.engines[line.engine] = LiveEngine(line.state, num_free=self.num_blocks)
                if line.state is EngineState.DEAD:
                    self.requests = {place: each for place, each in self.requests.items() if place[0] != line.engine}
            case TracedRequest():
                self.now = max(self.now, line.ended)
                if line.engine_opened is not None:
                    self._ended.append((line.ended, line.slo_met))
                    if line.ttft is not None:
                        self._first.append((line.ended, line.ttft))
            case TraceStatus():
                self.now = max(self.now, line.time)
                self.dropped, self.is_draining = line.dropped, line.is_draining
                self._expect_engines(len(line.engines))
                for engine, (state, stats) in zip(self.engines, line.engines, strict=True):
                    engine.state = state
                    if engine.step is None and stats.num_steps:
                        engine.num_running, engine.num_waiting = stats.num_running, stats.num_waiting
                        engine.num_free = stats.num_available_blocks
                    if not stats.num_running:  # the record of a step counts those which end with it
                        engine.num_running, engine.num_waiting = 0, stats.num_waiting
            case TraceEnd():
                self.now, self.dropped, self.has_ended = max(self.now, line.time), line.dropped, True
        self._forget()

    def _record(self, index: int, record: TraceRecord) -> None:
        match record:
            case RequestTrace():
                before = self.requests.get((index, record.number))  # it may be told again
                if before is None or before.trace.request_id != record.request_id:
                    phase = LatencyPhase.JOINING if record.time >= self._began else None
                    self.requests[index, record.number] = LiveRequest(index, record, phase)
            case PhaseTrace():
                for number, phase in record.phases:
                    if (request := self.requests.get((index, number))) is not None:
                        request.phase = phase
            case PreemptTrace():
                if (request := self.requests.get((index, record.number))) is not None:
                    request.phase = LatencyPhase.PREEMPTED
                    request.preemptions += 1
            case FinishTrace():
                self.requests.pop((index, record.number), None)
            case StepTrace():
                self._step(index, record)

    def _step(self, index: int, step: StepTrace) -> None:
        engine = self.engines[index]
        self.now = max(self.now, step.end_time)
        engine.step, engine.num_running, engine.num_waiting = step, step.num_running, step.num_waiting
        engine.num_free, engine.num_cached = step.num_free_blocks, step.num_cached_blocks
        engine.budget_use.append(sum(chunk.num_tokens for chunk in step.chunks) / max(step.token_budget, 1))
        num_prompt = num_generated = 0
        for chunk in step.chunks:
            num_generated += len(chunk.token_ids)
            request = self.requests.get((index, chunk.number))
            if request is None:
                continue
            is_prompt = chunk.start < request.trace.num_prompt_tokens
            num_prompt += chunk.num_tokens if is_prompt else 0
            if request.phase is None:
                request.phase = LatencyPhase.PREFILL if is_prompt else LatencyPhase.DECODE
            if chunk.token_ids:
                self._token(request, len(chunk.token_ids), step.end_time, is_first=is_prompt)
        self._tokens.append((step.end_time, num_prompt, num_generated))

    def _token(self, request: LiveRequest, count: int, time: float, *, is_first: bool) -> None:
        targets = request.trace.targets
        if is_first and not request.num_tokens:
            request.ttft = time - request.trace.arrival
        elif request.last_token is not None:
            self._gaps.append((time, time - request.last_token))
        if targets is not None:
            if request.judged is None:
                if request.ttft is None:  # its first token came before the trace
                    targets = replace(targets, ttft=None, ttft_per_token=None)
                request.judged = RequestSlo(
                    targets,
                    arrival_time=request.trace.arrival,
                    num_prompt_tokens=request.trace.num_prompt_tokens,
                )
            request.judged.observe_token(time)
        request.num_tokens += count
        request.last_token = time

    def _forget(self) -> None:
        """Forget what is too old to count."""
        for kept, seconds in (
            (self._tokens, RATE_SECONDS),
            (self._first, WINDOW_SECONDS),
            (self._gaps, WINDOW_SECONDS),
        ):
            while kept and kept[0][0] < self.now - seconds:
                kept.popleft()
        while self._ended and self._ended[0][0] < self.now - WINDOW_SECONDS:
            self._ended.popleft()

    # Figures ---------------------------------------------------------------------------------------------------------

    def figures(self) -> dict[str, Any]:
        """Return the figures of all engines together; None is unknown. Latencies are in seconds."""
        rate_seconds = max(min(RATE_SECONDS, self.now - self._began), 1.0)
        seconds = max(min(WINDOW_SECONDS, self.now - self._began), 1.0)
        met = [met for _, met in self._ended if met is not None]
        first, gaps = [value for _, value in self._first], [value for _, value in self._gaps]
        return {
            "prompt_tokens_per_second": sum(prompt for _, prompt, _ in self._tokens) / rate_seconds,
            "generated_tokens_per_second": sum(count for _, _, count in self._tokens) / rate_seconds,
            "requests_per_second": len(self._ended) / seconds,
            "goodput": sum(met) / seconds if met else None,
            "slo_attainment": sum(met) / len(met) if met else None,
            "ttft": _percentiles(first, (50, 90)),
            "itl": _percentiles(gaps, (50, 90, 99)),
        }

    def as_dict(self, sort: str) -> dict[str, Any]:
        """Return everything, as JSON has it."""
        return {
            "model": self.model,
            **self.figures(),
            "dropped_events": self.dropped,
            "engines": [
                {
                    "state": engine.state.value,
                    "running": engine.num_running,
                    "waiting": engine.num_waiting,
                    "kv_blocks": self.num_blocks,
                    "kv_blocks_held": self.num_held(engine),
                    "kv_blocks_cached": engine.num_cached,
                    "budget_use": round(sum(engine.budget_use) / len(engine.budget_use), 4)
                    if engine.budget_use
                    else None,
                }
                for engine in self.engines
            ],
            "requests": [
                {
                    "engine": request.engine,
                    "id": request.trace.request_id,
                    "phase": request.phase and request.phase.value,
                    "age": round(self.now - request.trace.sent_time, 3),
                    "prompt_tokens": request.trace.num_prompt_tokens,
                    "tokens": request.num_tokens,
                    "max_tokens": request.trace.max_tokens,
                    "ttft": request.ttft,
                    "preemptions": request.preemptions,
                    "slo": request.slo(self.now),
                }
                for request in self.ordered(sort)
            ],
        }

    def num_held(self, engine: LiveEngine) -> int:
        """Return the number of KV blocks that requests of an engine hold."""
        return max(self.num_blocks - engine.num_free - (engine.num_cached or 0), 0)

    def ordered(self, sort: str) -> list[LiveRequest]:
        """Return the requests in one of the orders of SORTS."""
        return sorted(self.requests.values(), key=lambda each: (SORTS[sort](each, self.now), each.trace.sent_time))


def _phase_order(request: LiveRequest) -> int:
    return -1 if request.phase is None else list(LatencyPhase).index(request.phase)


SORTS: dict[str, Any] = {
    "age": lambda request, _: request.trace.sent_time,
    "tokens": lambda request, _: -request.num_tokens,
    "phase": lambda request, _: _phase_order(request),
    "slo": lambda request, now: ("missed", "ok", "-").index(request.slo(now)),
}
"""Orders of requests, each with its key: the oldest first, the most tokens, by phase, the missed SLOs."""


def _percentiles(values: Iterable[float], which: tuple[int, ...]) -> dict[str, float] | None:
    """Return percentiles by name, each one of the values."""
    ordered = sorted(values)
    if not ordered:
        return None
    return {f"p{each}": ordered[min(len(ordered) * each // 100, len(ordered) - 1)] for each in which}
