"""Shares the machine fairly among owners, within each priority.

Start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996), with service measured as in Sheng et al., Fairness in
Serving Large Language Models (OSDI 2024): tokens of prompts and outputs, divided by the owner's weight. The key of a
request is the service of its owner so far, but no less than that of the least served owner that has requests now: an
owner with rare requests is served soon and accumulates no credit, and a flood of requests queues behind itself. With
one owner, keys are in the order of arrival.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import chain

from splitfuse.core.request import Request


class FairShare:
    """Counts the service of each owner, in tokens over weight."""

    def __init__(self) -> None:
        self._service: defaultdict[str, float] = defaultdict(float)
        self._levels: defaultdict[int, float] = defaultdict(float)
        """Service of the least served owner that has requests, for each priority; it never falls."""

    def key(self, request: Request, *, running: Sequence[Request], waiting: Sequence[Request]) -> float:
        """Return the `fair_share_key` of a new request, and charge its whole prompt: a burst is many requests. The
        prompt of one that goes on here was charged on another engine; it comes first by its `is_new`, and its key is no
        less than if it were new, so that its owner's other prompts gain nothing.
        """
        service, owner, priority = self._service, request.owner, request.priority
        levels = {each.owner: service[each.owner] for each in running if each.priority == priority}
        for each in waiting:
            if each.priority == priority:
                levels[each.owner] = min(levels.get(each.owner, each.fair_share_key), each.fair_share_key)
        same = (each for each in chain(running, waiting) if (each.owner, each.priority) == (owner, priority))
        level = min(levels.values()) if levels else max(service.values(), default=0.0)
        self._levels[priority] = max(self._levels[priority], level)
        key = max(service[owner], self._levels[priority], max((each.fair_share_key for each in same), default=0.0))
        if request.is_new:
            service[owner] = key + request.num_prompt_tokens / request.weight
        return key

    def charge_tokens(self, request: Request, count: int) -> None:
        """Charge the owner of a request for generated tokens."""
        self._service[request.owner] += count / request.weight

    def refund(self, request: Request) -> None:
        """Give back what was charged for the part of a finished request's prompt which was never computed."""
        if not request.is_new:
            return
        computed = max(request.num_scheduled, request.kv.num_lost)
        self._service[request.owner] -= max(request.num_prompt_tokens - computed, 0) / request.weight
