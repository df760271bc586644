"""Whether a new request can be on time, and when it could be if not: for those who want it on time or not at all.

It can be if its prompt is among those that can be on time and takes nobody's place among them, if the streams leave it
a pace, and if a seat and blocks are free for it, or will be: of those that run it is known when they end at the latest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from splitfuse.core.request import MISSED_ITL_FACTOR, Request
from splitfuse.core.slo.cost_model import Features
from splitfuse.core.slo.deadline_policy import DeadlinePolicy, SchedulingPolicy
from splitfuse.core.slo.decode_load import DecodeLoad
from splitfuse.errors import InvalidRequestError, LateError


@dataclass(frozen=True)
class AdmissionForecast:
    """Of a request, were it taken now."""

    first_token: float
    """Seconds until its first token, if it waits for all that come before it; at the latest."""
    wait: float
    """Seconds after which it could be on time, by what is known now: 0 if it can be now, infinity if it never can."""

    @property
    def is_on_time(self) -> bool:
        return self.wait == 0.0

    @property
    def why(self) -> str:
        """It cannot be on time."""
        if self.first_token == math.inf:
            return "no step here is short enough for its targets"
        if self.wait == math.inf:
            return f"its first token takes {self.first_token:.3g} s even alone"
        return f"its first token would come after {self.first_token:.3g} s; try again in {self.wait:.3g} s"


@dataclass(frozen=True)
class FreeResources:
    """What there is for further requests."""

    seats: int
    blocks: int
    block_size: int

    def takes(self, requests: Sequence[Request], *, besides: int) -> bool:
        """Whether their prompts find place, with a block for each of those that run."""
        blocks = sum(-(-request.num_known // self.block_size) for request in requests)
        return len(requests) <= self.seats and blocks + besides <= self.blocks

    def after(self, request: Request) -> FreeResources:
        """When it has ended."""
        return FreeResources(self.seats + 1, self.blocks + len(request.blocks), self.block_size)


def check_admission(
    request: Request,
    rule: SchedulingPolicy,
    *,
    running: Sequence[Request],
    waiting: Sequence[Request],
    room: FreeResources,
    now: float,
) -> None:
    """Raise LateError unless a new request can be on time and makes nobody late, InvalidRequestError where nothing is
    promised.
    """
    if not isinstance(rule, DeadlinePolicy) or not request.has_slo:
        raise InvalidRequestError("on time or not at all needs a promise: give it targets", parameter="targets")
    seen = forecast_admission(request, rule=rule, running=running, waiting=waiting, room=room, now=now)
    if not seen.is_on_time:
        raise LateError(f"the request cannot be on time: {seen.why}", retry_after=seen.wait)


def forecast_admission(
    request: Request,
    *,
    rule: DeadlinePolicy,
    running: Sequence[Request],
    waiting: Sequence[Request],
    room: FreeResources,
    now: float,
) -> AdmissionForecast:
    """`request` is not among those that wait."""
    streams = [r for r in running if r.output_token_ids]
    prompts = [*(r for r in running if not r.output_token_ids), *waiting]
    seconds = rule.length(streams, prompts, coming=[*prompts, request]).seconds
    seconds = min(seconds, _whole(rule, [*streams, *prompts, request]))
    share = 1.0 - 2 * rule.tail_share  # the oldest can come to be owed half of that; half is for steps that end late
    before = rule.feasible(prompts, DecodeLoad(streams), seconds=seconds, now=now, share=share)
    beside = DecodeLoad([*streams, *before])  # as they will stream when its turn comes
    per_step = share * rule.prompt_tokens(beside, seconds)
    ahead = [r for r in prompts if r in before or r.priority < request.priority]
    coming = [*(r for r in ahead if r in waiting), request]
    place, is_there = _place(coming, rule=rule, running=running, room=room, seconds=seconds)

    def first_token(tokens: int) -> float:
        return math.ceil(tokens / per_step) * seconds if per_step else math.inf

    allowed = request.due - now
    alone = _alone(request, rule)
    if alone > allowed or alone == math.inf:
        return AdmissionForecast(alone, math.inf)
    own, queued = first_token(request.num_wanted), sum(r.num_wanted for r in ahead)
    first = max(place, first_token(queued)) + own
    if first == math.inf:  # the streams leave prompts nothing: when they have ended
        first = max([place, *_ends(request, running, seconds)]) + alone * (1 + queued / request.num_wanted)
    after = rule.feasible([*prompts, request], beside, seconds=seconds, now=now, share=share)
    can_pace = not request.interval or seconds <= request.interval
    can_be_first = is_there and place + own <= allowed and (allowed == math.inf or after == before | {request})
    if can_pace and can_be_first:
        return AdmissionForecast(first, 0.0)
    return AdmissionForecast(first, max(first - allowed, seconds))


def _alone(request: Request, rule: DeadlinePolicy) -> float:
    """Seconds until its first token on an empty machine; infinity if no step there is short enough for its interval."""
    seconds = min(rule.length([], [], coming=[request]).seconds, _whole(rule, [request]))
    per_step = rule.prompt_tokens(DecodeLoad([]), seconds)
    too_long = request.interval and seconds > request.interval
    return math.inf if too_long or not per_step else math.ceil(request.num_wanted / per_step) * seconds


def _whole(rule: DeadlinePolicy, requests: Sequence[Request]) -> float:
    """Seconds of a step that has all they want: no step takes longer."""
    work = Features()
    for each in requests:
        work = work.plus(start=each.num_scheduled, count=each.num_wanted, rows=1)
    return rule.forecast.seconds(work)


def _ends(request: Request, running: Sequence[Request], seconds: float) -> list[float]:
    """Seconds until those who run have generated all that they may, if steps take `seconds`. Those of a class below
    the request's may be late by then.
    """
    ends = []
    for each in running:
        slower = MISSED_ITL_FACTOR if each.priority > request.priority and not each.missed_slo else 1.0
        ends.append((each.max_tokens - len(each.output_token_ids)) * slower * (each.interval or seconds))
    return ends


def _place(
    coming: Sequence[Request], *, rule: DeadlinePolicy, running: Sequence[Request], room: FreeResources, seconds: float
) -> tuple[float, bool]:
    """Seconds until those who come have seats, blocks and a pace beside those who run, which end one after the other at
    the latest when they have generated all that they may; or until all of these have ended, and False.
    """
    ends = sorted((end, index) for index, end in enumerate(_ends(coming[-1], running, seconds)))
    left, until = list(running), 0.0
    for end, index in [(0.0, -1), *ends]:
        until = end
        if index >= 0:
            left.remove(running[index])
            room = room.after(running[index])
        beside = DecodeLoad([*left, *coming]).within(seconds, margin=rule.forecast.margin)
        if room.takes(coming, besides=len(left)) and rule.forecast.seconds(beside) <= seconds:
            return until, True
    return until, False
