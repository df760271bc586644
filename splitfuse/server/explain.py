"""Explains where the time of a request went, from the first byte of its body to the last of its answer.

Joins the phases that the front has measured with the engine's account, keeps those of the last requests, and describes
them in words.
"""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise

import msgspec

from splitfuse.core.latency.phases import LatencyBreakdown, LatencyPhase
from splitfuse.core.slo.targets import SloViolation
from splitfuse.server.access_log import RequestRecord
from splitfuse.server.context import RequestContext
from splitfuse.server.errors import RefusedError

MAX_FINISHED = 1024
"""Number of finished requests that are kept."""
NUM_DESCRIBED_PHASES = 3
"""Number of phases that a sentence names."""
END_TIMEOUT = 0.5
"""Seconds to wait for the end of a running request: its client may have read all of its answer already."""


_UNIQUE_ID = re.compile("[0-9a-f]{32}")


class Timing(msgspec.Struct, frozen=True):
    """Holds the times of a request in an answer, in seconds.

    queued: from its arrival until its first step began; first_token: from its arrival to the first token of any choice;
    gaps: between each token and the next of its choice, all choices one after the other; steps: number of steps that
    computed a part of it; slo_met: whether all choices met their SLO, null without one; phases: where the time went.
    """

    queued: float | None
    first_token: float | None
    gaps: list[float]
    steps: int
    cached_tokens: int
    slo_met: bool | None
    phases: dict[LatencyPhase, float]


def timing_of(context: RequestContext, phases: dict[LatencyPhase, float] | None = None) -> Timing:
    """Return the times of a request so far."""
    begun = context.begun
    first_steps = [g.first_step for g in begun if g.first_step is not None]
    first_tokens = [g.timings.tokens[0] for g in begun if g.timings.tokens]
    return Timing(
        queued=min(first_steps) - context.arrival if first_steps else None,
        first_token=min(first_tokens) - context.arrival if first_tokens else None,
        gaps=[b - a for g in begun for a, b in pairwise(g.timings.tokens)],
        steps=sum(g.num_steps for g in begun),
        cached_tokens=sum(g.num_cached_tokens for g in begun),
        slo_met=all(met) if (met := [g.slo_met for g in begun if g.slo_met is not None]) else None,
        phases=phases or {},
    )


async def timing_with_phases(context: RequestContext) -> Timing:
    """Return the times of a request once its engine has reported where they went, which may be a step after its end."""
    if context.last is not None and context.last.stream is not None:
        await asyncio.shield(context.last.stream.breakdown)
    context.enter_phase(LatencyPhase.FROM_ENGINE)
    whole = breakdown_of(context)
    return timing_of(context, None if whole is None else whole.result().phases)


def breakdown_of(context: RequestContext) -> asyncio.Future[LatencyBreakdown] | None:
    """Return the breakdown of a whole request, with the phases of the front, once its engine has reported its own; None
    if no engine has had it. Of several choices, the engine's phases are those of the choice that ended last.
    """
    last = context.last
    if last is None or last.stream is None or last.sent is None:
        return None
    phases = context.phases | {LatencyPhase.TO_ENGINE: last.sent - context.sent_to_engine_at}
    detokenizing = min(last.detokenizing, phases[LatencyPhase.FROM_ENGINE])  # while it waited for the text
    phases[LatencyPhase.FROM_ENGINE] -= detokenizing
    phases[LatencyPhase.DETOKENIZING] += detokenizing
    sent, ended_at, reported = last.sent, last.ended_at, last.stream.breakdown
    whole: asyncio.Future[LatencyBreakdown] = asyncio.get_running_loop().create_future()

    def complete(reported: asyncio.Future[LatencyBreakdown | None]) -> None:
        engine = reported.result() or LatencyBreakdown(sent, ended_at, {LatencyPhase.FAILED: ended_at - sent})
        for phase, seconds in engine.phases.items():
            phases[phase] += seconds
        phases[LatencyPhase.FROM_ENGINE] += ended_at - engine.closed
        whole.set_result(replace(engine, phases={p: phases[p] for p in LatencyPhase if phases[p] > 0.0}))

    if reported.done():
        complete(reported)
    else:
        reported.add_done_callback(complete)
    return whole


class CoScheduled(msgspec.Struct, frozen=True):
    """Names a request with `tokens` of its prompt computed in the same steps. `id` is null if it was another key's."""

    id: str | None
    tokens: int


class Explanation(msgspec.Struct, frozen=True):
    """Explains where the time of a request went: `phases` add up to `seconds`, from arrival to the answer's end."""

    id: str
    request_id: str
    route: str
    status: int
    seconds: float
    phases: dict[LatencyPhase, float]
    co_scheduled: list[CoScheduled]
    preemptions: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    finish_reasons: list[str]
    slo_met: bool | None
    slo_violation: SloViolation | None


