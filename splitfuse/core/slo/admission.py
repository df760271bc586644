"""Admits `on_time_only` requests: says whether a new request can meet its SLO, and when it could if not now.

It can if, by the test that the order of claims follows (feasibility.py),

- its prompt is in time, and so are all that would be without it;
- it can keep its ITL and TPOT targets together with all that decode then;
- a sequence slot and blocks are free for it in time: running requests end with `max_tokens` at the latest.

Unless the engine is idle, an eighth of the time is left over (ON_TIME_ONLY_SHARE). Steps are counted at their worst:
one that ends at each deadline of a decode, and one for each prompt.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter, itemgetter
from typing import Protocol

from splitfuse.core.policy import split_running
from splitfuse.core.request import Request, RequestStatus
from splitfuse.core.slo.feasibility import Feasibility
from splitfuse.core.slo.fewest_late import ON_TIME_ONLY_SHARE
from splitfuse.core.slo.request_slo import MISSED_ITL_FACTOR
from splitfuse.core.step_builder import FreeResources
from splitfuse.errors import SloUnattainableError, whole_seconds

MakeFeasibility = Callable[..., Feasibility]
"""Type of a function that returns the Feasibility of decodes."""


class Unfinished(Protocol):
    """Holds what an engine has to do: its RequestQueue, or what is known of it elsewhere."""

    @property
    def running(self) -> Sequence[Request]: ...
    @property
    def waiting(self) -> Sequence[Request]: ...
    @property
    def fetching(self) -> Sequence[Request]: ...
    @property
    def free(self) -> FreeResources: ...


def check_on_time(request: Request, queue: Unfinished, make_feasibility: MakeFeasibility, *, now: float) -> None:
    """Raise SloUnattainableError if a new request, which is not in the queue, could not meet its SLO if it were
    admitted now. Its `retry_after` is when it could by what is known now: infinity if it never can.
    """
    _check_alone(request, make_feasibility)
    make_feasibility = partial(make_feasibility, now=now, priority=request.priority)
    decodes, prefills = split_running([each for each in queue.running if each.num_unscheduled])
    prefills += [*queue.waiting, *queue.fetching]
    share = ON_TIME_ONLY_SHARE if decodes or prefills else 1.0
    before = [each.request for each in make_feasibility(decodes).feasible(prefills, share=share)]
    above = [each for each in prefills if each.priority < request.priority and each not in before]
    ahead = sorted([*before, *above, request], key=attrgetter("priority", "slo.deadline"))
    feasibility = make_feasibility(decodes, soon=ahead[:-1])  # of which each takes time from the next
    ends = _latest_ends(queue.running, feasibility, priority=request.priority)
    num_ended, is_enough = _num_to_end(ends, ahead, queue, make_feasibility)
    start = ends[num_ended - 1][0] if num_ended else now
    done = feasibility.room(start) if start > now else 0.0  # nothing of it before
    after = feasibility.feasible([*prefills, request], share=share)
    deadline, own = request.slo.deadline, feasibility.seconds(request)
    is_in_time = deadline == math.inf or (
        {each.request for each in after}.issuperset([*before, request])
        and _have_time(ahead, feasibility, share=share)
        and feasibility.with_floor(done + own) <= share * feasibility.room(deadline)
    )
    if is_enough and is_in_time:
        return
    work = max(sum(map(feasibility.seconds, ahead)), done + own) / share  # after all that are before it
    first_token = feasibility.time_for(work)
    if first_token == math.inf:  # decodes leave prompts nothing: when all have ended
        ends += _latest_ends([*before, *above], feasibility, priority=request.priority)
        first_token = max([now, *(end for end, _ in ends)]) + work
    wait = max(first_token - min(deadline, first_token), start - now, feasibility.step_of_decodes)
    reason = f"its first token would come after {first_token - now:.3g} s"
    raise _unattainable(f"{reason}; try again in {whole_seconds(wait)} s", wait)


def _unattainable(reason: str, retry_after: float) -> SloUnattainableError:
    return SloUnattainableError(f"the request cannot meet its SLO: {reason}", retry_after=retry_after)


def _check_alone(request: Request, make_feasibility: MakeFeasibility) -> None:
    """Raise SloUnattainableError if a request could not meet its SLO even on an idle engine."""
    arrival = request.slo.arrival_time
    idle = make_feasibility((), now=arrival)
    first_token = idle.time_for(idle.seconds(request)) - arrival
    if first_token > request.slo.ttft_target:
        raise _unattainable(f"its first token may take {first_token:.3g} s even on an idle engine", math.inf)
    if not make_feasibility((), soon=[request], now=arrival).is_sustainable:
        gap = idle.floor / idle.safety_factor
        raise _unattainable(f"its tokens may take {gap:.3g} s each even on an idle engine", math.inf)


def _have_time(ahead: Sequence[Request], feasibility: Feasibility, *, share: float) -> bool:
    """Return whether all of `ahead` that are `on_time_only` are in time with a share of the machine, one after the
    other, each in a step of its own.
    """
    work = 0.0
    for number, request in enumerate(ahead, start=1):
        work += feasibility.seconds(request) / share
        deadline = request.slo.deadline
        if request.on_time_only and deadline < math.inf and feasibility.spare(deadline, work, num_steps=number) < 0.0:
            return False
    return True


def _latest_ends(
    requests: Sequence[Request], feasibility: Feasibility, *, priority: int
) -> list[tuple[float, Request]]:
    """Return the times at which requests have generated `max_tokens` at the latest, in order. Those of a priority below
    `priority` may be late by then.
    """
    ends = []
    for request in requests:
        gap = request.slo.itl_target or feasibility.step_of_decodes
        if request.slo.missed or request.priority > priority:
            gap *= MISSED_ITL_FACTOR
        ends.append((feasibility.now + (request.max_tokens - len(request.output_token_ids)) * gap, request))
    return sorted(ends, key=itemgetter(0))


def _num_to_end(
    ends: Sequence[tuple[float, Request]],
    ahead: Sequence[Request],
    queue: Unfinished,
    make_feasibility: MakeFeasibility,
) -> tuple[int, bool]:
    """Return how many of the running requests must end until there are sequence slots and blocks for the waiting ones
    of `ahead`, and time in each step for all of them to decode together with those that still run; and True. If even
    the end of all is not enough, returns their number and False.
    """
    new = [request for request in ahead if request.status is RequestStatus.WAITING]

    def is_enough(num_ended: int) -> bool:
        free = queue.free
        for _, request in ends[:num_ended]:
            free = free.after(request)
        left = [request for _, request in ends[num_ended:]]
        decodes, _ = split_running([request for request in left if request.num_unscheduled])
        return free.fit(new, num_running=len(left)) and make_feasibility(decodes, soon=ahead).is_sustainable

    num_ended = bisect_left(range(len(ends)), True, key=is_enough)
    return num_ended, num_ended < len(ends) or is_enough(num_ended)
