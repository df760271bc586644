"""Searches the throughput of conversations that Pensieve's evaluation is about: their KV stays, in two tiers, or not.

Yu et al., EuroSys 2025 (arXiv 2312.05516v3): 1.14 to 3.0 times the throughput of vLLM and TensorRT-LLM, which computed
the whole conversation at each turn. That think times are exponential, 60 s on average, is theirs, too. The rest is our
assumption: turns are ShareGPT's as Sarathi-Serve's trace has them, contexts are up to 8,192 tokens, the memory of the
machine has MEMORY_TIMES as much KV as the GPUs, over PCIe 4.0, and a load is sustained while a token of an answer takes
LIMITS on average, from the request to the end of the answer.

Their kernel computes prompts and decodes in one step: `orca` of bench/baselines.py. Their eviction, and the hole that
it leaves at the beginning of a conversation, are in benchmarks/eviction.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random

from benchmarks.papers.data import distserve_engine, turns_of_conversations
from benchmarks.papers.tables import Table
from splitfuse.bench import metrics
from splitfuse.bench.target import Target
from splitfuse.bench.workload import Lengths, LoadRequest, Prompt, Vocabulary, Workload, joined
from splitfuse.config import SchedulerConfig
from splitfuse.runtime.calibration import Calibration
from splitfuse.simulator import virtual_time
from splitfuse.simulator.deployment import Deployment, Machine, SimulationConfig, StepClock
from splitfuse.simulator.machines import MACHINES
from splitfuse.simulator.rates import largest_load, poisson_load
from splitfuse.simulator.simulate import SimulatedTarget

CONVERSATIONS = 200
THINK = 60.0
LONGEST = 8192
MEMORY_TIMES = 4.0
PCIE = 25e9
"""Bytes/s between a GPU and the machine's memory: PCIe 4.0 x16 has 31.5e9."""
LIMITS = (0.1, 0.2)
"""Mean seconds for a token of an answer."""
MAX_NUM_SEQS = 512
WHOLE_PROMPTS = 16_384
BUDGET = 512
SHORTEST = 300.0
"""Shortest time in seconds whose conversations count: some turns of each."""
LEAST = 1 / 64
"""Smallest rate of conversations that is tried."""


@dataclass(frozen=True)
class Conversations(Workload):
    """Makes conversations with the turns of ShareGPT's, which end when the context has no room for another turn."""

    kind = "conversations"
    vocabulary: Vocabulary
    room: int
    think: float = THINK
    seed: int = 0
    lengths: Lengths = field(default_factory=lambda: Lengths(1, 1))
    """Unused."""

    def _turns(self, number: int, stream: str) -> tuple[Random, tuple[tuple[int, int], ...]]:
        random = Random(f"{self.seed} {stream} {number}")
        return random, random.choice(turns_of_conversations())

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


@dataclass(frozen=True)
class Model:
    """Holds a model on its GPUs."""

    calibration: Calibration
    gpus: int
    times: StepClock | None = None


def models() -> dict[str, Model]:
    """Return the models by name."""
    found = {}
    for name, gpus in (("OPT-13B", 1), ("OPT-66B", 4)):
        engine = distserve_engine("DistServe", name, gpus)
        calibration = replace(engine.calibration, max_model_len=LONGEST)
        found[f"{name}, {gpus} x A100"] = Model(calibration, gpus, engine.times)
    llama = replace(MACHINES["a100-70b"], max_model_len=LONGEST)
    return {**found, "Llama-2 70B, 4 x A100": Model(llama, 4)}


@dataclass(frozen=True)
class System:
    """Is a way to serve conversations."""

    name: str
    policy: str
    budget: int
    caches: bool
    has_tier: bool = False

    def deployment(self, model: Model) -> Deployment:
        """Return the model served this way."""
        tier = {}
        calibration = model.calibration
        if self.has_tier:
            cache_bytes = calibration.num_blocks * calibration.block_size * calibration.kv_bytes_per_token
            tier = {"kv_memory_tier": int(MEMORY_TIMES * cache_bytes), "kv_memory_speed": model.gpus * PCIE}
        engine = SimulationConfig(
            calibration=calibration,
            scheduler=SchedulerConfig(max_num_batched_tokens=self.budget, max_num_seqs=MAX_NUM_SEQS),
            policy=self.policy,
            enable_prefix_caching=self.caches,
            **tier,  # type: ignore[arg-type]
        )
        return Deployment(machines=(Machine(engine=engine, step_times=model.times, gpus=model.gpus),))


SYSTEMS = (
    System("prefill-first, nothing kept: vLLM, TensorRT-LLM", "prefill-first", WHOLE_PROMPTS, caches=False),
    System("prefill-first, prefix cache", "prefill-first", WHOLE_PROMPTS, caches=True),
    System("prompts beside decodes, memory tier: Pensieve", "orca", WHOLE_PROMPTS, caches=True, has_tier=True),
    System("SplitFuse, nothing kept", "splitfuse", BUDGET, caches=False),
    System("SplitFuse, prefix cache", "splitfuse", BUDGET, caches=True),
    System("SplitFuse, memory tier", "splitfuse", BUDGET, caches=True, has_tier=True),
)


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


def run(names: Sequence[str], limits: Sequence[float], *, conversations: int) -> Table:
    """Simulate all systems and return their table."""
    table = Table(
        "Conversations/s of ShareGPT's turns, think time 60 s",
        ("model", "s/token", "system", "conversations/s", "to the first", "paper"),
    )
    for name in names:
        model = models()[name]
        for limit in limits:
            first = start = 0.0
            for system in SYSTEMS:
                deployment = system.deployment(model)

                def is_sustained(rate: float, deployment: Deployment = deployment, limit: float = limit) -> bool:
                    return sustains(deployment, rate, limit, conversations)

                start = largest_load(is_sustained, start=start or 0.5, least=LEAST)
                first = first or start
                paper = "1" if system is SYSTEMS[0] else "1.14-3.0" if "Pensieve" in system.name else ""
                table.add(name, f"{limit:g}", system.name, f"{start:.3g}", f"{start / first:.2f}", paper)
                print(table.rows[-1], flush=True)
    return table
