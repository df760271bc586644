"""Turns trace events into frames: what a console shows of a tenth of a second, as compact JSON.

    builder = FrameBuilder(origin=time.monotonic())
    builder.add(EngineRecords(0, (RequestTrace(...), StepTrace(...))))
    builder.take(number=0, now=time.monotonic())       # Frame(...)

Requests have a number here that no other request of the server has, whichever engine computes it and however often that
began again. Times are milliseconds since the origin. No text and no token id of a request is in a frame.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import msgspec

from splitfuse.config.values import EngineRole
from splitfuse.core.latency.phases import LatencyPhase
from splitfuse.core.slo.targets import NO_SLO
from splitfuse.engine.client import EngineState, LocalClient
from splitfuse.engine.trace import (
    BlockMap,
    FinishTrace,
    PhaseTrace,
    PreemptTrace,
    RequestTrace,
    StepTrace,
    TraceRecord,
)
from splitfuse.errors import EngineUnavailableError
from splitfuse.server.access_log import RequestRecord
from splitfuse.server.explain import why_missed
from splitfuse.server.traces import EngineChange, EngineRecords, RequestEnd, TraceEvent

PHASES = tuple(LatencyPhase)
"""Latency phases, which frames name by their index."""
BLOCK_LETTERS = bytes.maketrans(bytes(range(4)), b"fchs")
"""Table of the letters that stand for a block in a map: free, cached, held, shared."""
UNKNOWN = -1
"""Number of a request of which the engine has told nothing."""

_index_of_phase = {phase: index for index, phase in enumerate(PHASES)}


class ShownEngine(msgspec.Struct, array_like=True, frozen=True):
    """Tells the state of an engine. The last three numbers are 0 until it is ready."""

    engine: int
    time: float
    state: str
    reason: str
    """Why it is dead."""
    stage: str
    fraction: float
    token_budget: int
    num_blocks: int
    block_size: int
    role: str = EngineRole.MIXED.value


class ShownRequest(msgspec.Struct, array_like=True, frozen=True):
    """Tells of a request, one a choice, that an engine has accepted."""

    request: int
    engine: int
    request_id: str
    """Id that begins with that of the answer."""
    sent: float
    num_prompt_tokens: int
    max_tokens: int
    choice: int
    priority: int
    ttft: float | None
    """TTFT target in seconds, for this length of the prompt."""
    itl: float | None
    itl_percentile: float | None
    """Percentage of the gaps that must be at most `itl`; None: their moving average must."""
    tpot: float | None
    arrival: float
    """Time from which its TTFT counts."""


class ShownStep(msgspec.Struct, array_like=True, frozen=True):
    """Tells of a step."""

    engine: int
    step: int
    token_budget: int
    start: float
    duration: float
    predicted: float
    """Predicted duration; 0: nothing predicts steps."""
    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_cached_blocks: int
    decodes: tuple[int, ...] | None
    """Decodes, each once for every token that it got; None: those of the engine's step before, in the same frame."""
    chunks: tuple[int, ...]
    """Four numbers for each other chunk: its request, position, tokens, and the tokens that were chosen after it."""


class ShownPhase(msgspec.Struct, array_like=True, frozen=True):
    """Tells that requests have entered a phase each: their numbers, each with the index of its phase."""

    time: float
    phases: tuple[int, ...]


class ShownPreemption(msgspec.Struct, array_like=True, frozen=True):
    """Tells that a request was preempted."""

    request: int
    time: float


class ShownFinish(msgspec.Struct, array_like=True, frozen=True):
    """Tells that a request has ended at its engine."""

    request: int
    time: float
    reason: str
    num_output_tokens: int
    slo_met: bool | None


class ShownBlocks(msgspec.Struct, array_like=True, frozen=True):
    """Maps KV blocks: a letter (BLOCK_LETTERS) for each `stride`-th, with a number behind it if it is repeated."""

    engine: int
    time: float
    stride: int
    states: str


class ShownAnswer(msgspec.Struct, array_like=True, frozen=True):
    """Tells of an HTTP request whose answer has ended, and where its time went."""

    unique_id: str
    request_id: str
    time: float
    route: str
    status: int
    key: str | None
    error: str | None
    seconds: float
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    finish_reasons: dict[str, int]
    ttft: float | None
    itl_median: float | None
    itl_longest: float | None
    slo_met: bool | None
    phases: tuple[tuple[int, float], ...]
    """Index and seconds of each phase."""
    violation: str
    """Sentence about a missed SLO."""
    co_scheduled: tuple[tuple[str, int], ...]
    num_preemptions: int


