"""Where the time of requests went that have ended: their whole course, from the first byte to the last.

It puts together what the front has measured and what an engine has accounted, keeps the last of them, and finds the
words. It must not know of HTTP.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from splitfuse.core.latency.phases import LatencyBreakdown, LatencyPhase
from splitfuse.core.slo.targets import SloViolation
from splitfuse.server.access_log import RequestRecord
from splitfuse.server.context import RequestContext
from splitfuse.server.errors import RefusedError

KEPT = 1024
"""Requests that have ended, and can be asked about."""
BIGGEST = 3
"""Parts that a sentence names."""
PATIENCE = 0.5
"""Seconds that a question waits for the end of a request that runs."""

MEANINGS = {
    LatencyPhase.READING: "reading the request",
    LatencyPhase.TOKENIZING: "checking and tokenizing",
    LatencyPhase.TO_ENGINE: "on its way to the engine",
    LatencyPhase.JOINING: "until the step that ran had ended",
    LatencyPhase.NO_SLOT: "queued: all seats taken",
    LatencyPhase.NO_BLOCKS: "queued: no KV blocks",
    LatencyPhase.NO_BUDGET: "queued: steps were full",
    LatencyPhase.OUTRANKED: "queued: behind others' promises",
    LatencyPhase.PREFILL: "its prompt",
    LatencyPhase.DECODE: "its generation",
    LatencyPhase.CO_SCHEDULED: "beside others' chunks",
    LatencyPhase.PACED: "left out: ahead of its promise",
    LatencyPhase.LEFT_OUT: "left out: steps were full",
    LatencyPhase.LEFT_OUT_NO_BLOCKS: "left out: no KV blocks",
    LatencyPhase.PREEMPTED: "preempted",
    LatencyPhase.RECOMPUTED: "computed again",
    LatencyPhase.BETWEEN_STEPS: "between steps",
    LatencyPhase.FROM_ENGINE: "on its way back",
    LatencyPhase.DETOKENIZING: "detokenizing, making the answer",
    LatencyPhase.CLIENT: "handing over to the client",
    LatencyPhase.FAILED: "in an engine that failed",
}
"""Of each part, for people."""


@dataclass(frozen=True, kw_only=True)
class RequestTimeline:
    """What the front knows of a request that an engine has had; the engine's account may still be on its way. If it had
    several choices, the engine's part is of the one that all waited for.
    """

    unique_id: str
    key: str | None
    front: dict[LatencyPhase, float]
    handed_over: float
    sent: float
    left: float
    spent: asyncio.Future[LatencyBreakdown | None]
    record: RequestRecord | None

    @classmethod
    def of(cls, context: RequestContext, record: RequestRecord | None = None) -> RequestTimeline | None:
        """None if no engine has heard of the request."""
        last = context.last
        if last is None or last.stream is None or last.sent is None:
            return None
        front = dict(context.phases)
        detokenizing = min(last.detokenizing, front.get(LatencyPhase.FROM_ENGINE, 0.0))  # while it waited for the text
        if detokenizing:
            front[LatencyPhase.FROM_ENGINE] -= detokenizing
            front[LatencyPhase.DETOKENIZING] = front.get(LatencyPhase.DETOKENIZING, 0.0) + detokenizing
        return cls(
            unique_id=context.unique_id,
            key=context.owner.name,
            front=front,
            handed_over=context.handed_over,
            sent=last.sent,
            left=last.left,
            spent=last.stream.spent,
            record=record,
        )

    def phases(self) -> dict[LatencyPhase, float]:
        """Seconds of each part that has any, in the order of a request's life. `spent` must be there."""
        spent = self.spent.result()
        parts = dict(self.front)

        def add(part: LatencyPhase, seconds: float) -> None:
            parts[part] = parts.get(part, 0.0) + seconds

        add(LatencyPhase.TO_ENGINE, self.sent - self.handed_over)
        if spent is None:
            add(LatencyPhase.FAILED, self.left - self.sent)
        else:
            for part, seconds in spent.phases.items():
                add(part, seconds)
            add(LatencyPhase.FROM_ENGINE, self.left - spent.closed)
        return {part: parts[part] for part in LatencyPhase if parts.get(part, 0.0) > 0.0}


class CoScheduled(msgspec.Struct, frozen=True):
    """A request whose prompt was computed beside, `tokens` of it in the same steps."""

    id: str | None
    """None if it was another key's."""
    tokens: int


class Explanation(msgspec.Struct, frozen=True):
    """Where the time of a request went: `phases` add up to `seconds`, from its arrival to the end of its answer."""

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

    @classmethod
    def of(cls, course: RequestTimeline, co_scheduled: list[CoScheduled]) -> Explanation:
        """Of one with its record, and the engine's account there."""
        spent, record = course.spent.result(), course.record
        assert record is not None
        return cls(
            id=course.unique_id,
            request_id=record.request_id,
            route=record.route,
            status=record.status,
            seconds=record.total_seconds,
            phases=course.phases(),
            co_scheduled=co_scheduled,
            preemptions=0 if spent is None else spent.num_preemptions,
            prompt_tokens=record.prompt_tokens,
            cached_tokens=record.cached_tokens,
            generated_tokens=record.generated_tokens,
            finish_reasons=list(record.finish_reasons),
            slo_met=record.slo_met,
            slo_violation=None if spent is None else spent.slo_violation,
        )


