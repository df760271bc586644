"""Explains where the time of a request went, from the first byte of its body to the last of its answer.

Adds the times that the front has kept to the engine's account, keeps those of the last requests, and describes them in
words.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from operator import sub
from typing import NamedTuple

import msgspec

from splitfuse.core.latency.phases import LatencyBreakdown, LatencyPhase
from splitfuse.core.plan import DraftKind
from splitfuse.core.slo.targets import SloViolation
from splitfuse.server.access_log import RequestRecord
from splitfuse.server.context import RequestContext
from splitfuse.server.errors import RefusedError

MAX_FINISHED = 1024
"""Number of finished requests that are kept."""
NUM_DESCRIBED_PHASES = 3
"""Number of phases that a sentence names."""
END_TIMEOUT = 5.0
"""Seconds to wait for the end of a running request: its client may have read all of its answer already."""


_UNIQUE_ID = re.compile("[0-9a-f]{32}")


class Timing(msgspec.Struct, frozen=True):
    """Holds the times of a request in an answer, in seconds.

    queued: from its arrival until its first step began; first_token: from its arrival to the first token of any choice;
    gaps: between each token and the next of its choice, all choices one after the other; steps: number of steps that
    computed a part of it, those of all choices added up; draft_tokens and accepted_tokens: numbers of tokens that were
    drafted, and of those that were right, of all choices, by kind; resumed: number of times that a choice went on at
    another engine, or at its own after a restart; on_loan: whether another engine holds a part of the keys and values
    of a choice, which finishes while that engine lives; slo_met: whether all choices met their SLO, null without one;
    phases: where the time went.
    """

    queued: float | None
    first_token: float | None
    gaps: list[float]
    steps: int
    cached_tokens: int
    draft_tokens: dict[DraftKind, int]
    accepted_tokens: dict[DraftKind, int]
    resumed: int
    on_loan: bool
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
        gaps=[gap for g in begun for gap in map(sub, g.timings.tokens[1:], g.timings.tokens)],
        steps=sum(g.num_steps for g in begun),
        cached_tokens=sum(g.num_cached_tokens for g in begun),
        draft_tokens=_by_kind(g.num_drafted_tokens for g in begun),
        accepted_tokens=_by_kind(g.num_accepted_tokens for g in begun),
        resumed=sum(g.stream.num_resumed for g in begun if g.stream is not None),
        on_loan=any(g.stream.on_loan for g in begun if g.stream is not None),
        slo_met=all(met) if (met := [g.slo_met for g in begun if g.slo_met is not None]) else None,
        phases=phases or {},
    )


def _by_kind(counts: Iterable[Counter[DraftKind]]) -> dict[DraftKind, int]:
    total = Counter[DraftKind]()
    for each in counts:
        total.update(each)
    return dict(total)


async def timing_with_phases(context: RequestContext) -> Timing:
    """Return the times of a request until its engine has reported its own, which may be a step after its end."""
    if context.last is None:
        return timing_of(context)
    engine = await asyncio.shield(context.last.breakdown)
    return timing_of(context, breakdown_of(context, engine, ended=time.monotonic()).phases)


def breakdown_of(context: RequestContext, engine: LatencyBreakdown, *, ended: float) -> LatencyBreakdown:
    """Return where the time of a request went from its arrival until `ended`: the engine's phases of the choice that
    ended last, and before and after them the front's, which are differences between the times of the context.
    """
    assert context.last is not None, "an engine has reported"
    handed_back = context.last.ended_at
    # An engine may work on for a request that ended here, until it hears of that: this counts for nothing.
    wanted = min((handed_back - engine.opened) / ((engine.closed - engine.opened) or 1), 1)
    phases = {
        LatencyPhase.READING: context.read_at - context.arrival,
        LatencyPhase.TOKENIZING: engine.opened - context.read_at,
        **{phase: seconds * wanted for phase, seconds in engine.phases.items()},
        LatencyPhase.FROM_ENGINE: handed_back - engine.closed,
        LatencyPhase.DETOKENIZING: ended - handed_back - context.client_seconds,
        LatencyPhase.CLIENT: context.client_seconds,
    }
    some = {phase: phases[phase] for phase in LatencyPhase if phases.get(phase, 0) > 0}
    return replace(engine, opened=context.arrival, closed=ended, phases=some)


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
    finish_reasons: dict[str, int]
    slo_met: bool | None
    slo_violation: SloViolation | None


class _Known(NamedTuple):
    key: str | None
    unique_id: str
    request_id: str
    account: asyncio.Future[tuple[RequestRecord, LatencyBreakdown] | None]


class Explanations:
    """Keeps records and breakdowns of the last finished requests, by their ids. Belongs to the event loop's thread."""

    def __init__(self, max_finished: int = MAX_FINISHED) -> None:
        self._max_finished = max_finished
        self._finished: dict[str, _Known] = {}  # by our own id, the oldest first
        self._running: dict[str, _Known] = {}

    def begin(self, context: RequestContext) -> None:
        """Note a request that goes to an engine."""
        self.begin_one(context.unique_id, context.request_id, key=context.owner.name)

    def begin_one(self, unique_id: str, request_id: str, *, key: str | None) -> None:
        """Note a request by its ids, of the owner of a key."""
        account = asyncio.get_running_loop().create_future()
        self._running[unique_id] = _Known(key, unique_id, request_id, account)

    def end(self, unique_id: str, account: tuple[RequestRecord, LatencyBreakdown] | None) -> None:
        """Keep the record and the breakdown of a request that has ended, and forget the oldest if there are too many.
        The account is None for a request that no engine had.
        """
        known = self._running.pop(unique_id, None)
        if known is None:
            return
        known.account.set_result(account)
        if account is not None:
            self._finished[unique_id] = known
            if len(self._finished) > self._max_finished:
                del self._finished[next(iter(self._finished))]

    async def find(self, wanted: str, *, key: str | None) -> Explanation:
        """Return the explanation of the newest request of that key with that X-Request-Id or that answer's id, once it
        is there. Raises RefusedError (404).
        """
        known = [each for each in (*self._finished.values(), *self._running.values()) if each.key == key]
        found = [each for each in known if each.request_id == wanted or each.unique_id == _plain(wanted)]
        account = None
        if found:
            with suppress(TimeoutError):
                account = await asyncio.wait_for(asyncio.shield(found[-1].account), END_TIMEOUT)
        if account is None:
            raise RefusedError(
                404,
                f"there is no request {wanted!r:.200} among the last {self._max_finished} that have ended here; give "
                "the id of an answer, or its header X-Request-Id",
                code="request_not_found",
            )
        record, breakdown = account
        return Explanation(
            id=found[-1].unique_id,
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
            finish_reasons=dict(record.finish_reasons),
            slo_met=record.slo_met,
            slo_violation=breakdown.slo_violation,
        )

    def _id_for(self, key: str | None, unique_id: str) -> str | None:
        """Return the id of a request if that key may know it: not another key's, nor one whose key is forgotten."""
        known = self._running.get(unique_id) or self._finished.get(unique_id)
        return unique_id if key is None or (known is not None and known.key == key) else None