class Frame(msgspec.Struct, omit_defaults=True):
    """Holds what happened since the frame before."""

    frame: int
    """Number: each frame has the next."""
    now: float
    engines: tuple[ShownEngine, ...] = ()
    requests: tuple[ShownRequest, ...] = ()
    phases: tuple[ShownPhase, ...] = ()
    steps: tuple[ShownStep, ...] = ()
    preemptions: tuple[ShownPreemption, ...] = ()
    finishes: tuple[ShownFinish, ...] = ()
    blocks: tuple[ShownBlocks, ...] = ()
    answers: tuple[ShownAnswer, ...] = ()


class FrameBuilder:
    """Collects trace events until `take`."""

    def __init__(self, *, origin: float) -> None:
        self._origin = origin
        self._next_request = 0
        self._known: dict[int, dict[int, ShownRequest]] = {}  # engine -> its number -> request
        self._parts: dict[str, list[Any]] = {}
        self._decodes: dict[int, tuple[int, ...]] = {}  # of the newest step of each engine

    @property
    def is_empty(self) -> bool:
        """Return whether `take` would return an empty frame."""
        return not self._parts

    def milliseconds(self, time: float) -> float:
        """Return a time on the monotonic clock as frames have it."""
        return round(1e3 * (time - self._origin), 2)

    def add(self, event: TraceEvent, engines: Sequence[LocalClient]) -> None:
        """Take in an event; `engines` are those that it may be about."""
        match event:
            case EngineRecords():
                for record in event.records:
                    self._add_record(event.engine, record)
            case EngineChange():
                if event.state is EngineState.DEAD:
                    self._known.pop(event.engine, None)
                self.add_engine(event.engine, engines[event.engine], event.time, event.reason)
            case RequestEnd():
                self._append("answers", self._answer(event))

    def add_engine(self, index: int, engine: LocalClient, time: float, reason: str = "") -> None:
        """Take in the state of an engine, and the stage of its start."""
        self._append("engines", describe_engine(index, engine, self.milliseconds(time), reason))

    def take(self, number: int, now: float) -> Frame:
        """Return the frame since the last call."""
        parts, self._parts, self._decodes = self._parts, {}, {}
        return Frame(number, self.milliseconds(now), **{name: tuple(items) for name, items in parts.items()})

    def _append(self, part: str, item: Any) -> None:
        self._parts.setdefault(part, []).append(item)

    def _add_record(self, engine: int, record: TraceRecord) -> None:
        known = self._known.setdefault(engine, {})
        match record:
            case StepTrace():
                self._append("steps", self._step(engine, record, known))
            case PhaseTrace():
                pairs = [(known[n].request, _index_of_phase[phase]) for n, phase in record.phases if n in known]
                flat = tuple(number for pair in pairs for number in pair)
                self._append("phases", ShownPhase(self.milliseconds(record.time), flat))
            case RequestTrace():
                before = known.get(record.number)
                is_same = before is not None and before.request_id == record.request_id
                if not is_same:  # else it is told again, as a more detailed trace begins
                    known[record.number] = self._request(engine, record)
                    self._append("requests", known[record.number])
            case PreemptTrace():
                if record.number in known:
                    time = self.milliseconds(record.time)
                    self._append("preemptions", ShownPreemption(known[record.number].request, time))
            case FinishTrace():
                if record.number in known:
                    request, time = known.pop(record.number).request, self.milliseconds(record.time)
                    reason, count = record.reason.value, record.num_output_tokens
                    self._append("finishes", ShownFinish(request, time, reason, count, record.slo_met))
            case BlockMap():
                time, letters = self.milliseconds(record.time), record.states.translate(BLOCK_LETTERS)
                self._append("blocks", ShownBlocks(engine, time, record.stride, run_lengths(letters)))

    def _request(self, engine: int, record: RequestTrace) -> ShownRequest:
        number, self._next_request = self._next_request, self._next_request + 1
        targets = record.targets or NO_SLO
        ttft = targets.ttft_target(record.num_prompt_tokens)
        return ShownRequest(
            *(number, engine, record.request_id, self.milliseconds(record.sent_time)),
            *(record.num_prompt_tokens, record.max_tokens, record.choice, record.priority),
            *(None if ttft == math.inf else ttft, targets.itl, targets.itl_percentile, targets.tpot),
            arrival=self.milliseconds(record.arrival),
        )

    def _step(self, engine: int, record: StepTrace, known: dict[int, ShownRequest]) -> ShownStep:
        decodes: list[int] = []
        chunks: list[int] = []
        for chunk in record.chunks:
            request = known.get(chunk.number)
            number = UNKNOWN if request is None else request.request
            num_prompt = 0 if request is None else request.num_prompt_tokens
            if chunk.is_decode(num_prompt):
                decodes += [number] * len(chunk.token_ids)
            else:
                chunks += (number, chunk.start, chunk.num_tokens, len(chunk.token_ids))
        these = tuple(decodes)
        is_same = self._decodes.get(engine) == these
        self._decodes[engine] = these
        return ShownStep(
            *(engine, record.step, record.token_budget, self.milliseconds(record.start_time)),
            *(round(1e3 * (record.end_time - record.start_time), 2), round(1e3 * record.predicted_seconds, 2)),
            *(record.num_running, record.num_waiting, record.num_free_blocks, record.num_cached_blocks),
            *(None if is_same else these, tuple(chunks)),
        )

    def _answer(self, event: RequestEnd) -> ShownAnswer:
        record, breakdown = event.record, event.breakdown
        phases: tuple[tuple[int, float], ...] = ()
        co_scheduled: tuple[tuple[str, int], ...] = ()
        preemptions = 0
        if breakdown is not None:
            phases = tuple((_index_of_phase[p], round(seconds, 6)) for p, seconds in breakdown.phases.items())
            co_scheduled, preemptions = breakdown.co_scheduled, breakdown.num_preemptions
        median, longest = _gaps(record)
        return ShownAnswer(
            unique_id=event.unique_id,
            request_id=record.request_id,
            time=self.milliseconds(event.ended),
            route=record.route,
            status=record.status,
            key=record.key,
            error=record.error,
            seconds=round(record.total_seconds, 6),
            prompt_tokens=record.prompt_tokens,
            cached_tokens=record.cached_tokens,
            generated_tokens=record.generated_tokens,
            finish_reasons=dict(record.finish_reasons),
            ttft=record.time_to_first_token_seconds,
            itl_median=median,
            itl_longest=longest,
            slo_met=record.slo_met,
            phases=phases,
            violation=why_missed(record, breakdown),
            co_scheduled=co_scheduled,
            num_preemptions=preemptions,
        )


