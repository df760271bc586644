"""Simulates loans on 32 A100 with contexts to 2,000K tokens, beside the baselines of Infinite-LLM and fixed instances.

Lin et al., Infinite-LLM (arXiv 2401.02669v2). Its abstract could be read: 1.35 to 3.4 times the throughput of the state
of the art, contexts from a few to 2,000K tokens, 32 A100. The rest is second hand, from a reader's notes
(benchmarks/papers/README.md): four nodes, NVLink within; Llama-2 7B, 13B and 70B; prompts of up to 60K tokens beside
vLLM on as many instances of as many GPUs (vLLM-multi, 1.35 to 1.73), and up to 200K to 2,000K beside one vLLM instance
of all GPUs (vLLM-single, 1.4 to 3.4). How lengths are distributed, requests dispatched and instances sized is not
known: these are assumptions of ours, given here. Nothing is fitted to its figures.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random

from benchmarks.papers.kept import Kept
from benchmarks.papers.tables import Table
from splitfuse.bench.workload import Lengths, LoadRequest, Workload
from splitfuse.config.engine import SchedulerConfig
from splitfuse.core.request import Request
from splitfuse.core.slo.cost_model import CostModel
from splitfuse.runtime.calibration import Calibration
from splitfuse.simulator import machines, virtual_time
from splitfuse.simulator.deployment import Deployment, Machine, SimulationConfig
from splitfuse.simulator.lending import Lending
from splitfuse.simulator.simulate import Replica, SimulatedTarget

MULTI, SINGLE = (1.35, 1.73), (1.4, 3.4)
"""Least and most of the paper's ratios to vLLM-multi and vLLM-single."""
SHORT = 60_000
"""Longest prompts for which the paper compares with vLLM-multi."""
GPUS, NODE = 32, 8
LONGEST = (SHORT, 200_000, 600_000, 2_000_000)
"""Longest prompts. Lengths are drawn evenly by their logarithm, from SHORTEST on: most requests are short."""
SHORTEST = 1_000
ANSWERS = (50, 350)
"""Shortest and longest answer, drawn evenly."""
BUDGET, MAX_NUM_SEQS = 2048, 256
WHOLE_PROMPTS = 16_384
"""Number of prompt tokens that vLLM puts together."""
REQUESTS = 96
"""Fewest requests; there are more if these do not fill the caches twice."""
BLOCK_SIZE = 128
"""Tokens of a block: large ones make the simulation faster."""
INFINIBAND = 25e9
"""Bytes a second of each GPU to other nodes: 200 Gb/s, the usual network of such machines. The notes say 125 MB/s of
Ethernet, over which tensor parallel instances of several nodes would not be of use at all.
"""
NETWORK_LATENCY = 5e-6
"""Seconds of a message between nodes, both ends included."""


@dataclass(frozen=True)
class Shape:
    """Describes a network in fp16: https://huggingface.co/meta-llama, config.json."""

    name: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    sizes: tuple[int, ...]
    """GPUs of an instance, tensor parallel. Instances that lend have the fewest, which have room for some KV."""
    head_dim: int = 128
    vocabulary: int = 32_000

    @property
    def weights(self) -> int:
        attention = self.hidden * (2 * self.heads + 2 * self.kv_heads) * self.head_dim
        return self.layers * (attention + 3 * self.hidden * self.inner)

    @property
    def kv_bytes(self) -> int:
        return self.layers * 2 * self.kv_heads * self.head_dim * 2


SHAPES = {
    "7b": Shape("Llama-2 7B", 32, 4096, 11_008, 32, 32, sizes=(1, 2, 8, 32)),
    "70b": Shape("Llama-2 70B", 80, 8192, 28_672, 64, 8, sizes=(4, 8, 16, 32)),
}


@dataclass(frozen=True)
class LogUniform(Workload):
    """Draws the lengths of prompts evenly by their logarithm."""

    kind = "log-uniform"
    longest: int
    seed: int = 0
    lengths: Lengths = field(default_factory=lambda: Lengths(1, 1))
    """Unused."""

    def first(self, stream: str, number: int) -> LoadRequest:
        """See Workload. All tokens are zeros: nothing is cached."""
        random = Random(f"{self.seed} {stream} {number}")
        prompt = round(math.exp(random.uniform(math.log(SHORTEST), math.log(self.longest))))
        return LoadRequest(stream, number, 0, (0,) * prompt, random.randint(*ANSWERS))


