"""Lists the points of the grid: machines, workloads, loads and SLOs.

A scenario is what every policy sees: a machine, a workload and a load. Each scenario has several SLOs, which only our
policy is told; the others run once for all of them. All times are multiples of what the machine needs: targets of a
lone prompt's time and of a full step of decodes, rates of the throughput that the cost model gives a full batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random
from statistics import NormalDist
from typing import Any

from benchmarks.dominance.loop import PlannedRequest, Session
from splitfuse.config.values import PER_TOKEN
from splitfuse.core.slo.cost_model import StepFeatures
from splitfuse.core.slo.targets import SloTargets
from splitfuse.runtime.calibration import Calibration
from splitfuse.simulator.machines import MACHINES

MAX_NUM_SEQS = 128
FULL_BATCH = 32
"""Number of decodes in the step that ITL targets are multiples of, if the load does not say how many there are."""
SIGMA = 0.8
"""Standard deviation of the logarithm of lognormal lengths."""
DEVIATION = 0.3
"""Standard deviation of normal lengths as a fraction of their mean, as in FastGen's paper."""
EXTREME = NormalDist().inv_cdf(0.95)
"""Number of standard deviations from the median to long prompts, and to short ones: 5 % are beyond each."""


@dataclass(frozen=True)
class Lengths:
    """Draws lengths of prompts and answers: fixed, normal, or lognormal with these means."""

    spread: str
    prompt: int
    generate: int
    most: int = 8192
    """Largest length of either."""

    def draw(self, random: Random) -> tuple[int, int]:
        return self._draw(random, self.prompt), self._draw(random, self.generate)

    def _draw(self, random: Random, mean: int) -> int:
        if self.spread == "fixed":
            return mean
        if self.spread == "normal":
            length = random.gauss(mean, DEVIATION * mean)
        else:
            length = random.lognormvariate(math.log(mean) - SIGMA**2 / 2, SIGMA)
        return max(1, min(self.most, round(length)))

    def prompt_quantile(self, deviations: float) -> int:
        """Return the prompt length that is so many standard deviations above the median."""
        if self.spread == "fixed":
            return self.prompt
        if self.spread == "normal":
            return round(self.prompt * (1.0 + deviations * DEVIATION))
        return min(self.most, round(self.prompt * math.exp(deviations * SIGMA - SIGMA**2 / 2)))


@dataclass(frozen=True)
class Workload:
    """Describes requests: one class of lengths or several, each with its share; prefixes that requests have in common,
    or conversations of several turns.
    """

    classes: tuple[tuple[float, Lengths], ...]
    prefix: int = 0
    """Number of tokens that each prompt shares with a quarter of the others, before its own."""
    turns: int = 1
    """Number of requests of a session; each begins with all that was said before."""

    @property
    def caches_prefixes(self) -> bool:
        return self.prefix > 0 or self.turns > 1

    def sessions(self, requests: int, seed: int) -> list[Session]:
        """Return sessions of about `requests` requests together."""
        random = Random(f"{seed} lengths")
        draw = random.randbytes if self.caches_prefixes else bytes  # zeros are as good where none are compared
        prefixes = [tuple(Random(f"{seed} prefix {which}").randbytes(self.prefix)) for which in range(4)]
        shares = [share for share, _ in self.classes]
        sessions: list[Session] = []
        for _ in range(math.ceil(requests / self.turns)):
            kind = random.choices(range(len(shares)), shares)[0]
            history = random.choice(prefixes) if self.prefix else ()
            session = []
            for _ in range(self.turns):
                own, generate = self.classes[kind][1].draw(random)
                prompt = history + tuple(draw(own))
                session.append(PlannedRequest(prompt, generate, kind))
                history = prompt + (0,) * generate  # simulated answers are zeros
            sessions.append(session)
        return sessions

    def before(self) -> float:
        """Return the mean number of cached tokens before a prompt."""
        said = sum(share * (each.prompt + each.generate) for share, each in self.classes)
        return self.prefix + (self.turns - 1) / 2 * said


def one(spread: str, prompt: int, generate: int, most: int = 8192, **how: Any) -> Workload:
    """Return a workload of one class."""
    return Workload(((1.0, Lengths(spread, prompt, generate, most)),), **how)


WORKLOADS = {
    "short": one("fixed", 128, 64),
    "paper-small": one("normal", 512, 64),
    "paper": one("normal", 2600, 60, 3900),
    "sharegpt": one("lognormal", 700, 200, 1600),
    "azure-code": one("lognormal", 2066, 18),  # medians of 1,500 and 13
    "azure-code-2k": one("lognormal", 1300, 18, 1900),
    "azure-conv": one("lognormal", 1405, 178),  # medians of 1,020 and 129
    "azure-conv-2k": one("lognormal", 900, 178, 1000),
    "long-prompts": one("fixed", 8000, 30),
    "4k-prompts": one("normal", 4000, 30),
    "long-answers": one("lognormal", 256, 400, 1000),
    "chat": one("lognormal", 160, 80, 600, turns=5),
    "prefix": one("normal", 200, 60, prefix=1504),
    "two-classes": Workload(((0.7, Lengths("lognormal", 300, 100, 1200)), (0.3, Lengths("normal", 1500, 40)))),
    "two-classes-long": Workload(((0.8, Lengths("lognormal", 400, 120, 1600)), (0.2, Lengths("normal", 6000, 20)))),
}

