"""Find the largest load that meets an SLO, and the settings for it, by simulating every candidate.

A load is sustained if its SLO attainment is high enough and if requests finish as fast as they arrive. For each setting
the largest sustained Poisson rate is searched; the settings with the largest rate are chosen, and of equally good ones
the smallest. All loads consist of the same requests in the same order, only at other distances.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from splitfuse.bench import metrics
from splitfuse.bench.load import WARM_UP, closed_loop, open_loop
from splitfuse.bench.measure import MakeWorkload
from splitfuse.bench.results import Point
from splitfuse.bench.workload import Workload, poisson
from splitfuse.config import MAX_TARGET, PER_TOKEN, SchedulerConfig, parse_seconds
from splitfuse.core.limits import ceil_div
from splitfuse.core.slo.cost_model import StepFeatures
from splitfuse.core.slo.targets import SloTargets
from splitfuse.errors import ConfigError
from splitfuse.runtime.calibration import Calibration
from splitfuse.simulator import virtual_time
from splitfuse.simulator.simulate import SimulatedTarget, SimulationConfig, prompt_ids

BUDGETS = (32, 64, 128, 256, 512, 1024)
"""Candidates for max_num_batched_tokens."""
MAX_NUM_SEQS = (8, 16, 32, 64)
"""Candidates for max_num_seqs."""
USUAL_BUDGET = 256
"""Token budget, or else the largest candidate below it, with which max_num_seqs is chosen."""
PRECISION = 1.03
"""Ratio of loads, the one sustained and the other not, at which a search ends; settings within it are equally good."""
FIRST_STEP, LAST_STEP = 1.06, 2.0
"""Factors between successive loads of a search."""
LEAST = 1 / 64
"""Smallest load that is tried, as a fraction of the throughput of a lone client."""
KEEPS_UP = 0.95
"""Fraction of the arrivals in the window that must finish in it: a growing queue is not sustained."""
TTFTS_LONG = 20
"""Duration of a load in TTFT targets: a load that is a twentieth too large has missed them by then."""
LONGER_AT_MOST = 5
"""Maximum number of requests of a load, as a multiple of the wanted number."""
REFINED = 4
"""Multiple of the number of requests for the final load."""
LONE_REQUESTS = 64
"""Number of requests of a lone client."""
MOST_CLIENTS = 1024
SPARE = 1.1
"""Ratio of the targets that are called feasible to those that a lone request just meets."""
FAR = 2.0**20
"""Maximum ratio of feasible targets to the requested ones in the search."""


NO_TARGETS = "tune requires an SLO: give --ttft, such as 1s or 2ms/token, or --itl, such as 250ms"


@dataclass(frozen=True)
class CurvePoint:
    """A step of one chunk of a prompt, from its beginning."""

    tokens: int
    predicted: float
    """Seconds."""
    measured: float | None
    """Seconds; None if no such step was timed."""

    @property
    def tokens_per_second(self) -> float:
        """Speed as measured, or else as predicted."""
        return self.tokens / (self.predicted if self.measured is None else self.measured)


def curve(calibration: Calibration, budgets: Sequence[int] = BUDGETS) -> list[CurvePoint]:
    """Return step time against tokens, for each step that was timed and each budget."""
    timed = {
        sample.features.tokens: sample.seconds
        for sample in calibration.timed
        if sample.features.requests == 1 and sample.features.kv_tokens == sample.features.tokens
    }
    return [
        CurvePoint(tokens, step_seconds(calibration, tokens), timed.get(tokens))
        for tokens in sorted({1, *timed, *budgets})
    ]


def step_seconds(calibration: Calibration, tokens: int) -> float:
    """Return the predicted time of a step of one prompt of so many tokens."""
    return calibration.cost.seconds(StepFeatures().plus(start=0, count=tokens, rows=1))


@dataclass(frozen=True)
class Sustained:
    """The largest load that a setting sustains."""

    setting: SchedulerConfig
    """Without targets: first-come first-served."""
    rate: float
    """Arrival rate in requests/s, or conversations/s; 0 if none is sustained."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Results of all candidates, the chosen one, and the load that it sustains."""

    ttft: str | None
    itl: str | None
    attainment: float
    """Required SLO attainment."""
    budgets: tuple[Sustained, ...]
    """Token budgets with the chosen max_num_seqs and SLO scheduling."""
    budgets_fcfs: tuple[Sustained, ...]
    """Token budgets with the largest max_num_seqs, first-come first-served."""
    max_num_seqs: tuple[Sustained, ...]
    """Values of max_num_seqs with a usual token budget and SLO scheduling."""
    chosen: SchedulerConfig
    rate: float
    """Poisson rate in requests/s that it sustains."""
    clients: int
    """Clients of a closed loop that it sustains; 0 if not even one."""
    clients_rate: float
    """Throughput of these clients in requests/s."""


