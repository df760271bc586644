"""Holds what is drafted for one request, and how much of it was right."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate, repeat, takewhile
from operator import mul

from splitfuse.core.plan import DraftKind
from splitfuse.core.speculation.acceptance import Acceptance
from splitfuse.core.speculation.prompt_lookup import PromptLookup

FORCED_CHANCE = 0.99
"""Chance that a token is right which the form of an answer leaves no choice of: it may be spelled by other tokens."""


@dataclass(slots=True)
class RequestDrafts:
    """Holds the drafts of one request.

    >>> drafts = RequestDrafts()
    >>> drafts.begin([1, 2, 3, 4, 1], max_tokens=8, ends=(4,))
    >>> drafts.update([2])
    True
    >>> drafts.ahead(5)
    [(3, 0.5)]
    """

    forced: tuple[int, ...] = ()
    """Tokens that the form of the answer lets follow, and no others."""
    num_drafted: int = 0
    num_accepted: int = 0
    acceptance: Acceptance | None = None
    """How right the guesses of a draft model were; None: there were none."""
    confidences: tuple[float, ...] = ()
    """How sure the draft model was of its newest guesses."""
    num_readable: int | None = 0
    """Number of leading tokens that are known to be in the vocabulary of a draft model; None: one is not in it."""
    _lookup: PromptLookup | None = None  # its tokens so far, once it decodes
    _num_prompt_tokens: int = 0
    _ends: Collection[int] = ()

    @property
    def has_begun(self) -> bool:
        """Return whether anything can be drafted."""
        return self._lookup is not None

    def begin(self, prompt_token_ids: Sequence[int], *, max_tokens: int, ends: Collection[int]) -> None:
        """Take in the prompt of a request that generates at most `max_tokens`, and the tokens that end it."""
        self._lookup = PromptLookup(prompt_token_ids, max_tokens=max_tokens)
        self._num_prompt_tokens, self._ends = len(prompt_token_ids), ends

    def update(self, output_token_ids: Sequence[int]) -> bool:
        """Take in the tokens generated since the last call. Returns whether there may be drafts."""
        assert self._lookup is not None, "it has not begun"
        self._lookup.extend(output_token_ids[len(self._lookup) - self._num_prompt_tokens :])
        return self._lookup.has_draft or bool(self.forced)

    def ahead(self, most: int, least: float = 0.0) -> list[tuple[int, float]]:
        """Return up to `most` tokens that may come next, each with the chance that it and those before it are right:
        those with a chance above `least`. No token that ends the request is among them: nothing comes after it.
        """
        assert self._lookup is not None, "it has not begun"
        if self.forced:
            chances = accumulate(repeat(FORCED_CHANCE), mul)
            found = list(zip(self.forced[:most], takewhile(lambda chance: chance > least, chances), strict=False))
        else:
            found = self._lookup.draft(most, least)
        for index, (token, _) in enumerate(found):
            if token in self._ends:
                return found[:index]
        return found

    def count(self, num_drafted: int, num_accepted: int, kind: DraftKind = DraftKind.LOOKUP) -> None:
        """Count the drafts of a step, and those that were right."""
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted
        if kind is DraftKind.MODEL and self.acceptance is not None:
            self.acceptance.observe(self.confidences[:num_drafted], num_accepted)
