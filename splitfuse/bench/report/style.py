"""Gives all figures one look: colours for print and the colour-blind, a light grid, labels at the ends of lines.

Needs matplotlib, which is the extra `bench`: call `require_matplotlib` first.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

from splitfuse.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0f6cbd", "#d9480f", "#2b8a3e", "#9c36b5", "#b8860b", "#0b7285", "#c2255c", "#5c6770")
INK, PALE = "#1f2933", "#8a94a0"
LABEL_SIZE = 8.5
LINE_SPACING = 1.25


def look() -> AbstractContextManager[None]:
    """Return a context in which figures have the look of figures.mplstyle."""
    import matplotlib

    context: AbstractContextManager[None] = matplotlib.rc_context(fname=Path(__file__).with_name("figures.mplstyle"))
    return context


def require_matplotlib() -> None:
    """Raise a ConfigError that names the extra if matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError('matplotlib is not installed: pip install "splitfuse[bench]"')


def as_svg(figure: Figure) -> str:
    """Return the figure as an SVG element to embed in a page."""
    file = io.StringIO()
    with look():
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


@dataclass(frozen=True)
class EndLabel:
    """Holds a label to the right of the end of a line."""

    x: float
    y: float
    text: str
    colour: str


def write_end_labels(axes: Axes, labels: Sequence[EndLabel]) -> None:
    """Write each label at the height of its line's end, or as near as possible. Call it once the limits are set."""
    figure = axes.get_figure()
    assert figure is not None
    line_height = LINE_SPACING * LABEL_SIZE / (axes.get_window_extent().height * 72.0 / figure.dpi)  # of the axes
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = sorted(((to_axes.transform((label.x, label.y))[1], label) for label in labels), key=lambda end: end[0])
    texts = ["\n".join(wrapped for line in label.text.split("\n") for wrapped in wrap(line, 24)) for _, label in ends]
    sizes = [line_height * (1.1 + text.count("\n")) for text in texts]
    centres = spaced([height for height, _ in ends], sizes)
    for centre, text, (_, label) in zip(centres, texts, ends, strict=True):
        axes.annotate(
            text,
            xy=(1.0, centre),
            xycoords="axes fraction",
            xytext=(9, 0),
            textcoords="offset points",
            color=label.colour,
            fontsize=LABEL_SIZE,
            linespacing=LINE_SPACING,
            va="center",
            annotation_clip=False,
        )


def spaced(wished: Sequence[float], sizes: Sequence[float]) -> list[float]:
    """Return centres of labels of these sizes which do not overlap, near the ascending wished ones, in the same order.

    Labels that would touch are stacked, and the stack is centred on the mean of their wishes.

    >>> spaced([0.0, 0.0], [1.0, 1.0])
    [-0.5, 0.5]
    """
    stacks: list[list[int]] = []

    def low(stack: list[int]) -> float:
        centre = sum(wished[i] for i in stack) / len(stack)
        return centre - sum(sizes[i] for i in stack) / 2

    for i in range(len(wished)):
        stacks.append([i])
        while len(stacks) > 1 and low(stacks[-1]) < low(stacks[-2]) + sum(sizes[i] for i in stacks[-2]):
            last = stacks.pop()
            stacks[-1] += last
    centres = []
    for stack in stacks:
        place = low(stack)
        for i in stack:
            centres.append(place + sizes[i] / 2)
            place += sizes[i]
    return centres