SCENARIOS: dict[str, dict[str, Sequence[str]]] = {
    "0.5b-int8": {
        "paper-small": ("2 clients", "16 clients", "32 clients", "64 clients"),
        "azure-conv": ("50%", "90%", "120%"),
        "azure-code": ("80%",),
        "long-prompts": ("4 clients",),
        "short": ("32 clients",),
        "chat": ("8 clients", "24 clients"),
        "prefix": ("110%",),
        "two-classes": ("60%", "100%"),
    },
    "0.5b-bf16": {
        "paper-small": ("4 clients", "16 clients", "32 clients"),
        "two-classes": ("125%",),
    },
    "0.5b-int8-avx2": {
        "short": ("90%",),
        "azure-conv": ("60%",),
        "4k-prompts": ("50%",),
        "two-classes-long": ("80%",),
    },
    "7b-int8-avx2": {
        "short": ("4 clients", "150%"),
        "paper-small": ("50%",),
        "azure-code": ("90%",),
    },
    "a100-70b": {
        "paper": ("1 clients", "4 clients", "16 clients", "32 clients", "110%"),
        "azure-code": ("50%",),
        "chat": ("16 clients",),
        "prefix": ("90%",),
        "two-classes": ("80%", "120%"),
    },
    "opt-13b": {
        "sharegpt": ("25%", "60%", "90%", "110%", "150%", "64 clients"),
        "azure-code-2k": ("75%",),
    },
    "opt-66b": {
        "sharegpt": ("80%",),
        "azure-code-2k": ("75%", "120%"),
    },
    "splitwise-a100": {
        "azure-code": ("50%", "130%"),
        "azure-conv": ("75%",),
        "long-prompts": ("8 clients",),
        "long-answers": ("64 clients",),
    },
    "splitwise-h100": {
        "azure-code": ("100%",),
        "azure-conv": ("60%", "90%"),
        "two-classes-long": ("110%",),
        "long-answers": ("75%",),
        "prefix": ("60%", "100%"),
    },
}
"""Loads by machine and workload: a closed loop of clients, or Poisson arrivals at a fraction of the capacity."""

TTFTS = ("1.2", "2/token", "5", "20", "1.2/token", "2", "5/token", "20/token")
"""TTFT targets as multiples of the time that a lone prompt takes: of a long one, or for each token of a short one,
which takes longest for that.
"""
GAPS = (
    *("itl 3", "tpot 1.5", "p95 3", "tpot 30", "itl 1.5", "p99 10"),
    *("tpot 3", "itl 10", "p90 10", "tpot 10", "itl 30", "p99 30"),
)
"""Targets for the gaps between tokens as multiples of a full step of decodes: of their moving average (itl), their mean
over the answer (tpot), or for at least that percentage of the gaps of an answer (p95).
"""
SLOS_PER_SCENARIO = 3
FASTGEN = (("1.953ms/token", "itl 500ms"), ("1.953ms/token", "itl 250ms"), ("1.953ms/token", "itl 166.7ms"))
DISTSERVE = (("250ms", "tpot 100ms"), ("250ms", "tpot 40ms"), ("500ms", "tpot 100ms"), ("1000ms", "tpot 50ms"))
PUBLISHED: dict[str, Sequence[tuple[str, str]]] = {
    "opt-13b/sharegpt": DISTSERVE,
    "a100-70b/paper": FASTGEN,
    "0.5b-int8/paper-small": FASTGEN[1:],
    "0.5b-bf16/paper-small": FASTGEN[1:],
}
"""SLOs of papers, which these workloads have in addition: DistServe's (arXiv 2401.09670) and FastGen's, a first token
within prompt/512 s and 2, 4 or 6 tokens/s.
"""


@dataclass(frozen=True)
class Slo:
    """States targets as multiples (see TTFTS and GAPS), or in milliseconds: 250ms, 2ms/token, tpot 100ms."""

    ttft: str
    gap: str

    def __str__(self) -> str:
        return f"ttft {self.ttft}, {self.gap}"

    def targets(self, *, whole: float, per_token: float, step: float) -> SloTargets:
        """Return the targets in seconds: `whole` is a long prompt's time, `per_token` a short one's for each token,
        `step` that of a full step of decodes.
        """
        kind, gap = self.gap.split()
        settings: dict[str, Any] = {}
        if self.ttft.endswith(PER_TOKEN):
            settings["ttft_per_token"] = _seconds(self.ttft.removesuffix(PER_TOKEN), per_token)
        else:
            settings["ttft"] = _seconds(self.ttft, whole)
        if kind == "tpot":
            settings["tpot"] = _seconds(gap, step)
        else:
            settings["itl"] = _seconds(gap, step)
        if kind[1:].isdigit():
            settings["itl_percentile"] = float(kind[1:])
        return SloTargets(**settings)


