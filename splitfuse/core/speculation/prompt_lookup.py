"""Drafts the next tokens of a request from its own: where the newest ones occurred before, the same may follow again.

Prompt lookup needs no model: answers copy names, sentences, code and keys of JSON from their prompt and themselves.
A pair of tokens is looked up where it occurred last; from there the drafts follow the text as long as it is right, and
the longer it was, the likelier it goes on. How likely is counted at every token, drafted or not.

Each token takes constant time, and each request bounded memory: a table of positions, in which newer pairs take the
place of older ones.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from itertools import pairwise

MIN_ENTRIES, MAX_ENTRIES = 2**10, 2**18
"""Smallest and largest number of entries of the table, of 4 bytes each."""
ENTRIES_PER_TOKEN = 8
"""Number of entries for each token: one in 16 pairs is lost to another of the same hash."""
CHANCES = (0.5, 0.6, 0.75, 0.85, 0.9, 0.97)
"""Chances that the next token is as it was before, by how many before it are alike: those of a small model's answers to
mixed questions. A request begins with them and counts its own.
"""
CHANCE_OF_LENGTH = (0, 0, 0, 1, 2, 2, 3, 3, 4, 4, 4, 4, 5)
"""Index in CHANCES for 0, 1, 2, ... tokens that are alike, the last one for more too."""
MAX_LENGTH = len(CHANCE_OF_LENGTH) - 1
GAIN = 1 / 8
"""Weight of the newest token in its chance."""


class PromptLookup:
    """Drafts tokens of one request. It is made with the prompt, and extended by each generated token.

    >>> lookup = PromptLookup([1, 2, 3, 4, 5, 9, 1, 2], max_tokens=8)
    >>> lookup.draft(2)
    [(3, 0.5), (4, 0.3)]
    >>> lookup.extend([3, 7])
    >>> lookup.draft(3)
    []
    """

    def __init__(self, prompt_token_ids: Sequence[int], *, max_tokens: int) -> None:
        """`max_tokens` is how many tokens may follow."""
        count = ENTRIES_PER_TOKEN * (len(prompt_token_ids) + max_tokens)
        size = min(max(1 << (count - 1).bit_length(), MIN_ENTRIES), MAX_ENTRIES)
        self._tokens = array("i", prompt_token_ids[:-1])
        self._ends = array("i", bytes(4 * size))  # one past a pair of tokens, by its hash; 0: none
        self._mask = size - 1
        self._source = 0  # position of the token which the next one may be equal to; 0: none
        self._length = 0  # tokens before it which are equal to the newest ones
        self._chances = list(CHANCES)
        for end, pair in enumerate(pairwise(self._tokens), start=2):
            self._ends[hash(pair) & self._mask] = end
        self._append(prompt_token_ids[-1])

    def __len__(self) -> int:
        """Return how many tokens it knows."""
        return len(self._tokens)

    @property
    def has_draft(self) -> bool:
        """Return whether it drafts anything."""
        return self._source > 0

    def draft(self, most: int, least: float = 0.0) -> list[tuple[int, float]]:
        """Return up to `most` tokens which may come next, in their order, each with the chance that it and all before
        it are right: those with a chance above `least`.
        """
        drafts: list[tuple[int, float]] = []
        if not self._source:
            return drafts
        count, length, chance = len(self._tokens), self._length, 1.0
        for index in range(most):
            chance *= self._chances[_kind(length + index)]
            if chance <= least:
                break
            position = self._source + index
            # what is drafted beyond the last token repeats: a text of one period goes on
            drafts.append((self._tokens[position] if position < count else drafts[position - count][0], chance))
        return drafts

    def extend(self, token_ids: Iterable[int]) -> None:
        """Take in generated tokens."""
        for token in token_ids:
            if self._source:
                is_equal = self._tokens[self._source] == token
                kind = _kind(self._length)
                self._chances[kind] += GAIN * (is_equal - self._chances[kind])
                self._source, self._length = (self._source + 1, self._length + 1) if is_equal else (0, 0)
            self._append(token)

    def _append(self, token: int) -> None:
        """Add a token; look its pair up unless the text before it is followed."""
        tokens = self._tokens
        tokens.append(token)
        count = len(tokens)
        if count < 2:
            return
        place = hash((tokens[-2], token)) & self._mask
        end, self._ends[place] = self._ends[place], count
        if end and not self._source:
            length = 0
            while length < min(end, MAX_LENGTH) and tokens[end - 1 - length] == tokens[count - 1 - length]:
                length += 1
            if length >= 2:  # otherwise another pair of the same hash
                self._source, self._length = end, length


def _kind(length: int) -> int:
    return CHANCE_OF_LENGTH[min(length, MAX_LENGTH)]
