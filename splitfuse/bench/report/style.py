"""Gives all figures one look: colours for print and the colour-blind, a light grid, names next to the lines.

Needs matplotlib, which is the extra `bench`: call `require_matplotlib` first.
"""

from __future__ import annotations

import importlib.util
import io
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from splitfuse.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0f6cbd", "#d9480f", "#2b8a3e", "#9c36b5", "#b8860b", "#0b7285", "#c2255c", "#5c6770")
INK, PALE = "#1f2933", "#8a94a0"
LABEL_SIZE = 8.5


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


def write_legend(axes: Axes) -> None:
    """Name the lines of a panel to its right."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=LABEL_SIZE)
