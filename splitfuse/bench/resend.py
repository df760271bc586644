"""Sends the requests of a recording again, as they came, to engines of today's code and other settings.

    requests = [each for each in read_requests(recording.frames()) if not each.was_running]
    again = asyncio.run(send_again(recording, requests, config))
    print(Figures.of(requests), Figures.of(again))

Steps are composed anew, so that times differ; the tokens of a request do not, unless the model or the kernels do.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Self

from splitfuse.bench.metrics import percentile
from splitfuse.config.engine import EngineConfig
from splitfuse.core.request_output import FinishReason
from splitfuse.core.slo.targets import SloTargets
from splitfuse.engine.client import EngineClient
from splitfuse.engine.messages import Add
from splitfuse.engine.replicas import make_replicas
from splitfuse.engine.trace import TraceLevel, TraceRecord
from splitfuse.errors import RecordingError, SplitfuseError
from splitfuse.recording.format import Frame, Recorded, Recording, Records
from splitfuse.recording.requests import RecordedRequest, read_requests


@dataclass(frozen=True)
class Figures:
    """Sums up requests. Times are in seconds, at the engine."""

    requests: int
    ended: dict[str, int]
    """Number of requests by the reason for which they ended."""
    tokens: int
    seconds: float
    """Time from the first request to the last token."""
    with_slo: int
    met_slo: int
    ttft: dict[int, float]
    itl: dict[int, float]
    preemptions: int
    cached_tokens: int

    @property
    def goodput(self) -> float:
        """Return requests/s which met their SLO, of those which have one."""
        return self.met_slo / self.seconds if self.seconds else 0.0

    @classmethod
    def of(cls, requests: Sequence[RecordedRequest]) -> Self:
        """Return the figures of requests."""
        ends = [each.end for each in requests if each.end is not None]
        reasons = [end.reason.value for end in ends]
        times = [(each.request.sent_time, each.token_times) for each in requests if each.token_times]
        ttfts = [tokens[0] - sent for sent, tokens in times]
        gaps = [after - before for _, tokens in times for before, after in pairwise(tokens)]
        first = min((each.request.sent_time for each in requests), default=0.0)
        slos = [end.slo_met for end in ends if end.slo_met is not None]
        return cls(
            requests=len(requests),
            ended={reason: reasons.count(reason) for reason in sorted(set(reasons))},
            tokens=sum(len(tokens) for _, tokens in times),
            seconds=max((tokens[-1] for _, tokens in times), default=first) - first,
            with_slo=len(slos),
            met_slo=sum(slos),
            ttft={percent: percentile(ttfts, percent) for percent in (50, 95)},
            itl={percent: percentile(gaps, percent) for percent in (50, 95, 99)},
            preemptions=sum(each.num_preemptions for each in requests),
            cached_tokens=sum(each.num_cached for each in requests),
        )


def num_equal(recorded: Sequence[RecordedRequest], again: Sequence[RecordedRequest | None]) -> tuple[int, int]:
    """Return how many requests have the same tokens again, as far as both were generated, and how many can have."""
    pairs = [(one.token_ids, two.token_ids) for one, two in zip(recorded, again, strict=True) if two is not None]
    both = [(one, two, min(len(one), len(two))) for one, two in pairs if one and two]
    return sum(one[:count] == two[:count] for one, two, count in both), len(both)


async def send_again(
    recording: Recording,
    requests: Sequence[RecordedRequest],
    config: EngineConfig,
    *,
    replicas: int = 1,
    on_end: Callable[[], object] = lambda: None,
) -> list[RecordedRequest | None]:
    """Send requests at their recorded times, give up those which were, and return what became of each; None for one
    that the engines have refused.

    Raises RecordingError if an adapter is missing, and what starting the engines raises.
    """
    frames: list[Frame] = []

    def take(engine: int, records: tuple[TraceRecord, ...]) -> None:
        frames.append(Records(engine, tuple(record for record in records if isinstance(record, Recorded))))

    client = make_replicas(config, replicas=replicas)
    for index, engine in enumerate(client.engines):
        engine.on_trace = partial(take, index)
        engine.set_tracing(TraceLevel.PLANS)
    try:
        await client.start()
        if missing := {each.detail.adapter for each in requests} - {"", *client.adapters.values()}:
            raise RecordingError(
                f"{recording.path} has requests with LoRA adapters that are not given as lora: {missing}"
            )
        began, first = asyncio.get_running_loop().time(), min(each.request.sent_time for each in requests)
        recorded_targets = _default_targets(recording.header.config)
        async with asyncio.TaskGroup() as group:
            for number, each in enumerate(requests):
                add = _message(each, str(number), config, recorded_targets)
                send = _send(client, each, add, shift=began - first)
                group.create_task(send).add_done_callback(lambda _: on_end())
    finally:
        await client.close()
    found = {each.request.request_id: each for each in read_requests(frames)}
    return [found.get(str(number)) for number in range(len(requests))]


def _default_targets(config: EngineConfig) -> SloTargets:
    return SloTargets.parse(**config.scheduler.targets)


def _message(each: RecordedRequest, name: str, config: EngineConfig, recorded_targets: SloTargets) -> Add:
    """Return a request as it is sent again: with its seed, and with an SLO if the engines have any."""
    detail, enabled = each.detail, config.scheduler.slo_enabled
    scheduling = replace(detail.scheduling, arrival_time=None)
    if not enabled or scheduling.targets == recorded_targets:  # those of the engines, whatever they are now
        scheduling = replace(scheduling, targets=None)
    scheduling = replace(scheduling, on_time_only=scheduling.on_time_only and enabled)
    params = replace(detail.params, seed=detail.seed)
    return Add(
        *(name, detail.prompt_token_ids, params, each.request.choice, scheduling),
        pooling=detail.pooling,
        adapter=detail.adapter,
    )


async def _send(client: EngineClient, each: RecordedRequest, add: Add, *, shift: float) -> None:
    """Send a request when it is due, and read its tokens until it ends, is given up, or has those up to its stop."""
    loop = asyncio.get_running_loop()
    await asyncio.sleep(each.request.sent_time + shift - loop.time())
    given_up = math.inf if each.given_up_time is None else each.given_up_time + shift
    stops = each.end is not None and each.end.reason is FinishReason.STOP and each.detail.pooling is None
    most = max(each.num_output_tokens, 1) if stops else math.inf
    try:
        client.info.limits.check(add.prompt_token_ids, add.params, add.pooling)
        async with asyncio.timeout_at(None if given_up == math.inf else given_up):
            async with client.open(add) as stream:
                async for output in stream:
                    if stream.num_tokens >= most and output.finish_reason is None:
                        stream.stop(each.num_output_tokens)
    except (SplitfuseError, TimeoutError):
        return
