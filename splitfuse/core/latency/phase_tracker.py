"""Tracks the phase of every request from step to step, and keeps the ledger by it. Listens to an engine's events.

It looks at what a step became, and decides nothing. Only requests whose phase changes are touched; decodes which go on
are not even looked at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from splitfuse.core.events import (
    EngineEvents,
    RequestAdded,
    RequestFinished,
    RequestPreempted,
    StepRecord,
    StepScheduled,
)
from splitfuse.core.latency.ledger import LatencyLedger, RequestLatency, Transition
from splitfuse.core.latency.phases import LatencyBreakdown, LatencyPhase
from splitfuse.core.plan import Chunk
from splitfuse.core.request import Request
from splitfuse.core.slo.cost_model import CostModel, StepFeatures
from splitfuse.core.step_builder import StepBuilder

REFRESH_STEPS = 64
"""Number of steps after which the cost of running decodes is looked at again."""


class PhaseTracker:
    """Accounts for the latency of one scheduler's requests, as a listener of its events.

        tracker = PhaseTracker(scheduler.events)
        ...                                # the request finishes
        tracker.pop("a").phases            # {LatencyPhase.PREFILL: 0.8, LatencyPhase.DECODE: 1.2, ...}

    A step is divided by what the cost model predicts of its chunks; without one, by tokens.
    """

    def __init__(self, events: EngineEvents, *, cost: CostModel | None = None) -> None:
        self._ledger = LatencyLedger()
        self._cost = cost
        self._latencies: dict[str, RequestLatency] = {}  # of unfinished requests
        self._breakdowns: dict[str, LatencyBreakdown] = {}  # of finished ones, until `pop`
        self._decoding: set[Request] = set()  # the decodes of the last step, and some that have finished
        self._num_steps = 0
        events.subscribe(RequestAdded, self._open)
        events.subscribe(StepScheduled, self._begin_step)
        events.subscribe(StepRecord, self._end_step)
        events.subscribe(RequestPreempted, self._preempted)
        events.subscribe(RequestFinished, self._close)

    def pop(self, request_id: str) -> LatencyBreakdown | None:
        """Return the breakdown of a finished request, and forget it."""
        return self._breakdowns.pop(request_id, None)

    def _open(self, event: RequestAdded) -> None:
        latency = self._latencies[event.request.request_id] = RequestLatency(event.request.request_id)
        self._ledger.open(latency, sent=event.sent_time, now=event.time)

    def _close(self, event: RequestFinished) -> None:
        request = event.request
        latency = self._latencies.pop(request.request_id)
        breakdown = self._ledger.close(latency, event.time, wanted_until=event.wanted_until)
        num_preemptions, violation = request.kv.num_preemptions, request.slo.violation
        self._breakdowns[request.request_id] = replace(
            breakdown, num_preemptions=num_preemptions, slo_violation=violation
        )

    def _preempted(self, event: RequestPreempted) -> None:
        self._decoding.discard(event.request)

    def _end_step(self, step: StepRecord) -> None:
        self._ledger.end(step.end_time)

    def _begin_step(self, step: StepScheduled) -> None:
        """Find the requests whose phase changes with a step."""
        self._num_steps += 1
        if self._num_steps % REFRESH_STEPS == 0:
            self._decoding.clear()
        builder = step.builder
        granted, running, waiting = builder.granted, builder.queue.running, builder.queue.waiting
        transitions: list[Transition] = []
        for index, request in [(n, request) for n, request in enumerate(granted) if request not in self._decoding]:
            transitions.append(self._computed(request, step.plan.chunks[index]))
        left_out = [r for r in running if r not in granted] if len(granted) < len(running) else []
        is_full = builder.tokens_left <= 0 or not _takes_more(builder, (*left_out, *waiting[:1]))
        for request in left_out:
            self._change(request, self._left_out(request, is_full=is_full, now=step.time), transitions)
        if waiting:
            reason = self._reason_to_wait(builder, is_full=is_full)
            last_granted = max(request.queue_key for request in granted) if reason is LatencyPhase.NO_BUDGET else ()
            for request in waiting:
                phase = reason
                if request.kv.num_preemptions:
                    phase = LatencyPhase.PREEMPTED
                elif reason is LatencyPhase.NO_BUDGET and request.queue_key < last_granted:
                    phase = LatencyPhase.OUTRANKED
                self._change(request, phase, transitions)
        cost = sum(granted.values()) if self._cost is None else self._cost.seconds(builder.features)
        self._ledger.begin(transitions, cost=cost or 1, now=step.time)

    def _computed(self, request: Request, chunk: Chunk) -> Transition:
        count = len(chunk.token_ids)
        weight: float = count
        if self._cost is not None:  # what the step would take with this chunk alone
            weight = self._cost.seconds(StepFeatures().plus(start=chunk.start, count=count, rows=1))
        phase = LatencyPhase.DECODE
        if chunk.start < request.kv.num_lost:
            phase = LatencyPhase.RECOMPUTED
        elif chunk.start < request.num_prompt_tokens:
            phase = LatencyPhase.PREFILL
        else:
            self._decoding.add(request)
        latency = self._latencies[request.request_id]
        latency.planned = phase
        return Transition(latency, phase, weight, count if count > 1 else 0)

    def _change(self, request: Request, phase: LatencyPhase, transitions: list[Transition]) -> None:
        latency = self._latencies[request.request_id]
        if latency.planned is not phase:
            latency.planned = phase
            transitions.append(Transition(latency, phase))
            self._decoding.discard(request)

    def _reason_to_wait(self, builder: StepBuilder, *, is_full: bool) -> LatencyPhase:
        """Return why no more waiting requests were admitted."""
        free = builder.queue.free
        if free.sequence_slots <= 0:
            return LatencyPhase.NO_SLOT
        if free.blocks <= len(builder.queue.running) or not is_full:
            return LatencyPhase.NO_BLOCKS
        return LatencyPhase.NO_BUDGET if builder.tokens_left <= 0 else LatencyPhase.OUTRANKED

    def _left_out(self, request: Request, *, is_full: bool, now: float) -> LatencyPhase:
        """Return why a running request is not in the step."""
        if request.kv.preempt_on_return:
            return LatencyPhase.PREEMPTED
        if not request.num_unscheduled:  # the step in flight brings its last token
            return self._latencies[request.request_id].planned
        is_ahead = now < request.slo.deadline < math.inf and not request.slo.missed
        if request.num_unscheduled == 1 and request.output_token_ids and is_ahead:
            return LatencyPhase.PACED
        return LatencyPhase.LEFT_OUT if is_full else LatencyPhase.LEFT_OUT_NO_BLOCKS


def _takes_more(builder: StepBuilder, others: Sequence[Request]) -> bool:
    """Return whether the budgets have room for one of the requests which are not in the step."""
    needing = next((request for request in others if request.num_unscheduled), None)
    return needing is not None and builder.fitting_tokens(needing) > 0
