"""Simulates replicas as fluids, for more of them than full ones can be simulated: seconds of work and the names of
blocks, no steps. The router's own code chooses among them.

A FluidReplica is what a ReplicaView is to the router, and what it predicts is what happens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import NamedTuple, Protocol

from splitfuse.core.replicas.cells import Cells, Prefix
from splitfuse.core.replicas.prefix_index import PrefixMemory
from splitfuse.core.replicas.routing import Candidate, choose_replica
from splitfuse.core.replicas.shortlist import Shortlist
from splitfuse.core.replicas.virtual_replica import Job, VirtualReplica
from splitfuse.core.request import Request
from splitfuse.core.slo.cost_model import StepTimes
from splitfuse.core.slo.work_times import WorkTimes
from splitfuse.simulator.deployment import SimulationConfig


class Clock:
    """Holds the time of a simulation."""

    now = 0.0


class FluidReplica:
    """Serves requests one prompt after the other, while every running one has its part of each step."""

    def __init__(self, engine: SimulationConfig, clock: Clock, *, step: float | None = None) -> None:
        """While there are prompts steps take `step` seconds, if no ITL target asks for shorter ones; left out, they
        have as many tokens as the engine's budget.
        """
        calibration, budget = engine.calibration, engine.budget.tokens
        self.times: StepTimes | None = StepTimes(calibration.cost)
        self.memory = PrefixMemory(calibration.num_blocks, calibration.block_size)
        self.num_tokens = 0
        """Number of tokens that it was sent to compute."""
        self.work_times = WorkTimes(self.times)
        whole = self.work_times.overhead + self.work_times.seconds_of(budget, budget)
        self._fluid = VirtualReplica(self.work_times, step=whole if step is None else step)
        self._clock = clock

    def load(self, now: float) -> float:
        return self._fluid.wait(now)

    def first_token(self, request: Request, cached: int) -> float:
        count = max(request.num_prompt_tokens - cached, 1)
        return self._fluid.wait(self._clock.now) + self.work_times.overhead + self.work_times.seconds_of(cached, count)

    def num_broken(self, request: Request, cached: int, now: float) -> int:
        """Return 1 if a request would be late; others have no deadline here."""
        return int(now + self.first_token(request, cached) > request.slo.deadline)

    def wait(self, request: Request, cached: int, now: float) -> float:
        return max(now + self.first_token(request, cached) - request.slo.deadline, 0.0)

    def add(self, request: Request, names: Sequence[bytes], cached: int) -> Job:
        """Begin a request of which the first `cached` tokens are there."""
        job = Job(
            self.work_times,
            num_prompt=request.num_prompt_tokens,
            num_cached=cached,
            num_generated=request.max_tokens,
            deadline=request.slo.deadline,
            gap=request.slo.itl_target,
        )
        self.num_tokens += request.num_prompt_tokens - cached + request.max_tokens - 1
        self.memory.add(names)
        self._fluid.add(job, self._clock.now)
        return job

    @property
    def is_idle(self) -> bool:
        """Return whether it has no request."""
        self._fluid.advance(self._clock.now)
        return self._fluid.is_idle

    def finish(self) -> None:
        """Serve what there is to its end."""
        self._fluid.advance()


class Front(Protocol):
    """Chooses a replica for each request."""

    def choose(self, request: Request, names: Sequence[bytes], now: float) -> FluidReplica:
        """Return the replica that it goes to."""


class RouterFront:
    """Routes by one router, which knows all replicas: the code of the real one."""

    def __init__(self, replicas: Sequence[FluidReplica], *, seed: int = 0) -> None:
        self._replicas = replicas
        self._shortlist = Shortlist(seed=seed)
        self._shortlist.sync(replicas)

    def choose(self, request: Request, names: Sequence[bytes], now: float) -> FluidReplica:
        picked = [
            (self._replicas[number], count) for number, count in self._shortlist.pick(names, _always, now).items()
        ]
        return best_of(picked, request, now)


def best_of(replicas: Sequence[tuple[FluidReplica, int]], request: Request, now: float) -> FluidReplica:
    """Return the one among some replicas, with the blocks that each has of a prompt, which the router would choose."""
    candidates = [Candidate(each, count * each.memory.block_size) for each, count in replicas]
    index = choose_replica(candidates, request, now)
    assert index is not None, "all accept requests"
    return replicas[index][0]


class CellsFront:
    """Routes by a ring of cells, each with a router of its own. Every second each cell says how much it has to do.
    Requests go in turn to some gateways, which know besides what they sent themselves.
    """

    def __init__(self, replicas: Sequence[FluidReplica], *, size: int, gateways: int = 1) -> None:
        parts = [replicas[start : start + size] for start in range(0, len(replicas), size)]
        self._parts = {f"cell-{number}": part for number, part in enumerate(parts)}
        self._routers = {
            name: RouterFront(part, seed=number) for number, (name, part) in enumerate(self._parts.items())
        }
        self._gateways = [Cells(self._parts) for _ in range(gateways)]
        self._turns = cycle(self._gateways)
        self._work_times, self._block_size = replicas[0].work_times, replicas[0].memory.block_size
        self._reports_at = 0.0

    def choose(self, request: Request, names: Sequence[bytes], now: float) -> FluidReplica:
        if now >= self._reports_at:
            self._reports_at = now + 1.0
            for name, part in self._parts.items():
                load = sum(each.load(now) for each in part)
                for cells in self._gateways:
                    cells.report(name, load, replicas=len(part))
        prompt, seconds_of = request.num_prompt_tokens, self._work_times.seconds_of
        ends = [1 << power for power in range(len(names).bit_length()) if 1 << power <= len(names)]
        prefixes = [Prefix(names[end - 1], seconds_of(0, min(end * self._block_size, prompt))) for end in ends]
        seconds = seconds_of(0, prompt) + (request.max_tokens - 1) * seconds_of(prompt, 1)
        return self._routers[next(self._turns).choose(prefixes, seconds)].choose(request, names, now)


def _always(number: int) -> bool:
    del number
    return True


class Sent(NamedTuple):
    """Records a request that was sent to a replica."""

    at: float
    job: Job
    num_prompt: int
    num_cached: int

    @property
    def ttft(self) -> float:
        return self.job.first_token_at - self.at


def run(
    requests: Iterable[tuple[float, Request, Sequence[bytes]]],
    replicas: Sequence[FluidReplica],
    front: Front,
    clock: Clock,
) -> list[Sent]:
    """Send requests at their times, and return what became of them."""
    sent = []
    for at, request, names in requests:
        clock.now = at
        replica = front.choose(request, names, at)
        cached = min(replica.memory.cached_tokens(names), request.num_prompt_tokens - 1)
        sent.append(Sent(at, replica.add(request, names, cached), request.num_prompt_tokens, cached))
    for replica in replicas:
        replica.finish()
    return sent
