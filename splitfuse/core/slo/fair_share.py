"""Whose turn it is: classes of priority, and within a class fair shares of the machine between those who ask.

Start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996) in the currency of Sheng et al., Fairness in Serving Large
Language Models (OSDI 2024): tokens of prompts and of answers, over the weight of whoever asks. A request's turn is what
its owner has had, but no less than what the least served of those who are being served has had: who asks rarely comes
soon and saves nothing up, who floods waits behind himself. With one owner, turns are in the order of arrival.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import chain

from splitfuse.core.request import Priority, Request


class FairShare:
    """What each owner has had, in tokens over weight."""

    def __init__(self) -> None:
        self._had: defaultdict[str, float] = defaultdict(float)
        self._levels: defaultdict[Priority, float] = defaultdict(float)
        """Of each class, what the least served has had, of those who are being served."""

    def turn(self, request: Request, *, running: Sequence[Request], waiting: Sequence[Request]) -> float:
        """Of a new request. Its prompt counts at once: a burst is many requests, not one."""
        had, owner, its_class = self._had, request.owner, request.priority
        levels = {each.owner: had[each.owner] for each in running if each.priority == its_class}
        for each in waiting:
            if each.priority == its_class:
                levels[each.owner] = min(levels.get(each.owner, each.turn), each.turn)
        own = (each.turn for each in chain(running, waiting) if (each.owner, each.priority) == (owner, its_class))
        level = min(levels.values()) if levels else max(had.values(), default=0.0)
        self._levels[its_class] = max(self._levels[its_class], level)
        turn = max(had[owner], self._levels[its_class], max(own, default=0.0))
        had[owner] = turn + request.num_prompt / request.scheduling.weight
        return turn

    def generated(self, request: Request) -> None:
        """One more token of its answer."""
        self._had[request.owner] += 1.0 / request.scheduling.weight

    def ended(self, request: Request) -> None:
        """Early, perhaps: what was not computed of its prompt has not been had."""
        computed = max(request.num_scheduled, request.num_lost)
        self._had[request.owner] -= max(request.num_prompt - computed, 0) / request.scheduling.weight
