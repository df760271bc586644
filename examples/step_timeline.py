"""Draws a timeline of forward steps: the composition and the time of each. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from splitfuse.bench.report.style import INK, look, require_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REQUEST_COLOURS = (
    *("#4c78a8", "#e4813a", "#5b9f63", "#b5577d", "#c9a227"),
    *("#3f9c9c", "#8463a9", "#a2704b", "#d16d6a", "#6b7a8f"),
)
PALENESS = 0.62
"""Fraction of white in the colour of a prefill."""
LETTER_WIDTH = 0.05
"""Height of the lowest chunk that is labelled, as a fraction of the token budget."""


@dataclass(frozen=True)
class Piece:
    """Holds the tokens of one request in a step."""

    request: str
    tokens: int
    is_decode: bool
    """Kind of the tokens: a decode is one generated token, fed back."""


@dataclass(frozen=True)
class StepShown:
    """Holds one step, as it is drawn."""

    pieces: Sequence[Piece]
    seconds: float
    predicted: float | None = None
    """Time in seconds that the cost model predicted."""


def draw_steps(steps: Sequence[StepShown], *, budget: int, title: str = "") -> Figure:
    """Draw the tokens of each step by request (prefill pale, decode full); below, its time and prediction, if any."""
    require_matplotlib()
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure

    with look():
        figure = Figure(figsize=(max(7.0, min(0.16 * len(steps) + 2.2, 16.0)), 5.2), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1.6])
        names = list(dict.fromkeys(piece.request for each in steps for piece in each.pieces))
        colour = {name: REQUEST_COLOURS[i % len(REQUEST_COLOURS)] for i, name in enumerate(names)}
        pale = {name: [1 - (1 - part) * (1 - PALENESS) for part in to_rgb(colour[name])] for name in names}
        for number, each in enumerate(steps, start=1):
            bottom = 0
            for piece in each.pieces:
                above.bar(
                    number,
                    piece.tokens,
                    bottom=bottom,
                    width=1.0,
                    color=colour[piece.request] if piece.is_decode else pale[piece.request],
                    edgecolor="white",
                    linewidth=0.6,
                )
                bottom += piece.tokens
        for name in names:
            _write_name(above, name, steps, colour[name], budget)
        above.axhline(budget, color=INK, lw=0.8, ls=(0, (4, 2)))
        above.annotate(f"token budget {budget}", (1, budget), (0, 3), textcoords="offset points", fontsize=8, color=INK)
        above.set_ylim(0, 1.12 * max([budget, *(sum(p.tokens for p in each.pieces) for each in steps)]))
        above.set_ylabel("tokens")
        above.grid(visible=False, axis="x")
        above.set_title(title or "Tokens of each step: prefill pale, decode full")
        x = range(1, len(steps) + 1)
        below.bar(
            x, [1e3 * each.seconds for each in steps], width=1.0, color="#c6d3e1", edgecolor="white", linewidth=0.6
        )
        predicted = [(n, 1e3 * each.predicted) for n, each in zip(x, steps, strict=True) if each.predicted is not None]
        if predicted:
            numbers, values = zip(*predicted, strict=True)
            below.plot(numbers, values, color="#d9480f", lw=1.2, marker="o", markersize=2.5)
            below.set_title("step time: bars measured, line predicted", fontsize=9)
        else:
            below.set_title("step time", fontsize=9)
        below.set_ylabel("ms")
        below.set_xlabel("step")
        below.grid(visible=False, axis="x")
        below.set_xlim(0.4, len(steps) + 0.6)
        return figure


def save_picture(figure: Figure, path: Path) -> None:
    """Save the figure in the format of the file's suffix: .png, .svg or .pdf."""
    with look():
        figure.savefig(path, dpi=160)


def _write_name(axes: Axes, name: str, steps: Sequence[StepShown], colour: str, budget: int) -> None:
    """Write the name of a request in its largest chunk of prefill."""
    best: tuple[int, float, int] | None = None
    for number, each in enumerate(steps, start=1):
        bottom = 0
        for piece in each.pieces:
            if piece.request == name and not piece.is_decode and (best is None or piece.tokens > best[2]):
                best = number, bottom + piece.tokens / 2, piece.tokens
            bottom += piece.tokens
    if best is not None and best[2] >= LETTER_WIDTH * budget:
        axes.text(best[0], best[1], name, ha="center", va="center", fontsize=8, weight="bold", color=colour)
