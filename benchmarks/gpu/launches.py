"""Counts what a step launches, and times what the host does for it, without a GPU.

The network lies on PyTorch's device `meta`, whose operations compute nothing, and launches of kernels are prepared by
Triton, but not made. Times are of what Triton does for the kernels of a step, and of what is done before a CUDA graph
is replayed: the batch, its padding, and the lists of tiles. PyTorch's operations and the driver are not in them.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from benchmarks.gpu.compiling import Compiler
from benchmarks.gpu.engines import BLOCK, chunk, singles
from benchmarks.gpu.measure import Setting, Table
from benchmarks.models import SHAPES, write_without_weights
from splitfuse.core.plan import Chunk
from splitfuse.kernels.batch import RaggedBatch
from splitfuse.kernels.triton.backend import TritonBackend
from splitfuse.models.decoder import Decoder
from splitfuse.models.families.registry import load_spec
from splitfuse.models.kv_cache import KVCache
from splitfuse.models.sources.dummy import DummyWeights
from splitfuse.models.sources.folder import ModelFolder
from splitfuse.models.sources.source import Piece
from splitfuse.models.weights import load_decoder
from splitfuse.runtime.batch import BatchBuilder
from splitfuse.runtime.step_graphs import Bucket, pad

META = torch.device("meta")
CONTEXT = 512
"""Number of positions of each request that generates."""
REPEATS = 10
"""Number of times that the host's work is timed; the least counts."""
NOTHING_LAUNCHED = frozenset(
    [
        *(
            "empty",
            "empty_like",
            "empty_strided",
            "new_empty",
            "new_empty_strided",
            "view",
            "_unsafe_view",
            "t",
            "detach",
        ),
        *("transpose", "permute", "split_with_sizes", "split", "slice", "select", "unsqueeze", "squeeze", "expand"),
        *("alias", "as_strided", "unbind", "flatten", "reshape", "contiguous", "resolve_conj", "resolve_neg"),
    ]
)
"""Names of PyTorch's operations that launch no kernel: they allocate, or look at the same memory in another way."""
COPIES = frozenset(["to", "_to_copy", "copy_"])
"""Names of those that copy from the host, or change nothing here."""


class MetaWeights(DummyWeights):
    """Has every tensor that is asked for, without numbers."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype, torch.device("cpu"))

    @contextmanager
    def read(self, piece: Piece) -> Iterator[Tensor]:
        yield torch.empty(piece.shape, dtype=self._dtype, device=META)


class Counter(TorchDispatchMode):
    """Counts PyTorch's operations on the device that launch a kernel, and copies to it."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name, tensors = func.overloadpacket.__name__, [each for each in args if isinstance(each, Tensor)]
        of_device = isinstance(found, Tensor) and found.device == META
        if of_device and name in COPIES:
            self.copies += any(each.device.type == "cpu" for each in tensors)
        elif of_device and name not in NOTHING_LAUNCHED:
            self.operations += 1
        return found


class Launches(Compiler):
    """Stands for a GPU for which nothing is compiled: counts launches, and the programs that they would need."""

    def __init__(self, capability: tuple[int, int]) -> None:
        super().__init__(capability)
        self.launches = 0
        self.preparing = 0.0
        self.programs = 0

    def seconds_of(self, run: Callable[[], object]) -> float:
        """Return the processor time in which Triton prepares the launches of `run`."""
        before = self.preparing
        run()
        return self.preparing - before

    @contextmanager
    def instead_of_a_gpu(self) -> Iterator[None]:
        """Let launches be counted."""
        run = JITFunction.run

        def counted(function: JITFunction[Any], *args: Any, **options: Any) -> Any:
            self.launches += 1
            begin = time.process_time()
            program = run(function, *args, **options)
            self.preparing += time.process_time() - begin
            return program

        def compiled(function: JITFunction[Any], key: str, _signature: object, device: int, *_: object) -> Any:
            self.programs += 1
            program = SimpleNamespace()
            function.device_caches[device][0][key] = program
            return program

        with (
            patch.object(JITFunction, "_do_compile", compiled),
            patch.object(JITFunction, "run", counted),
            super().instead_of_a_gpu(),
        ):
            yield


def launches(setting: Setting, capability: tuple[int, int]) -> bool:
    """Print for steps of two models what they launch, and how long the host takes; return whether none after the first
    of its kind needs a program that was not compiled.
    """
    names = ("step                  ", "programs", "kernels", "operations", "copies", "prepared ms", "replayed ms")
    table = Table(*names)
    for name in ("7b", "moe"):
        gpu, all_known = Launches(capability), True
        with gpu.instead_of_a_gpu(), torch.inference_mode():
            decoder, cache = load(setting, name)
            for title, is_first, plan in steps():
                known, counter = gpu.programs, Counter()
                run, batch = steps_of(decoder, cache, plan)
                before = gpu.launches
                with counter:
                    run()
                kernels, programs = gpu.launches - before, gpu.programs - known
                all_known &= is_first or not programs
                prepared = min(gpu.seconds_of(run) for _ in range(REPEATS))
                replayed = seconds(partial(replay, batch, BatchBuilder(BLOCK, torch.device("cpu")), plan))
                counts = programs, kernels, counter.operations, counter.copies
                table.row(f"{name}: {title}", *counts, prepared * 1e3, replayed * 1e3)
    return all_known


def steps() -> Iterator[tuple[str, bool, list[Chunk]]]:
    """Yield names of steps, whether they are the first of their kind, and their chunks."""
    yield "1 decode", True, singles(1, CONTEXT)
    for count in (2, 7, 16, 256):
        yield f"{count} decodes", False, singles(count, CONTEXT)
    for number, tokens in enumerate((480, 17, 2048)):
        plan = singles(32, CONTEXT)
        plan.append(chunk("p", sum(len(each.block_table) for each in plan), tokens, 0))
        yield f"32 decodes + {tokens}", not number, plan


def load(setting: Setting, name: str) -> tuple[Decoder, KVCache]:
    """Return a model's decoder and cache, without numbers."""
    with tempfile.TemporaryDirectory() as folder:
        write_without_weights(SHAPES[name], Path(folder))
        spec = load_spec(ModelFolder(Path(folder)))
    backend = TritonBackend(device="cpu")
    given: dict[str, Any] = {"dtype": setting.dtype, "device": META, "backend": backend}
    return load_decoder(MetaWeights(setting.dtype), spec, **given), KVCache(
        spec, num_blocks=8192, block_size=BLOCK, **given
    )


def steps_of(decoder: Decoder, cache: KVCache, plan: list[Chunk]) -> tuple[Callable[[], object], RaggedBatch]:
    """Return what computes a step, and its padded batch with all that its kernels derive."""
    builder = BatchBuilder(BLOCK, META)
    on_host = BatchBuilder(BLOCK, torch.device("cpu")).build(plan)
    padded = pad(on_host, Bucket.of(on_host)).on_device(META)
    decoder.forward(padded, cache)
    return lambda: decoder.forward(builder.build(plan), cache), padded


def replay(captured: RaggedBatch, builder: BatchBuilder, plan: list[Chunk]) -> None:
    """Do what the host does before a graph is replayed."""
    batch = builder.build(plan)
    captured.write(pad(batch, Bucket.of(batch)))


def seconds(run: Callable[[], object]) -> float:
    """Return the least seconds of processor time that the host takes for `run`."""
    times = []
    for _ in range(REPEATS):
        begin = time.process_time()
        run()
        times.append(time.process_time() - begin)
    return min(times)
