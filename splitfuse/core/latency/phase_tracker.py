"""Where every request stands in a step that has been composed: computed, left out or waiting, and why.

It looks at what came out, and decides nothing. Only who stands otherwise than in the step before is told of; streams
that go on are not even looked at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from splitfuse.core.latency.ledger import StepTransitions, Transition
from splitfuse.core.latency.phases import LatencyPhase
from splitfuse.core.plan import Chunk, StepPlan
from splitfuse.core.request import Request
from splitfuse.core.slo.cost_model import Features
from splitfuse.core.slo.latency_predictor import LatencyPredictor
from splitfuse.core.step_builder import StepBuilder

STRETCH = 64
"""Passes after which it is looked at again what the tokens of streams cost."""


class PhaseTracker:
    """From pass to pass, of one scheduler. A step is divided by what `forecast` predicts; without one, by tokens."""

    def __init__(self, forecast: LatencyPredictor | None, *, max_num_seqs: int) -> None:
        self._cost = None if forecast is None else forecast.cost
        self._max_num_seqs = max_num_seqs
        self._generating: set[Request] = set()  # those that did in the last step, and some that have ended
        self._num_scenes = 0

    def scene(
        self,
        plan: StepPlan,
        draft: StepBuilder,
        *,
        running: Sequence[Request],
        waiting: Sequence[Request],
        num_blocks: int,
        now: float,
    ) -> StepTransitions:
        """Of the step that a draft has become, which leaves `num_blocks` to others."""
        self._num_scenes += 1
        if self._num_scenes % STRETCH == 0:
            self._generating.clear()
        granted, generating = draft.granted, self._generating
        moves: list[Transition] = []
        prompts: list[tuple[str, int]] = []
        for number, request in [(n, request) for n, request in enumerate(granted) if request not in generating]:
            chunk = plan.chunks[number]
            moves.append(self._computed(request, chunk))
            if len(chunk.token_ids) > 1:
                prompts.append((request.request_id, len(chunk.token_ids)))
        left_out = [r for r in running if r not in granted] if len(granted) < len(running) else []
        is_full = draft.left <= 0 or not _takes_more(draft, (*left_out, *waiting[:1]))
        for request in left_out:
            part = _left_out(request, is_full=is_full, now=now)
            if request.account.planned is not part:
                self._stand(request, part, moves)
        if waiting:
            reason = self._reason(draft, len(running), num_blocks, is_full=is_full)
            newest = max(request.place for request in granted) if reason is LatencyPhase.NO_BUDGET else ()
            for request in waiting:
                account, part = request.account, reason
                if account.num_preemptions:
                    part = LatencyPhase.PREEMPTED
                elif request.place < newest:  # of those that were granted something
                    part = LatencyPhase.OUTRANKED
                if account.planned is not part:
                    self._stand(request, part, moves)
        whole = sum(granted.values()) if self._cost is None else self._cost.seconds(draft.features)
        return StepTransitions(moves, prompts, whole or 1)

    def forget(self, request: Request) -> None:
        """It is to be looked at again: it has lost its blocks."""
        self._generating.discard(request)

    def _computed(self, request: Request, chunk: Chunk) -> Transition:
        count = len(chunk.token_ids)
        weight: float = count
        if self._cost is not None:  # what the step would take with this chunk alone
            weight = self._cost.seconds(Features().plus(start=chunk.start, count=count, rows=1))
        part = LatencyPhase.DECODE
        if chunk.start < request.num_lost:
            part = LatencyPhase.RECOMPUTED
        elif chunk.start < request.num_prompt:
            part = LatencyPhase.PREFILL
        else:
            self._generating.add(request)
        request.account.planned = part
        return Transition(request.account, part, weight)

    def _stand(self, request: Request, part: LatencyPhase, moves: list[Transition]) -> None:
        request.account.planned = part
        moves.append(Transition(request.account, part))
        self._generating.discard(request)

    def _reason(self, draft: StepBuilder, num_running: int, num_blocks: int, *, is_full: bool) -> LatencyPhase:
        """Why those wait that were not begun."""
        if num_running >= self._max_num_seqs:
            return LatencyPhase.NO_SLOT
        if num_blocks <= num_running or not is_full:
            return LatencyPhase.NO_BLOCKS
        return LatencyPhase.NO_BUDGET if draft.left <= 0 else LatencyPhase.OUTRANKED


def _takes_more(draft: StepBuilder, others: Sequence[Request]) -> bool:
    """Whether the step has tokens and time for one more of those that are not in it."""
    wanting = next((request for request in others if request.num_wanted), None)
    return wanting is not None and draft.takes(wanting) > 0


def _left_out(request: Request, *, is_full: bool, now: float) -> LatencyPhase:
    """Why one that runs is not in the step."""
    if request.preempt_on_return:
        return LatencyPhase.PREEMPTED
    if not request.num_wanted:  # the step in flight brings its last token
        return request.account.planned
    is_ahead = now < request.due < math.inf and not request.missed_slo
    if request.num_wanted == 1 and request.output_token_ids and is_ahead:
        return LatencyPhase.PACED
    return LatencyPhase.LEFT_OUT if is_full else LatencyPhase.LEFT_OUT_NO_BLOCKS
