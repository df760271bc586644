"""Says which phase a step puts a request in: what it computes of it, or why it computes nothing.

It looks at what a step became, and decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from splitfuse.core.events import StepScheduled
from splitfuse.core.latency.phases import LatencyPhase
from splitfuse.core.plan import Chunk
from splitfuse.core.request import Request, by_queue_key


def computing_phase(request: Request, chunk: Chunk) -> LatencyPhase:
    """Return the phase of a request in a step with a chunk of it."""
    if chunk.start < request.kv.num_lost:
        return LatencyPhase.RECOMPUTED
    return LatencyPhase.PREFILL if chunk.start < request.num_prompt_tokens else LatencyPhase.DECODE


class IdlePhases:
    """Finds the phases of the requests which have no chunk in a step."""

    def __init__(self) -> None:
        self._reason: LatencyPhase | None = None  # why requests waited in the step before
        self._waiting: list[Request] = []  # those that did

    def of(self, step: StepScheduled) -> Iterator[tuple[Request, LatencyPhase]]:
        """Yield each such request with the reason, but those whose last token is in flight, and those that wait for the
        same reason as in the step before.
        """
        builder = step.builder
        granted, running, waiting = builder.granted, builder.queue.running, builder.queue.waiting
        for request in builder.queue.fetching:
            yield request, LatencyPhase.FETCHING
        left_out = [request for request in running if request not in granted] if len(granted) < len(running) else []
        if not left_out and not waiting:
            self._waiting = []
            return
        needing = next((request for request in (*left_out, *waiting[:1]) if request.num_unscheduled), None)
        is_full = builder.tokens_left <= 0 or needing is None or builder.fitting_tokens(needing) <= 0
        for request in left_out:
            is_ahead = step.time < request.slo.deadline < math.inf and not request.slo.missed
            if request.kv.preempt_on_return:
                yield request, LatencyPhase.PREEMPTED
            elif request.num_unscheduled == 1 and request.output_token_ids and is_ahead:
                yield request, LatencyPhase.PACED
            elif request.num_unscheduled:
                yield request, LatencyPhase.LEFT_OUT if is_full else LatencyPhase.LEFT_OUT_NO_BLOCKS
        reason = _reason_to_wait(step, is_full=is_full)
        is_outranked = reason is LatencyPhase.NO_BUDGET  # those before a request that has got some of it
        last_granted = max(map(by_queue_key, granted)) if is_outranked else ()
        is_told = reason is self._reason and not is_outranked
        if is_told and waiting == self._waiting:  # which looks at no request, as long as none comes or goes
            return
        told = set(self._waiting) if is_told else ()
        for request in [request for request in waiting if request not in told]:
            if request.kv.num_preemptions:
                yield request, LatencyPhase.PREEMPTED
            elif is_outranked and by_queue_key(request) < last_granted:
                yield request, LatencyPhase.OUTRANKED
            else:
                yield request, reason
        self._reason, self._waiting = reason, list(waiting)


def _reason_to_wait(step: StepScheduled, *, is_full: bool) -> LatencyPhase:
    """Return why no more waiting requests were admitted."""
    queue = step.builder.queue
    if queue.free.sequence_slots <= 0:
        return LatencyPhase.NO_SLOT
    if queue.free.blocks <= len(queue.running) or not is_full:
        return LatencyPhase.NO_BLOCKS
    return LatencyPhase.NO_BUDGET if step.builder.tokens_left <= 0 else LatencyPhase.OUTRANKED