def why_missed(record: RequestRecord, breakdown: LatencyBreakdown | None) -> str:
    """Return a sentence about a request that missed its SLO: what it missed, its longest phases. Empty for others."""
    if record.slo_met is not False or breakdown is None:
        return ""
    total = sum(breakdown.phases.values())
    largest = sorted(breakdown.phases.items(), key=lambda item: -item[1])[:NUM_DESCRIBED_PHASES]
    longest = ", ".join(f"{seconds:.3g} s {phase.meaning} ({seconds / total:.0%})" for phase, seconds in largest)
    missed = f"{describe_violation(breakdown.slo_violation)}; " if breakdown.slo_violation is not None else ""
    others = f"; mostly together with {_plain(breakdown.co_scheduled[0][0])}" if breakdown.co_scheduled else ""
    return f"{missed}of {total:.3g} s: {longest}{others}"


def describe_violation(violation: SloViolation) -> str:
    """Return what was missed, and by how much.

    `first token after 1.2 s (target 1 s); tokens every 0.3 s (moving average; target 0.25 s), longest gap 0.7 s`
    `97.5 % of the gaps within 0.25 s (target 99 %), longest gap 0.7 s; tokens every 0.12 s (mean; target 0.1 s)`
    """
    parts = []
    if violation.ttft is not None and violation.ttft_target is not None:
        parts.append(f"first token after {violation.ttft:.3g} s (target {violation.ttft_target:.3g} s)")
    if violation.average_gap is not None and violation.itl_target is not None:
        parts.append(
            f"tokens every {violation.average_gap:.3g} s (moving average; target {violation.itl_target:.3g} s), "
            f"longest gap {violation.longest_gap:.3g} s"
        )
    if violation.percent_in_time is not None and violation.itl_percentile is not None:
        parts.append(
            f"{violation.percent_in_time:.4g} % of the gaps within {violation.itl_target:.3g} s (target "
            f"{violation.itl_percentile:.4g} %), longest gap {violation.longest_gap:.3g} s"
        )
    if violation.mean_gap is not None and violation.tpot_target is not None:
        parts.append(f"tokens every {violation.mean_gap:.3g} s (mean; target {violation.tpot_target:.3g} s)")
    return "; ".join(parts)


def _plain(name: str) -> str:
    """Return our own id of a request, from an answer's id (`cmpl-ID`) or an engine's (`ID-0.0`)."""
    found = _UNIQUE_ID.search(name)
    return found[0] if found else name
