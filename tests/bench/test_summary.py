"""Rows of a table from results, and results from their file."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from bench_points import RESULTS, point
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from splitfuse.bench.results import MeasuredRequest, Point, load, save
from splitfuse.bench.summary import Spread, cells, rows
from splitfuse.cli import tables
from splitfuse.errors import ConfigError


def test_repetitions_are_one_row_in_the_order_of_clients() -> None:
    two, eight = rows(RESULTS)
    assert (two.load, eight.load) == ("2", "8")
    assert two.throughput == Spread(2.0, 2.0, 2.0, 2)
    assert eight.throughput == Spread(3.0, 2.0, 4.0, 2) and str(eight.throughput) == "3 ±1"
    assert two.littles_law == pytest.approx(2 / 0.99)
    assert two.goodput[6.0].mean == 0.0 and two.ttft[50] == 0.25
    assert two.itl[95] == pytest.approx(0.74)
    assert (two.num_counted, two.num_failed) == (24, 0)


def test_one_repetition_has_no_spread() -> None:
    (row,) = rows(replace(RESULTS, points=(point(4, 1.0),)))
    assert str(row.throughput) == "4"


HAND_MADE = (  # of prompts of 10 tokens; their gaps are 0.1, 0.1, 0.4 and 0.2, 0.2, 0.2, and the third failed
    MeasuredRequest(0, 1.0, 10, (1.5, 1.6, 1.7, 2.1)),
    MeasuredRequest(1, 1.0, 10, (1.75, 1.95, 2.15, 2.35)),
    MeasuredRequest(2, 1.0, 10, (1.5,), "it broke"),
)


@pytest.mark.parametrize(
    ("targets", "num_met"),
    [
        ({"ttft": "600ms"}, 1),
        ({"ttft": "80ms/token"}, 2),
        ({"tpot": "210ms"}, 2),  # means of 0.2 and 0.2 s
        ({"tpot": "190ms"}, 0),
        ({"itl": "150ms/p60"}, 1),  # two of three gaps of the first
        ({"itl": "150ms/p70"}, 0),
        ({"itl": "210ms"}, 1),  # moving averages of at most 0.22 and 0.2 s
        ({"itl": "230ms"}, 2),
        ({"ttft": "600ms", "itl": "210ms", "tpot": "1s"}, 0),
        ({"ttft": "600ms", "itl": "150ms/p60", "tpot": "210ms"}, 1),
    ],
)
def test_goodput_at_given_targets_equals_that_by_hand(targets: dict[str, str], num_met: int) -> None:
    results = replace(RESULTS, points=(Point(3, None, (0.0, 4.0), HAND_MADE),))
    (row,) = rows(results, (), targets)
    assert row.slo_goodput is not None and row.slo_goodput.mean == num_met / 4.0
    assert cells(row, ())["goodput\nat SLO"] == f"{num_met / 4.0:.3g}"
    assert rows(results)[0].slo_goodput is None and "goodput\nat SLO" not in cells(rows(results, ())[0], ())


@pytest.mark.parametrize(
    ("width", "targets", "num_tables"),
    [(80, {}, 2), (80, {"tpot": "1s"}, 3), (160, {"tpot": "1s"}, 1)],
    ids=["narrow", "narrow, with targets", "wide"],
)
def test_wide_table_is_printed_in_parts(
    width: int, targets: dict[str, str], num_tables: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    monkeypatch.setattr(tables, "console", lambda: console)
    tables.print_results(RESULTS, (2.0, 4.0, 6.0), targets)
    assert isinstance(console.file, io.StringIO)
    printed = console.file.getvalue()
    assert printed.count("clients") == num_tables
    assert ("at SLO" in printed) == bool(targets)
    assert all(head in printed for head in ("goodput", "at 6", "P99", "failed", "3 ±1"))
    assert "…" not in printed


TIMES = st.lists(st.floats(0, 1e6), max_size=5).map(tuple)
RECORDS = st.builds(MeasuredRequest, st.integers(0), st.floats(0, 1e6), st.integers(0), TIMES, st.none() | st.text())


@given(st.lists(RECORDS, max_size=5).map(tuple))
def test_results_are_read_as_written(
    tmp_path_factory: pytest.TempPathFactory, records: tuple[MeasuredRequest, ...]
) -> None:
    results = replace(RESULTS, points=(Point(None, 1.5, (0.0, 1.0), records),))
    file = tmp_path_factory.mktemp("results") / "results.json"
    save(results, file)
    assert load(file) == results


def test_files_without_results_are_rejected(tmp_path: Path) -> None:
    for content in (b"{", b'{"system": 1}', b"[]"):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(ConfigError, match="is not a file of benchmark results"):
            load(tmp_path / "x.json")
    with pytest.raises(ConfigError, match=r"none.json cannot be read: No such file"):
        load(tmp_path / "none.json")
