"""Log-probabilities in buffers are those that were put in, to the last bit."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitfuse.core.plan import Logprobs, TokenLogprob

TOKEN = st.integers(0, 2**31 - 1)
VALUE = st.floats(max_value=0.0, allow_nan=False)


def entries_of(width: int) -> st.SearchStrategy[list[TokenLogprob]]:
    top = st.lists(st.tuples(TOKEN, VALUE), min_size=width, max_size=width).map(tuple)
    return st.lists(st.builds(TokenLogprob, TOKEN, VALUE, top), max_size=6)


def kept(entries: list[TokenLogprob]) -> Logprobs:
    return Logprobs.of(entries) or Logprobs()


@given(st.integers(0, 4).flatmap(lambda width: st.tuples(entries_of(width), entries_of(width))), st.integers(0, 12))
def test_entries_come_back_as_they_were(parts: tuple[list[TokenLogprob], list[TokenLogprob]], count: int) -> None:
    entries, logprobs = parts[0] + parts[1], kept(parts[0])
    if parts[1]:
        logprobs.extend(kept(parts[1]))
    assert list(logprobs) == entries and len(logprobs) == len(entries)
    assert [logprobs.chosen(i) for i in range(len(logprobs))] == [(e.token_id, e.logprob) for e in entries]
    logprobs.truncate(count)
    assert list(logprobs) == entries[:count]


def test_none_and_infinity_are_kept() -> None:
    assert Logprobs.of([]) is None and not Logprobs()
    assert kept([TokenLogprob(5, -math.inf)])[0] == TokenLogprob(5, -math.inf)


def test_entries_of_another_width_are_a_fault() -> None:
    logprobs = kept([TokenLogprob(5, -1.0)])
    with pytest.raises(AssertionError, match="different widths"):
        logprobs.extend(kept([TokenLogprob(5, -1.0, ((5, -1.0),))]))
