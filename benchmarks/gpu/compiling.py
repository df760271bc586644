"""Compiles the kernels for a GPU, without one: what Triton's compiler refuses, and what a kernel takes of a
multiprocessor, is seen on any machine.

Launches are compiled and not made: tensors lie on the CPU, and what the kernels would have written is left as it was.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from benchmarks.gpu.attention import Step, make_step
from benchmarks.gpu.checkpoints import stored_weights
from benchmarks.gpu.measure import Setting, Table
from splitfuse.kernels.batch import RaggedBatch
from splitfuse.kernels.layers import (
    AttentionSpec,
    ConvSpec,
    DeltaSpec,
    HeadNormSpec,
    LatentSpec,
    MambaSpec,
    MlpSpec,
    NormSpec,
)
from splitfuse.kernels.quantized import QuantizedWeight
from splitfuse.kernels.triton.backend import SMALL_STEP, TritonBackend
from splitfuse.kernels.triton.capabilities import OLDEST_OF_KV
from splitfuse.kernels.weights import LayerWeights, Weight, WeightRole

NORM = NormSpec(eps=1e-6)
SHARED_KIB = {(7, 5): 64, (8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}
"""Shared memory that a program can have, by compute capability (CUDA C++ Programming Guide, technical specifications).
"""
FP8_CACHE = "attention, FP8 cache"
HEADS = (64, 80, 128, 256)
"""Sizes of heads that attention is compiled for."""
NUM_PAIRS = (2, 1024)
"""Numbers of pairs of a token and an expert: of few, and of so many that a tile has many rows."""


class Compiler:
    """Stands for a GPU of a compute capability, of which Triton asks only what it compiles for."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.capability = capability
        self.kernels: dict[int, Any] = {}
        self.seconds = 0.0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 10 * self.capability[0] + self.capability[1], 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device

    @contextmanager
    def instead_of_a_gpu(self) -> Iterator[None]:
        """Let launches be compiled for this GPU, and not be made."""
        run, major, minor = JITFunction.run, *self.capability
        properties = SimpleNamespace(name="none", multi_processor_count=132, major=major, minor=minor)

        def compiled(function: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
            del grid, warmup
            begin = time.perf_counter()
            kernel = run(function, *args, grid=None, warmup=True, **options)
            self.seconds += time.perf_counter() - begin
            self.kernels[id(kernel)] = kernel

        driver: Any = triton.runtime.driver
        active = driver._active
        driver.set_active(self)
        try:
            with (
                patch.object(JITFunction, "run", compiled),
                patch.object(torch.cuda, "get_device_properties", lambda _: properties),
            ):
                yield
        finally:
            driver._active = active


def compile_all(setting: Setting, capability: tuple[int, int]) -> bool:
    """Print what each kernel takes on a GPU of this compute capability; return whether all can be compiled, and have
    the shared memory that they need.
    """
    table = Table("kernel                         ", "programs", "shared KiB", "registers", "spilled bytes", "seconds")
    most, all_right = SHARED_KIB[capability], True
    for name, launch in launches(setting):
        if name == FP8_CACHE and capability < OLDEST_OF_KV["fp8"]:
            continue
        compiler = Compiler(capability)
        try:
            with compiler.instead_of_a_gpu():
                launch(TritonBackend(device="cpu", invariant=name.startswith("equal bits")))
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
            all_right = False
            continue
        shared = max(kernel.metadata.shared for kernel in compiler.kernels.values()) / 1024
        used = [resources(kernel) for kernel in compiler.kernels.values()]
        fits = shared <= most
        all_right &= fits
        table.row(
            *(name, len(used), f"{shared:.1f}" + ("" if fits else f" > {most}")),
            *(max(registers for registers, _ in used), max(stack for _, stack in used), compiler.seconds),
        )
    return all_right


def resources(kernel: Any) -> tuple[int, int]:
    """Return the registers of a thread of a compiled kernel, and the bytes of its stack, where others are spilled."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (re.search(rf"{name}:(\d+)", said) for name in ("REG", "STACK"))
    assert registers is not None and stack is not None, said
    return int(registers[1]), int(stack[1])


def launches(setting: Setting) -> Iterator[tuple[str, Callable[[TritonBackend], object]]]:
    """Return launches of every kernel on the shapes of models, by names."""
    spec = AttentionSpec(num_heads=32, num_kv_heads=8, head_dim=128)
    for head_dim in HEADS:
        yield f"attention {head_dim}", lambda b, d=head_dim: attend(setting, b, replace(spec, head_dim=d))
    features = {"window": 4096, "softcap": 50.0, "sinks": True}
    yield "attention, all features", lambda b: attend(setting, b, replace(spec, **features, alibi=1.0, chunk=8192))
    yield "latent attention", lambda b: attend(setting, b, latent())
    yield "attention, int8 cache", lambda b: attend_scaled(setting, b, spec, "int8")
    yield FP8_CACHE, lambda b: attend_scaled(setting, b, spec, "fp8")
    norms = HeadNormSpec(norm=NORM)
    for name, more in (("heads", {}), ("normed heads", {"qk_norm": norms}), ("heads of values", {"v_norm": NORM})):
        yield name, lambda b, more=more: place(setting, b, replace(spec, **more))
    for width in (4096, 16384):
        x = rows(setting, width)
        yield f"sum and norm of {width}", lambda b, x=x: b.add_norm(x, x, 1.0, NORM, torch.ones(x.shape[1]))
    yield "gated", lambda b: b.gated(rows(setting, 64), rows(setting, 64, 96), None, "silu")
    yield "best token", lambda b: b.topk(torch.empty(3, 128256), 1)
    for pairs in NUM_PAIRS:
        yield f"experts, {pairs} pairs", lambda b, n=pairs: b.experts(*of_experts(setting, n))
    yield "equal bits", lambda b: b.linear(rows(setting, 4096), rows(setting, 4096, 96))
    for quantization in ("int8", "int4"):
        yield f"weights in {quantization}", lambda b, q=quantization: few_bits(setting, b, q)
    for name, weight in stored_weights().items():
        yield f"{name} weights", lambda b, w=weight: stored(setting, b, w)
        for pairs in NUM_PAIRS:
            arguments = partial(of_stored_experts, setting, make=weight, num_pairs=pairs)
            yield f"{name} experts, {pairs} pairs", lambda b, a=arguments: b.experts(*a(b))
    yield "delta net", lambda b: recurrent(setting, b, delta())
    yield "Mamba", lambda b: recurrent(setting, b, mamba())
    yield "convolution", lambda b: recurrent(setting, b, ConvSpec(num_channels=2048, conv_size=3))


def rows(setting: Setting, width: int, count: int = 3) -> torch.Tensor:
    return torch.ones(count, width, dtype=setting.dtype)


def latent() -> AttentionSpec:
    ranks = {"q_rank": None, "kv_rank": 512, "rope_dim": 64, "nope_dim": 128, "v_dim": 128}
    return AttentionSpec(num_heads=128, num_kv_heads=1, head_dim=576, latent=LatentSpec(norm=NORM, **ranks))


def delta() -> DeltaSpec:
    sizes = {"num_key_heads": 16, "num_value_heads": 32, "key_dim": 128, "value_dim": 128}
    return DeltaSpec(**sizes, conv_size=4, norm=NORM)


def mamba() -> MambaSpec:
    sizes = {"num_heads": 128, "num_groups": 8, "state_dim": 128, "head_dim": 64}
    return MambaSpec(**sizes, conv_size=4, norm=NORM, conv_bias=True)


def attend(setting: Setting, backend: TritonBackend, spec: AttentionSpec) -> None:
    """Compute a step of single tokens, whose keys are divided, and one with chunks."""
    for parts in ([(2000, 1)] * 2, [(300, 40), (10, 1)]):
        step = make_step(setting, spec, parts, backend)
        backend.attend(step.q, step.store, spec, step.batch, torch.ones(spec.num_heads) if spec.sinks else None)


def attend_scaled(setting: Setting, backend: TritonBackend, spec: AttentionSpec, kv_dtype: str) -> None:
    """Write to a cache of 8 bits, and attend to it."""
    backend = TritonBackend(device=backend.device, kv_dtype=kv_dtype)
    step = make_step(setting, spec, [(300, 40), (10, 1)], backend)
    written(setting, backend, spec, step)
    backend.attend(step.q, step.store, spec, step.batch)


def place(setting: Setting, backend: TritonBackend, spec: AttentionSpec) -> None:
    written(setting, backend, spec, make_step(setting, spec, [(300, 40), (10, 1)], backend))


def written(setting: Setting, backend: TritonBackend, spec: AttentionSpec, step: Step) -> None:
    """Write keys and values of a step."""
    width = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    table = torch.ones(400, spec.head_dim // 2)
    weights = LayerWeights(q_norm=torch.ones(spec.head_dim), k_norm=torch.ones(spec.head_dim))
    backend.rope_store(
        rows(setting, width, step.batch.num_tokens), step.store, spec, step.batch, (table, table), weights
    )


def of_experts(setting: Setting, num_pairs: int) -> tuple[Any, ...]:
    """Return arguments of `Backend.experts`, of eight of them."""
    w13, w2 = [rows(setting, 64, 96)] * 8, [rows(setting, 48, 64)] * 8
    return *routed(setting, num_pairs), LayerWeights(w13=w13, w2=w2)


def routed(setting: Setting, num_pairs: int) -> tuple[Any, ...]:
    """Return hidden states, their experts and weights of these, and experts' spec."""
    ids = torch.arange(num_pairs).view(-1, 2) % 8
    x = rows(setting, 64, len(ids))
    return x, ids, torch.ones(ids.shape), MlpSpec(intermediate_size=48, activation="silu")


def few_bits(setting: Setting, backend: TritonBackend, quantization: str) -> None:
    packed = TritonBackend(device=backend.device, quantization=quantization).pack(
        [rows(setting, 256, 96)], role=WeightRole.O
    )
    multiply(setting, backend, packed)
    backend.embed(torch.arange(3), packed)


def stored(setting: Setting, backend: TritonBackend, make: Callable[[int, int], QuantizedWeight]) -> None:
    packed = backend.pack_quantized([make(96, 256)], role=WeightRole.O, dtype=setting.dtype)
    multiply(setting, backend, packed)


def multiply(setting: Setting, backend: TritonBackend, weight: Weight) -> None:
    """Multiply by a quantized weight as it is, and by its copy."""
    for count in (3, SMALL_STEP + 1):
        backend.linear(rows(setting, 256, count), weight, torch.ones(96, dtype=setting.dtype))


def of_stored_experts(
    setting: Setting, backend: TritonBackend, make: Callable[[int, int], QuantizedWeight], num_pairs: int
) -> tuple[Any, ...]:
    """Return arguments of `Backend.experts` whose weights are a checkpoint's."""
    w13, w2 = (
        [backend.pack_quantized([make(*shape)], role=role, dtype=setting.dtype) for _ in range(8)]
        for role, shape in ((WeightRole.W13, (96, 64)), (WeightRole.W2, (64, 48)))
    )
    return *routed(setting, num_pairs), LayerWeights(w13=w13, w2=w2)


def recurrent(setting: Setting, backend: TritonBackend, spec: DeltaSpec | MambaSpec | ConvSpec) -> None:
    """Compute a step of two requests, one of which is taken in chunks."""
    attention, count = AttentionSpec(num_heads=1, num_kv_heads=1, head_dim=64), 41
    batch: RaggedBatch = make_step(setting, attention, [(0, count - 1), (3, 1)], backend).batch
    states = torch.zeros(3, 4 * (spec.conv_size - 1) * spec.num_channels)
    conv = {"conv": torch.ones(spec.conv_size, spec.num_channels)}
    if isinstance(spec, ConvSpec):
        backend.conv(rows(setting, 3 * spec.num_channels, count), states, spec, batch, LayerWeights(**conv))
        return
    heads = spec.num_value_heads if isinstance(spec, DeltaSpec) else spec.num_heads
    values = heads * (spec.value_dim if isinstance(spec, DeltaSpec) else spec.head_dim)
    of_heads = {name: torch.ones(heads) for name in ("decay", "decay_bias", "skip")}
    weights = LayerWeights(**conv, **of_heads, out_norm=torch.ones(values), conv_bias=torch.ones(spec.num_channels))
    x = rows(setting, spec.num_channels + values, count)
    if isinstance(spec, DeltaSpec):
        backend.delta(x, rows(setting, 2 * heads, count), states, spec, batch, weights)
    else:
        backend.mamba(x, rows(setting, heads, count), states, spec, batch, weights)
