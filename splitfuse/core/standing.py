"""Where every request stands in a pass that has been composed: computed, left out or waiting, and why.

It looks at what came out, and decides nothing. Only who stands otherwise than in the pass before is told of.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from splitfuse.core.account import Move, Part, Scene
from splitfuse.core.cost_model import CostModel, Features
from splitfuse.core.draft import Draft
from splitfuse.core.plan import Chunk, StepPlan
from splitfuse.core.request import Request

STRETCH = 64
"""Tokens after which what a stream's token costs is looked at again."""


class Standing:
    """The scene of one pass. `seats` and `blocks` are what is left of them, `cost` what passes are predicted by."""

    def __init__(self, draft: Draft, *, seats: int, blocks: int, cost: CostModel | None, now: float) -> None:
        self._draft = draft
        self._seats, self._blocks = seats, blocks
        self._cost = cost
        self._now = now
        self._moves: list[Move] = []

    def scene(self, plan: StepPlan, running: Sequence[Request], waiting: Sequence[Request]) -> Scene:
        """Of the pass that the draft has become."""
        granted, prompts = self._draft.granted, []
        for request, chunk in zip(granted, plan.chunks, strict=True):
            account = request.account
            if chunk.start < account.known_until:
                continue
            weight = self._alone(chunk)
            if chunk.start < request.num_lost:
                part = Part.RECOMPUTED
            elif chunk.start < request.num_prompt:
                part = Part.OWN_PROMPT
            else:
                part = Part.OWN_GENERATION
                account.known_until = math.inf if self._cost is None else chunk.start + STRETCH
            account.planned = part
            self._moves.append(Move(account, part, weight))
            if len(chunk.token_ids) > 1:
                prompts.append((request.request_id, len(chunk.token_ids)))
        if len(granted) < len(running):
            for request in running:
                if request not in granted:
                    self._move(request, self._left_out(request))
        if waiting:
            reason = self._reason(waiting[0], len(running))
            newest = max(request.arrival for request in granted)
            for request in waiting:
                if request.num_preemptions:
                    self._move(request, Part.PREEMPTED)
                elif reason is Part.NO_BUDGET and request.arrival < newest:
                    self._move(request, Part.BEHIND)
                else:
                    self._move(request, reason)
        whole = sum(granted.values()) if self._cost is None else self._cost.seconds(self._draft.features)
        return Scene(self._moves, prompts, whole or 1)

    def _move(self, request: Request, part: Part) -> None:
        account = request.account
        if account.planned is not part:
            account.planned, account.known_until = part, 0
            self._moves.append(Move(account, part))

    def _alone(self, chunk: Chunk) -> float:
        """What the pass would cost with this chunk alone."""
        count = len(chunk.token_ids)
        if self._cost is None:
            return count
        return self._cost.seconds(Features().plus(start=chunk.start, count=count, rows=1))

    def _left_out(self, request: Request) -> Part:
        """Why one that runs is not in the pass."""
        if request.preempt_on_return:
            return Part.PREEMPTED
        if not request.num_wanted:  # the pass in flight brings its last token
            return request.account.planned
        is_ahead = self._now < request.due < math.inf and not request.is_late
        if request.num_wanted == 1 and request.output_token_ids and is_ahead:
            return Part.PACED
        return Part.LEFT_OUT_NO_BLOCKS if self._draft.takes(request) else Part.LEFT_OUT

    def _reason(self, first: Request, num_running: int) -> Part:
        """Why those wait that were not begun; `first` is the one before all of them."""
        if self._seats <= 0:
            return Part.NO_SEAT
        if self._blocks <= num_running:
            return Part.NO_BLOCKS
        if self._draft.left <= 0:
            return Part.NO_BUDGET
        return Part.NO_BLOCKS if self._draft.takes(first) else Part.BEHIND
