"""Runs the prompts of a request that generates nothing: encodes, checks and admits them, and returns their numbers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise

from splitfuse.core.scheduling_options import SchedulingOptions
from splitfuse.server.context import RequestContext
from splitfuse.server.generate import blamed, check_not_failed
from splitfuse.server.slo_params import SloParams
from splitfuse.server.state import AppState
from splitfuse.text.generation import Generation
from splitfuse.text.prompts import PreparedRequest

Source = tuple[str, Callable[[], Awaitable[PreparedRequest]]]
"""Place of a prompt in the body, and a function that returns the request for it, which raises InvalidRequestError."""


async def pooled(
    state: AppState,
    context: RequestContext,
    body: SloParams,
    sources: Sequence[Source],
    *,
    shares_prefix: bool = False,
) -> list[tuple[float, ...]]:
    """Return the numbers of each prompt. With `shares_prefix` the first one runs before the others, which then find in
    the prefix cache what they begin with alike.

    Raises InvalidRequestError, RefusedError, OverloadedError, RequestFailedError, EngineUnavailableError.
    """
    slo_enabled = state.service.client.info.slo_enabled
    scheduling = body.scheduling(context.owner, arrival_time=context.arrival, slo_enabled=slo_enabled)
    work = _run(state, context, sources, scheduling, shares_prefix=shares_prefix)
    generations = await context.unless_gone(work, deadline=body.splitfuse_deadline)
    return [generation.values for generation in generations]


async def _run(
    state: AppState,
    context: RequestContext,
    sources: Sequence[Source],
    scheduling: SchedulingOptions,
    *,
    shares_prefix: bool,
) -> list[Generation]:
    service, admission, at_once = state.service, state.admission, min(len(sources), state.config.max_prompts)
    with ExitStack() as admitted:
        admitted.enter_context(admission.admit(0, at_once))
        prepared = []
        for place, encode in sources:
            with blamed(place, generates=False):
                prepared.append(replace(await encode(), adapter=context.adapter))
                prepared[-1].check(service.client.info.limits)
        admitted.enter_context(admission.admit(sum(len(each.token_ids) for each in prepared), 0))
        context.admitted = True
        context.generations = generations = service.begin(prepared, request_id=context.unique_id)
        state.explanations.begin(context)
        starts = [0, *range(1 if shares_prefix else at_once, len(generations), at_once), len(generations)]
        for start, end in pairwise(starts):
            await service.run(generations[start:end], lambda each, _: check_not_failed(each), scheduling=scheduling)
    return generations
