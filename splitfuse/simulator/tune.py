"""What load a machine can promise, and with which settings: every one is tried in simulation.

A load is carried if nearly all of its requests are on time, and if answers end as fast as requests come. The largest
load that a setting carries is searched among arrivals at random; the settings with the largest are chosen, of those
that are as good the smallest. All loads are the same requests in the same order, only nearer to each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from splitfuse.bench import metrics
from splitfuse.bench.load import WARM_UP, closed_loop, open_loop
from splitfuse.bench.measure import MakeWorkload
from splitfuse.bench.results import Point
from splitfuse.bench.workload import LoadRequest, Workload, poisson
from splitfuse.config import PER_TOKEN, SchedulerConfig, parse_seconds
from splitfuse.core.slo.cost_model import Features
from splitfuse.core.slo.targets import SloTargets
from splitfuse.errors import ConfigError
from splitfuse.runtime.calibration import Calibration
from splitfuse.simulator import virtual_time
from splitfuse.simulator.simulate import Deployment, SimulatedTarget

BUDGETS = (32, 64, 128, 256, 512, 1024)
SEATS = (8, 16, 32, 64)
USUAL_BUDGET = 256
"""Or the largest below, with which seats are tried."""
PRECISION = 1.03
"""Between a load that is carried and one that is not; settings whose loads differ by less are as good."""
FIRST_STEP, LAST_STEP = 1.06, 2.0
LEAST = 1 / 64
"""Of what one client gets alone, is the smallest load that is tried."""
KEEPS_UP = 0.95
"""Of the requests that came in the window, so many must have ended in it: a queue that grows is not carried."""
PROMISES_LONG = 20
"""Times the time to the first token, that a load goes on: one a twentieth too large has been late by then."""
LONGER_AT_MOST = 5
"""Times the wanted number of requests."""
REFINED = 4
"""Times as many requests for the settings that were chosen."""
LONE_REQUESTS = 64
MOST_CLIENTS = 1024
SPARE = 1.1
"""Times as long as what a request alone has just met, are the targets that are called possible."""
FAR = 2.0**20
"""Times longer than what was asked: promises that help nobody are not looked for."""


@dataclass(frozen=True)
class CurvePoint:
    """A chunk of a prompt from its beginning, alone in a step."""

    tokens: int
    predicted: float
    """Seconds."""
    measured: float | None
    """None where no such step was timed."""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / (self.predicted if self.measured is None else self.measured)


def curve(calibration: Calibration, budgets: Sequence[int] = BUDGETS) -> list[CurvePoint]:
    """Time of a step against its tokens: each that was timed, and each budget."""
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
    """Predicted, for a prompt of so many."""
    return calibration.cost.seconds(Features().plus(start=0, count=tokens, rows=1))


@dataclass(frozen=True)
class Setting:
    """What is chosen."""

    max_num_batched_tokens: int
    max_num_seqs: int
    deadline_policy: bool = True
    """Or by age."""


@dataclass(frozen=True)
class Carried:
    """The largest load that a setting carries."""

    setting: Setting
    rate: float
    """Requests a second, or conversations; 0 if none is carried."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What was tried, what was chosen, and what it can promise."""

    ttft: str | None
    itl: str | None
    share: float
    """Of the requests, that is to be on time."""
    budgets: tuple[Carried, ...]
    """With the seats that were chosen, by promise."""
    budgets_by_age: tuple[Carried, ...]
    """With the most seats."""
    seats: tuple[Carried, ...]
    """With a usual budget."""
    chosen: Setting
    rate: float
    """What it carries of arrivals at random."""
    clients: int
    """Of a closed loop, that it carries: clients that ask again as soon as they are answered. 0: not even one."""
    clients_rate: float
    """Requests a second of these."""


