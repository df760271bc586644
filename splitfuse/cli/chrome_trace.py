"""Turns the lines of a trace into events of the Chrome trace format, which Perfetto and chrome://tracing open.

Each engine is a process: a track of its steps, counters, and a track for each request with the phases it went through.
The front is another one, with what it did for each HTTP request. All share one time axis, which begins with the trace.

Every event is complete when it is written: a file that breaks off has all that had ended by then.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self

from splitfuse.core.latency.phases import AFTER_ENGINE, BEFORE_ENGINE, LatencyPhase
from splitfuse.engine.client import EngineState
from splitfuse.engine.trace import (
    ChunkTrace,
    FinishTrace,
    PhaseTrace,
    PreemptTrace,
    RequestTrace,
    StepTrace,
    TraceRecord,
)
from splitfuse.server.explain import describe_violation
from splitfuse.server.trace_feed import (
    TraceBegin,
    TracedChange,
    TracedRecords,
    TracedRequest,
    TraceEnd,
    TraceLine,
    TraceStatus,
)

Event = dict[str, Any]

FRONT = 1
"""Number of the front's process in a trace; engines follow."""
FIRST_TRACK = 1000
"""Number of the first track of a request. The track of an engine's steps has the number of its process, which readers
take for the first one; no other number may be there twice.
"""
IN_THE_ENGINE = "in the engine"


@dataclass
class _Request:
    """Follows one request of an engine."""

    track: int
    trace: RequestTrace
    phase: LatencyPhase | None = None
    """Phase that it is in; None: it began before the trace, and has not told yet."""
    since: float = 0.0
    has_tokens: bool = False


