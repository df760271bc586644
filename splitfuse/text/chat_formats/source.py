"""Reads a text that comes in pieces, for parsers that are generators: they yield where they need more of it.

What a parser does then depends on the text alone and never on how it was cut: every function here waits until what it
returns is certain.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Generator, Iterable
from typing import TypeAlias, TypeVar

T = TypeVar("T")
Steps: TypeAlias = Generator[None, None, T]
"""Generator that yields to wait for more text, and returns a value."""
Emit: TypeAlias = Callable[[str], None]
"""Function that receives text which is certain."""

SPACE = " \t\r\n"
"""Characters of white space between the parts of an answer."""


class Source:
    """Holds the text that has come and was not read."""

    def __init__(self) -> None:
        self.text = ""
        self.position = 0
        self.has_ended = False
        self._mark: int | None = None

    def feed(self, text: str) -> None:
        """Add text at the end."""
        start = self.position if self._mark is None else self._mark
        self.text = self.text[start:] + text
        self.position -= start
        self._mark = None if self._mark is None else 0

    def mark(self, back: int = 0) -> None:
        """Keep the text from `back` characters before the position on, for `reset`, until `commit`."""
        self._mark = self.position - back

    def reset(self, skip: int = 0) -> None:
        """Return to `skip` characters after the mark."""
        assert self._mark is not None
        self.position, self._mark = self._mark + skip, None

    def commit(self) -> None:
        """Let go of what was read since the mark."""
        self._mark = None

    def peek(self) -> Steps[str]:
        """Return the next character, without reading it; an empty text at the end."""
        while self.position == len(self.text) and not self.has_ended:
            yield
        return self.text[self.position : self.position + 1]

    def skip_space(self) -> Steps[str]:
        """Read white space, and return the character after it, without reading that."""
        while True:
            while self.position < len(self.text) and self.text[self.position] in SPACE:
                self.position += 1
            if self.position < len(self.text) or self.has_ended:
                return self.text[self.position : self.position + 1]
            yield

    def take(self, literal: str) -> Steps[bool]:
        """Read `literal` if it comes next, and return whether it does."""
        while True:
            found = self.text[self.position : self.position + len(literal)]
            if found == literal:
                self.position += len(literal)
                return True
            if self.has_ended or not literal.startswith(found):
                return False
            yield

    def ends_within(self, *literals: str) -> bool:
        """Return whether the text ends here, or within one of `literals`, which is read then."""
        rest = self.text[self.position :]
        does = self.has_ended and any(literal.startswith(rest) for literal in literals)
        self.position += len(rest) if does else 0
        return does

    def comes(self, literal: str) -> Steps[bool]:
        """Return whether `literal` comes next."""
        does = yield from self.take(literal)
        self.position -= len(literal) if does else 0
        return does

    def take_separator(self, closer: str) -> Steps[bool]:
        """Read a comma, and return whether there was one or `closer` comes next."""
        after = yield from self.skip_space()
        self.position += after == ","
        return after in (",", closer) and bool(after)

    def take_run(self, characters: re.Pattern[str], most: int = 0) -> Steps[str]:
        """Read and return the characters that `characters`, a pattern of one character, matches; at most `most`, or all
        of them.
        """
        found = ""
        while True:
            end = self.position
            while end < len(self.text) and characters.match(self.text, end) and not (most and len(found) >= most):
                found += self.text[end]
                end += 1
            self.position = end
            if end < len(self.text) or self.has_ended or (most and len(found) >= most):
                return found
            yield

    def copy(self, markers: Markers, emit: Emit, *, keeps_end: bool = True) -> Steps[str]:
        """Emit text until one of the markers, read and return that; an empty text at the end. There the beginning of
        a marker is emitted too, with `keeps_end`.
        """
        while True:
            if (found := markers.find(self.text, self.position)) is not None:
                emit(self.text[self.position : found.start()])
                self.position = found.end()
                return found[0]
            is_whole = self.has_ended and keeps_end
            end = len(self.text) if is_whole else markers.certain(self.text, self.position)
            emit(self.text[self.position : end])
            self.position = end
            if self.has_ended:
                self.position = len(self.text)
                return ""
            yield


class Markers:
    """Finds the first of several texts. None of them begins with another, or within another."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = tuple(texts)
        self._pattern = re.compile("|".join(map(re.escape, self.texts))) if self.texts else None
        self._firsts = frozenset(text[0] for text in self.texts)
        self._longest = max(map(len, self.texts), default=0)

    def find(self, text: str, start: int) -> re.Match[str] | None:
        """Return the first marker from `start` on."""
        return self._pattern.search(text, start) if self._pattern else None

    def certain(self, text: str, start: int) -> int:
        """Return the position up to which `text`, in which there is no marker, cannot belong to one."""
        for position in range(max(start, len(text) - self._longest + 1), len(text)):
            if text[position] in self._firsts:
                tail = text[position:]
                if any(marker.startswith(tail) for marker in self.texts):
                    return position
        return len(text)


@functools.lru_cache(maxsize=256)
def markers_of(*texts: str) -> Markers:
    """Return the markers, made once."""
    return Markers(texts)
