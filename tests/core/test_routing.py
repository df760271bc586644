"""The choice of a replica: a pure function."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitfuse.core.routing import PREFIX_TOKENS, PrefixMemory, ReplicaLoad, choose_replica, prefix_hashes


def load(outstanding: int, cached: int = 0, *, accepts: bool = True, silent: bool = False) -> ReplicaLoad:
    return ReplicaLoad(accepts=accepts, outstanding_tokens=outstanding, cached_tokens=cached, silent=silent)


@pytest.mark.parametrize(
    ("loads", "expected"),
    [
        ([], None),
        ([load(0, accepts=False)], None),
        ([load(5), load(4)], 1),
        ([load(5), load(5)], 0),
        ([load(0, accepts=False), load(1000)], 1),
        ([load(0), load(100, cached=96)], 0),  # 4 more to wait for than to compute
        ([load(0), load(90, cached=96)], 1),
        ([load(0, cached=96, silent=True), load(9000)], 1),
        ([load(9000, silent=True), load(0, silent=True)], 1),
        ([load(9000, silent=True), load(0, accepts=False)], 0),
    ],
)
def test_the_replica_where_it_is_done_first(loads: list[ReplicaLoad], expected: int | None) -> None:
    assert choose_replica(loads, 128) == expected


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 1000), st.integers(0, 1000))), st.integers(1, 5000))
def test_nobody_who_accepts_would_be_done_earlier(states: list[tuple[bool, int, int]], num_tokens: int) -> None:
    loads = [load(outstanding, cached, accepts=accepts) for accepts, outstanding, cached in states]
    chosen = choose_replica(loads, num_tokens)
    accepting = [r.outstanding_tokens - r.cached_tokens for r in loads if r.accepts]
    if chosen is None:
        assert not accepting
    else:
        assert loads[chosen].accepts
        assert loads[chosen].outstanding_tokens - loads[chosen].cached_tokens == min(accepting)


def test_what_was_sent_is_remembered_as_far_as_it_agrees() -> None:
    memory = PrefixMemory(100)
    prompt = list(range(5 * PREFIX_TOKENS + 3))
    memory.add(prefix_hashes(prompt))
    assert memory.cached_tokens(prefix_hashes(prompt)) == 5 * PREFIX_TOKENS
    other = [*prompt[: 2 * PREFIX_TOKENS + 1], -1, *prompt[2 * PREFIX_TOKENS + 2 :]]
    assert memory.cached_tokens(prefix_hashes(other)) == 2 * PREFIX_TOKENS
    assert memory.cached_tokens(prefix_hashes(prompt, salt="of somebody else")) == 0
    assert memory.cached_tokens(prefix_hashes(prompt[: PREFIX_TOKENS - 1])) == 0
    memory.clear()
    assert memory.cached_tokens(prefix_hashes(prompt)) == 0


def test_the_oldest_is_forgotten_first() -> None:
    memory = PrefixMemory(2)
    prompts = [[number] * PREFIX_TOKENS for number in range(3)]
    for prompt in (prompts[0], prompts[1], prompts[0], prompts[2]):
        memory.add(prefix_hashes(prompt))
    assert [memory.cached_tokens(prefix_hashes(prompt)) > 0 for prompt in prompts] == [True, False, True]
