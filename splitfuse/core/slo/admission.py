"""Admits `on_time_only` requests: says whether a new request can meet its SLO, and when it could if not now.

It can if (a) its prefill is feasible, (b) it makes no other prefill infeasible, (c) the decodes leave it enough of each
step, and (d) a sequence slot and blocks are free for it in time: running requests end with `max_tokens` at the latest.

A decode is here a request which has generated a token: the forecast is about the time until a first token. A step asks
instead how many tokens a request needs now (`split_running` in core/policy.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from splitfuse.core.request import Request
from splitfuse.core.slo.cost_model import StepFeatures
from splitfuse.core.slo.deadline_planner import DeadlinePlanner
from splitfuse.core.slo.decode_load import DecodeLoad
from splitfuse.core.slo.fewest_late import ON_TIME_ONLY_SHARE
from splitfuse.core.slo.request_slo import MISSED_ITL_FACTOR
from splitfuse.core.step_builder import RequestQueue
from splitfuse.errors import SloUnattainableError, whole_seconds


def check_on_time(request: Request, planner: DeadlinePlanner, queue: RequestQueue, *, now: float) -> None:
    """Raise SloUnattainableError if a new request, which is not in the queue, could not meet its SLO if it were
    admitted now. Its `retry_after` is when it could by what is known now: infinity if it never can.
    """
    running, waiting = queue.running, queue.waiting
    decodes = [r for r in running if r.output_token_ids]
    prefills = [*(r for r in running if not r.output_token_ids), *waiting]
    seconds = planner.step_limit(decodes, prefills, arriving=[*prefills, request]).seconds
    seconds = min(seconds, _whole_step(planner, [*decodes, *prefills, request]))
    share = ON_TIME_ONLY_SHARE
    before = planner.feasible(prefills, DecodeLoad(decodes), seconds=seconds, now=now, share=share)
    load = DecodeLoad([*decodes, *before])  # these will decode when its turn comes
    per_step = share * planner.prefill_tokens(load, seconds)
    ahead = [r for r in prefills if r in before or r.priority < request.priority]
    arriving = [*(r for r in ahead if r in waiting), request]
    start, is_certain = _wait_for_resources(arriving, planner, queue, seconds)

    def prefill_time(tokens: int) -> float:
        return math.ceil(tokens / per_step) * seconds if per_step else math.inf

    allowed = request.slo.deadline - now
    alone = _ttft_alone(request, planner)
    if alone == math.inf:
        raise _unattainable("no step of this engine is short enough for its targets", math.inf)
    if alone > allowed:
        raise _unattainable(f"its first token takes {alone:.3g} s even on an idle engine", math.inf)
    own, queued = prefill_time(request.num_unscheduled), sum(r.num_unscheduled for r in ahead)
    after = planner.feasible([*prefills, request], load, seconds=seconds, now=now, share=share)
    itl_target = request.slo.itl_target
    meets_itl = not itl_target or seconds <= itl_target
    meets_ttft = is_certain and start + own <= allowed and (allowed == math.inf or after == before | {request})
    if meets_itl and meets_ttft:
        return
    ttft = max(start, prefill_time(queued)) + own  # at the latest, after all that come before it
    if ttft == math.inf:  # the decodes leave prefills nothing: when they have ended
        ends = _latest_ends(request, running, seconds)
        ttft = max([start, *ends]) + alone * (1 + queued / request.num_unscheduled)
    wait = max(ttft - allowed, seconds)
    raise _unattainable(f"its first token would come after {ttft:.3g} s; try again in {whole_seconds(wait)} s", wait)


def _unattainable(reason: str, retry_after: float) -> SloUnattainableError:
    return SloUnattainableError(f"the request cannot meet its SLO: {reason}", retry_after=retry_after)


def _ttft_alone(request: Request, planner: DeadlinePlanner) -> float:
    """Return the seconds until its first token on an idle engine; infinity if no step is short enough for its ITL
    target.
    """
    seconds = min(planner.step_limit([], [], arriving=[request]).seconds, _whole_step(planner, [request]))
    per_step = planner.prefill_tokens(DecodeLoad([]), seconds)
    too_long = request.slo.itl_target and seconds > request.slo.itl_target
    return math.inf if too_long or not per_step else math.ceil(request.num_unscheduled / per_step) * seconds


def _whole_step(planner: DeadlinePlanner, requests: Sequence[Request]) -> float:
    """Return the seconds of a step with everything that requests need: no step takes longer."""
    work = StepFeatures()
    for each in requests:
        work = work.plus(start=each.num_scheduled, count=each.num_unscheduled, rows=1)
    return planner.predictor.seconds(work)


def _latest_ends(request: Request, running: Sequence[Request], seconds: float) -> list[float]:
    """Return the seconds until each running request has generated `max_tokens`, if steps take `seconds`. Those of a
    lower priority than the request's may be late by then.
    """
    ends = []
    for each in running:
        slower = MISSED_ITL_FACTOR if each.priority > request.priority and not each.slo.missed else 1.0
        ends.append((each.max_tokens - len(each.output_token_ids)) * slower * (each.slo.itl_target or seconds))
    return ends


def _wait_for_resources(
    arriving: Sequence[Request],
    planner: DeadlinePlanner,
    queue: RequestQueue,
    seconds: float,
) -> tuple[float, bool]:
    """Return the seconds until there are sequence slots, blocks and time in each step for all of `arriving` together
    with the requests which still run then, and True; running requests are taken to end as late as they can. If even
    the end of all is not enough, returns the seconds until then, and False.
    """
    running, free = queue.running, queue.free
    ends = sorted((end, index) for index, end in enumerate(_latest_ends(arriving[-1], running, seconds)))
    left, until = list(running), 0.0
    for end, index in [(0.0, -1), *ends]:
        until = end
        if index >= 0:
            left.remove(running[index])
            free = free.after(running[index])
        load = DecodeLoad([*left, *arriving]).within(seconds, safety_factor=planner.predictor.safety_factor)
        if free.fit(arriving, num_running=len(left)) and planner.predictor.seconds(load) <= seconds:
            return until, True
    return until, False
