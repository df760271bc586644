"""Times steps of a real model over a grid, and fits the cost model to them. The steps are synthetic; the executor is an
engine's, so that what is timed is what a plan takes: building tensors, network, output head, sampling.

Steps run in random order, so that a disturbance of the machine affects all kinds alike; the median of each counts.
Steps that check the fit lie between those that are fitted. The scheduler's own cost is timed separately, on a load.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random
from statistics import median, quantiles
from typing import NamedTuple

from tqdm import tqdm

from splitfuse.config.engine import EngineConfig
from splitfuse.core.limits import ceil_div
from splitfuse.core.plan import Chunk, SamplingState, StateSlots, StepPlan
from splitfuse.core.request import Request
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.scheduling_options import SchedulingOptions
from splitfuse.core.slo.cost_model import MIN_SAMPLES, CostModel, Sample, StepFeatures, fit
from splitfuse.core.slo.targets import SloTargets
from splitfuse.engine.build import build_scheduler
from splitfuse.errors import ConfigError, CostModelError
from splitfuse.runtime.calibration import Calibration, cache_path, identify, load, load_cost_model, save
from splitfuse.runtime.environment import environment_info
from splitfuse.runtime.executor import Executor
from splitfuse.runtime.loading import LoadedModel, load_model
from splitfuse.runtime.step_estimate import SMALL_NUMBER, estimate_cost

LEAST_RUNS, MOST_RUNS = 3, 30
"""Numbers of runs of each step."""
CACHED_TOKENS = 32_768
"""Number of KV positions that steps are spread over, if there are so many."""
PARAMS = SamplingParams(ignore_eos=True)


@dataclass(frozen=True)
class Case:
    """Describes a step to be timed by its chunks, each as (start, tokens, whether it samples)."""

    name: str
    chunks: tuple[tuple[int, int, bool], ...]

    @property
    def features(self) -> StepFeatures:
        """Return what the cost model predicts the step's time from."""
        total = StepFeatures()
        for start, count, samples in self.chunks:
            total = total.plus(start=start, count=count, rows=int(samples))
        return total


@dataclass(frozen=True)
class Timed:
    """Holds a case and the seconds of its runs, in order."""

    case: Case
    runs: tuple[float, ...]

    @property
    def sample(self) -> Sample:
        """Return the case's features with the median of its runs."""
        return Sample(self.case.features, median(self.runs))


def run_calibration(config: EngineConfig, *, seconds: float, progress: bool) -> tuple[Calibration, list[Timed]]:
    """Load the model, time its steps for about `seconds` and fit a cost model. Returns it with the held-out steps.

    Raises as `load_model` does, ConfigError for a duration that is not positive, CostModelError if the model or its
    cache is too small for enough different steps.
    """
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"seconds must be a positive number, not {seconds}")
    return calibrate(config, load_model(config, progress=progress), seconds=seconds, progress=progress)


def load_or_time(config: EngineConfig, *, seconds: float, progress: bool) -> Calibration:
    """Return the calibration that is stored for such an engine on this machine, with its timed steps; if there is none,
    make and store it. Raises as `run_calibration` does.
    """
    with suppress(CostModelError):  # a damaged file is made anew
        kept = load_cost_model(config)
        if kept.timed:
            return kept
    calibration, _ = run_calibration(config, seconds=seconds, progress=progress)
    save(calibration, cache_path(calibration.identity))
    return calibration


def load_or_estimate(config: EngineConfig, model: LoadedModel) -> CostModel:
    """Return the cost model that is stored for such an engine on this machine; if there is none, a rough one."""
    with suppress(CostModelError):
        return load(cache_path(identify(config, model.source))).cost
    return estimate_cost(model)


def calibrate(
    config: EngineConfig, model: LoadedModel, *, seconds: float, progress: bool = False
) -> tuple[Calibration, list[Timed]]:
    """Do as `run_calibration` with a model that is loaded."""
    plan = model.plan
    blocks = min(plan.num_blocks, ceil_div(CACHED_TOKENS, plan.block_size))
    model = replace(model, plan=replace(plan, num_blocks=blocks))
    executor = model.make_executor()
    for store in executor.kv_cache.layers:  # untouched pages would read unrealistically fast
        if store is not None:
            model.decoder.backend.fill_kv(store, SMALL_NUMBER)
    max_num_seqs = plan.max_num_seqs
    capacity = (blocks - max_num_seqs) * plan.block_size  # in KV positions: a request's last block is not full

    def fits(case: Case) -> bool:
        ends = [start + count for start, count, _ in case.chunks]
        return max(ends) <= plan.max_model_len and sum(ends) <= capacity and len(ends) <= max_num_seqs

    fine, coarse = (grid.only(fits) for grid in (FINE, COARSE))
    if not fine.is_enough:
        raise CostModelError(
            f"a calibration has to time at least {MIN_SAMPLES} different steps, but only {len(fine.fitted)} fit an "
            f"engine with {plan.max_model_len} tokens a request, {blocks} blocks and max_num_seqs {max_num_seqs}: "
            "raise --max-model-len or --kv-cache-memory-gib"
        )
    runs = _Runs(executor)
    fitted, checking = choose_grid(runs, fine, coarse, seconds=seconds)
    timed = time_cases(runs, [*fitted, *checking], seconds=seconds, progress=progress)
    cost = fit([each.sample for each in timed[: len(fitted)]], held_out=[e.sample for e in timed[len(fitted) :]])
    per_request = cost.per_request + scheduling_seconds(config, model, executor)
    calibration = Calibration(
        name=f"{model.source.name} ({plan.kernels})",
        cost=replace(cost, per_request=per_request, noise=noise(timed)),
        num_blocks=plan.num_blocks,
        block_size=plan.block_size,
        max_model_len=plan.max_model_len,
        kv_bytes_per_token=plan.block / plan.block_size,
        identity=identify(config, model.source),
        about=environment_info(),
        timed=tuple(each.sample for each in timed),
    )
    return calibration, timed[len(fitted) :]


