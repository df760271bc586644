"""Keeps simulated figures in a file, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeVar

from splitfuse.errors import ConfigError

Figure = TypeVar("Figure", bool, float, list[float])

ROOT = Path(__file__).parents[2]
SIMULATED = (
    "splitfuse/bench/*",
    "splitfuse/core/**/*",
    "splitfuse/simulator/*",
    "benchmarks/papers/*.csv",
    "benchmarks/papers/*.txt",
)
"""Patterns of the sources that all figures depend on, and the data."""


class Kept:
    """Computes each figure once for the same sources: those of others are not used, and stay in the file."""

    def __init__(self, path: Path | None = None) -> None:
        """Read a file, or keep nothing without one. Raises ConfigError for a file of something else."""
        self._path = path
        self._figures: dict[tuple[str, str], bool | float | list[float]] = {}
        if path is None or not path.exists():
            return
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                kept = json.loads(line)
                self._figures[kept["what"], kept["sources"]] = kept["figure"]
            except (ValueError, KeyError, TypeError):
                raise ConfigError(
                    f"line {number} of {path} is not a figure that was kept: give --keep another file"
                ) from None

    def find(self, paper: str, *what: object, compute: Callable[[], Figure]) -> Figure:
        """Return the figure of a paper that `what` describes, computed if it was not kept."""
        name, digest = " | ".join(map(str, (paper, *what))), sources(paper)
        if (name, digest) in self._figures:
            return self._figures[name, digest]  # type: ignore[return-value]
        began = time.process_time()
        figure = self._figures[name, digest] = compute()
        seconds = time.process_time() - began
        print(f"    {name}: {figure} ({seconds:.1f} s)", flush=True)
        if self._path is not None:
            line = {"what": name, "figure": figure, "seconds": round(seconds, 1), "sources": digest}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        return figure  # type: ignore[return-value]


@cache
def sources(paper: str) -> str:
    """Return a digest of all sources that figures of a paper depend on."""
    paths = {path for pattern in SIMULATED for path in ROOT.glob(pattern) if path.suffix in (".py", ".csv", ".txt")}
    paths |= {ROOT / "benchmarks/papers" / f"{name}.py" for name in ("data", paper.replace("-", "_"))}
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
