"""Writes tiny checkpoints in the published layouts of quantized ones, by packing of their own.

`quantize` turns the linear layers of a model's folder into tensors of a scheme, and returns for each the weight that
they mean, in float64: what is read must be that, rounded once. Levels are random rather than near the weights: every
bit of them counts, and a small scale keeps the network's numbers in bounds.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

LAYERS = re.compile(r"layers\.\d+\.\w+\.(\w+_proj|experts\.\d+\.\w+)\.weight$")
SIBLINGS = re.compile(r"\.(q_proj|k_proj|v_proj|gate_proj|up_proj|w1|w3)\.weight$")
"""Endings of layers that read the same as others: act-order puts their columns in the same order."""
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

Stored = tuple[dict[str, Tensor], NDArray[np.float64]]
"""Tensors of a layer by their endings, and the weight that they mean."""


def words(numbers: NDArray[np.int64], bits: int) -> Tensor:
    """Pack numbers [R, C] into int32 words along C, the first in the lowest bits."""
    per_word = 32 // bits
    padded = np.pad(numbers, ((0, 0), (0, -numbers.shape[1] % per_word))).reshape(len(numbers), -1, per_word)
    packed = sum(padded[:, :, place].astype(np.uint64) << np.uint64(bits * place) for place in range(per_word))
    return torch.from_numpy(np.asarray(packed, dtype=np.uint64).astype(np.uint32).view(np.int32).copy())


def draw(rng: np.random.Generator, rows: int, columns: int, bits: int) -> NDArray[np.int64]:
    """Random levels, from 0 on, among which are all."""
    return np.resize(rng.permutation(np.arange(rows * columns) % 2**bits), (rows, columns)).astype(np.int64)


def scales_of(rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype, size: float) -> Tensor:
    """Random positive scales of about `size`."""
    return torch.from_numpy(np.asarray(rng.uniform(0.5, 1.5, shape) * size)).to(dtype)


def spread(numbers: NDArray[Any], group_size: int, columns: int) -> NDArray[Any]:
    """A number of each group for each of its columns."""
    return np.repeat(numbers, group_size, axis=1)[:, :columns]


def gptq(
    rng: np.random.Generator,
    rows: int,
    columns: int,
    *,
    bits: int = 4,
    group_size: int = 16,
    symmetric: bool = True,
    act_order: bool = False,
    minus_one: bool = True,
    least_zero: int = 1,
    order_seed: int = 0,
) -> Stored:
    """A layer of GPTQ: words along the columns, zero points along the rows."""
    size = columns if group_size == -1 else group_size
    groups = -(-columns // size)
    group_of = np.arange(columns) // size
    if act_order:
        group_of = np.random.default_rng(order_seed).permutation(group_of)
    levels = draw(rng, rows, columns, bits)
    scales = scales_of(rng, (groups, rows), torch.float16, 0.2 / 2**bits)
    zeros = np.full((groups, rows), 2 ** (bits - 1)) if symmetric else rng.integers(least_zero, 2**bits, (groups, rows))
    stored = words(zeros, bits).numpy().view(np.uint32)
    if minus_one:
        stored = stored - np.uint32(sum(1 << place for place in range(0, 32, bits)))
    tensors = {
        ".qweight": words(levels, bits).T.contiguous(),
        ".qzeros": torch.from_numpy(stored.view(np.int32).copy()),
        ".scales": scales,
        ".g_idx": torch.from_numpy(group_of.astype(np.int32)),
    }
    return tensors, scales.double().numpy()[group_of].T * (levels - zeros[group_of].T)


def awq(rng: np.random.Generator, rows: int, columns: int, *, group_size: int = 16) -> Stored:
    """A layer of AWQ: words along the rows, eight of which lie in another order."""
    order, groups = [0, 2, 4, 6, 1, 3, 5, 7], -(-columns // group_size)
    levels, zeros = draw(rng, columns, rows, 4), rng.integers(0, 16, (groups, rows))
    scales = scales_of(rng, (groups, rows), torch.float16, 0.01)

    def interleaved(numbers: NDArray[np.int64]) -> Tensor:
        return words(numbers.reshape(len(numbers), -1, 8)[:, :, order].reshape(numbers.shape), 4)

    tensors = {".qweight": interleaved(levels), ".qzeros": interleaved(zeros), ".scales": scales}
    whole = spread(
        np.stack([scales.double().numpy(), zeros]).transpose(0, 2, 1).reshape(2 * rows, -1), group_size, columns
    )
    return tensors, whole[:rows] * (levels.T - whole[rows:])


def packed(
    rng: np.random.Generator,
    rows: int,
    columns: int,
    *,
    bits: int = 4,
    group_size: int | None = 16,
    symmetric: bool = True,
    one_scale: bool = False,
    act_order: bool = False,
    order_seed: int = 0,
) -> Stored:
    """A layer of "pack-quantized"."""
    size = group_size or columns
    group_of = np.arange(columns) // size
    if act_order:
        group_of = np.random.default_rng(order_seed).permutation(group_of)
    levels = draw(rng, rows, columns, bits)
    shape = (1, 1) if one_scale else (rows, -(-columns // size))
    scales = scales_of(rng, shape, torch.bfloat16, 0.2 / 2**bits)
    middle = 2 ** (bits - 1)
    zeros = np.full(shape, middle) if symmetric else rng.integers(0, 2**bits, shape)
    tensors = {
        ".weight_packed": words(levels, bits),
        ".weight_scale": scales.view(1) if one_scale else scales,
        ".weight_shape": torch.tensor([rows, columns]),
    }
    if not symmetric:
        tensors[".weight_zero_point"] = words(zeros.T, bits).T.contiguous()
    if act_order:
        tensors[".weight_g_idx"] = torch.from_numpy(group_of.astype(np.int32))
    return tensors, scales.double().numpy()[:, group_of] * (levels - zeros[:, group_of])


def integers(
    rng: np.random.Generator, rows: int, columns: int, *, symmetric: bool = True, one_scale: bool = False
) -> Stored:
    """A layer of "int-quantized"."""
    shape = (1, 1) if one_scale else (rows, 1)
    levels, zeros = draw(rng, rows, columns, 8) - 128, rng.integers(-128, 128, shape)
    scales = scales_of(rng, shape, torch.bfloat16, 1e-3)
    tensors = {".weight": torch.from_numpy(levels.astype(np.int8)), ".weight_scale": scales}
    if not symmetric:
        tensors[".weight_zero_point"] = torch.from_numpy(zeros.astype(np.int8))
    return tensors, scales.double().numpy() * (levels - (0 if symmetric else zeros))


def fp8(
    rng: np.random.Generator,
    rows: int,
    columns: int,
    *,
    block: tuple[int, int] | None = (16, 128),
    scale_shape: Callable[[int], tuple[int, ...]] = lambda _: (),
    ending: str = ".weight_scale_inv",
    dtype: torch.dtype = torch.float32,
    static: bool = False,
) -> Stored:
    """A layer in FP8: scales of blocks, or in `scale_shape(rows)`."""
    values = torch.from_numpy(rng.normal(size=(rows, columns)) * 40).to(torch.float8_e4m3fn)
    if block is None:
        scales = scales_of(rng, scale_shape(rows), dtype, 4e-3)
        whole = scales.double().numpy().reshape(-1, 1)
    else:
        scales = scales_of(rng, (-(-rows // block[0]), -(-columns // block[1])), dtype, 4e-3)
        whole = np.repeat(spread(scales.double().numpy(), block[1], columns), block[0], axis=0)[:rows]
    tensors = {".weight": values, ending: scales}
    if static:
        tensors |= {".input_scale": torch.tensor(0.5), ".k_scale": torch.tensor(0.25)}
    return tensors, values.double().numpy() * whole


def mxfp4(rng: np.random.Generator, rows: int, columns: int) -> Stored:
    """A layer in MXFP4: blocks [N, K / 32, 16] and exponents [N, K / 32]."""
    bits = draw(rng, rows, columns, 4)
    exponents = rng.integers(120, 125, (rows, columns // 32))
    pairs = bits.reshape(rows, -1, 16, 2)
    values = np.array([*FP4, *(-number for number in FP4)])[bits]
    tensors = {
        "_blocks": torch.from_numpy((pairs[..., 0] | pairs[..., 1] << 4).astype(np.uint8)),
        "_scales": torch.from_numpy(exponents.astype(np.uint8)),
    }
    return tensors, values * spread(2.0 ** (exponents - 127), 32, columns)


def _act_order(layer: Callable[..., Stored]) -> bool:
    return isinstance(layer, partial) and bool(layer.keywords.get("act_order"))


def quantize(
    source: Path,
    folder: Path,
    layer: Callable[..., Stored],
    config: Mapping[str, Any],
    *,
    which: re.Pattern[str] = LAYERS,
    dtype: str = "float32",
) -> dict[str, Tensor]:
    """Write the model of `source` with its matching layers as `layer` makes them; return all weights in float64, under
    the names that the model knows them by.
    """
    rng = np.random.default_rng(7)
    stored: dict[str, Tensor] = {}
    meaning: dict[str, Tensor] = {}
    for name, tensor in sorted(load_file(source / "model.safetensors").items()):
        if layer is mxfp4 and tensor.dim() == 3:  # of all experts, stored as [experts, columns, rows] if not quantized
            experts, columns, rows = tensor.shape
            tensors, weight = layer(rng, experts * rows, columns)
            stored |= {name + ending: each.unflatten(0, (experts, rows)) for ending, each in tensors.items()}
            meaning[name] = torch.from_numpy(weight).view(experts, rows, columns).transpose(1, 2)
        elif which.search(name) and tensor.dim() == 2:
            more = {"order_seed": zlib.crc32(SIBLINGS.sub("", name).encode())} if _act_order(layer) else {}
            tensors, weight = layer(rng, *tensor.shape, **more)
            stored |= {name.removesuffix(".weight") + ending: each for ending, each in tensors.items()}
            meaning[name] = torch.from_numpy(np.ascontiguousarray(weight))
        else:
            stored[name], meaning[name] = tensor, tensor.double()
    folder.mkdir(exist_ok=True)
    for file in source.iterdir():
        if file.suffix == ".json":
            (folder / file.name).write_bytes(file.read_bytes())
    values = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "quantization_config": config, "dtype": dtype}))
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "model.safetensors")
    return meaning
