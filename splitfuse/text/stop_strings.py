"""Finds stop strings in a stream of text: how much may be shown already, and where the output ends.

The output ends with the first character that completes any stop string, whatever follows: that is the earliest moment
at which generation can stop. If several are complete there, the longest, which begins earliest, counts. So the result
depends on the text alone, never on how it was cut into pieces or tokens.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterable


class StopStrings:
    """Searches one output for several strings at once, incrementally.

    Aho and Corasick, "Efficient string matching: an aid to bibliographic search", CACM 1975: a state per beginning of a
    stop string, a transition per character, and the state's depth is just the number of characters to hold back.

    >>> StopStrings(["END"]).push("a story EN")
    ('a story ', None)
    """

    def __init__(self, stop: Iterable[str]) -> None:
        self._automaton = _automaton(tuple(stop))
        self._state = 0
        self._held = ""
        self.length = 0
        """Number of characters released so far; after a match, the length of the output."""

    def push(self, text: str) -> tuple[str, str | None]:
        """Return the text that may be shown now and was not yet, and the stop string once one is complete.

        The text before it is then released, and nothing may be pushed any more.
        """
        automaton = self._automaton
        if automaton.is_empty:
            self.length += len(text)
            return text, None
        for end, character in enumerate(text, start=1):
            self._state = automaton.step(self._state, character)
            if size := automaton.matched[self._state]:
                self._held += text[:end]
                stop = self._held[-size:]
                released = self._release(size)
                self._held = ""
                return released, stop
        self._held += text
        return self._release(automaton.depth[self._state]), None

    def finish(self) -> str:
        """Return the text that was held back for a stop string, at the end of an output, or of a part, without one."""
        self._state = 0
        return self._release(0)

    def _release(self, keep: int) -> str:
        cut = len(self._held) - keep
        released, self._held = self._held[:cut], self._held[cut:]
        self.length += len(released)
        return released


@functools.lru_cache(maxsize=16)
def _automaton(stop: tuple[str, ...]) -> _Automaton:
    """Return the automaton, built once for all choices and prompts of a request; it is immutable."""
    return _Automaton(stop)


class _Automaton:
    """Finds the longest beginning of a stop string that a text ends with: a state, 0 for the empty one."""

    def __init__(self, stop: Iterable[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._fallback = [0]  # the longest other state that a state's text ends with
        self.depth = [0]  # length of a state's text
        self.matched = [0]  # length of the longest stop string that a state's text ends with
        for string in stop:
            self._insert(string)
        self._link()

    @property
    def is_empty(self) -> bool:
        """Return whether there are no stop strings."""
        return len(self.depth) == 1

    def step(self, state: int, character: str) -> int:
        """Return the state after one more character."""
        while (following := self._next[state].get(character)) is None:
            if state == 0:
                return 0
            state = self._fallback[state]
        return following

    def _insert(self, string: str) -> None:
        state = 0
        for character in string:
            if character not in self._next[state]:
                self._next[state][character] = len(self.depth)
                self._next.append({})
                self._fallback.append(0)
                self.depth.append(self.depth[state] + 1)
                self.matched.append(0)
            state = self._next[state][character]
        self.matched[state] = len(string)

    def _link(self) -> None:
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            # The fallback is shorter, so it is linked already; the state's own text, if a stop string, is longer.
            self.matched[state] = self.matched[state] or self.matched[self._fallback[state]]
            for character, following in self._next[state].items():
                self._fallback[following] = self.step(self._fallback[state], character)
                queue.append(following)
