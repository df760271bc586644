"""The choice of a cell: consistent hashing whose cells get no more than they have time for."""

from __future__ import annotations

from random import Random

import pytest

from splitfuse.core.replicas.cells import Cells, Prefix
from splitfuse.errors import ConfigError, EngineUnavailableError


def make(count: int = 20, *, size: int = 10) -> Cells:
    cells = Cells(f"c{number}" for number in range(count))
    for number in range(count):
        cells.report(f"c{number}", 0.0, replicas=size)
    return cells


def prefix(name: str, seconds: float = 0.5) -> list[Prefix]:
    return [Prefix(name.encode(), seconds)]


def test_a_prompt_stays_in_its_cell_until_that_has_more_to_do_than_it_saves() -> None:
    cells = make()
    home = cells.choose(prefix("key"), 1.0)
    assert {cells.choose(prefix("key"), 1.0) for _ in range(5)} == {home}
    chosen = [cells.choose(prefix("key"), 1.0) for _ in range(2000)]
    assert len(set(chosen)) > 15, "a prompt alone is spread over nearly all"
    counts = [chosen.count(name) for name in set(chosen)]
    assert max(counts) < 1.3 * 2000 / 20


def test_a_cell_that_is_lost_moves_its_own_prompts_only() -> None:
    keys = [f"{number}" for number in range(500)]
    cells = make()
    homes = {key: cells.choose(prefix(key, 0.0), 0.0) for key in keys}
    cells.report("c3", None)
    after = {key: cells.choose(prefix(key, 0.0), 0.0) for key in keys}
    assert all(after[key] == homes[key] for key in keys if homes[key] != "c3")
    assert len({after[key] for key in keys if homes[key] == "c3"}) > 3
    again = make()
    assert {key: again.choose(prefix(key, 0.0), 0.0) for key in keys} == homes, "another gateway chooses the same"


def test_a_loaded_cell_gives_to_the_less_loaded_of_two() -> None:
    home = make().choose(prefix("key"), 0.5)
    random = Random(3)
    for _ in range(50):
        cells = make()
        loads = {f"c{number}": 10.0 * random.random() for number in range(20)} | {home: 100.0}  # of ten replicas
        for name, load in loads.items():
            cells.report(name, load, replicas=10)
        assert cells.choose(prefix("key", 10.5), 12.0) == home, "computing it elsewhere takes as long"
        other = cells.choose(prefix("key", 8.5), 12.0)
        assert loads[other] < 10.0
        cells.report(other, loads[home] - 1.0, replicas=10)
        assert cells.choose(prefix("key", 99.0), 99.0) == other, "which has had it, and has less to do than its own"


def test_a_conversation_stays_where_its_turns_were() -> None:
    cells = make(5)
    shared = Prefix(b"instructions", 0.2)
    for number in range(200):  # the instructions alone are in all cells
        cells.choose([shared, Prefix(b"user %d" % number, 0.3)], 1.0)
    first = [cells.choose([shared, Prefix(b"a", 0.3)], 1.0), cells.choose([shared, Prefix(b"b", 0.3)], 1.0)]
    for number in range(5):
        cells.report(f"c{number}", 0.1 * number, replicas=1)
    for cell, name in zip(first, (b"a", b"b"), strict=True):
        turn = [shared, Prefix(name, 0.7), Prefix(name + b" again", 0.8)]
        assert cells.choose(turn, 1.0) == cell
    for cell in first:
        cells.report(cell, 9.0, replicas=1)
    assert cells.choose([shared, Prefix(b"a", 0.7)], 1.0) not in first, "it has more to do than the conversation saves"


def test_cells_that_were_tried_are_left_out() -> None:
    cells = make(3)
    tried: list[str] = []
    for _ in range(3):
        tried.append(cells.choose(prefix("key"), 1.0, without=tried))
    assert sorted(tried) == ["c0", "c1", "c2"]
    with pytest.raises(EngineUnavailableError, match="no cell"):
        cells.choose(prefix("key"), 1.0, without=tried)


def test_cells_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="at least one"):
        Cells([])
    cells = Cells(["a"])
    with pytest.raises(ConfigError, match="at least 1 replica"):
        cells.report("a", 1.0, replicas=0)
    cells.report("a", None)
    with pytest.raises(EngineUnavailableError, match="no cell"):
        cells.choose(prefix("key"), 1.0)
