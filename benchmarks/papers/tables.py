"""Prints tables of simulated figures beside published ones, in Markdown."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Table:
    """Holds a table, row by row."""

    title: str
    heads: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        assert len(cells) == len(self.heads)
        self.rows.append(cells)

    def __str__(self) -> str:
        lines = [self.heads, ("---",) * len(self.heads), *self.rows]
        return "\n".join([f"### {self.title}", "", *(f"| {' | '.join(line)} |" for line in lines)])