def generating(rows: int, context: int) -> Case:
    """Return a step of `rows` requests that get a token each."""
    return Case(f"{rows} generating at {context}", ((context - 1, 1, True),) * rows)


def prompt(count: int, start: int) -> Case:
    """Return a step of one chunk of a prompt: all of it if it starts at 0, else one from its middle."""
    return Case(f"prompt {start}-{start + count}", ((start, count, start == 0),))


def mixed(rows: int, context: int, count: int, start: int) -> Case:
    """Return a step of both."""
    first, second = generating(rows, context), prompt(count, start)
    return Case(f"{first.name}, {second.name}", first.chunks + second.chunks)


class Grid(NamedTuple):
    """Lists steps to be timed."""

    fitted: Sequence[Case]
    """Decodes at some contexts, chunks of prompts, and both together."""
    checking: Sequence[Case]
    """Other steps, between those."""

    @property
    def is_enough(self) -> bool:
        """Return whether a cost model can be fitted to it, and checked."""
        return len(self.fitted) >= MIN_SAMPLES and bool(self.checking)

    def only(self, wanted: Callable[[Case], bool]) -> Grid:
        """Return the steps that are `wanted`."""
        return Grid(*([case for case in part if wanted(case)] for part in self))

    def up_to(self, tokens: int) -> Grid:
        """Return the steps of at most so many tokens."""
        return self.only(lambda case: case.features.tokens <= tokens)


FINE = Grid(
    [
        *(generating(rows, context) for rows in (1, 2, 4, 8, 16, 32, 64) for context in (32, 256, 1024, 2048)),
        *(prompt(count, start) for count in (8, 16, 32, 64, 128, 256, 512) for start in (0, 512, 1536)),
        *(mixed(rows, 512, count, start) for rows in (4, 24) for count in (32, 128, 240) for start in (0, 512)),
    ],
    [
        *(generating(rows, context) for rows in (3, 6, 12, 24, 48) for context in (128, 512, 1536)),
        *(prompt(count, start) for count in (12, 48, 96, 192, 384) for start in (0, 768)),
        *(mixed(rows, 384, count, start) for rows in (8, 20) for count in (64, 200) for start in (0, 900)),
    ],
)
COARSE = Grid(
    [
        *(generating(rows, context) for rows in (1, 2, 4, 8, 16, 64) for context in (32, 256, 1024, 2048)),
        *(prompt(count, start) for count in (16, 64, 256) for start in (0, 512, 1536)),
        *(mixed(rows, 512, count, start) for rows in (4, 24) for count in (32, 240) for start in (0, 512)),
    ],
    [
        *(generating(rows, context) for rows in (3, 6, 12) for context in (128, 512)),
        *(prompt(count, 768) for count in (8, 24, 32, 48, 128)),
        *(mixed(8, 384, count, 900) for count in (24, 64, 200)),
    ],
)
"""Grid for a machine that is too slow for all of FINE."""


def choose_grid(runs: _Runs, fine: Grid, coarse: Grid, *, seconds: float) -> Grid:
    """Return the most and longest steps that a machine has time for, but always enough. Beyond the longest, the fit is
    extrapolated in a straight line.
    """
    floor, whole = (min(runs.seconds(case) for _ in range(3)) for case in (generating(1, 32), prompt(64, 0)))
    per_token = max(whole - floor, 0.0) / 64
    choices = [*((fine, longest) for longest in (512, 256, 128)), *((coarse, longest) for longest in (256, 128, 64))]
    best = fine
    for grid, longest in choices:
        shorter = grid.up_to(longest)
        if shorter.is_enough:
            best = shorter
            each = (floor + per_token * case.features.tokens for case in (*best.fitted, *best.checking))
            if LEAST_RUNS * sum(each) <= seconds:
                break
    return best


