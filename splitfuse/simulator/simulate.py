"""Simulates engines: the real scheduler, block allocator and routing on a virtual clock, with a cost model.

Loads drive them as any target (bench/load.py), in the event loop of virtual_time.py. The Scheduler composes steps,
`choose_replica` routes requests, and the CostModel predicts the time of a step. Other time of the machine counts only
as far as `step_overhead` and `client_overhead` add it.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Self

from splitfuse.bench.baselines import make_baseline
from splitfuse.bench.measure import MakeWorkload, measure
from splitfuse.bench.results import Results
from splitfuse.bench.target import Answer, Target
from splitfuse.bench.workload import LoadRequest, Loads, Prompt, TokenIds
from splitfuse.config import EngineConfig, SchedulerConfig
from splitfuse.core.kv.block_allocator import BlockAllocator
from splitfuse.core.kv.names import BlockNamer
from splitfuse.core.kv.request_kv import RequestKv
from splitfuse.core.plan import ChunkResult, StepPlan
from splitfuse.core.replica_view import ReplicaView
from splitfuse.core.request import Request, SchedulingOptions
from splitfuse.core.routing import Candidate, choose_replica
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.scheduler import Scheduler
from splitfuse.core.slo.cost_model import CostModel, StepFeatures, features_of
from splitfuse.core.slo.deadline_policy import make_policy
from splitfuse.core.slo.latency_predictor import StepTimes
from splitfuse.core.slo.targets import SloTargets
from splitfuse.core.step_budget import StepBudget
from splitfuse.errors import ConfigError, SplitfuseError
from splitfuse.runtime.calibration import Calibration
from splitfuse.simulator import virtual_time

CHOSEN = ChunkResult(token_ids=(0,))
NOT_CHOSEN = ChunkResult()
PARAMS = SamplingParams(ignore_eos=True)


class Bytes(TokenIds):
    """Draws prompts of random bytes: as distinct as random token ids, and drawn a hundred times faster."""

    def draw(self, random: Random, count: int) -> Prompt:
        """Return `count` tokens."""
        return tuple(random.randbytes(count))


MAX_BLOCKS = 2**24
"""Number of KV blocks that a simulation can have: it keeps lists of them, for each replica."""


@dataclass(frozen=True, kw_only=True)
class SimulationConfig:
    """Describes a calibrated model and machine, and how it is run."""

    calibration: Calibration
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    policy: str = "splitfuse"
    replicas: int = 1
    enable_prefix_caching: bool = True
    step_overhead: float = 0.0
    """Seconds between steps, in addition to the cost model."""
    client_overhead: float = 0.0
    """Seconds from a client to the engine."""

    def __post_init__(self) -> None:
        make_baseline(self.policy, self.scheduler)
        refuse_drafts(self.scheduler)
        if self.calibration.num_blocks > MAX_BLOCKS:
            raise ConfigError(
                f"num_blocks must be at most {MAX_BLOCKS} in a simulation, not {self.calibration.num_blocks}"
            )
        if self.replicas < 1:
            raise ConfigError(f"--replicas {self.replicas} must be at least 1")
        for name in ("step_overhead", "client_overhead"):
            if not 0 <= getattr(self, name) < float("inf"):
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} {getattr(self, name)} must be a number of seconds, at least 0")

    def make_namer(self) -> BlockNamer | None:
        """Return a namer of blocks; all of them give the same names. None without prefix caching."""
        return BlockNamer(self.calibration.block_size, key=b"simulation") if self.enable_prefix_caching else None

    @classmethod
    def of(cls, calibration: Calibration, config: EngineConfig, **how: Any) -> Self:
        """Return the simulation of a calibrated engine with these settings; `how` are the other fields."""
        calibration = replace(
            calibration,
            num_blocks=config.cache.num_blocks or calibration.num_blocks,
            max_model_len=config.model.max_model_len or calibration.max_model_len,
        )
        cached = config.cache.enable_prefix_caching
        return cls(calibration=calibration, scheduler=config.scheduler, enable_prefix_caching=cached, **how)

    @property
    def budget(self) -> StepBudget:
        """Return the token budget that an engine would have, chosen by the cost model if the settings leave it open."""
        return StepBudget.of(self.scheduler, self.calibration.cost)

    @property
    def settings(self) -> dict[str, Any]:
        """Return the settings by name, for the record."""
        own = {"cost_model": self.calibration.name, **vars(self), **vars(self.scheduler)}
        own |= {"num_blocks": self.calibration.num_blocks, "block_size": self.calibration.block_size}
        own |= {"max_num_batched_tokens": self.budget.tokens}
        return {name: value for name, value in own.items() if name not in ("calibration", "scheduler")}


def refuse_drafts(config: SchedulerConfig) -> None:
    """Raise ConfigError if requests would draft tokens: what is simulated has no text that could repeat."""
    if config.num_speculative_tokens:
        raise ConfigError(
            f"num_speculative_tokens must be 0 in a simulation, whose answers have no text to draft from, not "
            f"{config.num_speculative_tokens}"
        )


def simulate(
    simulation: SimulationConfig,
    make_workload: MakeWorkload,
    loads: Loads,
    *,
    system: str,
    about: Mapping[str, Any],
    on_point: Callable[[Results], None] = lambda _: None,
    progress: bool = False,
) -> Results:
    """Return the results that `measure` would have. Raises what loads and workload raise."""
    results = virtual_time.run(
        measure(
            SimulatedTarget(simulation),
            make_workload,
            loads,
            system=system,
            replicas=simulation.replicas,
            about=about,
            on_point=lambda results: on_point(replace(results, simulated=True)),
            progress=progress,
        )
    )
    return replace(results, simulated=True)


class SimulatedTarget(Target):
    """Simulates replicas, which generate zeros. Drive it in `virtual_time.run`."""

    def __init__(self, simulation: SimulationConfig) -> None:
        self._simulation = simulation
        self._namer = simulation.make_namer()
        self._targets = SloTargets.parse(**simulation.scheduler.targets)
        self._replicas = [Replica(simulation, seed) for seed in range(simulation.replicas)]
        self._numbers = itertools.count()
        self.vocabulary = self.answer_vocabulary = Bytes(256)
        calibration = simulation.calibration
        self.room = min(calibration.max_model_len, calibration.num_blocks * calibration.block_size)
        self.about = {"simulation": simulation.settings}

    async def start(self) -> None:
        """Do nothing: there is nothing to load."""

    async def ask(self, request: LoadRequest) -> Answer:
        return await self.answer(request, self._targets)

    async def answer(self, request: LoadRequest, targets: SloTargets) -> Answer:
        """Answer a request with an SLO of its own."""
        prompt = prompt_ids(request)
        if self._simulation.client_overhead:
            await asyncio.sleep(self._simulation.client_overhead)
        name, now = str(next(self._numbers)), asyncio.get_running_loop().time()
        scheduling = SchedulingOptions(targets=targets, arrival_time=now)
        names: list[bytes] = []
        replica = self._replicas[0]
        real, copy = (
            Request(
                name, prompt, PARAMS, request.max_tokens, seed=0, scheduling=scheduling, kv=RequestKv(block_names=n)
            )
            for n in (names, [])
        )
        if len(self._replicas) > 1:
            if self._namer is not None:
                self._namer.extend(names, prompt)
            replica = self._choose(copy, names, now)
        try:
            times = await replica.answer(real, copy, names)
        except SplitfuseError as error:
            return Answer(len(prompt), error=str(error))
        return Answer(len(prompt), tuple(times), (0,) * len(times))

    async def close(self) -> None:
        """Do nothing: there is nothing to release."""

    def _choose(self, copy: Request, names: list[bytes], now: float) -> Replica:
        """Return the replica that the router would choose for a prompt whose blocks have these names."""
        views = [replica.view for replica in self._replicas]
        index = choose_replica([Candidate(view, view.memory.cached_tokens(names)) for view in views], copy, now)
        assert index is not None, "all replicas accept"
        return self._replicas[index]


def prompt_ids(request: LoadRequest) -> tuple[int, ...]:
    """Return the token ids of a prompt. Raises ConfigError for text."""
    if isinstance(request.prompt, str):
        raise ConfigError("the trace contains text: a simulation requires token ids or prompt_tokens")
    return request.prompt


class Replica:
    """Simulates an engine: steps one after the other while there is work. `seed` is that of their noise."""

    def __init__(self, simulation: SimulationConfig, seed: int = 0) -> None:
        calibration = simulation.calibration
        self._allocator = allocator = BlockAllocator(
            calibration.num_blocks, calibration.block_size, namer=simulation.make_namer()
        )
        config = simulation.scheduler
        cost = calibration.cost if config.slo_enabled else None
        policy = make_baseline(simulation.policy, config) or make_policy(config, cost)
        self.scheduler = Scheduler(config, allocator, policy, simulation.budget)
        self._cost: CostModel = calibration.cost
        self._random = Random(seed)
        self._step_overhead = simulation.step_overhead
        self._waiting: dict[str, tuple[list[float], asyncio.Future[list[float]]]] = {}
        self._in_step = False
        self.view = ReplicaView(
            num_blocks=calibration.num_blocks,
            block_size=calibration.block_size,
            max_num_seqs=config.max_num_seqs,
            token_budget=simulation.budget.most,
        )
        """What the router knows of it."""
        self._chosen_cost = calibration.cost if simulation.budget.is_open else None
        self.view.times = self._times

    async def answer(self, request: Request, copy: Request, names: list[bytes]) -> list[float]:
        """Return when each token came. `copy` is for the router, which knows the names of the prompt's blocks.

        Raises RequestTooLargeError.
        """
        loop = asyncio.get_running_loop()
        self.scheduler.add(request, loop.time())
        self.view.add(copy, names)
        done: asyncio.Future[list[float]] = loop.create_future()
        self._waiting[request.request_id] = ([], done)
        if not self._in_step:
            self._begin_step()
        return await done

    @property
    def _times(self) -> StepTimes | None:
        if (predictor := self.scheduler.policy.predictor) is not None:
            return predictor.times
        return None if self._chosen_cost is None else StepTimes(self._chosen_cost)

    def _begin_step(self) -> None:
        plan = self.scheduler.schedule(asyncio.get_running_loop().time())
        if plan is None:
            assert not self.scheduler.has_unfinished, "unfinished requests, and nothing can run"
            return
        self._in_step = True
        asyncio.get_running_loop().call_later(self.step_seconds(features_of(plan)), self._end_step, plan)

    def step_seconds(self, step: StepFeatures) -> float:
        """Return the time of a step: as predicted, times noise as in the calibration."""
        scattered = self._random.lognormvariate(0.0, self._cost.noise)
        return self._cost.seconds(step) * scattered + self._step_overhead

    def _end_step(self, plan: StepPlan) -> None:
        now = asyncio.get_running_loop().time()
        result = {chunk.request_id: CHOSEN if chunk.samples else NOT_CHOSEN for chunk in plan.chunks}
        outputs = self.scheduler.update(plan, result, now)
        self.view.take(outputs, self._times, available_blocks=self._allocator.num_available, now=now)
        for output in outputs:
            if output.token_ids:
                times, done = self._waiting[output.request_id]
                times.append(now)
                if output.finish_reason is not None:
                    del self._waiting[output.request_id]
                    if not done.cancelled():
                        done.set_result(times)
        self._in_step = False
        self._begin_step()
