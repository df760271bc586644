"""`python -m benchmarks.kernels linear attention latent recurrent step guard neighbours`: kernels and steps against the
limits of the machine.

`linear` also times PyTorch's own products in turns with ours. `guard` fails if the micro-kernels fall behind the dot
products in registers, as they do when the compiler spills their accumulators. `neighbours` times steps next to busy
loops. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.kernels.account import account
from benchmarks.kernels.latent import latent
from benchmarks.kernels.limits import FORMATS, TILES, Limits, seconds
from benchmarks.kernels.neighbours import neighbours
from benchmarks.kernels.recurrent import recurrent
from benchmarks.kernels.steps import check_shape, forward, make_chunks, scattered_steps, step_bytes, step_operations
from benchmarks.models import SHAPES, ModelShape
from splitfuse.config.engine import EngineConfig
from splitfuse.core.slo.cost_model import num_pairs
from splitfuse.errors import SplitfuseError
from splitfuse.kernels.cpu.backend import CpuBackend
from splitfuse.kernels.cpu.layer_structs import Heads
from splitfuse.kernels.cpu.library import VARIANTS
from splitfuse.kernels.layers import AttentionSpec
from splitfuse.kernels.weights import WeightRole
from splitfuse.runtime.loading import load_model

ROWS = (1, 2, 4, 8, 14, 16, 28, 64, 128, 512)
STEP_ROWS = (1, 8, 16, 32, 64, 256)
DECODES = (1, 8, 16, 32)
ATTENTION = (
    *((1, 512, (context, context)) for context in (512, 1024, 2048, 4096)),
    (1, 256, (700, 700)),
    (1, 1, (4096, 4096)),
    (8, 1, (1024, 1024)),
    (32, 1, (1024, 1024)),
    *((requests, 1, lengths) for lengths in ((512, 512), (513, 513), (700, 700), (100, 1500)) for requests in (8, 32)),
)
"""Requests, rows of each, and the shortest and longest context, of attention."""
LEAST_SHARE = {"bf16": 0.8, "int8": 0.75, "int4/128": 0.65}  # of the dot products, before `guard` calls it a spill
LARGEST_CACHE = 2**28  # bytes of weights between two readings of the same

Row = dict[str, Any]


def linear(arguments: argparse.Namespace) -> Iterator[Row]:
    """Time the linear layers of the shape, one after the other, as in a layer of the network."""
    shape: ModelShape = SHAPES[arguments.shape]
    sizes = layer_sizes(shape)
    for name in arguments.formats:
        backend = make_backend(name, arguments.variant, arguments.threads)
        limits = Limits(backend)
        weights = [torch.randn(n, k).mul_(0.02).bfloat16() for n, k in sizes]
        packed_bytes = sum(backend.weight_bytes(w.shape, role=WeightRole.QKV, dtype=w.dtype) for w in weights)
        copies = max(1, -(-LARGEST_CACHE // packed_bytes))
        layers = [[backend.pack([w], role=WeightRole.QKV) for w in weights] for _ in range(copies)]
        for rows in arguments.rows or ROWS:
            inputs = {k: torch.randn(rows, k).bfloat16() for _, k in sizes}
            outputs = {n: torch.empty(rows, n) for n, _ in sizes}

            def run(layers: Any = layers, rows: int = rows, inputs: Any = inputs, outputs: Any = outputs) -> None:
                for layer in layers:
                    for w in layer:
                        x, y = inputs[w.columns].data_ptr(), outputs[w.rows].data_ptr()
                        backend.library.linear(w.address, x, rows, None, None, None, 0, y)

            operations = 2.0 * rows * sum(n * k for n, k in sizes) * copies
            timing = limits.compare(
                run, num_bytes=packed_bytes * copies, operations=operations, int8=name != "bf16", turns=arguments.turns
            )
            row = {
                "format": name,
                "rows": rows,
                "ms of a layer": timing.seconds / copies * 1e3,
                "GB/s": packed_bytes * copies / timing.seconds / 1e9,
                "Gop/s": operations / timing.seconds / 1e9,
                "% of limit": timing.share * 100,
            }
            if name == "bf16" and arguments.torch:
                row |= torch_linears(weights, inputs, lambda run=run, copies=copies: seconds(run) / copies)
            yield row


def torch_linears(weights: list[torch.Tensor], inputs: dict[int, torch.Tensor], ours: Callable[[], float]) -> Row:
    """Return the times of PyTorch's product and oneDNN's with a reordered weight, as multiples of ours, in turns."""
    blocked = [torch.ops.mkldnn._reorder_linear_weight(w) for w in weights]
    plain_ratios, blocked_ratios = [], []
    for _ in range(3):
        own = ours()
        plain_ratios.append(seconds(lambda: [F.linear(inputs[w.shape[1]], w) for w in weights]) / own)
        pairs = [(inputs[w.shape[1]], b) for w, b in zip(weights, blocked, strict=True)]
        call = torch.ops.mkldnn._linear_pointwise
        blocked_ratios.append(seconds(lambda: [call(x, b, None, "none", [], "") for x, b in pairs]) / own)
    return {"F.linear / ours": sorted(plain_ratios)[1], "oneDNN / ours": sorted(blocked_ratios)[1]}


def attention(arguments: argparse.Namespace) -> Iterator[Row]:
    """Time chunks against dot products, single rows against bandwidth, with blocks in random places.

    Contexts that end within a tile of 512 keys, and requests of different lengths, are what servers meet.
    """
    shape: ModelShape = SHAPES[arguments.shape]
    heads, kv_heads, dim = shape.num_heads, shape.num_kv_heads, shape.hidden_size // shape.num_heads
    cases = ATTENTION
    if arguments.contexts:
        given = [(int(ends[0]), int(ends[-1])) for ends in (each.split("-") for each in arguments.contexts)]
        cases = tuple((requests, 1, lengths) for lengths in given for requests in arguments.rows or DECODES)
    for int8 in (False, True):
        backend = CpuBackend(variant=arguments.variant, num_threads=arguments.threads, kv_int8=int8)
        limits = Limits(backend)
        num_blocks = 2 * 4096
        spec = AttentionSpec(num_heads=heads, num_kv_heads=kv_heads, head_dim=dim)
        store = backend.allocate_kv(
            spec, num_blocks=num_blocks, block_size=32, dtype=torch.bfloat16, device=torch.device("cpu")
        )
        store.memory.zero_()
        for requests, rows, lengths in cases:
            contexts = spread(requests, *lengths)
            q = torch.randn(requests * rows, heads, dim).bfloat16()
            out = torch.empty_like(q)
            steps = scattered_steps(rows, contexts, num_blocks)
            settings, many = Heads.of(spec), len(steps)

            def run(steps: Any = steps, q: Any = q, out: Any = out, settings: Any = settings) -> None:
                for step in steps:
                    backend.library.attend(
                        step.address,
                        settings.address,
                        store.address,
                        q.data_ptr(),
                        out.data_ptr(),
                    )

            pairs = sum(num_pairs(context - rows, rows) for context in contexts) * many
            num_bytes = sum(contexts) * kv_heads * dim * (2 if int8 else 4) * many
            # Chunks are judged by arithmetic alone and single rows by bandwidth alone
            timing = limits.compare(
                run,
                num_bytes=num_bytes if rows == 1 else 0,
                operations=4.0 * pairs * heads * dim if rows > 1 else 0,
                int8=False,
                turns=arguments.turns,
            )
            row = {
                "cache": "int8" if int8 else "bf16",
                "requests": requests,
                "rows each": rows,
                "context": " to ".join(map(str, dict.fromkeys(lengths))),
                "us": timing.seconds / many * 1e6,
                "limit": "arithmetic" if rows > 1 else "bandwidth",
                "% of limit": timing.share * 100,
            }
            if not int8 and rows > 1 and arguments.torch:
                row["sdpa / ours"] = sdpa_ratio(q, kv_heads, contexts[0], lambda run=run: seconds(run))
            yield row


def spread(requests: int, shortest: int, longest: int) -> list[int]:
    """Return the contexts of requests, evenly from the shortest to the longest, not sorted."""
    between = [shortest + (longest - shortest) * i // max(1, requests - 1) for i in range(requests)]
    return [between[i * 5 % requests] for i in range(requests)] if requests % 5 else between


def sdpa_ratio(q: torch.Tensor, kv_heads: int, context: int, ours: Callable[[], float]) -> float:
    """Return the time of PyTorch's attention over contiguous keys and values, as a multiple of ours."""
    rows, _, dim = q.shape
    keys, values = torch.randn(2, 1, kv_heads, context, dim).bfloat16()
    mask = torch.ones(rows, context, dtype=torch.bool).tril(context - rows)
    query = q.transpose(0, 1).unsqueeze(0)

    def run() -> None:
        F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)

    run()
    return sorted(seconds(run) / ours() for _ in range(3))[1]