def time_cases(runs: _Runs, cases: Sequence[Case], *, seconds: float, progress: bool) -> list[Timed]:
    """Time each case, in rounds in random order. Every case has an equal share of `seconds`: short steps, whose times
    vary most, run more often.
    """
    random = Random(0)
    times: list[list[float]] = [[] for _ in cases]
    for case in cases[: len(cases) // 8]:  # what is slow once, such as the first touch of memory
        runs.seconds(case)
    share = seconds / len(cases)
    wanting = list(range(len(cases)))
    with tqdm(total=len(cases), desc="Timing steps", unit="step", disable=not progress) as bar:
        while wanting:
            for index in random.sample(wanting, len(wanting)):
                times[index].append(runs.seconds(cases[index]))
                bar.set_postfix_str(f"{cases[index].name}, {1e3 * times[index][-1]:.1f} ms", refresh=False)
            wanting = [index for index in wanting if _wants_more(times[index], share)]
            bar.update(len(cases) - len(wanting) - bar.n)
    return [Timed(case, tuple(each)) for case, each in zip(cases, times, strict=True)]


def _wants_more(times: Sequence[float], share: float) -> bool:
    return len(times) < LEAST_RUNS or (sum(times) < share and len(times) < MOST_RUNS)


def noise(timed: Sequence[Timed]) -> float:
    """Return the standard deviation of the logarithm of equal steps' times: the 95th percentile of
    |log(t[i + 1] / t[i])| over the first runs of all cases, divided by 1.96 * sqrt(2), as for normal deviations.

    Deviations from the median would be too small where there were three runs. Further runs do not count, or short
    steps, which run more often, would decide.
    """
    apart = [abs(math.log(later / earlier)) for each in timed for earlier, later in pairwise(each.runs[:LEAST_RUNS])]
    return quantiles(apart, n=20, method="inclusive")[-1] / (1.96 * math.sqrt(2.0))


class _Runs:
    """Makes plans of cases and runs them, one after the other."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._random = Random(1)
        self._step = 0
        self._retired: tuple[str, ...] = ()

    def seconds(self, case: Case) -> float:
        """Return the seconds that it takes this time, with other tokens and other blocks than before."""
        self._step += 1
        plan = self._plan(case)
        began = time.perf_counter()
        self._executor.collect(self._executor.submit(plan))
        seconds = time.perf_counter() - began
        self._retired = tuple(new.request_id for new in plan.new_requests)
        return seconds

    def _plan(self, case: Case) -> StepPlan:
        num_blocks = self._executor.kv_cache.num_blocks
        free = iter(self._random.sample(range(num_blocks), num_blocks))
        chunks = tuple(self._chunk(i, each, free) for i, each in enumerate(case.chunks))
        new = tuple(SamplingState(chunk.request_id, chunk.token_ids, PARAMS, (), seed=0, choice=0) for chunk in chunks)
        return StepPlan(self._step, case.features.tokens, chunks, new, self._retired)

    def _chunk(self, number: int, chunk: tuple[int, int, bool], free: Iterator[int]) -> Chunk:
        start, count, samples = chunk
        vocab_size, block_size = self._executor.decoder.spec.vocab_size, self._executor.kv_cache.block_size
        tokens = tuple(self._random.randrange(vocab_size) for _ in range(count))
        table = tuple(next(free) for _ in range(ceil_div(start + count, block_size)))
        state = StateSlots(number, number) if self._executor.kv_cache.num_states else None
        return Chunk(f"{self._step}-{number}", start, tokens, table, int(samples), samples, state)


def scheduling_seconds(config: EngineConfig, model: LoadedModel, executor: Executor) -> float:
    """Return the seconds per request that planning a step and processing its result cost, while some requests run."""
    scheduler, _, _ = build_scheduler(config, model.plan)
    count = min(16, model.plan.max_num_seqs)
    length = min(32, model.plan.max_model_len // 2)
    targets = SloTargets.parse(**config.scheduler.targets)
    random = Random(2)
    for number in range(count):
        tokens = tuple(random.randrange(model.spec.vocab_size) for _ in range(length))
        now = time.monotonic()
        scheduling = SchedulingOptions(targets=targets, arrival_time=now)
        request = Request(f"scheduled-{number}", tokens, PARAMS, max_tokens=length, seed=0, scheduling=scheduling)
        scheduler.add(request, now)
    shares = []
    while scheduler.has_unfinished:
        began = time.perf_counter()
        plan = scheduler.schedule()
        assert plan is not None, "unfinished requests, and nothing can run"
        planned = time.perf_counter()
        result = executor.collect(executor.submit(plan))
        ran = time.perf_counter()
        scheduler.update(plan, result)
        shares.append((time.perf_counter() - ran + planned - began) / len(plan.chunks))
    return median(shares)
