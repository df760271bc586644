"""Simulates engines: the real scheduler, block allocator and routing on a virtual clock, with a cost model.

Loads drive them as any target (bench/load.py), in the event loop of virtual_time.py. The Scheduler composes steps,
`choose_replica` and pools.py route requests, and the CostModel predicts the time of a step. Other time of the machine
counts only as far as `step_overhead` and `client_overhead` add it.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from splitfuse.bench.baselines import make_baseline
from splitfuse.bench.measure import MakeWorkload, measure
from splitfuse.bench.results import Point, Results
from splitfuse.bench.target import Answer, Target
from splitfuse.bench.workload import LoadRequest, Loads, Prompt, TokenIds
from splitfuse.core.kv.block_allocator import BlockAllocator
from splitfuse.core.kv.fetching import WAITING_SHARE, Fetching, Inbox, places, waiting_bytes
from splitfuse.core.kv.request_kv import RequestKv
from splitfuse.core.limits import ceil_div
from splitfuse.core.plan import ChunkResult, StepPlan
from splitfuse.core.replicas.capacity import Arrival, replicas_needed
from splitfuse.core.replicas.prefix_index import PrefixMemory
from splitfuse.core.replicas.replica_view import ReplicaView
from splitfuse.core.replicas.routing import Candidate, choose_replica, expected_tokens
from splitfuse.core.replicas.shortlist import ALL_ARE_PICKED, Shortlist
from splitfuse.core.request import Request
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.scheduler import Scheduler
from splitfuse.core.scheduling_options import SchedulingOptions
from splitfuse.core.slo.cost_model import StepFeatures, StepTimes, features_of
from splitfuse.core.slo.deadline_policy import make_policy
from splitfuse.core.slo.targets import NO_SLO, SloTargets
from splitfuse.errors import ConfigError, ServerError, SplitfuseError
from splitfuse.simulator import virtual_time
from splitfuse.simulator.deployment import Deployment, Failure, Machine, SimulationConfig
from splitfuse.simulator.landing import LandedKv
from splitfuse.simulator.lending import LoanPool
from splitfuse.simulator.links import Network
from splitfuse.simulator.pace import by_chance
from splitfuse.simulator.pools import Pools
from splitfuse.simulator.tiers import SharedTiers, SimulatedTiers

CHOSEN = ChunkResult(token_ids=(0,))
NOT_CHOSEN = ChunkResult()
PARAMS = SamplingParams(ignore_eos=True)


class Bytes(TokenIds):
    """Draws prompts of random bytes: as distinct as random token ids, and drawn a hundred times faster."""

    def draw(self, random: Random, count: int) -> Prompt:
        """Return `count` tokens."""
        return tuple(random.randbytes(count))


def simulate(
    deployment: Deployment | SimulationConfig,
    make_workload: MakeWorkload,
    loads: Loads,
    *,
    system: str,
    about: Mapping[str, Any],
    on_point: Callable[[Results], None] = lambda _: None,
    progress: bool = False,
) -> Results:
    """Return the results that `measure` would have, of a deployment or an engine alone. Raises what loads and workload
    raise.
    """
    deployment = Deployment.of(deployment) if isinstance(deployment, SimulationConfig) else deployment
    results = virtual_time.run(
        measure(
            SimulatedTarget(deployment),
            make_workload,
            loads,
            system=system,
            replicas=len(deployment.machines),
            about=about,
            on_point=lambda results: on_point(replace(results, simulated=True)),
            progress=progress,
        )
    )
    return replace(results, simulated=True)


def needed(point: Point, simulation: SimulationConfig) -> int | None:
    """Return how many replicas the last minutes of a load need to meet the SLO of the settings; None without one."""
    targets = SloTargets.parse(**simulation.scheduler.targets)
    if targets == NO_SLO:
        return None
    arrivals = [
        Arrival(each.sent, each.num_prompt_tokens, count, targets, num_generated=count, has_ended=True)
        for each in point.records
        if (count := len(each.token_times))
    ]
    return replicas_needed(
        arrivals, StepTimes(simulation.calibration.cost), now=max((each.at for each in arrivals), default=0.0)
    )


class SimulatedTarget(Target):
    """Simulates a deployment, or an engine alone, which generates zeros. Drive it in `virtual_time.run`."""

    def __init__(self, deployment: Deployment | SimulationConfig) -> None:
        deployment = Deployment.of(deployment) if isinstance(deployment, SimulationConfig) else deployment
        lanes = [(number, lane) for number, machine in enumerate(deployment.machines) for lane in machine.lanes]
        self._deployment = deployment
        self._engine = deployment.machines[0].engine
        self._targets = SloTargets.parse(**self._engine.scheduler.targets)
        self._namer = self._engine.make_namer()
        shared = self._engine.make_tiers(len(lanes))
        self._replicas = [
            Replica(lane, seed, machine=number, tiers=shared) for seed, (number, lane) in enumerate(lanes)
        ]
        self._tiers = None if shared is None else PrefixMemory(shared.num_slots, self._engine.calibration.block_size)
        self._pools = Pools(self._replicas, deployment.long_queue) if deployment.is_split else None
        self._network = None if deployment.link is None else Network(deployment.link)
        self._loans = None if deployment.lending is None else LoanPool(self._replicas, deployment.lending)
        self._shortlist = Shortlist(seed=0)
        self._is_synced = False
        for replica in self._replicas:
            replica.on_emptied = self._note_emptied
        self._numbers = itertools.count()
        self.vocabulary = self.answer_vocabulary = Bytes(256)
        sizes = [lane.engine.calibration for _, lane in lanes]
        room = (sum if self._loans else min)(each.num_blocks * each.block_size for each in sizes)
        self.room = min(room, *(each.max_model_len for each in sizes))
        self.about = {"simulation": deployment.settings}

    async def start(self) -> None:
        """Prepare the failures: there is nothing to load."""
        for failure in self._deployment.failures:
            for replica in self._replicas:
                if replica.machine == failure.machine:
                    replica.fail_later(failure)

    async def ask(self, request: LoadRequest) -> Answer:
        return await self.answer(request, self._targets)

    async def answer(self, request: LoadRequest, targets: SloTargets) -> Answer:
        """Answer a request with an SLO of its own, where machines schedule by SLOs."""
        prompt = prompt_ids(request)
        if self._engine.client_overhead:
            await asyncio.sleep(self._engine.client_overhead)
        times: list[float] = []
        num_landed = 0
        try:
            while len(times) < request.max_tokens:
                known = prompt + (0,) * len(times)
                left = request.max_tokens - len(times)
                try:
                    await self._continue(known, left, times, targets, num_landed=num_landed)
                except MachineLostError:  # what was generated is known: it is recomputed elsewhere, and goes on
                    num_landed = 0
                    await asyncio.sleep(0)
                except MovedError as error:
                    num_landed = error.num_computed
        except SplitfuseError as error:
            return Answer(len(prompt), error=str(error))
        return Answer(len(prompt), tuple(times), (0,) * len(times))

    async def close(self) -> None:
        """Do nothing: there is nothing to release."""

    async def _continue(
        self, known: tuple[int, ...], max_tokens: int, times: list[float], targets: SloTargets, *, num_landed: int
    ) -> None:
        """Generate `max_tokens` tokens after those that are known, on one machine or on two, and add their `times`.
        The KV of the first `num_landed` has come from another machine.

        Raises MachineLostError if a machine fails, and MovedError if it is drained; the times of the tokens before are
        there.
        """
        name = str(next(self._numbers))
        if self._loans is not None:
            admission = await self._loans.admit(len(known) + max_tokens)
            try:
                kv = RequestKv(loan=admission.loan)
                await self._replicas[admission.index].answer(name, known, max_tokens, times, targets, kv=kv)
            finally:
                self._loans.end(admission)
            return
        names: list[bytes] = []
        if self._namer is not None and len(self._replicas) > 1:
            self._namer.extend(names, known)
        copy = None
        if self._pools is not None:
            first, second = self._pools.choose(len(known), max_tokens, names)
        elif len(self._replicas) == 1 and not self._deployment.failures:
            first = second = self._replicas[0]
        else:
            copy = new_request(name, known, max_tokens, targets, RequestKv())
            first = second = self._choose(copy, names)
        if first is second:
            kv = LandedKv(block_names=names, num_landed=num_landed) if num_landed else RequestKv(block_names=names)
            if copy is not None:
                copy.num_expected_cached = max(copy.num_expected_cached, num_landed)
            await first.answer(name, known, max_tokens, times, targets, kv=kv, copy=copy)
            return
        assert self._network is not None
        transfer = self._network.transfer(self._replicas.index(first), self._replicas.index(second))
        sent = 0

        def export(end: int) -> None:
            nonlocal sent
            transfer.send((min(end, len(known)) - sent) * self._deployment.kv_bytes_per_token)
            sent = min(end, len(known))

        with second.reserve(len(known) + max_tokens):
            kv = RequestKv(block_names=list(names))
            await first.answer(name, known, 1, times, targets, kv=kv, on_chunk=export)
            if max_tokens > 1:
                await transfer.received()
        if max_tokens > 1:
            landed = LandedKv(block_names=names, num_landed=len(known))
            await second.answer(name, (*known, 0), max_tokens - 1, times, targets, kv=landed)

    def _note_emptied(self) -> None:
        self._is_synced = False

    def _choose(self, copy: Request, names: list[bytes]) -> Replica:
        """Return the replica that the router would choose for a request whose blocks have these names."""
        shared = 0 if self._tiers is None else self._tiers.cached_tokens(names)
        now = asyncio.get_running_loop().time()
        if len(self._replicas) > ALL_ARE_PICKED:
            if not self._is_synced:
                self._is_synced = True
                self._shortlist.sync([each.view for each in self._replicas])
            picked = self._shortlist.pick(names, lambda number: self._replicas[number].is_running, now)
            running = [self._replicas[number] for number in picked]
        else:
            running = [each for each in self._replicas if each.is_running]
        candidates = [
            Candidate(each.view, expected_tokens(each.memory.cached_tokens(names), shared)) for each in running
        ]
        index = choose_replica(candidates, copy, now)
        if index is None:
            raise ServerError("all machines have failed")
        if self._tiers is not None:
            self._tiers.add(names)
        return running[index]


def new_request(name: str, prompt: tuple[int, ...], max_tokens: int, targets: SloTargets, kv: RequestKv) -> Request:
    """Return a request that comes now."""
    scheduling = SchedulingOptions(targets=targets, arrival_time=asyncio.get_running_loop().time())
    return Request(name, prompt, PARAMS, max_tokens, seed=0, scheduling=scheduling, kv=kv)


def prompt_ids(request: LoadRequest) -> tuple[int, ...]:
    """Return the token ids of a prompt. Raises ConfigError for text."""
    if isinstance(request.prompt, str):
        raise ConfigError("the trace contains text: a simulation requires token ids or prompt_tokens")
    return request.prompt


class MachineLostError(Exception):
    """Says that a machine has failed before it had answered."""


class MovedError(Exception):
    """Says that a request goes on at another machine, with the KV of its first `num_computed` tokens."""

    def __init__(self, num_computed: int) -> None:
        super().__init__(num_computed)
        self.num_computed = num_computed


@dataclass(slots=True)
class _Waiting:
    """Holds a request that a replica has not answered yet."""

    times: list[float]
    done: asyncio.Future[None]
    num_tokens: int
    on_chunk: Callable[[int], None] | None
    request: Request


class Replica:
    """Simulates an engine: steps one after the other while there is work. `seed` is that of their noise."""

    def __init__(self, lane: Machine, seed: int = 0, *, machine: int = 0, tiers: SharedTiers | None = None) -> None:
        """`lane` is one of the lanes of machine number `machine`. With `tiers`, `seed` is its number among the engines
        that share them.
        """
        self.machine, self.role = machine, lane.role
        self._shared, self._part = tiers, seed
        self._engine = lane.engine
        self.cost = lane.engine.calibration.cost
        self._step_times = lane.step_times or self.cost
        self._at_its_pace = by_chance(self.cost.noise, seed) if lane.pace is None else lane.pace.begin(seed)
        budget = StepFeatures().plus(start=0, count=lane.engine.budget.tokens, rows=1)
        self._seconds_per_token = self._step_times.seconds(budget) / budget.tokens
        self.block_size = lane.engine.calibration.block_size
        self._keeps_slos = lane.engine.scheduler.slo_enabled
        self._copy_seconds = lane.engine.block_bytes / lane.engine.kv_memory_speed
        self._newest_seconds = 0.0  # of the newest step
        self._num_failures = 0  # under way
        self.on_emptied: Callable[[], None] = lambda: None
        """Listener that is called when it has lost all that it had, and has another `view`."""
        self.is_started = True
        """Whether it is to take requests: False before it is started, and from when it is drained."""
        self.pool: LoanPool | None = None
        """Loans between the machines, if there are any."""
        self.num_tokens = self.num_cached_tokens = 0
        """Number of tokens that it has computed, and of those that it found in its prefix cache."""
        self._owed = 0.0  # seconds that it has computed for others since its step began
        self._start_empty()

    def _start_empty(self) -> None:
        calibration = self._engine.calibration
        self.allocator = allocator = BlockAllocator(
            calibration.num_blocks,
            calibration.block_size,
            namer=self._engine.make_namer(),
            saves_blocks=self._shared is not None,
        )
        self._tiers, fetching = None, None
        if self._shared is not None:
            block_bytes, num_engines = self._engine.block_bytes, len(self._shared.staged)
            inbox_bytes, staged_bytes = waiting_bytes(self._engine.kv_memory_tier // num_engines)
            self._tiers = SimulatedTiers(
                self._shared,
                part=self._part,
                block_bytes=block_bytes,
                staged_bytes=staged_bytes,
                clock=lambda: asyncio.get_running_loop().time(),
            )
            fetching = Fetching(self._tiers, Inbox(places(inbox_bytes, block_bytes), 0))  # bytes are not simulated
        config, budget = self._engine.scheduler, self._engine.budget
        policy = make_baseline(self._engine.policy, config)
        policy = policy or make_policy(config, calibration.cost if config.slo_enabled else None)
        self.scheduler = Scheduler(config, allocator, policy, budget, fetching=fetching)
        self._chosen_cost = calibration.cost if budget.is_open else None
        if (fetches := self.scheduler.fetches) is not None and self._chosen_cost is not None:
            fetches.seconds_of = fetches.seconds_of or self._chosen_cost.seconds
        self.view = ReplicaView(
            num_blocks=calibration.num_blocks,
            block_size=calibration.block_size,
            max_num_seqs=config.max_num_seqs,
            token_budget=budget.most,
        )
        """What the router knows of it."""
        self.view.times = self._times
        self.num_to_compute = 0
        """Tokens of its requests that are not computed yet."""
        self.num_reserved = 0
        """Blocks that its requests, and those which will come, need in the end."""
        self._waiting: dict[str, _Waiting] = {}
        self._step: asyncio.TimerHandle | None = None
        self._fetched: asyncio.TimerHandle | None = None  # when there is nothing to do before
        self.on_emptied()

    @property
    def is_running(self) -> bool:
        """Return whether it takes requests: no failure of it is under way."""
        return self.is_started and not self._num_failures

    @property
    def num_blocks(self) -> int:
        """Return the number of its KV blocks."""
        return self._engine.calibration.num_blocks

    @property
    def num_open(self) -> int:
        """Return the number of its requests."""
        return len(self._waiting)

    @property
    def is_idle(self) -> bool:
        return not self._waiting and not self.num_reserved

    @property
    def memory(self) -> PrefixMemory:
        return self.view.memory

    @property
    def _times(self) -> StepTimes | None:
        if (predictor := self.scheduler.policy.predictor) is not None:
            return predictor.times
        return None if self._chosen_cost is None else StepTimes(self._chosen_cost)

    def seconds_to_compute(self, names: list[bytes]) -> float:
        """Return about how long its requests take, less what is cached of a prompt whose blocks have these names."""
        return (self.num_to_compute - self.memory.cached_tokens(names)) * self._seconds_per_token

    def fits(self, num_tokens: int) -> bool:
        """Return whether its KV cache has room for one more request of so many tokens, when all have come to their end.

        A block is left for each running request, as the scheduler leaves it.
        """
        needed = self.num_reserved + self._blocks(num_tokens) + len(self._waiting) + 1
        return needed <= self._engine.calibration.num_blocks

    def _blocks(self, num_tokens: int) -> int:
        return ceil_div(num_tokens, self.block_size)

    @contextmanager
    def reserve(self, num_tokens: int) -> Iterator[None]:
        """Count a request of so many tokens among those that need room, while it is on its way."""
        scheduler, blocks = self.scheduler, self._blocks(num_tokens)
        self.num_reserved += blocks
        try:
            yield
        finally:
            if self.scheduler is scheduler:  # else it has failed meanwhile
                self.num_reserved -= blocks

    async def answer(
        self,
        request_id: str,
        prompt: tuple[int, ...],
        max_tokens: int,
        times: list[float],
        targets: SloTargets,
        *,
        kv: RequestKv | None = None,
        copy: Request | None = None,
        on_chunk: Callable[[int], None] | None = None,
    ) -> None:
        """Generate `max_tokens` tokens and add when each came to `times`. `copy` is for the router, and `on_chunk` is
        called with the end of each chunk that has been computed.

        Raises RequestTooLargeError, and MachineLostError if the machine fails meanwhile.
        """
        if not self.is_running:
            raise MachineLostError
        loop = asyncio.get_running_loop()
        kv = RequestKv() if kv is None else kv
        request = new_request(request_id, prompt, max_tokens, targets if self._keeps_slos else NO_SLO, kv)
        self.scheduler.add(request, loop.time())
        if copy is not None:
            self.view.add(copy, kv.block_names)
        landed = kv.num_landed if isinstance(kv, LandedKv) else 0
        waiting = _Waiting(times, loop.create_future(), len(prompt) - landed, on_chunk, request)
        self._waiting[request_id] = waiting
        self.num_to_compute += waiting.num_tokens + max_tokens
        with self.reserve(len(prompt) + max_tokens):
            if self._step is None:
                self._begin_step()
            await waiting.done

    def fail_later(self, failure: Failure) -> None:
        """Fail at the time of `failure`, and come back after it and all others that are under way then."""
        loop = asyncio.get_running_loop()

        def fail() -> None:
            self._num_failures += 1
            self._stop(lambda _: MachineLostError())

        def come_back() -> None:
            self._num_failures -= 1

        loop.call_later(failure.at, fail)
        if failure.seconds < math.inf:
            loop.call_later(failure.at + failure.seconds, come_back)

    def drain(self) -> None:
        """Take no more requests. Those which it has go on elsewhere with their KV, after the step in flight."""
        self.is_started = False
        if self._step is None:
            self._stop(_moved)

    def _stop(self, why: Callable[[Request], Exception]) -> None:
        """End its requests with an exception each, and forget all that it had."""
        for handle in (self._step, self._fetched):
            if handle is not None:
                handle.cancel()
        lost = list(self._waiting.values())
        self._start_empty()
        for waiting in lost:
            if not waiting.done.cancelled():
                waiting.done.set_exception(why(waiting.request))

    def _begin_step(self) -> None:
        """Begin the next step, or wait a little for KV blocks that are asked for."""
        if self._tiers is not None and self._ask(self._tiers):
            loop = asyncio.get_running_loop()
            at = min(loop.time() + WAITING_SHARE * self._newest_seconds, self._tiers.next_answer)
            self._step = loop.call_at(at, self._plan_step)
        else:
            self._plan_step()

    def _ask(self, tiers: SimulatedTiers) -> bool:
        """Ask for KV blocks of new requests. Returns whether there were any to ask for."""
        if self._fetched is not None:
            self._fetched.cancel()
            self._fetched = None
        self._take_answers(tiers)
        assert self.scheduler.fetches is not None
        fetches = self.scheduler.fetches.take(asyncio.get_running_loop().time())
        for fetch in fetches:
            tiers.ask(fetch)
        return bool(fetches)

    def _take_answers(self, tiers: SimulatedTiers) -> None:
        assert self.scheduler.fetches is not None
        for number, frames in tiers.answers():
            self.scheduler.fetches.arrived(number, frames, asyncio.get_running_loop().time())

    def _plan_step(self) -> None:
        loop, tiers, num_copied = asyncio.get_running_loop(), self._tiers, 0
        if tiers is not None:
            self._take_answers(tiers)
        plan = self.scheduler.schedule(loop.time())
        if plan is None:
            self._step = None
            if tiers is not None and self.scheduler.queue.fetching:
                self._fetched = loop.call_at(tiers.next_answer, self._begin_step)
                return
            assert not self.scheduler.has_unfinished, "unfinished requests, and nothing can run"
            if tiers is not None:
                tiers.save(self.allocator.take_saves())
            return
        if tiers is not None:
            num_copied = tiers.save(plan.saves) + len(plan.lands)
        self._newest_seconds = self._seconds(plan) + num_copied * self._copy_seconds + self._owed
        self._owed = 0.0
        self._step = loop.call_later(self._newest_seconds, self._end_step, plan)

    def owe(self, seconds: float) -> None:
        """Compute for the debtor of a loan, which makes the next step so much longer; for nothing if there is none."""
        if self._step is not None:
            self._owed += seconds

    def _seconds(self, plan: StepPlan) -> float:
        if self.pool is None:
            return self.step_seconds(features_of(plan))
        return self._measured(self.pool.seconds(plan, self.cost))

    def step_seconds(self, step: StepFeatures) -> float:
        """Return the time of a step: its usual one, at the pace of the machine, and what comes between steps."""
        return self._measured(self._step_times.seconds(step))

    def _measured(self, usual: float) -> float:
        return self._at_its_pace(usual) + self._engine.step_overhead

    def _end_step(self, plan: StepPlan) -> None:
        now = asyncio.get_running_loop().time()
        result = {chunk.request_id: CHOSEN if chunk.samples else NOT_CHOSEN for chunk in plan.chunks}
        outputs = self.scheduler.update(plan, result, now)
        self.view.take(outputs, self._times, available_blocks=self.allocator.num_available, now=now)
        for chunk in plan.chunks:
            if (on_chunk := self._waiting[chunk.request_id].on_chunk) is not None:
                on_chunk(chunk.end)
        self.num_tokens += plan.num_tokens
        for output in outputs:
            if output.token_ids:
                waiting = self._waiting[output.request_id]
                if not waiting.times:
                    self.num_cached_tokens += output.num_cached_tokens
                waiting.times.append(now)
                self.num_to_compute -= 1
                if output.finish_reason is not None:
                    del self._waiting[output.request_id]
                    self.num_to_compute -= waiting.num_tokens
                    if not waiting.done.cancelled():
                        waiting.done.set_result(None)
        if self.is_running:
            self._begin_step()
        else:
            self._stop(_moved)


def _moved(request: Request) -> MovedError:
    return MovedError(request.num_scheduled)
