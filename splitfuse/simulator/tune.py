"""Finds the largest load that meets an SLO, and the settings for it, by simulating every candidate.

A load is sustained if its SLO attainment is high enough and if requests finish as fast as they arrive. For each setting
the largest sustained Poisson rate is searched; the settings with the largest rate are chosen, and of equally good ones
the smallest. All loads consist of the same requests in the same order, only at other distances.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from splitfuse.bench import metrics
from splitfuse.bench.load import closed_loop
from splitfuse.bench.measure import MakeWorkload
from splitfuse.bench.results import Point
from splitfuse.bench.workload import Workload
from splitfuse.config.engine import SchedulerConfig
from splitfuse.config.values import parse_seconds
from splitfuse.core.limits import ceil_div
from splitfuse.core.slo.cost_model import StepFeatures
from splitfuse.core.slo.targets import SloTargets
from splitfuse.errors import ConfigError
from splitfuse.runtime.calibration import Calibration
from splitfuse.simulator import virtual_time
from splitfuse.simulator.deployment import SimulationConfig, without_targets
from splitfuse.simulator.rates import PRECISION, keeps_up, largest_load, poisson_load
from splitfuse.simulator.simulate import SimulatedTarget, prompt_ids

BUDGETS = (32, 64, 128, 256, 512, 1024)
"""Candidates for max_num_batched_tokens."""
MAX_NUM_SEQS = (8, 16, 32, 64)
"""Candidates for max_num_seqs."""
USUAL_BUDGET = 256
"""Token budget, or else the largest candidate below it, with which max_num_seqs is chosen."""
LEAST = 1 / 64
"""Smallest load that is tried, as a fraction of the throughput of a lone client."""
TTFTS_LONG = 20
"""Duration of a load in TTFT targets: a load that is a twentieth too large has missed them by then."""
LONGER_AT_MOST = 5
"""Maximum number of requests of a load, as a multiple of the wanted number."""
REFINED = 4
"""Multiple of the number of requests for the final load."""
LONE_REQUESTS = 64
"""Number of requests of a lone client."""
MOST_CLIENTS = 1024
LONGEST = 3600.0
"""Longest feasible target that is searched, in seconds."""
FAR = 2.0**20
"""Maximum ratio of feasible targets to the requested ones in the search."""


NO_TARGETS = (
    "tune requires an SLO: give --ttft, such as 1s or 2ms/token, --itl, such as 250ms or 250ms/p99, or --tpot, such as "
    "100ms"
)


@dataclass(frozen=True)
class CurvePoint:
    """Holds the time of a step of one chunk of a prompt, from its beginning."""

    tokens: int
    predicted: float
    """Seconds."""
    measured: float | None
    """Seconds; None if no such step was timed."""

    @property
    def seconds(self) -> float:
        """Return the time as measured, or else as predicted."""
        return self.predicted if self.measured is None else self.measured

    @property
    def tokens_per_second(self) -> float:
        """Return the speed as measured, or else as predicted."""
        return self.tokens / self.seconds


def curve(calibration: Calibration, budgets: Sequence[int] = BUDGETS) -> list[CurvePoint]:
    """Return step time against tokens, for each step that was timed and each budget."""
    timed = {
        sample.features.tokens: sample.seconds
        for sample in calibration.timed
        if sample.features.requests == 1 and sample.features.kv_tokens == sample.features.tokens
    }
    return [
        CurvePoint(
            tokens, calibration.cost.seconds(StepFeatures().plus(start=0, count=tokens, rows=1)), timed.get(tokens)
        )
        for tokens in sorted({1, *timed, *budgets})
    ]


@dataclass(frozen=True)
class Sustained:
    """Holds the largest load that a setting sustains."""

    setting: SchedulerConfig
    """Settings of the scheduler; without targets, it is first-come first-served."""
    rate: float
    """Arrival rate in requests/s, or conversations/s; 0 if none is sustained."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Holds the results of all candidates, the chosen one, and the load that it sustains."""

    ttft: str | None
    itl: str | None
    tpot: str | None
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

    Raises ConfigError if there are no targets, or if no load meets them: the message has the shortest feasible ones.
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
    least = LEAST * metrics.throughput(lone)
    usual = max((budget for budget in budgets if budget <= USUAL_BUDGET), default=budgets[0])
    if trials.attained(lone) < attainment:
        raise trials.infeasible(replace(largest, max_num_batched_tokens=usual), least)

    def sustained(settings: Iterable[SchedulerConfig], start: float) -> tuple[Sustained, ...]:
        """Search for each setting; each search starts from the result of the one before."""
        found: list[Sustained] = []
        for setting in settings:
            rate = trials.largest_rate(setting, start=start, least=least)
            found.append(Sustained(setting, rate))
            start = rate or start
        return tuple(found)

    by_seqs = sustained(
        (replace(config, max_num_batched_tokens=usual, max_num_seqs=count) for count in max_num_seqs),
        metrics.throughput(lone),
    )
    if not any(each.rate for each in by_seqs):
        raise trials.infeasible(replace(largest, max_num_batched_tokens=usual), least)
    best = _smallest_of_the_best(by_seqs)
    by_budget = sustained((replace(best.setting, max_num_batched_tokens=budget) for budget in budgets), best.rate)
    no_slo = without_targets(largest)
    fcfs = sustained((replace(no_slo, max_num_batched_tokens=budget) for budget in budgets), best.rate)
    best = _smallest_of_the_best(by_budget)
    chosen = best.setting
    rate = trials.largest_rate(chosen, start=best.rate, least=least, refined=True)
    clients, clients_rate = trials.most_clients(chosen)
    return Tuning(
        ttft=config.ttft,
        itl=config.itl,
        tpot=config.tpot,
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


@dataclass(frozen=True)
class _Trials:
    """Simulates loads, and says whether they are sustained."""

    simulation: SimulationConfig
    make_workload: MakeWorkload
    required: float
    requests: int
    on_trial: Callable[[], None]

    @property
    def targets(self) -> SloTargets:
        """Return the targets, which are those of the simulation whatever the setting."""
        return SloTargets.parse(**self.simulation.scheduler.targets)

    def largest_rate(self, setting: SchedulerConfig, *, start: float, least: float, refined: bool = False) -> float:
        """Return the largest Poisson rate that a setting sustains; 0 if it is below `least`."""
        requests = self.requests * (REFINED if refined else 1)
        return largest_load(lambda rate: self._sustains(setting, rate, requests), start, least)

    def _sustains(self, setting: SchedulerConfig, rate: float, requests: int) -> bool:
        """Return whether a setting sustains a Poisson rate, over `requests` requests and twenty TTFT targets."""
        target = self._target(setting)
        workload = self.make_workload(target)
        lasting = TTFTS_LONG * rate * self._longest_ttft(workload)
        requests = max(requests, math.ceil(min(lasting, LONGER_AT_MOST * requests)))
        self.on_trial()
        return self._is_sustained(virtual_time.run(poisson_load(target, workload, rate, requests)))

    def most_clients(self, setting: SchedulerConfig) -> tuple[int, float]:
        """Return the number of clients that a setting sustains, and their throughput.

        Without a TTFT target no request misses its target in the queue: max_num_seqs is the limit then.
        """
        rates: dict[int, float] = {}
        most = setting.max_num_seqs if setting.ttft is None else MOST_CLIENTS

        def is_sustained(clients: int) -> bool:
            point = self.closed(setting, clients, max(self.requests, 8 * clients))
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
        self.on_trial()
        loop = closed_loop(target, self.make_workload(target), clients=clients, requests=requests)
        return virtual_time.run(loop)

    def attained(self, point: Point) -> float:
        """Return the SLO attainment: the fraction of requests that met the targets."""
        return metrics.mean([metrics.meets_slo(record, self.targets) for record in metrics.counted(point)])

    def _is_sustained(self, point: Point) -> bool:
        return self.attained(point) >= self.required and keeps_up(point)

    def _target(self, setting: SchedulerConfig) -> SimulatedTarget:
        """Return a simulated engine with as many blocks as max_num_seqs can use."""
        calibration = self.simulation.calibration
        if not self.simulation.has_tiers:  # behind which the cache keeps what requests have left
            useful = setting.max_num_seqs * ceil_div(calibration.max_model_len, calibration.block_size)
            calibration = replace(calibration, num_blocks=min(calibration.num_blocks, useful))
        return SimulatedTarget(replace(self.simulation, scheduler=setting, calibration=calibration))

    def _longest_ttft(self, workload: Workload) -> float:
        """Return the longest TTFT target in seconds among some requests; 0 without one."""
        if not self.simulation.scheduler.ttft:
            return 0.0
        some = (workload.first("lengths", number) for number in range(32))
        return max(self.targets.ttft_target(len(prompt_ids(request))) for request in some)

    def infeasible(self, setting: SchedulerConfig, least: float) -> ConfigError:
        """Return the error for targets that not even the rate `least` meets: what misses them, and feasible targets."""
        alone = metrics.counted(self.closed(without_targets(setting), 1, LONE_REQUESTS))
        violations = [found for each in alone if (found := metrics.slo_violation(each, self.targets)) is not None]
        missed = []
        if late := [each.ttft for each in violations if each.ttft is not None]:
            missed.append(f"a TTFT of up to {max(late):.3g} s")
        if averages := [each.average_gap for each in violations if each.average_gap is not None]:
            missed.append(f"an inter-token latency of up to {1e3 * max(averages):.3g} ms")
        if percents := [each.percent_in_time for each in violations if each.percent_in_time is not None]:
            missed.append(f"as few as {min(percents):.3g} % of its inter-token latencies within the target")
        if means := [each.mean_gap for each in violations if each.mean_gap is not None]:
            missed.append(f"a time per output token of up to {1e3 * max(means):.3g} ms")
        why = f"even a lone request has {' and '.join(missed)}" if missed else "too many requests overlap by chance"
        given = [name for name in ("itl", "tpot", "ttft") if name in setting.targets]
        feasible = [flags for name in given if (flags := self._shortest(setting, [name], least))]
        feasible = feasible or [flags for flags in [self._shortest(setting, given, least)] if flags]
        return ConfigError(
            f"{_flags(setting)} cannot be met here: {why}; feasible targets: "
            f"{' or '.join(feasible) or 'none of this kind'}"
        )

    def _shortest(self, setting: SchedulerConfig, names: Sequence[str], least: float) -> str | None:
        """Return flags with the shortest feasible targets `names`, one after the other, and the others as requested."""
        found = setting
        for name in names:
            found = _with_target(found, name, getattr(setting, name), FAR)
        for name in names:

            def longer(speed: float, found: SchedulerConfig = found, name: str = name) -> SchedulerConfig:
                return _with_target(found, name, getattr(setting, name), 1.0 / speed)

            def is_feasible(speed: float, longer: Callable[[float], SchedulerConfig] = longer) -> bool:
                config = longer(speed)
                trials = replace(self, simulation=replace(self.simulation, scheduler=config))
                lone = trials.closed(config, 1, LONE_REQUESTS)
                return trials.attained(lone) >= self.required and trials._sustains(config, least, self.requests)

            if not is_feasible(1.0 / FAR):
                return None
            found = longer(largest_load(is_feasible, 1.0, 1.0 / FAR))
        return _flags(found)


def _with_target(setting: SchedulerConfig, name: str, target: str, times: float) -> SchedulerConfig:
    """Return the setting with a target multiplied by `times`, rounded up to three digits, at most LONGEST."""
    time, slash, measure = target.partition("/")
    milliseconds = 1e3 * min(times * parse_seconds(name, time), LONGEST)
    digit = 10.0 ** (math.floor(math.log10(milliseconds)) - 2)
    rounded = digit * math.ceil(milliseconds / digit - 1e-9)
    changes: dict[str, Any] = {name: f"{rounded:.12g}ms{slash}{measure}"}
    return replace(setting, **changes)


def _flags(config: SchedulerConfig) -> str:
    """Return the targets as flags of a server."""
    return " ".join(f"--{name} {value}" for name, value in config.targets.items())
