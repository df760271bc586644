"""Traces an engine: turns its events into the records of trace.py.

    tracer = EngineTracer(engine)
    tracer.level = TraceLevel.STEPS
    ...                                 # steps
    tracer.take()                       # (RequestTrace(...), PhaseTrace(...), StepTrace(...), FinishTrace(...))

Without a level nothing is listened to, and nothing costs anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from splitfuse.core.events import PhasesEntered, RequestAdded, RequestFinished, RequestPreempted, StepRecord
from splitfuse.core.plan import Chunk, ChunkResult
from splitfuse.core.request import Request
from splitfuse.engine.engine import Engine
from splitfuse.engine.trace import (
    BlockMap,
    ChunkDetail,
    ChunkTrace,
    FinishTrace,
    PhaseTrace,
    PreemptTrace,
    RequestDetail,
    RequestTrace,
    StepTrace,
    TraceLevel,
    TraceRecord,
)

TAKE_SECONDS = 0.1
"""Time for which records are kept, to be taken together: those of each step, sent alone, would cost it more."""
BLOCK_MAP_SECONDS = 1.0
"""Least time between two maps of the KV blocks, which take some tenths of a millisecond. An engine that goes idle
makes one in any case: it is what is known until it works again.
"""
MAX_MAPPED_BLOCKS = 4096
"""Number of blocks up to which a map has them all; of more, it has every second, third or n-th."""


class EngineTracer:
    """Turns an engine's events into records, until `take`. Belongs to the engine's thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._level = TraceLevel.OFF
        self._unsubscribe: list[Callable[[], None]] = []
        self._records: list[TraceRecord] = []
        self._numbers: dict[str, int] = {}  # of unfinished requests, by id
        self._tables: dict[str, tuple[int, int]] = {}  # length and last block of the tables that were traced
        self._next_map = 0.0
        self._taken = 0.0
        self._has_finished = False  # a request whose end is among the records

    @property
    def level(self) -> TraceLevel:
        """Return how much is traced."""
        return self._level

    @level.setter
    def level(self, level: TraceLevel) -> None:
        if level is self._level:
            return
        for unsubscribe in self._unsubscribe:
            unsubscribe()
        rises, self._unsubscribe, self._level = level > self._level, [], level
        if level is TraceLevel.OFF:
            self._records, self._numbers, self._tables, self._next_map = [], {}, {}, 0.0
            return
        if rises:
            self._tables = {}
            for request in sorted(self._engine.scheduler.queue.unfinished, key=lambda each: each.sequence_number):
                arrival = request.slo.arrival_time
                self._trace_request(request, arrival, arrival)
            if level >= TraceLevel.STEPS:
                self._trace_phases(self._engine.phases)
        listeners: dict[type[Any], Callable[[Any], None]] = {
            RequestAdded: lambda event: self._trace_request(event.request, event.sent_time, event.time),
            RequestPreempted: self._trace_preemption,
            RequestFinished: self._trace_finish,
        }
        if level >= TraceLevel.STEPS:
            listeners |= {PhasesEntered: self._trace_phases, StepRecord: self._trace_step}
        self._unsubscribe = [self._engine.events.subscribe(event, listener) for event, listener in listeners.items()]

    @property
    def has_records(self) -> bool:
        """Return whether there are records that `take` would return."""
        return bool(self._records)

    @property
    def is_due(self) -> bool:
        """Return whether records should be taken now: the end of a request is among them, which must be known before
        its answer ends; nothing else will come; or TAKE_SECONDS are over.
        """
        return self.has_records and (
            self._has_finished or not self._engine.has_unfinished or time.monotonic() >= self._taken + TAKE_SECONDS
        )

    def take(self) -> tuple[TraceRecord, ...]:
        """Return the records since the last call; of an engine that has just gone idle, with a map of its blocks."""
        self._taken, self._has_finished = time.monotonic(), False
        if self._records and not self._engine.has_unfinished:
            self._trace_blocks(self._taken)
        records, self._records = tuple(self._records), []
        return records

    def _trace_request(self, request: Request, sent_time: float, time: float) -> None:
        self._numbers[request.request_id] = request.sequence_number
        detail = None
        if self._level is TraceLevel.PLANS:
            detail = RequestDetail(
                *(request.prompt_token_ids, request.params, request.seed, request.eos_token_ids, request.scheduling),
                *(request.adapter, request.pooling, tuple(request.output_token_ids)),
            )
        self._records.append(
            RequestTrace(
                *(request.sequence_number, request.request_id, sent_time, time),
                *(request.num_prompt_tokens, request.max_tokens, request.choice, request.priority),
                *(request.slo.targets if request.slo.exists else None, detail, request.slo.arrival_time),
            )
        )

    def _trace_phases(self, event: PhasesEntered) -> None:
        numbers = self._numbers
        phases = tuple((numbers[request_id], phase) for request_id, phase in event.phases if request_id in numbers)
        if phases:
            self._records.append(PhaseTrace(event.time, phases))

    def _trace_step(self, event: StepRecord) -> None:
        plan, result, allocator = event.plan, event.result, self._engine.allocator
        number, detail = self._numbers.get, self._detail if self._level is TraceLevel.PLANS else None
        chunks = []
        for chunk in plan.chunks:
            name = chunk.request_id
            if name not in self._numbers:  # it ended while this step was planned or running
                continue
            got = result[name]
            more = None if detail is None else detail(chunk, got)
            traced = (number(name, -1), chunk.start, len(chunk.token_ids), got.token_ids, got.error, more)
            chunks.append(ChunkTrace(*traced, chunk.num_drafts))
        num_cached = allocator.num_cached
        self._records.append(
            StepTrace(
                *(plan.step, plan.token_budget, event.start_time, event.end_time, event.predicted_seconds),
                *(event.num_running, event.num_waiting, allocator.num_available - num_cached, num_cached),
                tuple(chunks),
            )
        )
        if event.end_time >= self._next_map:
            self._trace_blocks(event.end_time)

    def _trace_blocks(self, now: float) -> None:
        allocator = self._engine.allocator
        self._next_map = now + BLOCK_MAP_SECONDS
        stride = -(-allocator.num_blocks // MAX_MAPPED_BLOCKS)
        self._records.append(BlockMap(now, stride, allocator.states_of_blocks(stride)))

    def _detail(self, chunk: Chunk, result: ChunkResult) -> ChunkDetail | None:
        table = chunk.block_table
        size, (count, last) = len(table), self._tables.get(chunk.request_id, (0, -1))
        if count > size or (count and table[count - 1] != last):
            count = 0
        if count < size:
            self._tables[chunk.request_id] = size, table[-1]
        elif (
            (chunk.samples and chunk.num_logits == 1)
            and not (chunk.state or result.logprobs or result.prompt_logprobs or result.values)
            and not (result.is_complete or result.state_lost)
        ):
            return None  # PLAIN
        return ChunkDetail(
            *(chunk.num_logits, chunk.samples, count, table[count:], chunk.state),
            *(result.logprobs, result.prompt_logprobs, result.values, result.is_complete, result.state_lost),
            chunk.drafts,
        )

    def _trace_preemption(self, event: RequestPreempted) -> None:
        request = event.request
        self._tables.pop(request.request_id, None)
        self._records.append(PreemptTrace(request.sequence_number, event.time))

    def _trace_finish(self, event: RequestFinished) -> None:
        request = event.request
        assert request.finish_reason is not None
        self._tables.pop(request.request_id, None)
        self._numbers.pop(request.request_id, None)
        self._has_finished = True
        self._records.append(
            FinishTrace(
                *(request.sequence_number, event.time, request.finish_reason, len(request.output_token_ids)),
                *(request.slo.met, request.slo.violation, event.wanted_until),
            )
        )
