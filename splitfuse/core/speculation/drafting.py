"""Decides which drafts a step computes: tokens that requests may generate next, guessed before they are chosen.

A step waits for the weights to come from memory, however few its tokens are. So it may compute, with the newest token
of a request, some that may follow it; the executor chooses a token after each as it would have without drafts, and each
that was guessed right saves a step. Outputs are the same; steps are fewer, and a little longer.

Drafts are the last claim on a step: they get what is left of its budgets when everything else is granted. One is worth
its chance of being right times the seconds of a token without it, and costs the seconds by which it lengthens the step.
So a request whose drafts are mostly wrong gets none, and a step of many requests few.

What the form of an answer leaves no choice of comes first, then prompt lookup; both take no time. A draft model, if
there is one (model_drafts.py), guesses for requests that have neither, in steps of decodes alone: no prompt waits for
it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from splitfuse.core.events import EngineEvents, RequestFinished, StepRecord
from splitfuse.core.plan import DraftKind
from splitfuse.core.request import Request
from splitfuse.core.slo.latency_predictor import LatencyPredictor
from splitfuse.core.speculation.model_drafts import WORTH, ModelDrafts, StepWorth
from splitfuse.core.speculation.token_cost import TokenCost
from splitfuse.core.step_builder import StepBuilder


class Drafting:
    """Drafts up to `most` tokens of a request in a step: by prompt lookup, and by a model if there is one."""

    def __init__(self, most: int, model: ModelDrafts | None = None) -> None:
        self.most = most
        self.model = model
        self.cost = TokenCost()

    def observe(self, step: StepRecord) -> None:
        """Take in the time of a step, if it was one of decodes."""
        if all(chunk.samples and len(chunk.token_ids) == 1 + chunk.num_drafts for chunk in step.plan.chunks):
            self.cost.observe(step.plan.num_tokens, step.measured_seconds)

    def follow(self, events: EngineEvents) -> None:
        """Give back what the draft model holds for a request when that ends."""
        if (model := self.model) is not None:
            events.subscribe(RequestFinished, lambda event: model.forget(event.request.request_id))

    def is_expected(self, running: Sequence[Request]) -> bool:
        """Return whether the next step is likely to have drafts, of running requests whose tokens are in flight."""
        requests = [each for each in running if each.num_output_placeholders]
        if self.model is not None and self.model.is_on and requests:
            return True
        least = self._least(len(requests))
        return any(self._update(request) and len(self._ahead(request, 2, least)) == 2 for request in requests)

    def compose(self, step: StepBuilder, predictor: LatencyPredictor | None) -> float:
        """Add drafts to a step whose claims have been met, the likeliest first, as long as each makes the tokens of its
        decodes come faster and the step keeps within its tokens and seconds. Nothing may be in flight. Returns the
        seconds that the draft model has taken, which are part of the step's.
        """
        decodes = [each for each, granted in step.granted.items() if granted == each.num_unscheduled == 1]
        least, found = self._least(len(decodes)), list[tuple[float, int, Request]]()
        drafts = {each: self._ahead(each, self.most, least) for each in decodes if self._update(each)}
        guessed, spent = self._guessed(step, decodes, drafts, least, predictor)
        drafts |= guessed
        for number, (request, ahead) in enumerate(drafts.items()):  # of equal chances, earlier claims first
            found += [(-chance, number, request) for _, chance in ahead]
        if not found:
            return spent
        seconds, tokens, per_token = self.cost.seconds(len(decodes)), float(len(decodes)), self.cost.per_token
        features, chosen = step.features, dict.fromkeys(drafts, 0)
        found.sort(key=lambda each: each[:2])  # the chances of a request fall from draft to draft
        for lost, _, request in found[: max(step.tokens_left, 0)]:
            if -lost * seconds <= WORTH * per_token * tokens:
                break
            if predictor is not None and step.max_seconds < math.inf:
                features = features.longer(end=request.num_scheduled + 1 + chosen[request], count=1)
                if predictor.seconds(features) + spent > step.max_seconds:
                    break
            seconds, tokens = seconds + per_token, tokens - lost
            chosen[request] += 1
        for request, count in chosen.items():
            if count:
                kind = DraftKind.FORM if request.drafts.forced else DraftKind.LOOKUP
                step.draft(
                    request,
                    [token for token, _ in drafts[request][:count]],
                    DraftKind.MODEL if request in guessed else kind,
                )
        return spent

    def _guessed(
        self,
        step: StepBuilder,
        decodes: Sequence[Request],
        drafts: Mapping[Request, Sequence[tuple[int, float]]],
        least: float,
        predictor: LatencyPredictor | None,
    ) -> tuple[dict[Request, list[tuple[int, float]]], float]:
        """Return what the draft model guesses for decodes that have no other drafts, and its seconds."""
        others = [each for each in decodes if each.output_token_ids and not drafts.get(each)]
        if self.model is None or len(decodes) < len(step.granted) or not others or not self.cost.is_measured:
            return {}, 0.0
        seconds_left = math.inf
        if predictor is not None and step.max_seconds < math.inf:
            seconds_left = step.max_seconds - predictor.seconds(step.features)
        lookups = [chance for ahead in drafts.values() for _, chance in ahead]
        worth = StepWorth(
            tokens=len(decodes) + sum(lookups),
            seconds=self.cost.seconds(len(decodes) + len(lookups)),
            per_token=self.cost.per_token,
            least=least,
            seconds_left=seconds_left,
            most_drafts=step.tokens_left - len(lookups),
        )
        before = self.model.seconds
        return self.model.draft(others, self.most, worth), self.model.seconds - before

    def _least(self, num_decodes: int) -> float:
        """Return the chance that a draft is not worth computing with so many decodes in the step: it has the tokens
        and the seconds of these, and one more token is to be worth the seconds that it adds.
        """
        if not num_decodes:
            return 1.0
        return WORTH * self.cost.per_token * num_decodes / self.cost.seconds(num_decodes)

    @staticmethod
    def _update(request: Request) -> bool:
        """Take in the newest tokens of a request. Returns whether it may have drafts."""
        drafts, output = request.drafts, request.output_token_ids
        if not drafts.has_begun:
            if not output:
                return False
            ends = {*request.eos_token_ids, *request.params.stop_token_ids}
            drafts.begin(request.prompt_token_ids, max_tokens=request.max_tokens, ends=ends)
        return drafts.update(output)

    @staticmethod
    def _ahead(request: Request, most: int, least: float) -> list[tuple[int, float]]:
        return request.drafts.ahead(min(most, request.max_tokens - len(request.output_token_ids) - 1), least)
