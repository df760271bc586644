"""Holds cost models of machines from published figures, for comparing simulations with a paper.

a100-70b is Llama-2 70B in fp16 on four A100-80GB SXM, tensor parallel: the large model of DeepSpeed-FastGen's
evaluation. It follows from public facts and three free efficiencies (UTILISATION, BANDWIDTH, ATTENTION), which were not
fitted to the paper's results. docs/decisions/0013-cost-model.md has the derivation.
"""

from __future__ import annotations

from dataclasses import replace

from splitfuse.core.slo.cost_model import CostModel
from splitfuse.runtime.calibration import Calibration

# The network: https://huggingface.co/meta-llama/Llama-2-70b-hf, config.json.
LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY, CONTEXT = 80, 8192, 28672, 64, 8, 128, 32_000, 4096
LAYER_WEIGHTS = HIDDEN * (2 * HEADS + 2 * KV_HEADS) * HEAD_DIM + 3 * HIDDEN * INNER
WEIGHTS = LAYERS * LAYER_WEIGHTS  # 68.5e9
KV_BYTES = LAYERS * 2 * KV_HEADS * HEAD_DIM * 2  # of one token: 328 kB

# The machine: NVIDIA's A100 80GB SXM data sheet, times four.
GPUS = 4
FLOPS = GPUS * 312e12  # fp16 with fp32 accumulation, dense
BYTES_PER_SECOND = GPUS * 2.039e12
MEMORY = GPUS * 80e9
NVLINK = 600e9 / 2  # bytes a second from each GPU
ALL_REDUCE_SECONDS = 20e-6  # of a small message among four GPUs over NVLink: two in each layer

UTILISATION = 0.5
"""Fraction of peak arithmetic in large matrix products. Free: serving systems of 2023 report 0.4 to 0.6."""
BANDWIDTH = 0.8
"""Fraction of peak bandwidth while weights are read. Free: 0.7 to 0.85 is usual."""
ATTENTION = 0.3
"""Fraction of peak arithmetic and bandwidth in paged attention. Free."""
HOST_SECONDS = 5e-3
"""Time between steps, in which Python plans a step and launches its kernels. Free."""

VLLM_HOST_SECONDS = 13e-3
"""Time between vLLM's steps: the GPU waits 5 to 13 ms for Python (vLLM's issue 6854, on multi-step scheduling)."""
VLLM_KV_READS = HEADS // KV_HEADS
"""Number of times that vLLM 0.2's attention kernel reads each key and value: once per query head that shares it.

Free: there is no source that measured it.
"""


def _a100_70b() -> Calibration:
    stream = 2 * WEIGHTS / (BYTES_PER_SECOND * BANDWIDTH)
    arithmetic = 2 * WEIGHTS / (FLOPS * UTILISATION)
    reduced = 2 * LAYERS * HIDDEN * 2 * 2 * (GPUS - 1) / GPUS / NVLINK  # a ring moves each byte 2 (n - 1) / n times
    cost = CostModel(
        floor=HOST_SECONDS + stream + 2 * LAYERS * ALL_REDUCE_SECONDS,
        per_token=reduced,
        knee=stream / arithmetic,
        per_token_beyond=arithmetic,
        per_row=2 * HIDDEN * VOCABULARY / (FLOPS * UTILISATION),
        per_pair=4 * LAYERS * HEADS * HEAD_DIM / (FLOPS * ATTENTION),
        per_kv_token=KV_BYTES / (BYTES_PER_SECOND * ATTENTION),
    )
    block_size = 32
    cache = 0.9 * MEMORY - 2 * (WEIGHTS + 2 * HIDDEN * VOCABULARY)
    return Calibration(
        name="Llama-2 70B on 4 x A100-80GB",
        cost=cost,
        num_blocks=int(cache / KV_BYTES / block_size),
        block_size=block_size,
        max_model_len=CONTEXT,
        identity={"model": "meta-llama/Llama-2-70b-hf", "machine": "4 x A100-80GB SXM"},
        about={"from": "published figures: splitfuse/simulator/machines.py"},
    )


def _vllm_2023(ours: Calibration) -> Calibration:
    """Return the same machine with the attention kernel and the host time of vLLM 0.2."""
    cost = replace(
        ours.cost,
        floor=ours.cost.floor - HOST_SECONDS + VLLM_HOST_SECONDS,
        per_kv_token=VLLM_KV_READS * ours.cost.per_kv_token,
    )
    return replace(ours, name=f"{ours.name}, vLLM 0.2", cost=cost)


MACHINES = {"a100-70b": _a100_70b(), "a100-70b-vllm-0.2": _vllm_2023(_a100_70b())}
