"""Decides which drafts a step computes: tokens that requests may generate next, guessed before they are chosen.

A step waits for the weights to come from memory, however few its tokens are. So it may compute, with the newest token
of a request, some that may follow it; the executor chooses a token after each as it would have without drafts, and each
that was guessed right saves a step. Outputs are the same; steps are fewer, and a little longer.

Drafts are the last claim on a step: they get what is left of its budgets when everything else is granted. One is worth
its chance of being right times the seconds of a token without it, and costs the seconds by which it lengthens the step.
So a request whose drafts are mostly wrong gets none, and a step of many requests few.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import count

from splitfuse.core.request import Request
from splitfuse.core.slo.cost_model import CostModel, StepFeatures
from splitfuse.core.slo.latency_predictor import LatencyPredictor
from splitfuse.core.step_builder import StepBuilder

USUAL_COST = CostModel(floor=1.0, per_token=1 / 8)
"""Cost model where nothing is measured, in steps of no tokens: each token adds an eighth, as was measured of small
models. Of larger ones it is less.
"""


class Drafting:
    """Drafts by prompt lookup, up to `most` tokens of a request in a step."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._usual = LatencyPredictor(USUAL_COST)

    def is_expected(self, requests: Sequence[Request]) -> bool:
        """Return whether a step that is planned once the tokens in flight are known may have drafts."""
        return any(self._update(request) and request.drafts.is_ahead for request in requests)

    def compose(self, step: StepBuilder, predictor: LatencyPredictor | None) -> None:
        """Add drafts to a step whose claims have been met, the likeliest first, as long as each makes the tokens of its
        decodes come faster and the step keeps within its tokens and seconds. Nothing may be in flight.
        """
        decodes = [each for each, granted in step.granted.items() if granted == each.num_unscheduled == 1]
        drafts = {request: found for request in decodes if self._update(request) and (found := self._ahead(request))}
        if not drafts:
            return
        predict = (predictor or self._usual).seconds
        alone = StepFeatures()
        for request in decodes:
            alone = alone.plus(start=request.num_scheduled, count=1, rows=1)
        seconds, tokens, tokens_left = predict(alone), float(len(decodes)), step.tokens_left
        features, before = step.features, predict(step.features)
        chosen = dict.fromkeys(drafts, 0)
        order = count()  # of equal chances, those of earlier claims first
        likeliest = [(-found[0][1], next(order), request) for request, found in drafts.items()]
        heapq.heapify(likeliest)
        while likeliest and tokens_left > 0:
            chance, _, request = heapq.heappop(likeliest)
            longer = features.longer(end=request.num_scheduled + 1 + chosen[request], count=1)
            cost = (after := predict(longer)) - before
            if after > step.max_seconds or -chance * seconds <= cost * tokens:
                break
            features, before, tokens_left = longer, after, tokens_left - 1
            seconds, tokens = seconds + cost, tokens - chance
            chosen[request] += 1
            if chosen[request] < len(drafts[request]):
                heapq.heappush(likeliest, (chance * drafts[request][chosen[request]][1], next(order), request))
        for request, number in chosen.items():
            if number:
                step.draft(request, [token for token, _ in drafts[request][:number]])

    @staticmethod
    def _update(request: Request) -> bool:
        """Take in the newest tokens of a request. Returns whether it has generated any."""
        if not request.output_token_ids:
            return False
        request.drafts.update(request.prompt_token_ids, request.output_token_ids, max_tokens=request.max_tokens)
        return True

    def _ahead(self, request: Request) -> list[tuple[int, float]]:
        most = min(self.most, request.max_tokens - len(request.output_token_ids) - 1)
        return request.drafts.ahead(most, ends={*request.eos_token_ids, *request.params.stop_token_ids})
