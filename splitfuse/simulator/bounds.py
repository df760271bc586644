"""Says which rates a placement cannot sustain, without simulating it: its engines would have to compute more than there
is time for.

What a request takes is counted at the least that a cost model can give it: the floor of a step is shared by as many
tokens as a step can have. So a bound is never below what a simulation finds, but for noise, and a placement is searched
only if its bound leaves it a chance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from splitfuse.bench.load import WARM_UP
from splitfuse.bench.workload import LoadRequest, Trace, Workload
from splitfuse.config.values import EngineRole
from splitfuse.core.slo.cost_model import CostModel
from splitfuse.core.slo.targets import SloTargets
from splitfuse.simulator.deployment import Machine
from splitfuse.simulator.rates import Goal
from splitfuse.simulator.simulate import prompt_ids

STREAM = "as it came repetition 0"
"""Name of the stream of all loads of a search (rates.py)."""
CERTAIN = 4.0
"""Number of standard deviations of the noise of a step by which work may be less than predicted."""


@dataclass(frozen=True)
class _Size:
    """Holds the size of a request, as far as it must be computed."""

    start: int
    """Tokens at its beginning that may be cached."""
    prompt: int
    answer: int


class Bounds:
    """Knows the requests that count in a search."""

    def __init__(self, workload: Workload, goal: Goal) -> None:
        first = math.ceil(WARM_UP * goal.requests)
        requests = [workload.first(STREAM, first + number) for number in range(goal.requests)]
        self._sizes = [_size(request, is_trace=isinstance(workload, Trace)) for request in requests]
        self._goal = goal

    def capacity(self, machines: Sequence[Machine]) -> float:
        """Return about how many requests/s these engines can compute, all of them busy."""
        parts = self._parts(machines, most=_token_budget)
        return min(len(part) / max(sum(works) / len(works), 1e-9) for part, works, _ in parts)

    def largest_rate(self, machines: Sequence[Machine]) -> float:
        """Return a rate above which these engines cannot reach the goal; infinity if nothing is known.

        The requests of which an SLO asks must be computed between the first arrival that counts and the last deadline:
        at least as many as the goal wants, the smallest ones.
        """
        targets, count = self._goal.targets, self._goal.requests
        if targets is None or not self._goal.limits_queue:
            return math.inf
        bounds = []
        share = self._goal.criteria[0].share
        for part, works, role in self._parts(machines, most=_most_tokens):
            pieces = [(works, role)]
            if role is EngineRole.MIXED:  # first tokens alone may be more than they can do in time
                pieces.append((self._works(part, EngineRole.PROMPT, most=_most_tokens), EngineRole.PROMPT))
            for seconds, what in pieces:
                work = sum(sorted(seconds)[: math.ceil(share * count)])
                noise = part[0].engine.calibration.cost.noise
                time = work * math.exp(-CERTAIN * noise) / len(part) - self._slack(targets, what)
                bounds.append(count / time if time > 0 else math.inf)
        return min(bounds)

    def _slack(self, targets: SloTargets, role: EngineRole) -> float:
        """Return the time from the last arrival to the last deadline of what is computed in a role; infinity if answers
        have none.
        """
        first = max(targets.ttft_target(each.start + each.prompt) for each in self._sizes)
        if role is EngineRole.PROMPT:
            return first
        if targets.tpot is None:
            return math.inf
        return first + targets.tpot * max(each.answer for each in self._sizes)

    def _parts(
        self, machines: Sequence[Machine], *, most: Callable[[Machine], int]
    ) -> list[tuple[list[Machine], list[float], EngineRole]]:
        """Return the machines of each role, and for each request the least time that one of them takes for it in steps
        of `most` tokens at most.
        """
        by_role = {role: [machine for machine in machines if machine.role is role] for role in EngineRole}
        return [(part, self._works(part, role, most=most), role) for role, part in by_role.items() if part]

    def _works(self, part: Sequence[Machine], role: EngineRole, *, most: Callable[[Machine], int]) -> list[float]:
        """Return the least time that one of equal machines takes for what each request needs of a role."""
        return [_least_seconds(each, part[0], role, most(part[0])) for each in self._sizes]


def _token_budget(machine: Machine) -> int:
    """Return how many tokens a full step has."""
    engine = machine.engine
    return engine.scheduler.max_num_seqs if machine.role is EngineRole.GENERATION else engine.budget.tokens


def _most_tokens(machine: Machine) -> int:
    """Return how many tokens a step can have: with SLOs, a prompt that would be late in parts is computed whole."""
    engine = machine.engine
    if engine.scheduler.slo_enabled:
        return max(engine.budget.most, engine.calibration.max_model_len, engine.scheduler.max_num_seqs)
    return max(_token_budget(machine), engine.budget.most)


def _size(request: LoadRequest, *, is_trace: bool) -> _Size:
    """Return the size of a request; of a trace it is not known what its prompts have in common."""
    length = len(prompt_ids(request))
    start = length - 1 if is_trace else min(request.prefix, length - 1)
    return _Size(start, length - start, request.max_tokens)


def _least_seconds(size: _Size, machine: Machine, role: EngineRole, most: int) -> float:
    """Return the least time that an engine takes for a request's part of a role, in steps of at most `most` tokens."""
    engine, cost = machine.engine, machine.engine.calibration.cost
    per_token = cost.per_token + _least_per_token(cost, most) + engine.step_overhead / most
    seconds, end = 0.0, size.start + size.prompt
    if role is not EngineRole.GENERATION:
        pairs = size.prompt * size.start + size.prompt * (size.prompt + 1) / 2
        seconds += per_token * size.prompt + cost.per_row + cost.per_request
        seconds += cost.per_pair * pairs + cost.per_kv_token * end
    if role is not EngineRole.PROMPT:
        count = size.answer - 1
        kv_tokens = count * end + count * (count + 1) / 2
        seconds += (per_token + cost.per_row + cost.per_request) * count
        seconds += (cost.per_pair + cost.per_kv_token) * kv_tokens
    return seconds


def _least_per_token(cost: CostModel, most: int) -> float:
    """Return the least share of a step's floor, and of its time beyond the knee, that a token of at most `most` has."""
    knee = max(min(cost.knee, most), 1.0)
    return min((cost.floor + cost.per_token_beyond * max(0.0, count - cost.knee)) / count for count in (knee, most))