@dataclass
class _Engine:
    """Follows one engine."""

    process: int
    requests: dict[int, _Request] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Return the track of its steps."""
        return self.process


class ChromeTrace:
    """Turns lines into events.

    trace = ChromeTrace()
    for line in lines:
        events += trace.take(line)
    events += trace.end()
    """

    def __init__(self) -> None:
        self.num_steps = self.num_requests = self.dropped = 0
        self._events: list[Event] = []
        self._engines: dict[int, _Engine] = {}
        self._num_blocks = self._num_arrows = 0
        self._zero = self._now = 0.0
        self._front: dict[int, float] = {}  # ends of the last requests on the front's tracks
        self._num_tracks = 0
        self._arrows: dict[str, list[tuple[_Engine, int, float]]] = {}  # of unfinished requests, from the front

    def take(self, line: TraceLine) -> list[Event]:
        """Return the events that a line completes."""
        match line:
            case TraceBegin():
                self._begin(line)
            case TracedRecords():
                engine = self._engine(line.engine)
                for record in line.records:
                    self._record(engine, record)
            case TracedChange():
                self._change(line)
            case TracedRequest():
                self._answer(line)
            case TraceStatus() | TraceEnd():
                self._now = max(self._now, line.time)
                self.dropped = line.dropped
        events, self._events = self._events, []
        return events

    def end(self) -> list[Event]:
        """Return the phases that have not ended yet, up to the last time that was told."""
        for engine in self._engines.values():
            for request in engine.requests.values():
                self._enter(engine, request, None, self._now)
        events, self._events = self._events, []
        return events

    # Engines ---------------------------------------------------------------------------------------------------------

    def _begin(self, line: TraceBegin) -> None:
        self._zero = self._now = line.time
        self._num_blocks = line.num_blocks
        self._name(FRONT, None, "front", order=0)
        for index in range(len(line.engines)):
            self._engine(index)

    def _engine(self, index: int) -> _Engine:
        if index not in self._engines:
            engine = self._engines[index] = _Engine(FRONT + 1 + index)
            self._name(engine.process, None, f"engine {index}", order=1 + index)
            self._name(engine.process, engine.steps, "steps", order=0)
        return self._engines[index]

    def _record(self, engine: _Engine, record: TraceRecord) -> None:
        requests = engine.requests
        match record:
            case RequestTrace():
                before = requests.get(record.number)  # it may be told again
                if before is None or before.trace.request_id != record.request_id:
                    self._add(engine, record)
            case PhaseTrace():
                for number, phase in record.phases:
                    if number in requests:
                        self._enter(engine, requests[number], phase, record.time)
            case StepTrace():
                self._step(engine, record)
            case PreemptTrace():
                if (request := requests.get(record.number)) is not None:
                    self._enter(engine, request, LatencyPhase.PREEMPTED, record.time)
                    self._instant(engine.process, request.track, "preempted", record.time)
            case FinishTrace():
                if (request := requests.pop(record.number, None)) is not None:
                    self._finish(engine, request, record)

    def _add(self, engine: _Engine, record: RequestTrace) -> None:
        self.num_requests += 1
        request = engine.requests[record.number] = _Request(self._next_track(), record)
        self._name(engine.process, request.track, f"request {record.number}", order=request.track)
        if record.time < self._zero:
            return
        self._enter(engine, request, LatencyPhase.TO_ENGINE, record.sent_time)
        self._enter(engine, request, LatencyPhase.JOINING, record.time)
        self._arrows.setdefault(record.request_id.partition("-")[0], []).append(
            (engine, request.track, (record.sent_time + record.time) / 2)
        )
        targets = {} if record.targets is None else _some(vars(record.targets))
        targets = {name if name == "itl_percentile" else f"{name}_seconds": value for name, value in targets.items()}
        arguments = {
            "request_id": record.request_id,
            "prompt_tokens": record.num_prompt_tokens,
            "max_tokens": record.max_tokens,
            "choice": record.choice,
            "priority": record.priority,
            **{f"slo_{name}": value for name, value in targets.items()},
        }
        self._instant(engine.process, request.track, "accepted", record.time, arguments)

    def _enter(self, engine: _Engine, request: _Request, phase: LatencyPhase | None, time: float) -> None:
        """End the phase of a request, and begin another; None ends the last one."""
        if phase is request.phase:
            return
        if request.phase is not None:
            self._slice(
                *(engine.process, request.track, request.phase.meaning, "request", request.since, time),
                {"request": request.trace.number, "phase": request.phase.value},
            )
        request.phase, request.since = phase, max(time, request.since, self._zero)

    def _step(self, engine: _Engine, step: StepTrace) -> None:
        self.num_steps += 1
        self._now = max(self._now, step.end_time)
        prompts, decodes, num_prompt_tokens = {}, [], 0
        middle = (step.start_time + step.end_time) / 2
        for chunk in step.chunks:
            request = engine.requests.get(chunk.number)
            is_decode = chunk.is_decode(0 if request is None else request.trace.num_prompt_tokens)
            if not is_decode:
                prompts[str(chunk.number)] = f"{chunk.num_tokens} tokens from {chunk.start}"
                num_prompt_tokens += chunk.num_tokens
            else:
                decodes.append(str(chunk.number))
            if request is None:
                continue
            if request.phase is None:  # it began before the trace, and is in this phase at least since here
                request.phase = LatencyPhase.DECODE if is_decode else LatencyPhase.PREFILL
                request.since = max(step.start_time, self._zero)
            if not is_decode:
                self._arrow("chunk", (engine.process, request.track, middle), (engine.process, engine.steps, middle))
            self._tokens(engine, request, chunk, step.end_time)
        num_tokens = sum(chunk.num_tokens for chunk in step.chunks)
        kinds = (("prefill", prompts), ("decode", decodes))
        arguments: dict[str, Any] = {
            "step": step.step,
            "tokens": num_tokens,
            "token_budget": step.token_budget,
            "prompt_tokens": num_prompt_tokens,
            "decode_tokens": num_tokens - num_prompt_tokens,
            "measured_ms": round(1e3 * (step.end_time - step.start_time), 3),
        }
        if step.predicted_seconds:
            arguments["predicted_ms"] = round(1e3 * step.predicted_seconds, 3)
        if prompts:
            arguments["prefill of requests"] = prompts
        if decodes:
            arguments["decode of requests"] = " ".join(decodes)
        name = " + ".join(kind for kind, chunks in kinds if chunks) or "empty"
        self._slice(engine.process, engine.steps, name, "step", step.start_time, step.end_time, arguments)
        held = max(self._num_blocks - step.num_free_blocks - step.num_cached_blocks, 0)
        blocks = {"held": held, "cached": step.num_cached_blocks, "free": step.num_free_blocks}
        self._count(engine, "requests", step.end_time, {"running": step.num_running, "waiting": step.num_waiting})
        self._count(engine, "KV blocks", step.end_time, blocks)
        self._count(engine, "step tokens", step.start_time, {"computed": num_tokens, "budget": step.token_budget})

    def _tokens(self, engine: _Engine, request: _Request, chunk: ChunkTrace, time: float) -> None:
        """Mark the first token of a request, and an error."""
        if chunk.error is not None:
            self._instant(engine.process, request.track, "error", time, {"error": chunk.error})
        if chunk.token_ids and not request.has_tokens:
            request.has_tokens = True
            if chunk.start + chunk.num_tokens <= request.trace.num_prompt_tokens:
                ttft = {"ttft_ms": round(1e3 * (time - request.trace.arrival), 3)}
                self._instant(engine.process, request.track, "first token", time, ttft)

    def _finish(self, engine: _Engine, request: _Request, record: FinishTrace) -> None:
        end = min(record.wanted_until or record.time, record.time)
        self._enter(engine, request, None, end)
        reason = {"finish_reason": record.reason.value, "tokens": record.num_output_tokens, "slo_met": record.slo_met}
        self._instant(engine.process, request.track, f"finish: {record.reason.value}", end, _some(reason))
        if record.slo_met is False:
            why = "" if record.violation is None else describe_violation(record.violation)
            self._instant(engine.process, request.track, "SLO missed", end, {"why": why})

    def _change(self, line: TracedChange) -> None:
        engine = self._engine(line.engine)
        self._now = max(self._now, line.time)
        reason = {"reason": line.reason} if line.reason else {}
        self._instant(engine.process, engine.steps, f"engine {line.state.value}", line.time, reason, scope="p")
        if line.state is EngineState.DEAD:
            for request in engine.requests.values():
                self._enter(engine, request, None, line.time)
            engine.requests.clear()

    # The front -------------------------------------------------------------------------------------------------------

    def _answer(self, line: TracedRequest) -> None:
        arrows = self._arrows.pop(line.id, [])
        arrival, ended = max(line.arrival, self._zero), max(line.ended, self._zero)
        self._now = max(self._now, line.ended)
        track = next((track for track, end in self._front.items() if end <= arrival), None)
        if track is None:
            track = self._next_track()
            self._name(FRONT, track, f"HTTP requests {len(self._front) + 1}", order=track)
        self._front[track] = ended
        facts = {
            "request_id": line.request_id,
            "id": line.id,
            "route": line.route,
            "status": line.status,
            "key": line.key,
            "prompt_tokens": line.prompt_tokens,
            "cached_tokens": line.cached_tokens,
            "generated_tokens": line.generated_tokens,
            "finish_reasons": " ".join(f"{reason} {count}" for reason, count in line.finish_reasons.items()) or None,
            "error": line.error,
            "ttft_ms": None if line.ttft is None else round(1e3 * line.ttft, 3),
            "preemptions": line.preemptions,
            "slo_met": line.slo_met,
            "why": line.why or None,
        }
        arguments = _some(facts)
        if line.engine_opened is None:
            name = f"refused: {line.error}" if line.error else line.route
            self._slice(FRONT, track, name, "front", arrival, ended, arguments)
            return
        at = line.arrival
        for phase in BEFORE_ENGINE:
            seconds = line.phases.get(phase, 0.0)
            self._slice(FRONT, track, phase.meaning, "front", at, at + seconds, arguments)
            for engine, other, time in arrows if phase is BEFORE_ENGINE[-1] and seconds else ():
                self._arrow("request", (FRONT, track, at + seconds / 2), (engine.process, other, time))
            at += seconds
        begun = line.ended - sum(line.phases.get(phase, 0.0) for phase in AFTER_ENGINE)
        self._slice(FRONT, track, IN_THE_ENGINE, "front", at, begun, arguments)
        at = begun
        for phase in AFTER_ENGINE:
            seconds = line.phases.get(phase, 0.0)
            self._slice(FRONT, track, phase.meaning, "front", at, at + seconds, arguments)
            at += seconds
        if line.slo_met is False:
            self._instant(FRONT, track, "SLO missed", line.ended, {"why": line.why})

    # Events ----------------------------------------------------------------------------------------------------------

    def _next_track(self) -> int:
        self._num_tracks += 1
        return FIRST_TRACK - 1 + self._num_tracks

    def _at(self, time: float) -> float:
        """Return a time in microseconds from the beginning of the trace, whole nanoseconds: slices must not overlap."""
        return round(max(time - self._zero, 0.0) * 1e6, 3)

    def _slice(self, process: int, track: int, name: str, kind: str, start: float, end: float, args: Event) -> None:
        begun, ended = self._at(start), self._at(end)
        if ended > begun:
            event = {"ph": "X", "pid": process, "tid": track, "name": name, "cat": kind, "ts": begun}
            self._events.append({**event, "dur": round(ended - begun, 3), "args": args})

    def _instant(
        self, process: int, track: int, name: str, time: float, args: Event | None = None, *, scope: str = "t"
    ) -> None:
        event = {"ph": "i", "s": scope, "pid": process, "tid": track, "name": name, "cat": "request"}
        self._events.append({**event, "ts": self._at(time), "args": args or {}})

    def _count(self, engine: _Engine, name: str, time: float, values: Event) -> None:
        self._events.append({"ph": "C", "pid": engine.process, "name": name, "ts": self._at(time), "args": values})

    def _arrow(self, name: str, *places: tuple[int, int, float]) -> None:
        """Draw an arrow between two places: the slices which are on a track of a process at a time."""
        self._num_arrows += 1
        for (process, track, time), way in zip(places, ({"ph": "s"}, {"ph": "f", "bp": "e"}), strict=True):
            event = {**way, "id": self._num_arrows, "cat": name, "name": name, "pid": process, "tid": track}
            self._events.append({**event, "ts": self._at(time)})

    def _name(self, process: int, track: int | None, name: str, *, order: int) -> None:
        what = "process" if track is None else "thread"
        place = {"ph": "M", "pid": process, "tid": track or 0}
        self._events.append({**place, "name": f"{what}_name", "args": {"name": name}})
        self._events.append({**place, "name": f"{what}_sort_index", "args": {"sort_index": order}})


def _some(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


class TraceFile:
    """Writes events into a file which is a whole JSON document after every writing, however it ends."""

    def __init__(self, path: Path) -> None:
        """Raise OSError if the file cannot be written."""
        self._file: BinaryIO = path.open("wb")
        self._is_empty = True
        self._file.write(b'{"displayTimeUnit": "ms", "traceEvents": [')
        self._end = self._file.tell()
        self._write_end()

    def write(self, events: Iterable[Event]) -> None:
        """Add events."""
        lines = ",\n".join(json.dumps(event) for event in events)
        if not lines:
            return
        self._file.seek(self._end)
        self._file.write(b"\n" if self._is_empty else b",\n")
        self._file.write(lines.encode())
        self._is_empty, self._end = False, self._file.tell()
        self._write_end()

    @property
    def size(self) -> int:
        """Return the number of bytes so far."""
        return self._file.tell()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _write_end(self) -> None:
        self._file.write(b"\n]}\n")
        self._file.flush()
