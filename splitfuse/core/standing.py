"""Where every request stands in a pass that has been composed: computed, left out or waiting, and why.

It looks at what came out, and decides nothing. Only who stands otherwise than in the pass before is told of; streams
that go on are not even looked at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from splitfuse.core.account import Move, Part, Scene
from splitfuse.core.cost_model import Features
from splitfuse.core.draft import Draft
from splitfuse.core.forecast import Forecast
from splitfuse.core.plan import Chunk, StepPlan
from splitfuse.core.request import Request

STRETCH = 64
"""Passes after which it is looked at again what the tokens of streams cost."""


class Standing:
    """From pass to pass, of one scheduler. A pass is divided by what `forecast` predicts; without one, by tokens."""

    def __init__(self, forecast: Forecast | None, *, max_num_seqs: int) -> None:
        self._cost = None if forecast is None else forecast.cost
        self._max_num_seqs = max_num_seqs
        self._generating: set[Request] = set()  # those that did in the last pass, and some that have ended
        self._num_scenes = 0

    def scene(
        self,
        plan: StepPlan,
        draft: Draft,
        *,
        running: Sequence[Request],
        waiting: Sequence[Request],
        num_blocks: int,
        now: float,
    ) -> Scene:
        """Of the pass that a draft has become, which leaves `num_blocks` to others."""
        self._num_scenes += 1
        if self._num_scenes % STRETCH == 0:
            self._generating.clear()
        granted, generating = draft.granted, self._generating
        moves: list[Move] = []
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
            newest = max(request.place for request in granted) if reason is Part.NO_BUDGET else ()
            for request in waiting:
                account, part = request.account, reason
                if account.num_preemptions:
                    part = Part.PREEMPTED
                elif request.place < newest:  # of those that were granted something
                    part = Part.BEHIND
                if account.planned is not part:
                    self._stand(request, part, moves)
        whole = sum(granted.values()) if self._cost is None else self._cost.seconds(draft.features)
        return Scene(moves, prompts, whole or 1)

    def forget(self, request: Request) -> None:
        """It is to be looked at again: it has lost its blocks."""
        self._generating.discard(request)

    def _computed(self, request: Request, chunk: Chunk) -> Move:
        count = len(chunk.token_ids)
        weight: float = count
        if self._cost is not None:  # what the pass would take with this chunk alone
            weight = self._cost.seconds(Features().plus(start=chunk.start, count=count, rows=1))
        part = Part.OWN_GENERATION
        if chunk.start < request.num_lost:
            part = Part.RECOMPUTED
        elif chunk.start < request.num_prompt:
            part = Part.OWN_PROMPT
        else:
            self._generating.add(request)
        request.account.planned = part
        return Move(request.account, part, weight)

    def _stand(self, request: Request, part: Part, moves: list[Move]) -> None:
        request.account.planned = part
        moves.append(Move(request.account, part))
        self._generating.discard(request)

    def _reason(self, draft: Draft, num_running: int, num_blocks: int, *, is_full: bool) -> Part:
        """Why those wait that were not begun."""
        if num_running >= self._max_num_seqs:
            return Part.NO_SEAT
        if num_blocks <= num_running or not is_full:
            return Part.NO_BLOCKS
        return Part.NO_BUDGET if draft.left <= 0 else Part.BEHIND


def _takes_more(draft: Draft, others: Sequence[Request]) -> bool:
    """Whether the pass has tokens and time for one more of those that are not in it."""
    wanting = next((request for request in others if request.num_wanted), None)
    return wanting is not None and draft.takes(wanting) > 0


def _left_out(request: Request, *, is_full: bool, now: float) -> Part:
    """Why one that runs is not in the pass."""
    if request.preempt_on_return:
        return Part.PREEMPTED
    if not request.num_wanted:  # the pass in flight brings its last token
        return request.account.planned
    is_ahead = now < request.due < math.inf and not request.is_late
    if request.num_wanted == 1 and request.output_token_ids and is_ahead:
        return Part.PACED
    return Part.LEFT_OUT if is_full else Part.LEFT_OUT_NO_BLOCKS
