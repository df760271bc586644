"""Orders of eviction in `benchmarks.eviction`, counted by hand."""

import pytest

from benchmarks.eviction import BLOCK_SIZE, ORDERS, Load, block_seconds, replay, short
from benchmarks.papers.data import turns_of_conversations
from splitfuse.core.slo.cost_model import CostModel

COST = CostModel(floor=0.01, per_token=1e-4, per_pair=1e-7)
FLAT = CostModel(floor=0.01, per_token=1e-4)
BY_NAME = {order.name: order for order in ORDERS}
BLOCK = BLOCK_SIZE - 1  # new tokens of a turn, whose answer is one


def two_conversations() -> Load:
    """The first has ten blocks and comes back last, the second four; a third one of six blocks comes between."""
    begins = [0.0, 1.0, 2.0]
    turns = [((10 * BLOCK_SIZE - 1, 1), (BLOCK, 1)), ((4 * BLOCK_SIZE - 1, 1), (BLOCK, 1)), ((6 * BLOCK_SIZE - 1, 1),)]
    return Load(begins, turns, [[0.0, 20.0], [0.0, 10.0], [0.0]])  # type: ignore[arg-type]


def seconds(*places: int) -> float:
    each = block_seconds(COST, 20)
    return float(sum(each[place] for place in places))


def test_each_order_forgets_its_own_blocks() -> None:
    """A store of 16 blocks has 14 when the third conversation comes, which needs six: the first one loses four, and one
    more for the second turn of the second, unless it is known that the third does not come back.
    """
    part = 1 - 1 / BLOCK_SIZE  # of a prompt's last block: the answer fills it
    new = seconds(*range(9), *range(3), *range(5)) + part * seconds(9, 3, 5, 10, 4)
    lost = {"LRU": range(5, 10), "island, LRU": range(5), "foreseen": range(6, 10), "island, foreseen": range(4)}
    for name, blocks in lost.items():
        count = replay(two_conversations(), BY_NAME[name], COST, 16, counted_from=0)
        assert count.again == len(blocks), name
        assert count.seconds == pytest.approx(new + seconds(*blocks)), name
        assert count.seconds_new == pytest.approx(new)


def test_a_store_for_all_computes_only_what_is_new() -> None:
    for order in ORDERS:
        count = replay(two_conversations(), order, COST, 100, counted_from=0)
        assert count.again == 0 and count.seconds == pytest.approx(count.seconds_new)


def test_the_end_of_a_long_text_is_dear() -> None:
    flat, steep = block_seconds(FLAT, 100), block_seconds(COST, 100)
    assert flat[0] == pytest.approx(flat[99]) == pytest.approx(BLOCK_SIZE * FLAT.per_token)
    assert steep[99] - steep[0] == pytest.approx(COST.per_pair * BLOCK_SIZE * 99 * BLOCK_SIZE)


def test_loads_are_drawn_and_measured() -> None:
    load = Load.draw(short, 60.0, count=40, live=10, seed=1)
    events = list(load.events())
    assert [event.time for event in events] == sorted(event.time for event in events)
    assert len(events) == 2 * sum(map(len, load.turns)) == 2 * 6 * 40
    lone = Load([0.0], [((64, 100),)], [[0.0]])
    assert lone.held == pytest.approx(164 / BLOCK_SIZE)


def test_conversations_are_those_described() -> None:
    turns = turns_of_conversations()
    assert len(turns) == 400
    new = [each for conversation in turns for each in conversation]
    assert len(new) / 400 == pytest.approx(5.76, abs=0.01)
    assert sum(prompt for prompt, _ in new) / len(new) == pytest.approx(148.0, abs=0.1)
    assert sum(answer for _, answer in new) / len(new) == pytest.approx(420.1, abs=0.1)