def tune(
    simulation: SimulationConfig,
    make_workload: MakeWorkload,
    *,
    attainment: float = 0.99,
    requests: int = 200,
    budgets: Sequence[int] = BUDGETS,
    max_num_seqs: Sequence[int] = MAX_NUM_SEQS,
    on_trial: Callable[[], None] = lambda: None,
) -> Tuning:
    """Choose among `max_num_seqs` with a usual budget, then among `budgets` with the best of them.

    The targets are those of the simulation's scheduler. `requests` count at each load, `attainment` is the fraction of
    them that must meet the targets. `on_trial` is called for each simulated load.

    Raises ConfigError if there are no targets, or if even a lone request misses them: the message has feasible ones.
    """
    if not simulation.scheduler.has_targets:
        raise ConfigError(NO_TARGETS)
    if not 0 < attainment <= 1:
        raise ConfigError(f"--slo-attainment {attainment} must be above 0 and at most 1, such as 0.99")
    candidates = {"max-num-batched-tokens": budgets, "max-num-seqs": max_num_seqs, "requests": (requests,)}
    for name, values in candidates.items():
        if not values or min(values) < 1:
            raise ConfigError(f"--{name} must be positive integers, not {','.join(map(str, values)) or 'none'}")
    trials = _Trials(simulation, make_workload, attainment, requests, on_trial)
    budgets, max_num_seqs = sorted(set(budgets)), sorted(set(max_num_seqs))
    config = simulation.scheduler
    largest = replace(config, max_num_batched_tokens=budgets[-1], max_num_seqs=max_num_seqs[-1])  # its steps shorten
    lone = trials.closed(largest, 1, LONE_REQUESTS)
    if trials.attainment(lone) < attainment:
        raise trials.infeasible(largest)
    least = LEAST * metrics.throughput(lone)

    def sustained(settings: Iterable[SchedulerConfig], start: float) -> tuple[Sustained, ...]:
        """Each search starts from the result of the one before."""
        found: list[Sustained] = []
        for setting in settings:
            rate = trials.largest_rate(setting, start=start, least=least)
            found.append(Sustained(setting, rate))
            start = rate or start
        return tuple(found)

    usual = max((budget for budget in budgets if budget <= USUAL_BUDGET), default=budgets[0])
    by_seqs = sustained(
        (replace(config, max_num_batched_tokens=usual, max_num_seqs=count) for count in max_num_seqs),
        metrics.throughput(lone),
    )
    if not any(each.rate for each in by_seqs):
        raise trials.infeasible(largest)
    best = _smallest_of_the_best(by_seqs)
    by_budget = sustained((replace(best.setting, max_num_batched_tokens=budget) for budget in budgets), best.rate)
    no_slo = replace(largest, ttft=None, itl=None)
    fcfs = sustained((replace(no_slo, max_num_batched_tokens=budget) for budget in budgets), best.rate)
    best = _smallest_of_the_best(by_budget)
    chosen = best.setting
    rate = trials.largest_rate(chosen, start=best.rate, least=least, refined=True)
    clients, clients_rate = trials.most_clients(chosen)
    return Tuning(
        ttft=config.ttft,
        itl=config.itl,
        attainment=attainment,
        budgets=by_budget,
        budgets_fcfs=fcfs,
        max_num_seqs=by_seqs,
        chosen=chosen,
        rate=rate,
        clients=clients,
        clients_rate=clients_rate,
    )


