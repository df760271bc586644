"""Drives the engine's scheduler on a virtual clock: the same steps as splitfuse/simulator, without an event loop.

Requests of sessions arrive at given times, or when a client of a closed loop has its answer; the cost model says how
long each step takes. Nothing else takes time. A client has its answer just after the next step is planned, as of an
engine: what it sends then waits for the end of that step.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from splitfuse.bench.baselines import make_baseline
from splitfuse.bench.results import MeasuredRequest
from splitfuse.config.engine import TAIL_SHARE, SchedulerConfig
from splitfuse.core.kv.block_allocator import BlockAllocator
from splitfuse.core.kv.names import BlockNamer
from splitfuse.core.plan import ChunkResult, StepPlan
from splitfuse.core.request import Request
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.scheduler import Scheduler
from splitfuse.core.scheduling_options import SchedulingOptions
from splitfuse.core.slo.cost_model import StepFeatures
from splitfuse.core.slo.deadline_policy import make_policy
from splitfuse.core.slo.targets import SloTargets
from splitfuse.errors import SloUnattainableError
from splitfuse.runtime.calibration import Calibration

CHOSEN = ChunkResult(token_ids=(0,))
NOT_CHOSEN = ChunkResult()
PARAMS = SamplingParams(ignore_eos=True)
OURS = "ours"


@dataclass(frozen=True)
class System:
    """Names a policy and its token budget."""

    policy: str
    budget: int
    tail_share: float = TAIL_SHARE

    def __str__(self) -> str:
        tail = f" tail {self.tail_share:g}" if self.tail_share != TAIL_SHARE else ""
        return f"{self.policy} {self.budget}{tail}"

    @property
    def is_ours(self) -> bool:
        return self.policy == OURS

    def make_scheduler(self, machine: Calibration, *, max_num_seqs: int, caches_prefixes: bool) -> Scheduler:
        """Return a new scheduler with the blocks of the machine."""
        config = SchedulerConfig(
            max_num_batched_tokens=self.budget,
            max_num_seqs=max_num_seqs,
            enable_slo=self.is_ours,
            tail_share=self.tail_share,
        )
        if self.is_ours:
            policy = make_policy(config, machine.cost)
        else:
            policy = make_baseline(self.policy, config) or make_policy(config, None)
        namer = BlockNamer(machine.block_size, key=b"simulation") if caches_prefixes else None
        return Scheduler(config, BlockAllocator(machine.num_blocks, machine.block_size, namer=namer), policy)


@dataclass(frozen=True)
class PlannedRequest:
    """Holds a request before it is sent. `kind` is the number of its class, which has its own targets."""

    prompt: tuple[int, ...]
    max_tokens: int
    kind: int = 0


Session = Sequence[PlannedRequest]
"""Requests of which each is sent when the one before it has been answered."""


def drive(
    scheduler: Scheduler,
    machine: Calibration,
    sessions: Sequence[Session],
    *,
    arrivals: Sequence[float] | None = None,
    clients: int = 0,
    spacing: float = 0.0,
    targets: Sequence[SloTargets] = (),
    max_unfinished: int = 0,
    on_time_only: Sequence[bool] = (),
) -> list[tuple[MeasuredRequest, int]]:
    """Return the requests with the times of their tokens and their kinds, in the order in which they were sent.

    With `arrivals` each session begins at its time; without, `clients` take one session after the other, each beginning
    `spacing` seconds after the one before. `targets` are given to the requests by their kind; without, they have no
    SLO. Requests that arrive while `max_unfinished` others are unfinished are refused; 0 refuses none. Sessions for
    which `on_time_only` says so end when one of theirs is refused. Steps have the noise of the cost model.
    """
    if arrivals is None:
        due = [(number * spacing, number, 0) for number in range(min(clients, len(sessions)))]
    else:
        due = [(time, number, 0) for number, time in enumerate(arrivals)]
    heapq.heapify(due)
    next_session = len(due)
    cost, now, random = machine.cost, 0.0, Random(1)
    records: list[tuple[MeasuredRequest, int]] = []
    running: dict[str, tuple[int, int, int, list[float]]] = {}  # place in records, session, turn, times of tokens
    while due or running:
        while due and due[0][0] <= now:
            sent, number, turn = heapq.heappop(due)
            planned = sessions[number][turn]
            refused = MeasuredRequest(number, sent, len(planned.prompt), (), error="refused")
            if 0 < max_unfinished <= len(running):
                records.append((refused, planned.kind))
                continue
            name = f"{number}.{turn}"
            scheduling = SchedulingOptions(
                targets=targets[planned.kind] if targets else None,
                arrival_time=sent,
                on_time_only=bool(on_time_only) and on_time_only[number],
            )
            request = Request(name, planned.prompt, PARAMS, planned.max_tokens, seed=0, scheduling=scheduling)
            try:
                scheduler.add(request, now)
            except SloUnattainableError:
                records.append((refused, planned.kind))
                continue
            times: list[float] = []
            running[name] = len(records), number, turn, times
            records.append((MeasuredRequest(number, sent, len(planned.prompt), ()), planned.kind))
        plan = scheduler.schedule(now)
        if plan is None:
            if not due:
                assert not running, "unfinished requests cannot run"
                break  # the last requests were refused
            now = max(now, due[0][0])
            continue
        now += cost.seconds(features_of(plan)) * (random.lognormvariate(0.0, cost.noise) if cost.noise else 1.0)
        result = {chunk.request_id: CHOSEN if chunk.samples else NOT_CHOSEN for chunk in plan.chunks}
        for output in scheduler.update(plan, result, now):
            if output.token_ids:
                running[output.request_id][3].append(now)
            if output.finish_reason is None:
                continue
            place, number, turn, times = running.pop(output.request_id)
            record, kind = records[place]
            records[place] = replace(record, token_times=tuple(times)), kind
            answered = math.nextafter(now, math.inf)
            if turn + 1 < len(sessions[number]):
                heapq.heappush(due, (answered, number, turn + 1))
            elif arrivals is None and next_session < len(sessions):
                heapq.heappush(due, (answered, next_session, 0))
                next_session += 1
    return records


def features_of(plan: StepPlan) -> StepFeatures:
    """Return the features of a step, as cost_model.features_of does, in one pass."""
    tokens = rows = pairs = kv_tokens = 0
    for chunk in plan.chunks:
        start, count = chunk.start, len(chunk.token_ids)
        tokens += count
        rows += chunk.num_logits
        pairs += count * start + count * (count + 1) // 2
        kv_tokens += start + count
    return StepFeatures(tokens, rows, pairs, kv_tokens, len(plan.chunks))