class OpenRequest(msgspec.Struct, array_like=True):
    """Holds a request that has not ended, with the phase that it is in."""

    request: ShownRequest
    phase: int = _index_of_phase[LatencyPhase.JOINING]
    since: float = 0.0


class OpenRequests:
    """Holds the requests that are open after some frames."""

    def __init__(self) -> None:
        self._open: dict[int, OpenRequest] = {}

    def apply(self, frame: Frame) -> None:
        """Take in a frame."""
        for request in frame.requests:
            self._open[request.request] = OpenRequest(request, since=request.sent)
        for each in frame.phases:
            for number, phase in zip(each.phases[::2], each.phases[1::2], strict=True):
                if (known := self._open.get(number)) is not None:
                    known.phase, known.since = phase, each.time
        for finish in frame.finishes:
            self._open.pop(finish.request, None)
        for engine in frame.engines:
            if engine.state == EngineState.DEAD:
                lost = [number for number, each in self._open.items() if each.request.engine == engine.engine]
                for number in lost:
                    del self._open[number]

    @property
    def all(self) -> list[OpenRequest]:
        """Return them, the oldest first."""
        return list(self._open.values())


def describe_engine(index: int, engine: LocalClient, time: float, reason: str = "") -> ShownEngine:
    """Return the state of an engine at a time, in milliseconds."""
    stage, numbers = engine.stage, (0, 0, 0)
    try:
        info = engine.info
        numbers = info.max_num_batched_tokens, info.limits.num_blocks, info.limits.block_size
    except EngineUnavailableError:
        pass  # it has not been ready yet
    state = "drained" if engine.is_drained else engine.state.value
    return ShownEngine(index, time, state, reason, stage.stage, round(stage.fraction, 2), *numbers, engine.role.value)


def run_lengths(letters: bytes) -> str:
    """Return a text in which letters that are repeated stand once, with their number.

    >>> run_lengths(b"ffffhhc")
    'f4hhc'
    """
    return re.sub(rb"(.)\1{2,}", lambda found: b"%c%d" % (found[1], len(found[0])), letters).decode()


def _gaps(record: RequestRecord) -> tuple[float | None, float | None]:
    """Return the median and the longest gap between tokens, of those in rising order."""
    gaps = record.inter_token_latency_seconds
    return (gaps[len(gaps) // 2], gaps[-1]) if gaps else (None, None)
