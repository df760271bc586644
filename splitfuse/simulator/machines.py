"""Holds cost models of machines from published figures, for comparing simulations with a paper.

a100-70b is Llama-2 70B in fp16 on four A100-80GB SXM, tensor parallel: the large model of DeepSpeed-FastGen's
evaluation. It follows from public facts and three free efficiencies (UTILISATION, BANDWIDTH, ATTENTION), which were not
fitted to the paper's results. docs/decisions/0013-cost-model.md has the derivation.

The others are fits to times that their authors published, or that benchmarks/results has: DistServe's OPT-13B and
OPT-66B, Splitwise's Llama-2 70B on eight A100 or H100, and CPUs of two cores with the shapes of Qwen2.5-0.5B and of
Mistral-7B.
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
        kv_bytes_per_token=KV_BYTES,
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


def _published(
    name: str,
    cost: CostModel,
    *,
    source: str,
    model: str,
    machine: str,
    kv_tokens: int,
    kv_bytes_per_token: float,
    max_model_len: int,
) -> Calibration:
    """Return a calibration with room for `kv_tokens` tokens of `kv_bytes_per_token` each in the KV cache."""
    block_size = 32
    return Calibration(
        name=name,
        cost=cost,
        num_blocks=kv_tokens // block_size,
        block_size=block_size,
        max_model_len=max_model_len,
        kv_bytes_per_token=kv_bytes_per_token,
        identity={"model": model, "machine": machine},
        about={"from": f"{source}: splitfuse/simulator/machines.py"},
    )


# DistServe (arXiv 2401.09670) fits a step of prompts as a + b tokens + c (sum of squared lengths), and one of decodes
# as a + b context + c batch. Repository LLMServe/DistServe (Apache-2.0), in ms:
#     OPT-13B, 1 x A100   18.10, .1019, 7.1e-6; 19.93, .00063, .0385
#     OPT-66B, 4 x A100   29.4, .151, 8.3e-6; 30.8, .00045, .0633
# A fused step, which its engine does not have, is taken as the floor of a prompt's step, a decode's time for each of
# the first 64 tokens, and a prompt's for each one beyond. A pair of query and key is half a square. KV cache: 90 % of
# 80 GB each without the weights.
DISTSERVE = "DistServe's fitted times (arXiv 2401.09670)"
OPT_13B_KV_BYTES = 40 * 2 * 5120 * 2
OPT_66B_KV_BYTES = 64 * 2 * 9216 * 2


def _opt_13b() -> Calibration:
    cost = CostModel(
        floor=18.5e-3,
        per_token=0.0385e-3,
        knee=64.0,
        per_token_beyond=0.0634e-3,
        per_pair=2 * 7.1e-9,
        per_kv_token=0.63e-6,
    )
    name, machine = "OPT-13B on an A100-80GB", "1 x A100-80GB"
    return _published(
        *(name, cost),
        source=DISTSERVE,
        model="OPT-13B",
        machine=machine,
        kv_tokens=int((0.9 * 80e9 - 26e9) / OPT_13B_KV_BYTES),
        kv_bytes_per_token=OPT_13B_KV_BYTES,
        max_model_len=2048,
    )


def _opt_66b() -> Calibration:
    cost = CostModel(
        floor=29.6e-3,
        per_token=0.0633e-3,
        knee=64.0,
        per_token_beyond=0.0877e-3,
        per_pair=2 * 8.3e-9,
        per_kv_token=0.45e-6,
    )
    name, machine = "OPT-66B on 4 x A100-80GB", "4 x A100-80GB"
    return _published(
        *(name, cost),
        source=DISTSERVE,
        model="OPT-66B",
        machine=machine,
        kv_tokens=int((0.9 * 320e9 - 132e9) / OPT_66B_KV_BYTES),
        kv_bytes_per_token=OPT_66B_KV_BYTES,
        max_model_len=2048,
    )


# Splitwise (arXiv 2311.18677), data/perf_model.csv of Mutinifni/splitwise-sim (MIT): Llama-2 70B, tensor parallel over
# eight GPUs, prompts of 128 to 8192 tokens in batches of up to 4 and decodes in batches of up to 64. cost_model.fit
# over the rows of each machine: median error 1.2 % (A100) and 2.1 % (H100).
SPLITWISE = "Splitwise's measured times (arXiv 2311.18677)"


def _splitwise(gpu: str, cost: CostModel) -> Calibration:
    return _published(
        *(f"Llama-2 70B on 8 x {gpu}-80GB", cost),
        source=SPLITWISE,
        model="meta-llama/Llama-2-70b-hf",
        machine=f"DGX-{gpu}",
        kv_tokens=int((0.9 * 640e9 - 2 * WEIGHTS) / KV_BYTES),
        kv_bytes_per_token=KV_BYTES,
        max_model_len=16_384,
    )


SPLITWISE_A100 = CostModel(
    floor=44.27e-3,
    per_token=91.4e-6,
    knee=512.0,
    per_token_beyond=29.9e-6,
    per_row=135.7e-6,
    per_pair=14.87e-9,
    per_kv_token=0.261e-6,
)
SPLITWISE_H100 = CostModel(
    floor=29.85e-3,
    per_token=46.8e-6,
    knee=2048.0,
    per_token_beyond=53.4e-6,
    per_row=163.5e-6,
    per_pair=3.48e-9,
    per_kv_token=0.157e-6,
)


def _two_cores(
    name: str, cost: CostModel, *, kernels: str, kv_tokens: int = 131_072, kv_bytes: float = 24 * 2 * 128 * 2
) -> Calibration:
    return _published(
        f"{name} on two cores, {kernels}",
        cost,
        source="measured by us (benchmarks/results)",
        model=name,
        machine=f"two cores with {kernels}",
        kv_tokens=kv_tokens,
        kv_bytes_per_token=kv_bytes,
        max_model_len=16_384,
    )


# Two lines: the weights read from memory once a step, or the arithmetic of each token; and 1 ms of all else.
# AVX-512, int8 and bf16: benchmarks/slo.py. AVX2 (Zen 3), int8: one decode in 14 ms, and 1.8 requests/s of 128 + 24
# tokens when saturated (benchmarks/results/simulator.md). 7B shape there, int8: a prompt of 512 in 32.8 s, a decode in
# 264 ms (benchmarks/results/cpu-kernels.md).
QWEN, MISTRAL = "Qwen2.5-0.5B's shape", "Mistral-7B's shape"
CPUS = {
    "0.5b-int8": _two_cores(
        *(f"{QWEN} in int8", CostModel(floor=9e-3, per_token=0.0, knee=8 / 0.42, per_token_beyond=0.42e-3)),
        kernels="AVX-512",
    ),
    "0.5b-bf16": _two_cores(
        *(f"{QWEN} in bf16", CostModel(floor=16.5e-3, per_token=0.0, knee=15.5 / 0.84, per_token_beyond=0.84e-3)),
        kernels="AVX-512",
    ),
    "0.5b-int8-avx2": _two_cores(
        *(f"{QWEN} in int8", CostModel(floor=14e-3, per_token=0.0, knee=13 / 3.4, per_token_beyond=3.4e-3)),
        kernels="AVX2",
    ),
    "7b-int8-avx2": _two_cores(
        *(f"{MISTRAL} in int8", CostModel(floor=0.264, per_token=0.0, knee=264 / 64, per_token_beyond=64e-3)),
        kernels="AVX2",
        kv_tokens=32_768,
        kv_bytes=32 * 2 * 1024 * 2,
    ),
}

MACHINES = {
    "a100-70b": _a100_70b(),
    "a100-70b-vllm-0.2": _vllm_2023(_a100_70b()),
    "opt-13b": _opt_13b(),
    "opt-66b": _opt_66b(),
    "splitwise-a100": _splitwise("A100", SPLITWISE_A100),
    "splitwise-h100": _splitwise("H100", SPLITWISE_H100),
    **CPUS,
}