def tune(
    deployment: Deployment,
    make_workload: MakeWorkload,
    *,
    share: float = 0.99,
    requests: int = 200,
    budgets: Sequence[int] = BUDGETS,
    seats: Sequence[int] = SEATS,
    on_trial: Callable[[], None] = lambda: None,
) -> Tuning:
    """Try `seats` with a usual budget, then `budgets` with the best of them. The targets are those of the
    deployment's scheduler; `requests` count at each load, of which the `share` must be on time. `on_trial` hears of
    each load that was simulated.

    Raises ConfigError if nothing is promised, or if what is promised cannot be kept for a request alone: it then says
    what could.
    """
    if not deployment.scheduler.has_targets:
        raise ConfigError("say what is to be promised: ttft, such as 1s or 2ms/token, or itl, such as 250ms")
    if not 0 < share <= 1:
        raise ConfigError(f"the share that is to be on time must be above 0 and at most 1, not {share}")
    for name, values in (("budgets", budgets), ("seats", seats), ("requests", (requests,))):
        if not values or min(values) < 1:
            raise ConfigError(f"{name} must be whole numbers from 1")
    trials = _Trials(deployment, make_workload, share, requests, on_trial)
    budgets, seats = sorted(set(budgets)), sorted(set(seats))
    largest = Setting(budgets[-1], seats[-1])  # an upper bound for what is composed by promise
    lone = trials.closed(largest, 1, LONE_REQUESTS)
    if trials.on_time(lone) < share:
        raise _impossible(trials, largest)
    least = LEAST * metrics.throughput(lone)

    def carried(settings: Sequence[Setting], start: float) -> tuple[Carried, ...]:
        """Each search begins where the one before ended."""
        found: list[Carried] = []
        for setting in settings:
            rate = trials.largest_rate(setting, start=start, least=least)
            found.append(Carried(setting, rate))
            start = rate or start
        return tuple(found)

    usual = max((budget for budget in budgets if budget <= USUAL_BUDGET), default=budgets[0])
    by_seats = carried([Setting(usual, count) for count in seats], metrics.throughput(lone))
    if not any(each.rate for each in by_seats):
        raise _impossible(trials, largest)
    best = _smallest_of_the_best(by_seats)
    count = best.setting.max_num_seqs
    by_budget = carried([Setting(budget, count) for budget in budgets], best.rate)
    by_age = carried([Setting(budget, seats[-1], deadline_policy=False) for budget in budgets], best.rate)
    best = _smallest_of_the_best(by_budget)
    chosen = best.setting
    rate = trials.largest_rate(chosen, start=best.rate, least=least, refined=True)
    clients, clients_rate = trials.most_clients(chosen)
    return Tuning(
        ttft=deployment.scheduler.ttft,
        itl=deployment.scheduler.itl,
        share=share,
        budgets=by_budget,
        budgets_by_age=by_age,
        seats=by_seats,
        chosen=chosen,
        rate=rate,
        clients=clients,
        clients_rate=clients_rate,
    )


def _smallest_of_the_best(carried: Sequence[Carried]) -> Carried:
    """The first that is as good as any; smaller settings come first."""
    most = max(each.rate for each in carried)
    return next(each for each in carried if each.rate * PRECISION >= most)