def step(arguments: argparse.Namespace) -> Iterator[Row]:
    """Time a forward step with the output head: decodes, or one prompt."""
    for name in arguments.formats:
        quantization, group = FORMATS[name]
        settings = {
            "model": str(arguments.model) if arguments.model else None,
            "dtype": "bfloat16",
            "num_threads": arguments.threads,
            "kernels": arguments.variant or "auto",
            "quantization": quantization,
            "quantization_group_size": group,
            "num_blocks": 2048,
            "max_num_batched_tokens": 1024,
        }
        model = load_model(EngineConfig.from_settings(settings))
        check_shape(arguments.shape, model.spec)
        executor, backend = model.make_executor(), model.decoder.backend
        assert isinstance(backend, CpuBackend)
        for store in executor.kv_cache.layers:
            store.memory.zero_()
        limits = Limits(backend)
        for rows in arguments.rows or STEP_ROWS:
            generating = rows <= 32
            chunks = make_chunks(rows, generating, arguments.beside)
            kind = "generating" if generating else "a prompt"
            if not generating and arguments.beside:
                kind += f" beside {arguments.beside} generating"
            title = {"format": name, "rows": rows, "kind": kind}
            if arguments.account:
                for part in account(executor, chunks, limits, int8=name != "bf16", turns=arguments.turns):
                    yield title | part
                continue
            timing = limits.compare(
                lambda chunks=chunks: forward(executor, chunks),
                num_bytes=step_bytes(model, chunks),
                operations=step_operations(model.spec, chunks),
                int8=name != "bf16",
                turns=arguments.turns,
            )
            yield title | {
                "ms": timing.seconds * 1e3,
                "read GB/s": timing.bytes_per_second / 1e9,
                "dots Gop/s": timing.operations_per_second / 1e9,
                "% of limit": timing.share * 100,
            }


