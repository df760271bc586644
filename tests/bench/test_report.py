"""The report: self-contained, complete, in the order of clients. Figures need the extra `bench`."""

import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from bench_points import RESULTS, point

from splitfuse.bench.report.page import write_report
from splitfuse.errors import ConfigError

pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install splitfuse[bench]")

from step_timeline import Piece, StepShown, draw_steps, save_picture

from splitfuse.bench.report import figures
from splitfuse.bench.results import Results
from splitfuse.bench.summary import rows

SIMULATED = replace(RESULTS, simulated=True)
OTHER = replace(RESULTS, system="<vLLM> & co", points=(point(2, 1.5), point(8, 6.0)))
VOID = ("meta", "br", "path", "use", "rect")


class Elements(HTMLParser):
    """Opened and closed elements in balance, and what they refer to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def page(folder: Path, *results: Results) -> str:
    write_report(results, folder / "page.html", title="Ours & theirs")
    return (folder / "page.html").read_text(encoding="utf-8")


def test_page_is_self_contained(tmp_path: Path) -> None:
    text = page(tmp_path, RESULTS, SIMULATED, OTHER)
    elements = Elements()
    elements.feed(text)
    assert elements.open == []
    assert all(reference.startswith("#") for reference in elements.references)
    assert "<script" not in text and "@import" not in text and not re.search(r"url\((?!#)", text)
    assert text.count("<svg") == 3 and "<h1>Ours &amp; theirs</h1>" in text
    assert "&lt;vLLM&gt; &amp; co" in text and "<vLLM>" not in text
    assert "splitfuse int8, simulated" in text and "splitfuse bench run" in text and "1.00 GB" in text


def test_scaling_is_drawn_when_there_are_replicas(tmp_path: Path) -> None:
    replicas = [replace(RESULTS, replicas=count) for count in (1, 4, 2)]
    assert page(tmp_path, *replicas).count("<svg") == 4
    assert page(tmp_path, RESULTS, replace(RESULTS, tensor_parallel_size=2)).count("<svg") == 4


def test_replicas_have_their_own_figure() -> None:
    results = [replace(RESULTS, replicas=4), RESULTS, replace(OTHER, replicas=2), replace(SIMULATED, replicas=2)]
    series = [figures.Series(each, tuple(rows(each)), "#000000") for each in results]
    assert figures.smallest(series) == series[1:]


def test_panels_have_room_for_all_lines() -> None:
    """They share a scale, which is that of the highest, whichever panel it is in."""
    series = [figures.Series(RESULTS, tuple(rows(RESULTS, (6.0, 1.0))), "#000000")]
    panels = figures.goodput(series, (6.0, 1.0)).axes
    highest = max(y for axes in panels for line in axes.lines for y in line.get_ydata())
    assert highest > 1 and all(axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > highest for axes in panels)


def test_each_workload_has_its_own_figures(tmp_path: Path) -> None:
    other = replace(RESULTS, workload={**RESULTS.workload, "prompt": 1200.0})
    text = page(tmp_path, RESULTS, other)
    assert text.count("<svg") == 6 and "Prompts of 1200 tokens, answers of 64" in text


def test_lines_join_points_in_the_order_of_clients() -> None:
    """Saturation that turns back must show: throughput falls from 2 to 8 clients, and the line goes back with it."""
    back = replace(RESULTS, points=(point(8, 8.0), point(2, 1.0), point(16, 40.0)))
    series = [figures.Series(back, tuple(rows(back)), "#000000")]
    (axes,) = figures.throughput_latency(series).axes
    (line,) = (line for line in axes.lines if line.get_marker() == "o")
    assert list(line.get_xdata()) == pytest.approx([2.0, 1.0, 0.4])
    assert list(line.get_ydata()) == pytest.approx([0.99, 0.99 * 8, 0.99 * 40])


def test_simulated_lines_are_dashed_in_the_same_colour() -> None:
    colour = figures.colours(["a", "b", "a"])
    assert list(colour) == ["a", "b"] and colour["a"] != colour["b"]
    styles = [figures.Series(each, tuple(rows(each)), colour["a"]).style for each in (RESULTS, SIMULATED)]
    assert styles[0]["linestyle"] == "-" != styles[1]["linestyle"] and styles[0]["color"] == styles[1]["color"]


def test_open_loops_and_loads_without_success(tmp_path: Path) -> None:
    failed = tuple(replace(record, token_times=(), error="status 500") for record in point(2, 1.0).records)
    open_loop = replace(RESULTS, points=(replace(point(2, 1.0), clients=None, rate=2.0),))
    broken = replace(RESULTS, points=(replace(point(2, 1.0), records=failed),))
    text = page(tmp_path, open_loop, broken)
    assert "2/s" in text and text.count("<svg") == 3


def test_errors_have_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="nothing to report"):
        page(tmp_path, replace(RESULTS, points=()))
    with pytest.raises(ConfigError, match="cannot be written"):
        page(tmp_path / "none", RESULTS)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"splitfuse\[bench\]"):
        page(tmp_path, RESULTS)


def test_legend_names_all_lines() -> None:
    """A legend keeps the names of lines apart, however near the lines end."""
    same = replace(RESULTS, system="a system with a name that is longer than a line")
    series = [figures.Series(each, tuple(rows(each)), "#000000") for each in (RESULTS, SIMULATED, same)]
    for figure in (figures.throughput_latency(series), figures.goodput(series, (2.0,)), figures.token_latency(series)):
        legend = figure.axes[-1].get_legend()
        assert [text.get_text().replace("\n", " ") for text in legend.get_texts()] == [each.name for each in series]
        figure.draw_without_rendering()
        assert legend.get_window_extent().x1 <= figure.bbox.x1, "it has room"


def test_step_timeline(tmp_path: Path) -> None:
    steps = [
        StepShown([Piece("A", 13, False), Piece("B", 3, False)], 0.01, 0.012),
        StepShown([Piece("A", 1, True), Piece("B", 1, True)], 0.004, None),
    ]
    figure = draw_steps(steps, budget=16)
    above, below = figure.axes
    assert [bar.get_height() for bar in above.patches] == [13, 3, 1, 1]
    assert [bar.get_y() for bar in above.patches] == [0, 13, 0, 1]
    assert [bar.get_height() for bar in below.patches] == [10, 4]
    assert list(below.lines[0].get_ydata()) == [12.0]
    save_picture(figure, tmp_path / "passes.png")
    assert (tmp_path / "passes.png").read_bytes().startswith(b"\x89PNG")