class Explanations:
    """The courses of the last requests that have ended, by their ids. One thread: the event loop's."""

    def __init__(self, most: int = KEPT) -> None:
        self._most = most
        self._courses: OrderedDict[str, RequestTimeline] = OrderedDict()  # by our own id, the oldest first
        self._running: dict[str, tuple[str | None, asyncio.Event]] = {}  # those that have not ended: whose
        self._named: dict[tuple[str | None, str], str] = {}  # by key and the client's id: ours of its newest

    def begin(self, context: RequestContext) -> None:
        """A request goes to an engine."""
        key = context.owner.name
        self._running[context.unique_id] = key, asyncio.Event()
        self._named[key, context.request_id] = context.unique_id

    def end(self, context: RequestContext, course: RequestTimeline | None) -> None:
        """It has ended: its course, with its record, if an engine had it. If there are too many, the oldest is
        forgotten.
        """
        running = self._running.pop(context.unique_id, None)
        if running is None:
            return
        key, ended = running
        ended.set()
        if course is None:
            self._forget_name(key, context.request_id, context.unique_id)
            return
        self._courses[context.unique_id] = course
        if len(self._courses) > self._most:
            unique_id, oldest = self._courses.popitem(last=False)
            assert oldest.record is not None
            self._forget_name(oldest.key, oldest.record.request_id, unique_id)

    async def find(self, wanted: str, *, key: str | None) -> Explanation:
        """By the X-Request-Id or an answer's id, when the engine's account of it is there. With keys, everybody is told
        of their own requests only. Raises RefusedError (404).
        """
        unique_id = self._named.get((key, wanted), _plain(wanted))
        if (running := self._running.get(unique_id)) is not None:  # its client may have all of it already
            with suppress(TimeoutError):
                await asyncio.wait_for(running[1].wait(), PATIENCE)
        course = self._courses.get(unique_id)
        if course is None or course.key != key:
            raise RefusedError(
                404,
                f"there is no request {wanted!r:.200} among the last {self._most} that have ended here; ids are those "
                "of answers, or of the header X-Request-Id",
                code="request_not_found",
            )
        spent = await asyncio.shield(course.spent)
        beside = () if spent is None else spent.co_scheduled
        return Explanation.of(course, [CoScheduled(self._id_for(key, _plain(name)), tokens) for name, tokens in beside])

    def _id_for(self, key: str | None, unique_id: str) -> str | None:
        """None if it is not for that key to know: another's, or nobody knows whose."""
        if (running := self._running.get(unique_id)) is not None:
            return unique_id if running[0] == key else None
        course = self._courses.get(unique_id)
        return unique_id if key is None or (course is not None and course.key == key) else None

    def _forget_name(self, key: str | None, name: str, unique_id: str) -> None:
        if self._named.get((key, name)) == unique_id:
            del self._named[key, name]


def sentence(course: RequestTimeline) -> str:
    """What a request that was late was promised, and what took the longest of it."""
    parts, spent = course.phases(), course.spent.result()
    total = sum(parts.values())
    largest = sorted(parts.items(), key=lambda item: -item[1])[:BIGGEST]
    said = [f"{seconds:.3g} s {MEANINGS[part]} ({seconds / total:.0%})" for part, seconds in largest]
    beside = (
        ""
        if spent is None or not spent.co_scheduled
        else f"; beside it was most of all {_plain(spent.co_scheduled[0][0])}"
    )
    missed = "" if spent is None or spent.slo_violation is None else f"{told(spent.slo_violation)}; "
    return f"{missed}of {total:.3g} s: {', '.join(said)}{beside}"


def told(missed: SloViolation) -> str:
    """`first token after 1.2 s, promised after 1 s; tokens every 0.3 s (moving average), promised every 0.25 s, longest
    gap 0.7 s`.
    """
    parts = []
    if missed.ttft is not None and missed.ttft_target is not None:
        parts.append(f"first token after {missed.ttft:.3g} s, promised after {missed.ttft_target:.3g} s")
    if missed.average_gap is not None and missed.itl_target is not None:
        parts.append(
            f"tokens every {missed.average_gap:.3g} s (moving average), promised every {missed.itl_target:.3g} s, "
            f"longest gap {missed.longest_gap:.3g} s"
        )
    return "; ".join(parts)


def _plain(name: str) -> str:
    """Our own id of a request, in an answer's id (`cmpl-ID`) or an engine's (`ID-0.0`)."""
    return name.removeprefix("cmpl-").removeprefix("chatcmpl-").partition("-")[0]