class _Trials:
    """Simulates loads on settings, and judges them."""

    def __init__(
        self,
        deployment: Deployment,
        make_workload: MakeWorkload,
        share: float,
        requests: int,
        on_trial: Callable[[], None],
    ) -> None:
        self.scheduler = deployment.scheduler
        self._deployment = deployment
        self._make_workload = make_workload
        self._share, self._requests, self._on_trial = share, requests, on_trial

    def largest_rate(self, setting: Setting, *, start: float, least: float, refined: bool = False) -> float:
        """Requests a second at random that it carries; 0 if it is less than `least`."""
        requests = self._requests * (REFINED if refined else 1)
        target = self._target(setting)
        workload = self._make_workload(target)
        ttft = self._longest_ttft(workload)

        def carries(rate: float) -> bool:
            lasting = min(math.ceil(PROMISES_LONG * rate * ttft), LONGER_AT_MOST * requests)
            return self._carries(self._open(setting, rate, max(requests, lasting)))

        return _largest(carries, start, least)

    def most_clients(self, setting: Setting) -> tuple[int, float]:
        """Clients that it carries, and the requests a second that they send. Where no first token is promised, nobody
        could be late in the queue: there are as many as seats then.
        """
        rates: dict[int, float] = {}
        most = setting.max_num_seqs if self.scheduler.ttft is None else MOST_CLIENTS

        def carries(clients: int) -> bool:
            point = self.closed(setting, clients, max(self._requests, 8 * clients))
            rates[clients] = metrics.throughput(point)
            return self._carries(point)

        low, high = 1, 2  # `low` are carried
        while high <= most and carries(high):
            low, high = high, 2 * high
        high = min(high, most + 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if carries(middle) else (low, middle)
        if low not in rates and not carries(low):
            return 0, 0.0
        return low, rates[low]

    def closed(self, setting: Setting, clients: int, requests: int, scheduler: SchedulerConfig | None = None) -> Point:
        """A closed loop; of another scheduler's targets, if they are given."""
        target = self._target(setting, scheduler)
        self._on_trial()
        loop = closed_loop(target, self._make_workload(target), clients=clients, requests=requests)
        return virtual_time.run(loop)

    def on_time(self, point: Point, scheduler: SchedulerConfig | None = None) -> float:
        """The share of its requests that were."""
        config = scheduler or self.scheduler
        records = metrics.counted(point)
        targets = SloTargets.parse(config.ttft, config.itl)
        return metrics.mean([metrics.meets_slo(record, targets) for record in records])

    def _open(self, setting: Setting, rate: float, requests: int) -> Point:
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

    def _carries(self, point: Point) -> bool:
        comes = len(metrics.counted(point)) / metrics.seconds(point)
        return self.on_time(point) >= self._share and metrics.throughput(point) >= KEEPS_UP * comes

    def _target(self, setting: Setting, scheduler: SchedulerConfig | None = None) -> SimulatedTarget:
        """With as many blocks as an engine would take for its seats."""
        config = replace(
            scheduler or self.scheduler,
            max_num_batched_tokens=setting.max_num_batched_tokens,
            max_num_seqs=setting.max_num_seqs,
        )
        if not setting.deadline_policy:
            config = replace(config, ttft=None, itl=None)
        calibration = self._deployment.calibration
        useful = setting.max_num_seqs * -(-calibration.max_model_len // calibration.block_size)
        calibration = replace(calibration, num_blocks=min(calibration.num_blocks, useful))
        return SimulatedTarget(replace(self._deployment, scheduler=config, calibration=calibration))

    def _longest_ttft(self, workload: Workload) -> float:
        """That is promised to anybody, in seconds; 0 without a promise."""
        if self.scheduler.ttft is None:
            return 0.0
        targets = SloTargets.parse(self.scheduler.ttft, None)
        some = (workload.first("lengths", number) for number in range(32))
        return max(targets.ttft_target(_length(request)) for request in some)


def _length(request: LoadRequest) -> int:
    if isinstance(request.prompt, str):
        raise ConfigError("the trace has prompts as text: a simulation takes token ids, or their numbers alone")
    return len(request.prompt)


def _largest(carries: Callable[[float], bool], start: float, least: float) -> float:
    """The largest load that is carried, to PRECISION; 0 if it is less than `least`. Steps away from `start` grow, until
    there is a load that is carried and a larger one that is not; then the two approach each other.
    """
    low = high = start
    step = FIRST_STEP
    if carries(start):
        while carries(high := low * step):
            low, step = high, min(step**2, LAST_STEP)
    else:
        while not carries(low := high / step):
            high, step = low, min(step**2, LAST_STEP)
            if high < least:
                return 0.0
    while high > low * PRECISION:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if carries(middle) else (low, middle)
    return low


def _impossible(trials: _Trials, setting: Setting) -> ConfigError:
    """What to say of targets that a request alone does not meet: what it would take, and what could be promised."""
    alone = metrics.counted(trials.closed(replace(setting, deadline_policy=False), 1, LONE_REQUESTS))
    gap = max((average for record in alone for average in metrics.moving_averages(metrics.gaps(record))), default=0.0)
    first = max(map(metrics.first_token_seconds, alone))
    scheduler = trials.scheduler
    ways = [(1, 0), (0, 1)] if scheduler.ttft and scheduler.itl else []
    possible = [flags for way in (*ways, (1, 1)) if (flags := _least_possible(trials, setting, *way))]
    return ConfigError(
        f"{_flags(scheduler)} can be promised to nobody here: even a request alone is late, whose tokens come up to "
        f"{1e3 * gap:.3g} ms apart, and the first after up to {first:.3g} s; possible would be "
        f"{' or '.join(possible[:2]) or 'nothing like it'}"
    )


def _least_possible(trials: _Trials, setting: Setting, ttft: int, itl: int) -> str | None:
    """The shortest targets, of those that are asked for the first or both made longer, that a request alone meets."""

    def longer(times: float) -> SchedulerConfig:
        config = trials.scheduler
        return replace(
            config,
            ttft=_longer(config.ttft, times) if ttft else config.ttft,
            itl=_longer(config.itl, times) if itl else config.itl,
        )

    def holds(config: SchedulerConfig) -> bool:
        return trials.on_time(trials.closed(setting, 1, LONE_REQUESTS, config), config) == 1.0

    low, high = 1.0, 2.0
    while not holds(longer(high)):
        low, high = high, 2.0 * high
        if high > FAR:
            return None
    while high > 1.1 * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if holds(longer(middle)) else (middle, high)
    return _flags(longer(SPARE * high))


def _longer(target: str | None, times: float) -> str | None:
    """A target, so many times as long, in two digits."""
    if target is None:
        return None
    seconds = times * parse_seconds("target", target.removesuffix(PER_TOKEN))
    digit = 10.0 ** (math.floor(math.log10(1e3 * seconds)) - 1)
    rounded = digit * math.ceil(1e3 * seconds / digit - 1e-9)
    return f"{rounded:.6g}ms{PER_TOKEN if target.endswith(PER_TOKEN) else ''}"


def _flags(config: SchedulerConfig) -> str:
    """Its targets, as they are given to a server."""
    return " ".join(f"--{name} {value}" for name in ("ttft", "itl") if (value := getattr(config, name)))