def _smallest_of_the_best(candidates: Sequence[Sustained]) -> Sustained:
    """Return the first that is as good as any; smaller settings come first."""
    most = max(each.rate for each in candidates)
    return next(each for each in candidates if each.rate * PRECISION >= most)


class _Trials:
    """Simulations of loads, and whether they are sustained."""

    def __init__(
        self,
        simulation: SimulationConfig,
        make_workload: MakeWorkload,
        required: float,
        requests: int,
        on_trial: Callable[[], None],
    ) -> None:
        self._simulation = simulation
        self._targets = SloTargets.parse(simulation.scheduler.ttft, simulation.scheduler.itl)
        self._make_workload = make_workload
        self._required, self._requests, self._on_trial = required, requests, on_trial

    def largest_rate(self, setting: SchedulerConfig, *, start: float, least: float, refined: bool = False) -> float:
        """Return the largest Poisson rate that a setting sustains; 0 if it is below `least`."""
        requests = self._requests * (REFINED if refined else 1)
        target = self._target(setting)
        workload = self._make_workload(target)
        ttft = self._longest_ttft(workload)

        def is_sustained(rate: float) -> bool:
            lasting = min(math.ceil(TTFTS_LONG * rate * ttft), LONGER_AT_MOST * requests)
            return self._is_sustained(self._open(setting, rate, max(requests, lasting)))

        return _largest(is_sustained, start, least)

    def most_clients(self, setting: SchedulerConfig) -> tuple[int, float]:
        """Return the number of clients that a setting sustains, and their throughput.

        Without a TTFT target no request misses its target in the queue: max_num_seqs is the limit then.
        """
        rates: dict[int, float] = {}
        most = setting.max_num_seqs if setting.ttft is None else MOST_CLIENTS

        def is_sustained(clients: int) -> bool:
            point = self.closed(setting, clients, max(self._requests, 8 * clients))
            rates[clients] = metrics.throughput(point)
            return self._is_sustained(point)

        low, high = 1, 2  # `low` are sustained
        while high <= most and is_sustained(high):
            low, high = high, 2 * high
        high = min(high, most + 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if is_sustained(middle) else (low, middle)
        if low not in rates and not is_sustained(low):
            return 0, 0.0
        return low, rates[low]

    def closed(self, setting: SchedulerConfig, clients: int, requests: int) -> Point:
        """Simulate a closed loop."""
        target = self._target(setting)
        self._on_trial()
        loop = closed_loop(target, self._make_workload(target), clients=clients, requests=requests)
        return virtual_time.run(loop)

    def attainment(self, point: Point, targets: SloTargets | None = None) -> float:
        """Return the SLO attainment: the fraction of requests that met the targets (by default, the simulation's)."""
        return metrics.mean([metrics.meets_slo(record, targets or self._targets) for record in metrics.counted(point)])

    def _open(self, setting: SchedulerConfig, rate: float, requests: int) -> Point:
        target = self._target(setting)
        workload = self._make_workload(target)
        seed = int(workload.settings["seed"])
        warm_up = math.ceil(WARM_UP * requests)
        first, last = islice(poisson(1.0, seed=seed, stream="tune"), warm_up, warm_up + requests + 1, requests)
        scale = requests / rate / (last - first)  # chance must not make the window's rate another
        arrivals = (scale * at for at in poisson(1.0, seed=seed, stream="tune"))
        self._on_trial()
        loop = open_loop(target, workload, rate=None, arrivals=arrivals, requests=requests)
        return virtual_time.run(loop)  # without its rate, which would give each load other requests

    def _is_sustained(self, point: Point) -> bool:
        comes = len(metrics.counted(point)) / metrics.seconds(point)
        return self.attainment(point) >= self._required and metrics.throughput(point) >= KEEPS_UP * comes

    def _target(self, setting: SchedulerConfig) -> SimulatedTarget:
        """Return a simulated engine with as many blocks as max_num_seqs can use."""
        calibration = self._simulation.calibration
        useful = setting.max_num_seqs * ceil_div(calibration.max_model_len, calibration.block_size)
        calibration = replace(calibration, num_blocks=min(calibration.num_blocks, useful))
        return SimulatedTarget(replace(self._simulation, scheduler=setting, calibration=calibration))

    def _longest_ttft(self, workload: Workload) -> float:
        """Return the longest TTFT target in seconds among some requests; 0 without one."""
        if not self._simulation.scheduler.ttft:
            return 0.0
        some = (workload.first("lengths", number) for number in range(32))
        return max(self._targets.ttft_target(len(prompt_ids(request))) for request in some)

    def infeasible(self, setting: SchedulerConfig) -> ConfigError:
        """Return the error for targets that even a lone request misses, with its latencies and feasible targets."""
        alone = metrics.counted(self.closed(replace(setting, ttft=None, itl=None), 1, LONE_REQUESTS))
        itl = max((average for each in alone for average in metrics.moving_averages(metrics.gaps(each))), default=0.0)
        first = max(map(metrics.ttft, alone))
        ways = [(True, False), (False, True), (True, True)] if setting.ttft and setting.itl else [(True, True)]
        feasible = [flags for way in ways if (flags := self._least_feasible(setting, *way))]
        return ConfigError(
            f"{_flags(setting)} cannot be met here: even a lone request has an inter-token latency of up to "
            f"{1e3 * itl:.3g} ms and a TTFT of up to {first:.3g} s; feasible targets: "
            f"{' or '.join(feasible[:2]) or 'none of this kind'}"
        )

    def _least_feasible(self, setting: SchedulerConfig, ttft: bool, itl: bool) -> str | None:
        """Return the shortest targets that a lone request meets, with `ttft`, `itl` or both longer than requested."""

        def longer(times: float) -> SchedulerConfig:
            return replace(
                setting,
                ttft=_longer(setting.ttft, times) if ttft else setting.ttft,
                itl=_longer(setting.itl, times) if itl else setting.itl,
            )

        def holds(config: SchedulerConfig) -> bool:
            targets = SloTargets.parse(config.ttft, config.itl)
            return self.attainment(self.closed(config, 1, LONE_REQUESTS), targets) == 1.0

        low, high = 1.0, 2.0
        while not holds(longer(high)):
            low, high = high, 2.0 * high
            if high > FAR:
                return None
        while high > 1.1 * low:
            middle = math.sqrt(low * high)
            low, high = (low, middle) if holds(longer(middle)) else (middle, high)
        return _flags(longer(SPARE * high))


def _largest(is_sustained: Callable[[float], bool], start: float, least: float) -> float:
    """Return the largest sustained load, to PRECISION; 0 if it is below `least`.

    The search moves away from `start` in growing steps until it has bounds, then bisects.
    """
    low = high = start
    step = FIRST_STEP
    if is_sustained(start):
        while is_sustained(high := low * step):
            low, step = high, min(step**2, LAST_STEP)
    else:
        while not is_sustained(low := high / step):
            high, step = low, min(step**2, LAST_STEP)
            if high < least:
                return 0.0
    while high > low * PRECISION:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if is_sustained(middle) else (low, middle)
    return low


def _longer(target: str | None, times: float) -> str | None:
    """Return a target multiplied by `times`, rounded up to two digits."""
    if target is None:
        return None
    seconds = min(times * parse_seconds("target", target.removesuffix(PER_TOKEN)), MAX_TARGET)
    digit = 10.0 ** (math.floor(math.log10(1e3 * seconds)) - 1)
    rounded = digit * math.ceil(1e3 * seconds / digit - 1e-9)
    return f"{rounded:.6g}ms{PER_TOKEN if target.endswith(PER_TOKEN) else ''}"


def _flags(config: SchedulerConfig) -> str:
    """Return the targets as flags of a server."""
    return " ".join(f"--{name} {value}" for name in ("ttft", "itl") if (value := getattr(config, name)))