class Explanations:
    """Keeps records and breakdowns of the last finished requests, by their ids. Belongs to the event loop's thread."""

    def __init__(self, max_finished: int = MAX_FINISHED) -> None:
        self._max_finished = max_finished
        # By our own id, the oldest first
        self._finished: OrderedDict[str, tuple[RequestRecord, asyncio.Future[LatencyBreakdown]]] = OrderedDict()
        self._running: dict[str, tuple[str | None, asyncio.Event]] = {}  # by our own id: key, and its end
        self._named: dict[tuple[str | None, str], str] = {}  # by key and the client's id: our id of the newest

    def begin(self, context: RequestContext) -> None:
        """Note a request that goes to an engine."""
        key = context.owner.name
        self._running[context.unique_id] = key, asyncio.Event()
        self._named[key, context.request_id] = context.unique_id

    def end(
        self, context: RequestContext, record: RequestRecord, breakdown: asyncio.Future[LatencyBreakdown] | None
    ) -> None:
        """Keep the record and the breakdown of a request that has ended, and forget the oldest if there are too many.
        The breakdown is None for a request that no engine had.
        """
        running = self._running.pop(context.unique_id, None)
        if running is None:
            return
        key, ended = running
        ended.set()
        if breakdown is None:
            self._forget_name(key, context.request_id, context.unique_id)
            return
        self._finished[context.unique_id] = record, breakdown
        if len(self._finished) > self._max_finished:
            unique_id, (oldest, _) = self._finished.popitem(last=False)
            self._forget_name(oldest.key, oldest.request_id, unique_id)

    async def find(self, wanted: str, *, key: str | None) -> Explanation:
        """Return the explanation of a request of that key, by its X-Request-Id or its answer's id, once the engine's
        account is there. Raises RefusedError (404).
        """
        unique_id = self._named.get((key, wanted), _plain(wanted))
        if (running := self._running.get(unique_id)) is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(running[1].wait(), END_TIMEOUT)
        record, whole = self._finished.get(unique_id, (None, None))
        if record is None or whole is None or record.key != key:
            raise RefusedError(
                404,
                f"there is no request {wanted!r:.200} among the last {self._max_finished} that have ended here; give "
                "the id of an answer, or its header X-Request-Id",
                code="request_not_found",
            )
        breakdown = await asyncio.shield(whole)
        return Explanation(
            id=unique_id,
            request_id=record.request_id,
            route=record.route,
            status=record.status,
            seconds=record.total_seconds,
            phases=breakdown.phases,
            co_scheduled=[
                CoScheduled(self._id_for(key, _plain(name)), tokens) for name, tokens in breakdown.co_scheduled
            ],
            preemptions=breakdown.num_preemptions,
            prompt_tokens=record.prompt_tokens,
            cached_tokens=record.cached_tokens,
            generated_tokens=record.generated_tokens,
            finish_reasons=list(record.finish_reasons),
            slo_met=record.slo_met,
            slo_violation=breakdown.slo_violation,
        )

    def _id_for(self, key: str | None, unique_id: str) -> str | None:
        """Return the id of a request if that key may know it: not another key's, nor one whose key is forgotten."""
        if (running := self._running.get(unique_id)) is not None:
            return unique_id if running[0] == key else None
        record, _ = self._finished.get(unique_id, (None, None))
        return unique_id if key is None or (record is not None and record.key == key) else None

    def _forget_name(self, key: str | None, name: str, unique_id: str) -> None:
        if self._named.get((key, name)) == unique_id:
            del self._named[key, name]


def describe_breakdown(breakdown: LatencyBreakdown) -> str:
    """Return a sentence about a request that missed its SLO: what it missed, and its longest phases."""
    total = sum(breakdown.phases.values())
    largest = sorted(breakdown.phases.items(), key=lambda item: -item[1])[:NUM_DESCRIBED_PHASES]
    longest = ", ".join(f"{seconds:.3g} s {phase.meaning} ({seconds / total:.0%})" for phase, seconds in largest)
    missed = f"{describe_violation(breakdown.slo_violation)}; " if breakdown.slo_violation is not None else ""
    others = f"; mostly together with {_plain(breakdown.co_scheduled[0][0])}" if breakdown.co_scheduled else ""
    return f"{missed}of {total:.3g} s: {longest}{others}"


def describe_violation(violation: SloViolation) -> str:
    """Return what was missed, and by how much.

    `first token after 1.2 s (target 1 s); tokens every 0.3 s (moving average; target 0.25 s), longest gap 0.7 s`
    """
    parts = []
    if violation.ttft is not None and violation.ttft_target is not None:
        parts.append(f"first token after {violation.ttft:.3g} s (target {violation.ttft_target:.3g} s)")
    if violation.average_gap is not None and violation.itl_target is not None:
        parts.append(
            f"tokens every {violation.average_gap:.3g} s (moving average; target {violation.itl_target:.3g} s), "
            f"longest gap {violation.longest_gap:.3g} s"
        )
    return "; ".join(parts)


def _plain(name: str) -> str:
    """Return our own id of a request, from an answer's id (`cmpl-ID`) or an engine's (`ID-0.0`)."""
    found = _UNIQUE_ID.search(name)
    return found[0] if found else name
