"""The index of prefixes, and the few replicas that it and their loads pick for a test."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from splitfuse.core.replicas.prefix_index import PrefixIndex, PrefixMemory
from splitfuse.core.replicas.shortlist import NUM_HOLDERS, NUM_LEAST_LOADED, NUM_RANDOM, Shortlist

BLOCK = 16


def names(prompt: str) -> list[bytes]:
    """Return one block a letter, named as blocks are: by all up to its end."""
    return [prompt[:end].encode() for end in range(1, len(prompt) + 1)]


class Replica:
    """Holds what a shortlist knows of a replica."""

    def __init__(self, seconds: float = 0.0, *, num_blocks: int = 100) -> None:
        self.memory = PrefixMemory(num_blocks, BLOCK)
        self.seconds = seconds

    def load(self, now: float) -> float:
        del now
        return self.seconds


@given(
    st.lists(st.tuples(st.integers(0, 3), st.text("ab", min_size=1, max_size=5)), max_size=40),
    st.text("ab", max_size=6),
)
def test_the_index_finds_what_each_memory_has(sent: list[tuple[int, str]], prompt: str) -> None:
    index, memories = PrefixIndex(), [PrefixMemory(6, BLOCK) for _ in range(4)]
    for number, memory in enumerate(memories[:3]):
        memory.join(index, number)
    for number, text in sent:
        memories[number].add(names(text))
    memories[3].join(index, 3)  # later, with what it has
    runs = {number: memory.cached_tokens(names(prompt)) // BLOCK for number, memory in enumerate(memories)}
    found = list(index.holders(names(prompt)))
    assert dict(found) == {number: count for number, count in runs.items() if count}
    assert [count for _, count in found] == sorted((count for _, count in found), reverse=True)
    for memory in memories:
        memory.leave()
    assert not len(index) and not list(index.holders(names(prompt)))


def test_a_prompt_is_forgotten_from_its_end() -> None:
    memory = PrefixMemory(3, BLOCK)
    for text in ("abc", "xy"):
        memory.add(names(text))
    assert [memory.cached_tokens(names(text)) // BLOCK for text in ("abc", "xy")] == [1, 2]


def test_those_that_share_a_prompt_take_turns() -> None:
    index, memories = PrefixIndex(), [PrefixMemory(9, BLOCK) for _ in range(3)]
    for number, memory in enumerate(memories):
        memory.join(index, number)
        memory.add(names("ab"))
    memories[0].add(names("ab"))
    assert [number for number, _ in index.holders(names("abc"))] == [1, 2, 0]


def picked(
    replicas: Sequence[Replica | None], prompt: str = "", *, refuse: Sequence[int] = (), seed: int = 1
) -> list[int]:
    shortlist = Shortlist(seed=seed)
    shortlist.sync(replicas)
    return list(
        shortlist.pick(names(prompt), lambda number: number not in refuse and replicas[number] is not None, 0.0)
    )


def test_the_holders_of_the_longest_runs_are_picked_of_many() -> None:
    replicas = [Replica(float(number)) for number in range(200)]
    for number in range(20, 60):
        replicas[number].memory.add(names("ab"))
    for number in (150, 170):
        replicas[number].memory.add(names("abc"))
    found = picked(replicas, "abcd")
    assert set(found[:2]) == {150, 170} and len(found) <= NUM_HOLDERS + NUM_LEAST_LOADED + NUM_RANDOM
    assert sum(20 <= number < 60 for number in found) >= NUM_HOLDERS - 2
    assert {0, 1} <= set(found), "the least loaded"
    assert 150 not in picked(replicas, "abcd", refuse=[150])


def test_the_least_loaded_are_found_as_loads_change() -> None:
    replicas = [Replica(float(number)) for number in range(100)]
    shortlist, random, now = Shortlist(seed=1), Random(1), 0.0
    shortlist.sync(replicas)
    found = 0
    for _ in range(2000):
        now += 0.05
        for each in replicas:
            each.seconds = max(each.seconds - 0.05, 0.0)
        numbers = shortlist.pick([], lambda _: True, now)
        best = min(numbers, key=lambda number: replicas[number].seconds)
        found += replicas[best].seconds == min(each.seconds for each in replicas)
        replicas[best].seconds += 10.0 * random.random()
    assert found > 1900, found


def test_several_fronts_do_not_all_pick_the_same() -> None:
    replicas = [Replica() for _ in range(200)]
    assert len({number for seed in range(20) for number in picked(replicas, seed=seed)}) > 30
    assert picked(replicas, seed=3) == picked(replicas, seed=3)


def test_one_that_is_gone_or_new_has_nothing_cached() -> None:
    replicas: list[Replica | None] = [Replica() for _ in range(30)]
    shortlist = Shortlist(seed=1)
    shortlist.sync(replicas)
    held = replicas[7]
    assert held is not None
    held.memory.add(names("abc"))
    assert next(iter(shortlist.pick(names("abc"), lambda _: True, 0.0).items())) == (7, 3)
    replicas[7] = None
    shortlist.sync(replicas)
    for _ in range(50):
        assert 7 not in shortlist.pick(names("abc"), lambda number: replicas[number] is not None, 0.0)
    held.memory.add(names("abc"))  # no index follows it any more
    replicas[7] = Replica()
    shortlist.sync(replicas)
    assert not list(shortlist.index.holders(names("abc")))
    shortlist.sync(replicas[:20])
    assert all(number < 20 for _ in range(50) for number in shortlist.pick([], lambda _: True, 0.0))


def test_nothing_is_picked_of_nothing() -> None:
    assert picked([]) == picked([None] * 20) == picked([Replica()] * 3, refuse=range(3)) == []


def test_idle_replicas_that_accept_nothing_hide_no_others() -> None:
    replicas = [Replica(0.0 if number < 50 else 1.0 + number) for number in range(60)]
    shortlist = Shortlist(seed=1)
    shortlist.sync(replicas)
    found = {n for step in range(30) for n in shortlist.pick([], lambda number: number >= 50, 0.1 * step)}
    assert {50, 51} <= found
