"""Holds what is drafted for one request, and how much of it was right."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from splitfuse.core.speculation.prompt_lookup import PromptLookup

FORCED_CHANCE = 0.99
"""Chance that a token is right which the form of an answer leaves no choice of: it may be spelled by other tokens."""


@dataclass(slots=True)
class RequestDrafts:
    """Holds the drafts of one request.

    >>> drafts = RequestDrafts()
    >>> drafts.update([1, 2, 3, 4, 1], [2])
    >>> drafts.ahead(5, ends=(4,))
    [(3, 0.5)]
    """

    forced: tuple[int, ...] = ()
    """Tokens that the form of the answer lets follow, and no others."""
    num_drafted: int = 0
    num_accepted: int = 0
    lookup: PromptLookup | None = None
    """Its tokens so far, once it decodes."""

    def update(self, prompt_token_ids: Sequence[int], output_token_ids: Sequence[int], *, max_tokens: int = 0) -> None:
        """Take in the tokens generated since the last call, of a request that generates at most `max_tokens`."""
        if self.lookup is None:
            self.lookup = PromptLookup(prompt_token_ids, max_tokens=max_tokens)
        self.lookup.extend(output_token_ids[len(self.lookup) - len(prompt_token_ids) :])

    def ahead(self, most: int, *, ends: Collection[int]) -> list[tuple[int, float]]:
        """Return up to `most` tokens that may come next, each with the chance that it is right if those before it are.
        None of `ends`, which end the request, is among them: nothing comes after it.
        """
        if self.forced:
            found = [(token, FORCED_CHANCE) for token in self.forced[:most]]
        else:
            found = [] if self.lookup is None else self.lookup.draft(most)
        return found[: next((n for n, (token, _) in enumerate(found) if token in ends), len(found))]

    @property
    def is_ahead(self) -> bool:
        """Return whether there are drafts after the tokens that it knows."""
        return bool(self.forced) or (self.lookup is not None and self.lookup.has_draft)

    def count(self, num_drafted: int, num_accepted: int) -> None:
        """Count the drafts of a step, and those that were right."""
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted
