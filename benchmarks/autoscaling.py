"""Simulates autoscaling by SLO beside an oracle, and what sixteen replicas are worth.

    python -m benchmarks.autoscaling day [--hours H] [--start-seconds S] [--window S] [--in-time F] [--seed N] [--full]
    python -m benchmarks.autoscaling fixed [--replicas 8,12,16] [--hours H] [--seed N]
    python -m benchmarks.autoscaling oracle [--hours H] [--seed N] [--every N]
    python -m benchmarks.autoscaling scaling [--replicas 1,2,4,8,16] [--clients N]

`day` simulates a day with bursts, with one to sixteen replicas: the real router and `replicas_wanted`
(core/replicas/capacity.py), where a replica takes some time to start and one that is stopped is drained. Replicas are
fluids (splitfuse/simulator/fluid.py), or with --full have the real scheduler, which takes a hundred times as long. It
prints the share of the requests that met the SLO, the replica-hours, and those of an oracle: for each minute the
smallest number of replicas that keeps 95 % of its requests within the SLO, knowing them, by virtual replicas, each
started as long before as it takes. With few hours the day is that much faster, while replicas take as long as ever to
start. `fixed` prints the share with a number of replicas that does not change. `oracle` compares its number with that
of full replicas, for one minute of every so many. `scaling` prints the requests/s of a closed loop with so many
clients for each replica.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import time
from collections.abc import Sequence
from random import Random

from benchmarks.dominance.points import MAX_NUM_SEQS, Scenario, Slo
from splitfuse.bench import metrics
from splitfuse.bench.results import MeasuredRequest
from splitfuse.bench.workload import LoadRequest
from splitfuse.config.engine import SchedulerConfig
from splitfuse.core.replicas.capacity import PART, WANTED_IN_TIME, Arrival, replicas_needed
from splitfuse.core.request import Request
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.scheduling_options import SchedulingOptions
from splitfuse.core.slo.cost_model import StepTimes
from splitfuse.core.slo.targets import NO_SLO
from splitfuse.core.slo.usual_step import usual_step
from splitfuse.core.slo.work_times import WorkTimes
from splitfuse.simulator import virtual_time
from splitfuse.simulator.autoscaling import AutoscaledTarget, Autoscaling
from splitfuse.simulator.deployment import Deployment, SimulationConfig
from splitfuse.simulator.fluid import Clock, FluidReplica, best_of
from splitfuse.simulator.simulate import SimulatedTarget

SCENARIO = Scenario("0.5b-int8-avx2", "paper-small", "70%", (Slo("3", "itl 10"),))
"""Machine, workload and SLO, as of benchmarks.dominance. The load is that of a replica at the peak of the day."""
LEAST, MOST = 1, 16
PEAK = 11.0
"""Replicas' loads at the peak, without bursts."""
NIGHT = 0.1
"""Load at night, relative to the peak."""
BURSTS = 3.0
"""Number of bursts in an hour."""
BURST = (1.3, 1.8)
"""Factors of the smallest and of the largest burst."""
BURST_SECONDS = (120.0, 480.0)
KEPT = 0.95


class Day:
    """Describes a load: its rate by the hour, and its requests."""

    def __init__(self, hours: float, seed: int) -> None:
        random = Random(f"{seed} day")
        self.seconds = 3600.0 * hours
        self._bursts = []
        bursts = round(BURSTS * hours)
        for number in range(bursts):
            begin = self.seconds * (number + random.random()) / bursts
            self._bursts.append((begin, begin + random.uniform(*BURST_SECONDS), random.uniform(*BURST)))
        self.times: list[float] = []
        most, at = PEAK * BURST[1] * SCENARIO.rate, 0.0
        while (at := at + random.expovariate(most)) < self.seconds:
            if random.random() * most < self.rate(at):
                self.times.append(at)
        self.sessions = SCENARIO.requests_of.sessions(len(self.times), seed)
        self.targets = SCENARIO.targets(SCENARIO.slos[0])[0]

    def rate(self, at: float) -> float:
        """Return the requests/s at a time of the day."""
        noon = math.sin(math.pi * at / self.seconds) ** 2
        burst = max((factor for begin, end, factor in self._bursts if begin <= at < end), default=1.0)
        return PEAK * (NIGHT + (1.0 - NIGHT) * noon) * burst * SCENARIO.rate

    def arrivals(self) -> list[Arrival]:
        """Return the requests as the oracle knows them."""
        return [
            Arrival(at, len(planned.prompt), planned.max_tokens, self.targets, 0, planned.max_tokens, True)
            for at, (planned,) in zip(self.times, self.sessions, strict=True)
        ]


def engine() -> SimulationConfig:
    config = SchedulerConfig(max_num_seqs=MAX_NUM_SEQS, enable_slo=True)
    return SimulationConfig(calibration=SCENARIO.calibration, scheduler=config, enable_prefix_caching=False)


def send(target: SimulatedTarget, day: Day, *, since: float = 0.0, until: float = math.inf) -> list[tuple[float, bool]]:
    """Return when each request of a part of the day came, and whether it met its SLO."""

    async def ask(number: int, at: float) -> tuple[float, bool]:
        (planned,) = day.sessions[number]
        await asyncio.sleep(at - since)
        answer = await target.answer(LoadRequest("", number, 0, planned.prompt, planned.max_tokens), day.targets)
        assert answer.error is None, answer.error
        assert len(answer.token_times) == planned.max_tokens, "tokens were lost"
        record = MeasuredRequest(number, at - since, len(planned.prompt), answer.token_times)
        return at, metrics.meets_slo(record, day.targets)

    async def ask_all() -> list[tuple[float, bool]]:
        await target.start()
        answers = await asyncio.gather(*(ask(n, at) for n, at in enumerate(day.times) if since <= at < until))
        await target.close()
        return answers

    return virtual_time.run(ask_all())


def oracle(day: Day, *, start_seconds: float) -> tuple[list[int], float]:
    """Return the smallest number of replicas for each minute, and their hours, with the time that they take to start.

    One that is needed again before another could have started is kept.
    """
    times, arrivals = StepTimes(SCENARIO.calibration.cost), day.arrivals()
    needed = []
    for minute in range(math.ceil(day.seconds / PART)):
        begin = PART * minute
        around = [each for each in arrivals if begin - PART <= each.at < begin + PART]
        count = replicas_needed(
            around,
            times,
            now=begin + PART,
            window=2 * PART,
            in_time=KEPT,
            warm_up=PART,
            guess=needed[-1] if needed else 1,
        )
        needed.append(min(max(count, LEAST), MOST))
    ahead = math.ceil(start_seconds / PART)
    paid = sum(max(needed[minute : minute + ahead + 1]) for minute in range(len(needed)))
    return needed, paid * PART / 3600.0


class FluidServer:
    """Simulates the day with fluid replicas: as AutoscaledTarget does with full ones, but those that are drained serve
    what they have to its end, and count until then.
    """

    def __init__(self, day: Day, scaling: Autoscaling) -> None:
        self._day, self._scaling, self._clock = day, scaling, Clock()
        self._arrivals = day.arrivals()
        self._times = StepTimes(SCENARIO.calibration.cost)
        work_times = WorkTimes(self._times)
        margin = (day.targets.ttft or 0.0) / 2
        self._step = usual_step(work_times, [margin])
        self._ready = [self._replica() for _ in range(scaling.least)]
        self._starting: list[float] = []  # when they will be ready
        self._draining: list[FluidReplica] = []
        self.replica_seconds = 0.0
        self.counts = [(0.0, scaling.least)]

    def _replica(self) -> FluidReplica:
        return FluidReplica(engine(), self._clock, step=self._step)

    def run(self) -> list[tuple[float, bool]]:
        """Return when each request came, and whether it met its SLO."""
        check, sent, first = self._scaling.check_seconds, [], 0
        for number, arrival in enumerate(self._arrivals):
            while check <= arrival.at:
                while self._arrivals[first].at < check - self._scaling.window:
                    first += 1
                self._check(check, self._arrivals[first:number])
                check += self._scaling.check_seconds
            self._clock.now = arrival.at
            self._begin(arrival.at)
            request = Request(
                *(str(number), (0,) * arrival.num_prompt, SamplingParams(), arrival.max_tokens),
                seed=0,
                scheduling=SchedulingOptions(targets=arrival.targets, arrival_time=arrival.at),
            )
            replica = best_of([(each, 0) for each in self._ready], request, arrival.at)
            sent.append((arrival.at, replica.add(request, (), 0)))
        for replica in (*self._ready, *self._draining):
            replica.finish()
        return [(at, not job.is_late) for at, job in sent]

    def _begin(self, now: float) -> None:
        """Let those take requests that have started."""
        for at in [at for at in self._starting if at <= now]:
            self._starting.remove(at)
            self._ready.append(self._replica())

    def _check(self, now: float, arrivals: Sequence[Arrival]) -> None:
        self._clock.now = now
        self._begin(now)
        self._draining = [each for each in self._draining if not each.is_idle]
        before = len(self._ready) + len(self._starting)
        self.replica_seconds += (before + len(self._draining)) * self._scaling.check_seconds
        wanted = self._scaling.wanted(arrivals, self._times, now=now, num_replicas=before)
        self._starting += [now + self._scaling.start_seconds] * (wanted - before)
        while len(self._ready) + len(self._starting) > wanted:
            if self._starting:
                self._starting.pop()
            else:
                self._draining.append(self._ready.pop())
        if wanted != before:
            self.counts.append((now, wanted))


def print_day(day: Day, scaling: Autoscaling, *, is_full: bool) -> None:
    began = time.process_time()
    server: AutoscaledTarget | FluidServer
    if is_full:
        server = AutoscaledTarget(engine(), scaling)
        answers = send(server, day)
    else:
        server = FluidServer(day, scaling)
        answers = server.run()
    took = time.process_time() - began
    hours = server.replica_seconds / 3600.0
    needed, oracle_hours = oracle(day, start_seconds=scaling.start_seconds)
    met = sum(kept for _, kept in answers) / len(answers)
    by_minute: dict[int, list[bool]] = {}
    for at, kept in answers:
        by_minute.setdefault(int(at // PART), []).append(kept)
    good = sum(sum(kept) >= KEPT * len(kept) for kept in by_minute.values()) / len(by_minute)
    numbers = [number for _, number in server.counts]
    print(
        f"{len(answers)} requests, {min(numbers)} to {max(numbers)} replicas (oracle {min(needed)} to {max(needed)}), "
        f"{len(numbers) - 1} changes: within the SLO {met:.2%}, minutes with {KEPT:.0%} {good:.1%}; replica-hours "
        f"{hours:.2f}, oracle {oracle_hours:.2f}: {hours / oracle_hours:.3f}; always {MOST}: "
        f"{MOST * day.seconds / 3600:.0f}  ({took:.0f} s)",
        flush=True,
    )


def print_fixed(day: Day, numbers: Sequence[int]) -> None:
    for count in numbers:
        answers = send(SimulatedTarget(Deployment.of(engine(), replicas=count)), day)
        met = sum(kept for _, kept in answers) / len(answers)
        print(
            f"{count:3} replicas: within the SLO {met:.2%}, replica-hours {count * day.seconds / 3600:.1f}", flush=True
        )


def print_oracle(day: Day, every: int) -> None:
    """Compare the oracle's numbers with the smallest of full replicas, in a minute after one that warms them up."""
    needed, _ = oracle(day, start_seconds=0.0)
    differences = []
    for minute in range(every // 2, len(needed), every):
        begin = PART * minute

        def is_enough(count: int, begin: float = begin) -> bool:
            target = SimulatedTarget(Deployment.of(engine(), replicas=count))
            answers = [kept for at, kept in send(target, day, since=begin - PART, until=begin + PART) if at >= begin]
            return sum(answers) >= KEPT * len(answers)

        full = needed[minute]
        if is_enough(full):
            while full > 1 and is_enough(full - 1):
                full -= 1
        else:
            while full < MOST and not is_enough(full := full + 1):
                pass
        differences.append(needed[minute] - full)
        print(f"minute {minute:4}: virtual {needed[minute]:2}, full {full:2}", flush=True)
    print(f"mean difference {metrics.mean([float(each) for each in differences]):+.2f} of {len(differences)} minutes")


def print_scaling(numbers: Sequence[int], clients: int, per_client: int) -> None:
    """Print the throughput of so many clients for each replica, each of which sends one request after the other."""
    alone = 0.0
    for count in numbers:
        simulation = SimulationConfig(
            calibration=SCENARIO.calibration,
            scheduler=SchedulerConfig(max_num_seqs=MAX_NUM_SEQS),
            enable_prefix_caching=False,
        )
        target = SimulatedTarget(Deployment.of(simulation, replicas=count))
        sessions = SCENARIO.requests_of.sessions(count * clients * per_client, 1)
        ended: list[float] = []

        async def ask(
            client: int, target: SimulatedTarget = target, sessions=sessions, ended: list[float] = ended
        ) -> None:
            for number in range(client * per_client, (client + 1) * per_client):
                (planned,) = sessions[number]
                answer = await target.answer(LoadRequest("", number, 0, planned.prompt, planned.max_tokens), NO_SLO)
                ended.append(answer.token_times[-1])

        async def ask_all(count: int = count, ask=ask) -> None:
            await asyncio.gather(*(ask(client) for client in range(count * clients)))

        virtual_time.run(ask_all())
        ended.sort()
        first, last = len(ended) // 5, len(ended) * 4 // 5  # all clients are at work
        speed = (last - first) / (ended[last] - ended[first])
        alone = alone or speed / count
        print(
            f"{count:3} replicas, {count * clients} clients: {speed:8.3f} requests/s, {speed / alone:6.2f} of one",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("day", "fixed", "oracle", "scaling"))
    parser.add_argument("--hours", type=float, default=24.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--start-seconds", type=float, default=60.0)
    parser.add_argument("--check-seconds", type=float, default=10.0)
    parser.add_argument("--window", type=float, default=300.0)
    parser.add_argument("--in-time", type=float, default=WANTED_IN_TIME)
    parser.add_argument("--every", type=int, default=12)
    parser.add_argument("--full", action="store_true", help="simulate full replicas, steps and all")
    parser.add_argument("--replicas", default="", help="numbers of replicas, separated by commas")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--per-client", type=int, default=8)
    arguments = parser.parse_args()
    numbers = [int(each) for each in arguments.replicas.split(",") if each]
    if arguments.what == "scaling":
        print_scaling(numbers or [1, 2, 4, 8, 16], arguments.clients, arguments.per_client)
        return
    day = Day(arguments.hours, arguments.seed)
    match arguments.what:
        case "day":
            scaling = Autoscaling(
                least=LEAST,
                most=MOST,
                start_seconds=arguments.start_seconds,
                check_seconds=arguments.check_seconds,
                window=arguments.window,
                in_time=arguments.in_time,
            )
            print_day(day, scaling, is_full=arguments.full)
        case "fixed":
            print_fixed(day, numbers or [8, 12, 16])
        case _:
            print_oracle(day, arguments.every)


if __name__ == "__main__":
    main()
