"""Prompt lookup: what it drafts, against a search of all tokens, and what that costs."""

from __future__ import annotations

from array import array
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitfuse.core.speculation.prompt_lookup import CHANCES, MAX_ENTRIES, MAX_LENGTH, PromptLookup

PROMPTS = st.lists(st.integers(0, 3), min_size=1, max_size=30)
ANSWERS = st.lists(st.integers(0, 3), max_size=60)


class Search:
    """The same by searching: the newest earlier occurrence of the last pair, followed while it is right."""

    def __init__(self, prompt: list[int]) -> None:
        """Nothing is followed within a prompt: it is looked up at its end."""
        self.tokens = prompt[:-1]
        self.source = self.length = 0

    def push(self, token: int) -> None:
        tokens = self.tokens
        if self.source and tokens[self.source] == token:
            self.source, self.length = self.source + 1, self.length + 1
        else:
            self.source = self.length = 0
        tokens.append(token)
        pairs = list(pairwise(tokens))
        if not self.source and pairs and pairs[-1] in pairs[:-1]:
            self.source = len(pairs) - pairs[-2::-1].index(pairs[-1])
            before, now = tokens[: self.source][::-1], tokens[::-1]
            unlike = (n for n, (a, b) in enumerate(zip(before, now, strict=False)) if a != b)
            self.length = next(unlike, len(before))

    def draft(self, most: int) -> list[int]:
        tokens = list(self.tokens)
        for index in range(most if self.source else 0):
            tokens.append(tokens[self.source + index])
        return tokens[len(self.tokens) :]


@given(PROMPTS, ANSWERS, st.integers(0, 9))
def test_drafts_are_those_that_a_search_finds(prompt: list[int], answer: list[int], most: int) -> None:
    lookup, search = PromptLookup(prompt, max_tokens=len(answer)), Search(prompt)
    search.push(prompt[-1])
    for token in answer:
        assert [each for each, _ in lookup.draft(most)] == search.draft(most)
        lookup.extend([token])
        search.push(token)
    assert len(lookup) == len(prompt) + len(answer)


@given(PROMPTS, ANSWERS, st.integers(0, 60))
def test_the_cuts_of_an_answer_change_nothing(prompt: list[int], answer: list[int], cut: int) -> None:
    whole, parts = (PromptLookup(prompt, max_tokens=60) for _ in range(2))
    whole.extend(answer)
    parts.extend(answer[:cut])
    parts.extend(answer[cut:])
    assert whole.draft(8) == parts.draft(8)


@given(PROMPTS, ANSWERS)
def test_chances_are_chances(prompt: list[int], answer: list[int]) -> None:
    lookup = PromptLookup(prompt, max_tokens=60)
    lookup.extend(answer)
    assert all(0.0 <= chance <= 1.0 for _, chance in lookup.draft(20))


def test_a_longer_match_has_a_better_chance() -> None:
    text = list(range(100))
    chances = [PromptLookup(text + text[:count], max_tokens=9999).draft(1)[0][1] for count in range(2, 20)]
    assert chances == sorted(chances) and chances[0] == CHANCES[0] and chances[-1] == CHANCES[-1]


def test_chances_follow_the_answer_without_any_draft() -> None:
    prompt = [token for number in range(10, 90) for token in (1, 2, number)]  # what follows 1, 2 is always new
    lookup = PromptLookup([*prompt, 1, 2], max_tokens=400)
    before = lookup.draft(1)[0][1]
    for number in range(100, 140):
        lookup.extend([number, 1, 2])
    assert lookup.draft(1)[0][1] < 0.02 < before
    for _ in range(40):
        lookup.extend([lookup.draft(1)[0][0], 1, 2])
    assert lookup.draft(1)[0][1] > 0.9


def test_a_period_goes_on_beyond_the_last_token() -> None:
    assert [token for token, _ in PromptLookup([7, 8, 7, 8, 7], max_tokens=9).draft(6)] == [8, 7, 8, 7, 8, 7]


@pytest.mark.parametrize("prompt", [[5], [5, 5], [5, 6]])
def test_the_shortest_prompts(prompt: list[int]) -> None:
    lookup = PromptLookup(prompt, max_tokens=4)
    assert lookup.draft(4) == []
    lookup.extend([5, 5, 5])
    assert [token for token, _ in lookup.draft(2)] == [5, 5]


def test_memory_is_bounded_and_the_newest_text_is_found() -> None:
    lookup = PromptLookup(range(MAX_ENTRIES), max_tokens=1000)
    newest = MAX_ENTRIES - 500
    lookup.extend([newest, newest + 1])
    assert lookup.draft(2) == [(newest + 2, CHANCES[0]), (newest + 3, CHANCES[0] * CHANCES[1])]
    assert len(lookup._ends) == MAX_ENTRIES


class CountedTokens(array):  # type: ignore[type-arg]
    """Counts how often tokens are read."""

    reads = 0

    def __getitem__(self, index: Any) -> Any:
        CountedTokens.reads += 1
        return super().__getitem__(index)


@pytest.mark.parametrize("count", [100, 20_000])
def test_a_token_looks_at_a_bounded_number_of_others(count: int) -> None:
    lookup = PromptLookup([1] * count, max_tokens=10)
    lookup._tokens = CountedTokens("i", lookup._tokens)
    CountedTokens.reads = 0
    lookup.extend([2, 1, 1])  # the pair of ones is found, and so is how much before it is alike
    assert lookup.draft(1) and CountedTokens.reads <= 3 * (2 * MAX_LENGTH + 4)
