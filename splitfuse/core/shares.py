"""Whose turn it is: classes of priority, and within a class fair shares of the machine between those who ask.

Start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996) in the currency of Sheng et al., Fairness in Serving Large
Language Models (OSDI 2024): tokens of prompts and of answers, over the weight of whoever asks. A request's turn is what
its owner has had, but no less than what the least served of those who are being served has had: who asks rarely comes
soon and saves nothing up, who floods waits behind himself. With one owner, turns are in the order of arrival.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from splitfuse.core.request import Request


class Shares:
    """What each owner has had, in tokens over weight."""

    def __init__(self) -> None:
        self._had: defaultdict[str, float] = defaultdict(float)
        self._level = 0.0
        """What the least served has had, of those who are being served."""

    def turn(self, request: Request, *, running: Iterable[Request], waiting: Iterable[Request]) -> float:
        """Of a new request. Its prompt counts at once: a burst is many requests, not one."""
        had = self._had
        levels = {each.owner: had[each.owner] for each in running}
        for each in waiting:
            levels[each.owner] = min(levels.get(each.owner, each.turn), each.turn)
        self._level = max(self._level, min(levels.values()) if levels else max(had.values(), default=0.0))
        turn = max(had[request.owner], self._level)
        had[request.owner] = turn + request.num_prompt / request.weight
        return turn

    def generated(self, request: Request) -> None:
        """One more token of its answer."""
        self._had[request.owner] += 1.0 / request.weight
