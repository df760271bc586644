"""Keeps simulated figures in a file, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from splitfuse.errors import ConfigError

Figure = TypeVar("Figure", bool, float, list[float])

ROOT = Path(__file__).parents[2]
SIMULATED = ("benchmarks/papers", "splitfuse/bench", "splitfuse/core", "splitfuse/simulator")
"""Folders of the sources that a figure depends on."""


class Kept:
    """Computes each figure once for the same sources: those of others are not used, and stay in the file."""

    def __init__(self, path: Path | None = None) -> None:
        """Read a file, or keep nothing without one. Raises ConfigError for a file of something else."""
        self._path, self._sources = path, sources()
        self._figures: dict[str, bool | float | list[float]] = {}
        if path is None or not path.exists():
            return
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                kept = json.loads(line)
                if kept["sources"] == self._sources:
                    self._figures[kept["what"]] = kept["figure"]
            except (ValueError, KeyError, TypeError):
                raise ConfigError(
                    f"line {number} of {path} is not a figure that was kept: give --keep another file"
                ) from None

    def find(self, *what: object, compute: Callable[[], Figure]) -> Figure:
        """Return the figure that `what` describes, computed if it was not kept."""
        name = " | ".join(map(str, what))
        if name in self._figures:
            return self._figures[name]  # type: ignore[return-value]
        began = time.process_time()
        figure = self._figures[name] = compute()
        seconds = time.process_time() - began
        print(f"    {name}: {figure} ({seconds:.1f} s)", flush=True)
        if self._path is not None:
            line = {"what": name, "figure": figure, "seconds": round(seconds, 1), "sources": self._sources}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        return figure  # type: ignore[return-value]


def sources() -> str:
    """Return a digest of all sources that figures depend on."""
    digest = hashlib.sha256()
    for folder in SIMULATED:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".csv", ".txt"):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
