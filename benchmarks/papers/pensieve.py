"""Searches the throughput of conversations that Pensieve's evaluation is about: their KV stays, in two tiers, or not.

Yu et al., EuroSys 2025 (arXiv 2312.05516v3): 1.14 to 3.0 times the throughput of vLLM 0.2.0 and TensorRT-LLM 0.12.0,
which computed the whole conversation at each turn. Its abstract could be read; the rest is second hand, from notes of
readers (benchmarks/papers/README.md): think times are exponential, 60 s on average; 40 GB of each A100-80GB are KV, and
the machine has 220 GB of memory for each; contexts are up to 16,384 tokens; ShareGPT's conversations have 5.56 turns of
37.77 and 204.58 tokens on average; and throughput is compared where a token of an answer takes LIMITS on average, from
the request to the end of the answer.

The turns are those of Sarathi-Serve's trace, scaled to these averages. Their kernel computes prompts and decodes in one
step: `orca` of bench/baselines.py. Its times are not known: those of DistServe's engine stand for them, and vLLM's own
for its baseline, so that policy and engine can be told apart. Their eviction, and the hole that it leaves at the
beginning of a conversation, are in benchmarks/eviction.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from random import Random

from benchmarks.papers.data import distserve_engine, turns_of_conversations
from benchmarks.papers.kept import Kept
from benchmarks.papers.tables import Table
from splitfuse.bench import metrics
from splitfuse.bench.target import Target
from splitfuse.bench.workload import Lengths, LoadRequest, Prompt, Vocabulary, Workload, joined
from splitfuse.config.engine import SchedulerConfig
from splitfuse.runtime.calibration import Calibration
from splitfuse.simulator import virtual_time
from splitfuse.simulator.deployment import Deployment, Machine, SimulationConfig, StepClock
from splitfuse.simulator.machines import MACHINES
from splitfuse.simulator.rates import largest_load, poisson_load
from splitfuse.simulator.simulate import SimulatedTarget

CONVERSATIONS = 200
THINK = 60.0
LONGEST = 16_384
NEW, ANSWER = 37.77, 204.58
"""Mean tokens of a turn: new ones of its prompt, and of its answer."""
KV_PER_GPU = 40e9
MEMORY_PER_GPU = 220e9
"""Size in bytes of the machine's memory for each GPU: the tier has all of it."""
PCIE = 25e9
"""Bytes/s between a GPU and the machine's memory: PCIe 4.0 x16 has 31.5e9."""
MAX_NUM_SEQS = 256
"""Number of requests of a step: vLLM 0.2's default."""
WHOLE_PROMPTS = 16_384
BUDGET = 512
SHORTEST = 300.0
"""Shortest time in seconds whose conversations count: some turns of each."""
LEAST = 1 / 64
"""Smallest rate of conversations that is tried."""


@dataclass(frozen=True)
class Conversations(Workload):
    """Makes conversations with the turns of ShareGPT's, which end when the context has no room for another turn. Their
    lengths are scaled to the means NEW and ANSWER.
    """

    kind = "conversations"
    vocabulary: Vocabulary
    room: int
    think: float = THINK
    seed: int = 0
    lengths: Lengths = field(default_factory=lambda: Lengths(1, 1))
    """Unused."""

    def _turns(self, number: int, stream: str) -> tuple[Random, tuple[tuple[int, int], ...]]:
        random = Random(f"{self.seed} {stream} {number}")
        return random, random.choice(scaled_turns())

    def first(self, stream: str, number: int) -> LoadRequest:
        """See Workload."""
        random, turns = self._turns(number, stream)
        new, answer = turns[0]
        answer = min(answer, self.room - 1)
        prompt = self.vocabulary.draw(random, max(min(new, self.room - answer), 1))
        return LoadRequest(stream, number, 0, prompt, max(answer, 1))

    def successor(self, request: LoadRequest, answer: Prompt) -> LoadRequest | None:
        """See Workload."""
        turn = request.turn + 1
        _, turns = self._turns(request.number, request.stream)
        history = joined(request.prompt, answer)
        if turn == len(turns) or len(history) + sum(turns[turn]) > self.room:
            return None
        random = Random(f"{self.seed} {request.stream} {request.number} {turn}")
        new, generate = turns[turn]
        return replace(
            request,
            turn=turn,
            prompt=joined(history, self.vocabulary.draw(random, max(new, 1))),
            max_tokens=max(generate, 1),
            prefix=len(history),
            pause=random.expovariate(1 / self.think),
        )


@cache
def scaled_turns() -> tuple[tuple[tuple[int, int], ...], ...]:
    """Return the conversations with turns as long as the paper's are on average."""
    made = turns_of_conversations()
    new, answer = (metrics.mean([turn[which] for turns in made for turn in turns]) for which in (0, 1))
    return tuple(
        tuple((max(round(x * NEW / new), 1), max(round(y * ANSWER / answer), 1)) for x, y in turns) for turns in made
    )


@dataclass(frozen=True)
class Engine:
    """Describes a model on its GPUs with an engine: its cost model, and the times of its steps if they are others."""

    calibration: Calibration
    times: StepClock | None = None


@dataclass(frozen=True)
class Model:
    """Holds a model on its GPUs, and the paper's figures for ShareGPT."""

    gpus: int
    limit: float
    """Mean seconds for a token of an answer, from the request on."""
    to_vllm: float
    to_tensorrt: float
    vllm: Engine
    engine: Engine
    """What stands for Pensieve's engine."""