def guard(arguments: argparse.Namespace) -> Iterator[Row]:
    """Time full tiles on a weight that stays in the cache, on one thread: only the micro-kernel can be slow then."""
    for name, least in LEAST_SHARE.items():
        backend = make_backend(name, arguments.variant, 1)
        rows = 8 * TILES[backend.variant][0]  # whole tiles
        weight = backend.pack([torch.randn(512, 1024).bfloat16()], role=WeightRole.QKV)
        x, y = torch.randn(rows, 1024).bfloat16(), torch.empty(rows, 512)

        def run(weight: Any = weight, x: Any = x, y: Any = y, backend: Any = backend, rows: int = rows) -> None:
            for _ in range(50):
                backend.library.linear(weight.address, x.data_ptr(), rows, None, None, None, 0, y.data_ptr())

        operations = 50 * 2.0 * rows * 512 * 1024
        timing = Limits(backend).compare(run, num_bytes=0, operations=operations, int8=name != "bf16", turns=5)
        yield {"format": name, "% of dots": timing.share * 100, "least": least * 100, "ok": timing.share >= least}


def layer_sizes(shape: ModelShape) -> list[tuple[int, int]]:
    """Return [N, K] of the linear layers of a layer."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    qkv = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    return [(qkv, hidden), (hidden, hidden), (2 * inner, hidden), (hidden, inner)]


def make_backend(name: str, variant: str | None, threads: int) -> CpuBackend:
    quantization, group = FORMATS[name]
    return CpuBackend(variant=variant, num_threads=threads, quantization=quantization, group_size=group)


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "linear": linear,
    "attention": attention,
    "latent": latent,
    "recurrent": recurrent,
    "step": step,
    "guard": guard,
    "neighbours": neighbours,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument(
        "--shape", default="1.1b", choices=[name for name, shape in SHAPES.items() if not shape.num_experts]
    )
    parser.add_argument("--model", type=Path, help="the folder of that shape, for step (see benchmarks.models)")
    parser.add_argument("--formats", nargs="+", default=["bf16", "int8", "int4/128"], choices=FORMATS)
    parser.add_argument("--rows", nargs="+", type=int)
    parser.add_argument(
        "--contexts",
        nargs="+",
        metavar="N or N-M",
        help="of single rows, for attention: one length, or a mix between two",
    )
    parser.add_argument("--variant", choices=VARIANTS, help="of the kernels; by default the best one")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--no-torch", dest="torch", action="store_false", help="ours alone")
    parser.add_argument(
        "--beside", type=int, default=0, choices=range(33), metavar="0..32", help="generating beside a prompt, for step"
    )
    parser.add_argument("--account", action="store_true", help="of each operator of a step, for step")
    parser.add_argument("--out", type=Path, help="append the rows as JSON lines")
    arguments = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(f"{platform.machine()}, {arguments.threads} threads, torch {torch.__version__}, commit {commit}")
    print(CpuBackend(variant=arguments.variant, num_threads=arguments.threads).describe())
    failed = False
    for part in arguments.parts:
        print(f"\n{part}, {arguments.shape}")
        names: list[str] = []
        for row in PARTS[part](arguments):
            if list(row) != names:
                names = list(row)
                print("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
            print(
                "| " + " | ".join(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()) + " |",
                flush=True,
            )
            failed |= row.get("ok") is False
            if arguments.out:
                with arguments.out.open("a") as out:
                    out.write(json.dumps({"part": part, "shape": arguments.shape, "commit": commit, **row}) + "\n")
    sys.exit(failed)


try:
    main()
except SplitfuseError as error:
    sys.exit(f"benchmarks.kernels: {error}")