def instance(shape: Shape, gpus: int) -> Calibration:
    """Return a network, tensor parallel over so many A100-80GB, by the figures and efficiencies of machines.py.

    Over several nodes, activations are reduced within each first, and by each GPU with its peers of the others.
    """
    flops, bandwidth = (gpus * each / machines.GPUS for each in (machines.FLOPS, machines.BYTES_PER_SECOND))
    nodes, within = -(-gpus // NODE), min(gpus, NODE)
    bytes_of_token = 2 * shape.layers * shape.hidden * 2
    reduced = bytes_of_token * 2 * (within - 1) / within / machines.NVLINK
    reduced += bytes_of_token / within * 2 * (nodes - 1) / nodes / INFINIBAND
    meeting = 2 * shape.layers * ((gpus > 1) * machines.ALL_REDUCE_SECONDS + 2 * (nodes - 1) * NETWORK_LATENCY)
    stream = 2 * shape.weights / (bandwidth * machines.BANDWIDTH)
    arithmetic = 2 * shape.weights / (flops * machines.UTILISATION)
    cost = CostModel(
        floor=machines.HOST_SECONDS + stream + meeting,
        per_token=reduced,
        knee=stream / arithmetic,
        per_token_beyond=arithmetic,
        per_row=2 * shape.hidden * shape.vocabulary / (flops * machines.UTILISATION),
        per_pair=4 * shape.layers * shape.heads * shape.head_dim / (flops * machines.ATTENTION),
        per_kv_token=shape.kv_bytes / (bandwidth * machines.ATTENTION),
    )
    weights = 2 * (shape.weights + 2 * shape.hidden * shape.vocabulary)
    cache = 0.9 * gpus * machines.MEMORY / machines.GPUS - weights
    return Calibration(
        name=f"{shape.name} on {gpus} x A100-80GB",
        cost=cost,
        num_blocks=int(cache / shape.kv_bytes / BLOCK_SIZE),
        block_size=BLOCK_SIZE,
        max_model_len=4_000_000,
        kv_bytes_per_token=shape.kv_bytes,
    )


def deployment(shape: Shape, gpus: int, *, lends: bool) -> Deployment:
    """Return all GPUs as equal instances, with SplitFuse; the next request goes where most room is."""
    engine = SimulationConfig(
        calibration=instance(shape, gpus),
        scheduler=SchedulerConfig(max_num_batched_tokens=BUDGET, max_num_seqs=MAX_NUM_SEQS),
        enable_prefix_caching=False,
    )
    lending = Lending(latency=NETWORK_LATENCY, layers=shape.layers, most_creditors=None if lends else 0)
    return Deployment(machines=(Machine(engine=engine, gpus=gpus),) * (GPUS // gpus), lending=lending)


def vllm(shape: Shape, gpus: int) -> Deployment:
    """Return all GPUs as equal instances of vLLM: prompts are whole, and go first."""
    engine = SimulationConfig(
        calibration=instance(shape, gpus),
        scheduler=SchedulerConfig(max_num_batched_tokens=WHOLE_PROMPTS, max_num_seqs=MAX_NUM_SEQS),
        policy="prefill-first",
        enable_prefix_caching=False,
    )
    return Deployment(machines=(Machine(engine=engine, gpus=gpus),) * (GPUS // gpus))


class InTurn(SimulatedTarget):
    """Sends requests to one instance after the other as they come: vLLM has nothing that looks at their load."""

    def __init__(self, deployment: Deployment) -> None:
        super().__init__(deployment)
        self._turns = itertools.cycle(self._replicas)

    def _choose(self, copy: Request, names: list[bytes]) -> Replica:  # noqa: ARG002
        return next(self._turns)


def fits(shape: Shape, gpus: int, longest: int) -> bool:
    """Return whether one instance holds the longest request alone."""
    calibration = instance(shape, gpus)
    return longest + ANSWERS[1] <= (calibration.num_blocks - 2) * calibration.block_size


def num_requests(shape: Shape, longest: int, least: int) -> int:
    """Return how many requests there are: those that fill the caches of instances that lend twice, or `least`."""
    room = GPUS // shape.sizes[0] * instance(shape, shape.sizes[0]).num_blocks * BLOCK_SIZE
    mean = (longest - SHORTEST) / math.log(longest / SHORTEST)
    return max(least, math.ceil(2 * room / mean))


def throughput(
    placed: Deployment,
    longest: int,
    requests: int,
    make_target: Callable[[Deployment], SimulatedTarget] = SimulatedTarget,
) -> float:
    """Return the tokens a second, of prompts and answers, if all requests come at once, until the last one is done."""

    async def main() -> float:
        target, workload = make_target(placed), LogUniform(longest)
        wanted = [workload.first("", number) for number in range(requests)]
        began = asyncio.get_running_loop().time()
        answers = await asyncio.gather(*(target.ask(request) for request in wanted))
        assert all(answer.error is None for answer in answers)
        tokens = sum(answer.num_prompt_tokens + len(answer.token_times) for answer in answers)
        return tokens / (asyncio.get_running_loop().time() - began)

    return virtual_time.run(main())


def run(names: Sequence[str], longest: Sequence[int], *, requests: int, kept: Kept) -> list[Table]:
    """Simulate contexts up to these lengths and return a table for each network."""
    return [_run(SHAPES[name], longest, requests, kept) for name in names]


def _run(shape: Shape, longest: Sequence[int], requests: int, kept: Kept) -> Table:
    small = shape.sizes[0]
    alone = [f"SplitFuse, {GPUS // gpus} x {gpus}" for gpus in shape.sizes]
    heads = (
        *("longest prompt, requests", f"vLLM-multi: {GPUS // small} x {small} GPUs", f"vLLM-single: 1 x {GPUS}"),
        *(*alone, f"SplitFuse, {GPUS // small} x {small} with loans", "to vLLM-multi", "to vLLM-single", "paper"),
        *("to the best SplitFuse", "to the best that holds the longest of all"),
    )
    table = Table(f"Tokens/s of {shape.name} on {GPUS} A100", heads)
    for length in longest:
        table.add(*_row(shape, length, num_requests(shape, length, requests), kept))
        print(table.rows[-1], flush=True)
    return table


def _row(shape: Shape, length: int, count: int, kept: Kept) -> list[str]:
    small = shape.sizes[0]
    fitting = [gpus for gpus in shape.sizes if fits(shape, gpus, length)]

    def found(system: str, placed: Deployment, make_target: Callable[[Deployment], SimulatedTarget]) -> float:
        compute = partial(throughput, placed, length, count, make_target)
        return kept.find("infinite-llm", shape.name, length, count, system, compute=compute)

    theirs = {gpus: found(f"vLLM, {gpus} GPUs", vllm(shape, gpus), InTurn) for gpus in (small, GPUS) if gpus in fitting}
    ours = {
        gpus: found(f"SplitFuse, {gpus} GPUs", deployment(shape, gpus, lends=False), SimulatedTarget)
        for gpus in fitting
    }
    lent = found("loans", deployment(shape, small, lends=True), SimulatedTarget)
    rates = [*(theirs.get(gpus) for gpus in (small, GPUS)), *(ours.get(gpus) for gpus in shape.sizes), lent]
    cells = ["does not fit" if rate is None else f"{rate:,.0f}" for rate in rates]
    ratios = [f"{lent / theirs[gpus]:.2f}" if gpus in theirs else "" for gpus in (small, GPUS)]
    least, most = MULTI if length <= SHORT else SINGLE
    paper = f"{least:g}-{most:g} to vLLM-{'multi' if length <= SHORT else 'single'}"
    fixed = max(rate for gpus, rate in ours.items() if fits(shape, gpus, LONGEST[-1]))
    best = [f"{lent / rate:.2f}" for rate in (max(ours.values()), fixed)]
    return [f"{length:,}, {count}", *cells, *ratios, paper, *best]
