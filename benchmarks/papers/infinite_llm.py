"""Simulates loans on 32 A100 with contexts to 2,000K tokens, beside instances that hold the longest request alone.

Lin et al., Infinite-LLM (arXiv 2401.02669v2), abstract: 1.35 to 3.4 times the throughput of the state of the art, on
contexts from a few to 2,000K tokens, with 32 A100. Its sections could not be read: model, lengths, links and what it
was compared with are assumptions of ours, given here. Nothing is fitted to its figures.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random

from benchmarks.papers.tables import Table
from splitfuse.bench.workload import Lengths, LoadRequest, Workload
from splitfuse.config import SchedulerConfig
from splitfuse.core.slo.cost_model import CostModel
from splitfuse.runtime.calibration import Calibration
from splitfuse.simulator import machines, virtual_time
from splitfuse.simulator.deployment import Deployment, Machine, SimulationConfig
from splitfuse.simulator.lending import Lending
from splitfuse.simulator.simulate import SimulatedTarget

PAPER = (1.35, 3.4)
"""Least and most of the paper's ratios."""
GPUS, NODE = 32, 8
SIZES = (4, 8, 16, 32)
"""GPUs of an instance, tensor parallel. Llama-2 70B in fp16 needs two, and leaves little for KV then."""
LENDING = (4, 8)
"""GPUs of an instance that lends: those within a node."""
LONGEST = (8_000, 32_000, 128_000, 512_000, 1_000_000, 2_000_000)
"""Longest prompts. Lengths are drawn evenly by their logarithm, from SHORTEST on: most requests are short."""
SHORTEST = 1_000
ANSWERS = (50, 350)
"""Shortest and longest answer, drawn evenly."""
BUDGET, MAX_NUM_SEQS = 2048, 256
REQUESTS = 96
BLOCK_SIZE = 128
"""Tokens of a block: large ones make the simulation faster."""
INFINIBAND = 25e9
"""Bytes a second of each GPU to other nodes: 200 Gb/s, the usual network of such machines."""
NETWORK_LATENCY = 5e-6
"""Seconds of a message between nodes, both ends included."""


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


def instance(gpus: int) -> Calibration:
    """Return Llama-2 70B, tensor parallel over so many A100-80GB, by the cost model of simulator/machines.py.

    Over several nodes, activations are reduced within each first, and by each GPU with its peers of the others.
    """
    base, share = machines.MACHINES["a100-70b"], machines.GPUS / gpus
    cost, nodes = base.cost, -(-gpus // NODE)
    within = min(gpus, NODE)
    bytes_of_token = 2 * machines.LAYERS * machines.HIDDEN * 2
    reduced = bytes_of_token * 2 * (within - 1) / within / machines.NVLINK
    reduced += bytes_of_token / within * 2 * (nodes - 1) / nodes / INFINIBAND
    meeting = 2 * machines.LAYERS * (machines.ALL_REDUCE_SECONDS + 2 * (nodes - 1) * NETWORK_LATENCY)
    fixed = machines.HOST_SECONDS + 2 * machines.LAYERS * machines.ALL_REDUCE_SECONDS
    scaled = {name: getattr(cost, name) * share for name in ("per_token_beyond", "per_row", "per_pair", "per_kv_token")}
    floor = (cost.floor - fixed) * share + machines.HOST_SECONDS + meeting
    spread = CostModel(floor=floor, per_token=reduced, knee=cost.knee, **scaled)
    weights = 2 * (machines.WEIGHTS + 2 * machines.HIDDEN * machines.VOCABULARY)
    cache = 0.9 * gpus * machines.MEMORY / machines.GPUS - weights
    num_blocks = int(cache / machines.KV_BYTES / BLOCK_SIZE)
    sizes = {"num_blocks": num_blocks, "block_size": BLOCK_SIZE, "max_model_len": 4_000_000}
    return replace(base, cost=spread, timed=(), **sizes)


def deployment(gpus: int, *, lends: bool) -> Deployment:
    """Return all GPUs as equal instances."""
    engine = SimulationConfig(
        calibration=instance(gpus),
        scheduler=SchedulerConfig(max_num_batched_tokens=BUDGET, max_num_seqs=MAX_NUM_SEQS),
        enable_prefix_caching=False,
    )
    lending = Lending(latency=NETWORK_LATENCY, layers=machines.LAYERS, most_creditors=None if lends else 0)
    return Deployment(machines=(Machine(engine=engine, gpus=gpus),) * (GPUS // gpus), lending=lending)


def fits(gpus: int, longest: int) -> bool:
    """Return whether one instance holds the longest request alone."""
    calibration = instance(gpus)
    return longest + ANSWERS[1] <= (calibration.num_blocks - 2) * calibration.block_size


def throughput(placed: Deployment, longest: int, requests: int) -> float:
    """Return the tokens a second, of prompts and answers, if all requests come at once, until the last one is done."""

    async def main() -> float:
        target, workload = SimulatedTarget(placed), LogUniform(longest)
        wanted = [workload.first("", number) for number in range(requests)]
        began = asyncio.get_running_loop().time()
        answers = await asyncio.gather(*(target.ask(request) for request in wanted))
        assert all(answer.error is None for answer in answers)
        tokens = sum(answer.num_prompt_tokens + len(answer.token_times) for answer in answers)
        return tokens / (asyncio.get_running_loop().time() - began)

    return virtual_time.run(main())


def run(longest: Sequence[int], *, requests: int) -> Table:
    """Simulate contexts up to these lengths and return the table."""
    alone = [f"{GPUS // gpus} x {gpus} GPUs" for gpus in SIZES]
    lent = [f"{GPUS // gpus} x {gpus} GPUs with loans" for gpus in LENDING]
    heads = ("longest prompt", *alone, *lent, "ratio to the best", "to the best that holds 2,000K", "paper")
    table = Table("Tokens/s of Llama-2 70B on 32 A100", heads)
    for length in longest:
        fitting = [gpus for gpus in SIZES if fits(gpus, length)]
        rates = {gpus: throughput(deployment(gpus, lends=False), length, requests) for gpus in fitting}
        with_loans = [throughput(deployment(gpus, lends=True), length, requests) for gpus in LENDING]
        cells = [f"{rates[gpus]:,.0f}" if gpus in rates else "does not fit" for gpus in SIZES]
        cells += [f"{rate:,.0f}" for rate in with_loans]
        fixed = max(rates[gpus] for gpus in SIZES if fits(gpus, LONGEST[-1]))
        ratios = [f"{max(with_loans) / rate:.2f}" for rate in (max(rates.values()), fixed)]
        table.add(f"{length:,}", *cells, *ratios, f"{PAPER[0]}-{PAPER[1]}")
    return table