def models() -> dict[str, Model]:
    """Return the models by name."""
    found = {}
    for name, gpus, limit, *ratios in (("OPT-13B", 1, 0.12, 1.36, 1.14), ("OPT-66B", 4, 0.2, 2.04, 1.64)):
        engines = []
        for maker in ("vLLM", "DistServe"):
            engine = distserve_engine(maker, name, gpus)
            engines.append(Engine(_sized(engine.calibration, gpus), engine.times))
        found[f"{name}, {gpus} x A100"] = Model(gpus, limit, *ratios, *engines)
    llama = (Engine(_sized(MACHINES[name], 4)) for name in ("a100-70b-vllm-0.2", "a100-70b"))
    found["Llama-2 70B, 4 x A100"] = Model(4, 0.4, 3.0, 2.47, *llama)
    return found


def _sized(calibration: Calibration, gpus: int) -> Calibration:
    """Return a calibration with the KV cache and the contexts of the paper."""
    num_tokens = gpus * KV_PER_GPU / calibration.kv_bytes_per_token
    num_blocks = int(num_tokens / calibration.block_size)
    return replace(calibration, num_blocks=num_blocks, max_model_len=LONGEST)


@dataclass(frozen=True)
class System:
    """Is a way to serve conversations."""

    name: str
    policy: str
    budget: int
    caches: bool
    has_tier: bool = False
    is_vllm: bool = False
    """True if steps take as long as vLLM's."""

    def deployment(self, model: Model) -> Deployment:
        """Return the model served this way."""
        made = model.vllm if self.is_vllm else model.engine
        tier = {}
        if self.has_tier:
            tier = {"kv_memory_tier": int(model.gpus * MEMORY_PER_GPU), "kv_memory_speed": model.gpus * PCIE}
        engine = SimulationConfig(
            calibration=made.calibration,
            scheduler=SchedulerConfig(max_num_batched_tokens=self.budget, max_num_seqs=MAX_NUM_SEQS),
            policy=self.policy,
            enable_prefix_caching=self.caches,
            **tier,  # type: ignore[arg-type]
        )
        return Deployment(machines=(Machine(engine=engine, step_times=made.times, gpus=model.gpus),))


SYSTEMS = {
    "vllm": System("vLLM: prefill-first, nothing kept, its times", "prefill-first", WHOLE_PROMPTS, False, is_vllm=True),
    "stateless": System("prefill-first, nothing kept", "prefill-first", WHOLE_PROMPTS, caches=False),
    "cache": System("prefill-first, prefix cache", "prefill-first", WHOLE_PROMPTS, caches=True),
    "pensieve": System("Pensieve: one step, prefix cache, memory tier", "orca", WHOLE_PROMPTS, True, has_tier=True),
    "splitfuse": System("SplitFuse, nothing kept", "splitfuse", BUDGET, caches=False),
    "splitfuse-cache": System("SplitFuse, prefix cache", "splitfuse", BUDGET, caches=True),
    "splitfuse-tier": System("SplitFuse, memory tier", "splitfuse", BUDGET, caches=True, has_tier=True),
}


def sustains(deployment: Deployment, rate: float, limit: float, conversations: int) -> bool:
    """Return whether `rate` conversations/s have `limit` seconds for a token of an answer on average, or less. So many
    count, or those of SHORTEST seconds: in a short window a cache is not full yet.
    """
    conversations = max(conversations, math.ceil(rate * SHORTEST))

    def make(target: Target) -> Conversations:
        return Conversations(target.vocabulary, target.room)

    target = SimulatedTarget(deployment)
    point = virtual_time.run(poisson_load(target, make(target), rate, conversations))
    normalized = [(each.done - each.sent) / len(each.token_times) for each in metrics.counted(point)]
    return metrics.mean(normalized) <= limit


def run(names: Sequence[str], systems: Sequence[str], *, conversations: int, kept: Kept) -> Table:
    """Simulate all systems and return their table."""
    table = Table(
        "Conversations/s of ShareGPT's turns, think time 60 s",
        ("model, s/token", "system", "conversations/s", "to vLLM", "to its policy with the same engine", "paper"),
    )
    for name in names:
        model = models()[name]
        found: dict[str, float] = {}
        start = 0.5
        for which in systems:
            system = SYSTEMS[which]
            deployment = system.deployment(model)

            def is_sustained(rate: float, deployment: Deployment = deployment, limit: float = model.limit) -> bool:
                return sustains(deployment, rate, limit, conversations)

            def compute(is_sustained: Callable[[float], bool] = is_sustained, start: float = start) -> float:
                return largest_load(is_sustained, start=start, least=LEAST)

            rate = kept.find("pensieve", conversations, name, model.limit, which, compute=compute)
            found[which], start = rate, rate or start
            paper = {"vllm": "1", "pensieve": f"{model.to_vllm:g} (to TensorRT-LLM {model.to_tensorrt:g})"}
            ratios = [f"{rate / found[each]:.2f}" if found.get(each) else "" for each in ("vllm", "stateless")]
            table.add(f"{name}, {model.limit:g}", system.name, f"{rate:.3g}", *ratios, paper.get(which, ""))
            print(table.rows[-1], flush=True)
    return table