def _seconds(text: str, unit: float) -> float:
    """Return the seconds of a time in milliseconds, or of a multiple of `unit`."""
    return float(text[:-2]) / 1e3 if text.endswith("ms") else float(text) * unit


@dataclass(frozen=True)
class Scenario:
    """What every policy sees: a machine, a workload and a load."""

    machine: str
    workload: str
    load: str
    slos: tuple[Slo, ...]

    def __str__(self) -> str:
        return f"{self.machine}/{self.workload}/{self.load}"

    @property
    def calibration(self) -> Calibration:
        return MACHINES[self.machine]

    @property
    def requests_of(self) -> Workload:
        return WORKLOADS[self.workload]

    @property
    def clients(self) -> int:
        """Return the number of clients of a closed loop; 0 for an open one."""
        return int(self.load.removesuffix(" clients")) if self.load.endswith("clients") else 0

    @property
    def spacing(self) -> float:
        """Return the seconds between the starts of two clients of a closed loop: a full machine serves one meanwhile.

        All at once, most of their first requests would be late, and count in the goodput of a policy that lets such
        wait: they take its time in the window, for no request of the window.
        """
        return 1.0 / self.capacity

    @property
    def rate(self) -> float:
        """Return the arrival rate of an open loop in requests/s."""
        return float(self.load.removesuffix("%")) / 100.0 * self.capacity

    @cached_property
    def capacity(self) -> float:
        """Return the requests/s of full steps: each has a token of every running decode, and as many prompt tokens as
        take their places when they end.
        """
        workload, cost = self.requests_of, self.calibration.cost
        prompt = sum(share * each.prompt for share, each in workload.classes)
        generate = sum(share * each.generate for share, each in workload.classes)
        before = workload.before()
        kv_tokens = self.calibration.num_blocks * self.calibration.block_size
        batch = min(MAX_NUM_SEQS, kv_tokens / (before + prompt + generate))
        started = batch / generate  # prompts for each step
        context = before + prompt + generate / 2
        seconds = cost.seconds(
            StepFeatures(
                tokens=round(batch + started * prompt),
                rows=round(batch + started),
                pairs=round(batch * context + started * prompt * (before + prompt / 2)),
                kv_tokens=round(batch * context + started * (before + prompt)),
                requests=round(batch + started),
            )
        )
        return started / seconds

    def arrivals(self, sessions: int, seed: int) -> list[float] | None:
        """Return the times at which that many sessions begin; None in a closed loop."""
        if self.clients:
            return None
        random, time, times = Random(f"{seed} arrivals"), 0.0, []
        for _ in range(sessions):
            time += random.expovariate(self.rate / self.requests_of.turns)
            times.append(time)
        return times

    def targets(self, slo: Slo) -> list[SloTargets]:
        """Return the targets of each class of requests."""
        workload, cost = self.requests_of, self.calibration.cost
        kv_tokens = self.calibration.num_blocks * self.calibration.block_size
        before = round(workload.before())
        targets = []
        for _, each in workload.classes:
            context = before + each.prompt + each.generate // 2
            batch = max(1, min(self.clients or FULL_BATCH, MAX_NUM_SEQS, kv_tokens // context))
            lone, full = StepFeatures(), StepFeatures()
            whole = cost.seconds(lone.plus(start=before, count=each.prompt_quantile(EXTREME), rows=1))
            short = each.prompt_quantile(-EXTREME)
            for _ in range(batch):
                full = full.plus(start=context - 1, count=1, rows=1)
            # A target per token counts the cached tokens of a prompt, too.
            per_token = cost.seconds(lone.plus(start=before, count=short, rows=1)) / (before + short)
            targets.append(slo.targets(whole=whole, per_token=per_token, step=cost.seconds(full)))
        return targets


def grid() -> list[Scenario]:
    """Return all scenarios, each with the next SLOs in an order which covers the combinations evenly."""
    scenarios: list[Scenario] = []
    for machine, workloads in SCENARIOS.items():
        for workload, loads in workloads.items():
            for load in loads:
                slos = []
                for number in range(len(scenarios) * SLOS_PER_SCENARIO, (len(scenarios) + 1) * SLOS_PER_SCENARIO):
                    gap = GAPS[(5 * number + number // len(TTFTS)) % len(GAPS)]
                    slos.append(Slo(TTFTS[number % len(TTFTS)], gap))
                slos += [Slo(*published) for published in PUBLISHED.get(f"{machine}/{workload}", ())]
                scenarios.append(Scenario(machine, workload, load, tuple(slos)))
    return scenarios
