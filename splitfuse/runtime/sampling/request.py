"""Follows the tokens of one request where they are chosen: by what the next one is, and whether it is the last."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace
from typing import NamedTuple

from splitfuse.core.plan import SamplingState
from splitfuse.kernels.drawing import GREEDY, Filter
from splitfuse.runtime.sampling.draw import number_at, stream_of
from splitfuse.runtime.sampling.grammar import Matcher


class Row(NamedTuple):
    """Describes a row of hidden states that chooses a token."""

    number: int
    state: SamplingState
    matcher: Matcher | None


class RequestSampling:
    """Holds what choosing the tokens of a request needs, from its first step until it retires. `state` is its own, and
    gets the tokens that `take` is given; `matcher` follows the form that its answer must have, if any.
    """

    __slots__ = ("_matcher", "_plain_from", "_stream", "filter", "state")

    def __init__(self, state: SamplingState, matcher: Matcher | None = None) -> None:
        params = state.params
        self.state = state
        self.filter = GREEDY
        if params.temperature > 0.0:
            self.filter = Filter(params.temperature, params.top_k, params.top_p, params.min_p)
        self._matcher = matcher
        self._stream = stream_of(state.seed, state.choice)
        is_special = (
            *(state.pooling, state.thought, matcher, params.logprobs),
            *(params.logit_bias or None, params.presence_penalty or None, params.frequency_penalty or None),
        )
        never_plain = params.repetition_penalty != 1.0 or any(each is not None for each in is_special)
        self._plain_from = math.inf if never_plain else params.min_tokens

    @property
    def is_plain(self) -> bool:
        """Return whether the model's logits and `filter` alone say which token is next, and it is all that is asked
        for: kernels choose it, and `sample` has nothing to do.
        """
        return len(self.state.output_token_ids) >= self._plain_from

    @property
    def number(self) -> float:
        """Return the number from 0 to below 1 by which the next token is drawn."""
        return number_at(self._stream, self.state.num_tokens)

    @property
    def heeded(self) -> Matcher | None:
        """Return the matcher if the next token is chosen by the form of the answer."""
        thought = self.state.thought
        return self._matcher if thought is None or thought.heeds_form else None

    def take(self, token_ids: Sequence[int]) -> tuple[int, bool]:
        """Note tokens that the request was given, up to the one with which its answer has the form that was asked for.
        Returns how many there are, and whether it has.
        """
        state, matcher = self.state, self._matcher
        if state.thought is None and matcher is None:
            state.output_token_ids.extend(token_ids)
            return len(token_ids), False
        for count, token in enumerate(token_ids, start=1):
            state.output_token_ids.append(token)
            is_answer = state.thought is None or state.thought.push(token)
            if is_answer and matcher is not None and matcher.settle([token]):
                return count, True
        return len(token_ids), False

    def after(self, number: int, drafts: Sequence[int]) -> Row | None:
        """Return row `number`, of a draft model, that chooses what follows `drafts`; None if the form of the answer
        does not allow them, or nothing behind them. What it chooses is not taken here, and has no logprobs.
        """
        *_, (count, state, matcher) = self.rows(0, drafts)
        if count < len(drafts):
            return None
        if matcher is not None and matcher is self._matcher:
            matcher = matcher.after((), state.thought)
            if matcher is None:
                return None
        if state.params.logprobs is not None:
            state = replace(state, params=replace(state.params, logprobs=None))
        return Row(number, state, matcher)

    def rows(self, first: int, drafts: Sequence[int]) -> Iterator[Row]:
        """Yield the row that chooses the next token, number `first`, and that of each draft, up to one that the form of
        the answer does not allow: its state is as if the drafts so far were right, and its token counts if they are.
        """
        state, matcher = self.state, self._matcher
        yield Row(first, state, self.heeded)
        for number, draft in enumerate(drafts, start=first + 1):
            thought = copy(state.thought)
            is_answer = thought is None or thought.push(draft)
            state = replace(state, output_token_ids=[*state.output_token_ids, draft], thought=thought)
            if matcher is not None:
                matcher = matcher.after([draft] if is_answer else [], thought)
                if matcher is None:
                    return
            yield Row(number, state, matcher if thought is None or thought.heeds_form else None)
