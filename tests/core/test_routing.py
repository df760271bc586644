"""The choice of a replica: a pure function."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitfuse.core.kv.names import BlockNamer
from splitfuse.core.routing import PrefixMemory, ReplicaLoad, choose_replica

SIZE = 32


def load(outstanding: int, cached: int = 0, *, accepts: bool = True, silent: bool = False) -> ReplicaLoad | None:
    return ReplicaLoad(silent, outstanding - cached) if accepts else None


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
def test_the_replica_that_finishes_first_is_chosen(loads: list[ReplicaLoad | None], expected: int | None) -> None:
    assert choose_replica(loads) == expected


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 1000), st.integers(0, 1000))))
def test_no_accepting_replica_would_finish_earlier(states: list[tuple[bool, int, int]]) -> None:
    loads = [load(outstanding, cached, accepts=accepts) for accepts, outstanding, cached in states]
    chosen = choose_replica(loads)
    accepting = [outstanding - cached for accepts, outstanding, cached in states if accepts]
    if chosen is None:
        assert not accepting
    else:
        accepts, outstanding, cached = states[chosen]
        assert accepts and outstanding - cached == min(accepting)


def names(prompt: list[int], salt: str = "") -> list[bytes]:
    made: list[bytes] = []
    BlockNamer(SIZE, key=b"test").extend(made, prompt, salt=salt)
    return made


def test_a_sent_prompt_is_remembered_as_far_as_it_agrees() -> None:
    memory = PrefixMemory(100, SIZE)
    prompt = list(range(5 * SIZE + 3))
    assert memory.cached_tokens(names(prompt)) == 0
    memory.add(names(prompt))
    assert memory.cached_tokens(names(prompt)) == 5 * SIZE
    other = [*prompt[: 2 * SIZE + 1], -1, *prompt[2 * SIZE + 2 :]]
    assert memory.cached_tokens(names(other)) == 2 * SIZE
    assert memory.cached_tokens(names(prompt, salt="another")) == 0
    assert memory.cached_tokens(names(prompt[: SIZE - 1])) == 0


def test_the_block_sent_longest_ago_is_forgotten_first() -> None:
    memory = PrefixMemory(2, SIZE)
    prompts = [[number] * SIZE for number in range(3)]
    for prompt in (prompts[0], prompts[1], prompts[0], prompts[2]):
        memory.add(names(prompt))
    assert [memory.cached_tokens(names(prompt)) > 0 for prompt in prompts] == [True, False, True]
