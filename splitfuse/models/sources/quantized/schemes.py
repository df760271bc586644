"""Says for each scheme in which tensors a quantized linear weight is stored, and reads them by `layouts`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor

from splitfuse.kernels.quantized import FP4_TABLE, Fp8Format, GroupFormat, QuantizedFormat, QuantizedWeight
from splitfuse.models.sources.quantized import layouts

Shape: TypeAlias = tuple[int, ...]

INT32, SCALES = ("I32",), ("F16", "BF16", "F32")
BYTES = ("U8", "I8", "F8_E8M0")
SCALE_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
WHOLE_ROWS = 256
"""Number of columns that the group of a whole row is a multiple of, so that all rows have a size that backends keep."""
MX_GROUP = 32
"""Number of columns that share an exponent in the formats of MX."""


class Header(NamedTuple):
    """Holds what the header of a file says of a tensor; dtypes are called as in safetensors."""

    shape: Shape
    dtype: str

    def size(self, axis: int) -> int:
        """Return the size of an axis; 0 if there is no such: it has not been checked."""
        return self.shape[axis] if axis < len(self.shape) else 0


class Wanted(NamedTuple):
    """Holds the shapes and dtypes that a stored tensor may have."""

    shapes: tuple[Shape, ...]
    dtypes: tuple[str, ...]


def wanted(dtypes: tuple[str, ...], *shapes: Shape) -> Wanted:
    """Return what a tensor of these dtypes may look like."""
    return Wanted(shapes, dtypes)


class Scheme(ABC):
    """Describes how a checkpoint stores linear weights [N, K]: in several tensors each, named after their layer."""

    label: str
    """Name of the scheme, as its files and messages call it."""
    marker: ClassVar[str]
    """Ending of the tensor that only a quantized layer has."""
    suffixes: ClassVar[Mapping[str, str]]
    """Name of a part -> ending of its tensor."""
    optional: ClassVar[frozenset[str]] = frozenset()
    """Parts that a layer may lack."""
    weight: ClassVar[str] = ".weight"
    """Ending of the name that the family of the model knows the weight by."""

    def parts(self) -> Mapping[str, str]:
        """Return the endings of the tensors of a layer by part: those that this scheme has."""
        return self.suffixes

    def multiples(self) -> tuple[int, int]:
        """Return what the rows and columns of a weight must be multiples of: whole words hold them."""
        return 1, 1

    @abstractmethod
    def wanted(self, rows: int, columns: int) -> Mapping[str, Wanted]:
        """Return what the parts of a weight of this shape may look like."""

    @abstractmethod
    def format(self, headers: Mapping[str, Header]) -> QuantizedFormat:
        """Return the format of a weight with parts of these headers, which have not been checked."""

    @abstractmethod
    def read(self, stored: QuantizedFormat, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> QuantizedWeight:
        """Return a weight in the format, of its parts. Raises WeightsError if they contradict the checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Groups(Scheme):
    """Describes a scheme of whole numbers in groups of columns, or of one group (`group_size` None)."""

    label: str
    bits: int
    group_size: int | None
    zeros: bool

    def _format(self, scales: Header, columns: int) -> GroupFormat:
        """Return the format: its groups are not much wider than a row, since scales are repeated for each column."""
        whole = max(1, -(-columns // WHOLE_ROWS)) * WHOLE_ROWS
        return GroupFormat(
            name=self.label,
            bits=self.bits,
            group_size=min(self.group_size or whole, whole),
            zeros=self.zeros,
            scale_dtype=SCALE_DTYPES.get(scales.dtype, torch.float32),
        )

    def _num_groups(self, columns: int) -> int:
        return 1 if self.group_size is None else -(-columns // self.group_size)


@dataclass(frozen=True, kw_only=True)
class Gptq(Groups):
    """Describes GPTQ; `minus_one` and `wraps` are those of `layouts.gptq`."""

    minus_one: bool
    wraps: bool
    marker = ".qweight"
    suffixes: ClassVar[Mapping[str, str]] = {
        "qweight": ".qweight",
        "qzeros": ".qzeros",
        "scales": ".scales",
        "g_idx": ".g_idx",
    }
    optional = frozenset({"g_idx"})

    def multiples(self) -> tuple[int, int]:
        return 32 // self.bits, 32 // self.bits

    def wanted(self, rows: int, columns: int) -> Mapping[str, Wanted]:
        groups = self._num_groups(columns)
        return {
            "qweight": wanted(INT32, (columns * self.bits // 32, rows)),
            "qzeros": wanted(INT32, (groups, rows * self.bits // 32)),
            "scales": wanted(SCALES, (groups, rows)),
            "g_idx": wanted((*INT32, "I64"), (columns,)),
        }

    def format(self, headers: Mapping[str, Header]) -> GroupFormat:
        return self._format(headers["scales"], headers["qweight"].size(0) * 32 // self.bits)

    def read(self, stored: QuantizedFormat, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> QuantizedWeight:
        del shape
        assert isinstance(stored, GroupFormat)
        return layouts.gptq(
            stored,
            parts["qweight"],
            parts["qzeros"],
            parts["scales"],
            parts.get("g_idx"),
            minus_one=self.minus_one,
            wraps=self.wraps,
        )


@dataclass(frozen=True, kw_only=True)
class Awq(Groups):
    """Describes AWQ in its layout "gemm"."""

    marker = ".qweight"
    suffixes: ClassVar[Mapping[str, str]] = {"qweight": ".qweight", "qzeros": ".qzeros", "scales": ".scales"}

    def multiples(self) -> tuple[int, int]:
        return 8, 1

    def wanted(self, rows: int, columns: int) -> Mapping[str, Wanted]:
        groups = self._num_groups(columns)
        return {
            "qweight": wanted(INT32, (columns, rows // 8)),
            "qzeros": wanted(INT32, (groups, rows // 8)),
            "scales": wanted(SCALES, (groups, rows)),
        }

    def format(self, headers: Mapping[str, Header]) -> GroupFormat:
        return self._format(headers["scales"], headers["qweight"].size(0))

    def read(self, stored: QuantizedFormat, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> QuantizedWeight:
        del shape
        assert isinstance(stored, GroupFormat)
        return layouts.awq(stored, parts["qweight"], parts["qzeros"], parts["scales"])


@dataclass(frozen=True, kw_only=True)
class CompressedIntegers(Groups):
    """Describes whole numbers of compressed-tensors; with `one_scale` the scale is that of the whole tensor."""

    one_scale: bool

    def parts(self) -> Mapping[str, str]:
        return {part: suffix for part, suffix in self.suffixes.items() if self.zeros or part != "zeros"}

    def _scales(self, rows: int, columns: int) -> tuple[Shape, ...]:
        return ((1,), (), (1, 1)) if self.one_scale else ((rows, self._num_groups(columns)),)

    def _by_row(self, numbers: Tensor, shape: tuple[int, int]) -> Tensor:
        return numbers.reshape(1, 1).expand(shape[0], 1) if self.one_scale else numbers


@dataclass(frozen=True, kw_only=True)
class PackedIntegers(CompressedIntegers):
    """Describes the format "pack-quantized" of compressed-tensors."""

    marker = ".weight_packed"
    suffixes: ClassVar[Mapping[str, str]] = {
        "packed": ".weight_packed",
        "scales": ".weight_scale",
        "zeros": ".weight_zero_point",
        "g_idx": ".weight_g_idx",
        "shape": ".weight_shape",
    }
    optional = frozenset({"g_idx", "shape"})

    def wanted(self, rows: int, columns: int) -> Mapping[str, Wanted]:
        groups = self._num_groups(columns)
        return {
            "packed": wanted(INT32, (rows, -(-columns * self.bits // 32))),
            "scales": wanted(SCALES, *self._scales(rows, columns)),
            "zeros": wanted(INT32, (-(-rows * self.bits // 32), groups)),
            "g_idx": wanted((*INT32, "I64"), (columns,)),
            "shape": wanted((*INT32, "I64"), (2,)),
        }

    def format(self, headers: Mapping[str, Header]) -> GroupFormat:
        return self._format(headers["scales"], headers["packed"].size(1) * 32 // self.bits)

    def read(self, stored: QuantizedFormat, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> QuantizedWeight:
        assert isinstance(stored, GroupFormat)
        scales, zeros = self._by_row(parts["scales"], shape), parts.get("zeros")
        return layouts.packed_integers(stored, parts["packed"], scales, zeros, parts.get("g_idx"), shape)


@dataclass(frozen=True, kw_only=True)
class PlainIntegers(CompressedIntegers):
    """Describes the format "int-quantized" of compressed-tensors."""

    marker = ".weight_scale"
    suffixes: ClassVar[Mapping[str, str]] = {
        "values": ".weight",
        "scales": ".weight_scale",
        "zeros": ".weight_zero_point",
    }

    def wanted(self, rows: int, columns: int) -> Mapping[str, Wanted]:
        scales = self._scales(rows, columns)
        return {
            "values": wanted(("I8",), (rows, columns)),
            "scales": wanted(SCALES, *scales),
            "zeros": wanted(("I8",), *scales),
        }

    def format(self, headers: Mapping[str, Header]) -> GroupFormat:
        return self._format(headers["scales"], headers["values"].size(1))

    def read(self, stored: QuantizedFormat, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> QuantizedWeight:
        assert isinstance(stored, GroupFormat)
        zeros = self._by_row(parts["zeros"], shape) if self.zeros else None
        return layouts.integers(stored, parts["values"], self._by_row(parts["scales"], shape), zeros)


@dataclass(frozen=True, kw_only=True)
class Fp8(Scheme):
    """Describes FP8, with scales of blocks, or without `block` of rows or of the whole tensor, as they are stored."""

    label: str
    block: tuple[int, int] | None
    marker = ".weight_scale"
    suffixes: ClassVar[Mapping[str, str]] = {"values": ".weight", "scales": ".weight_scale"}

    def wanted(self, rows: int, columns: int) -> Mapping[str, Wanted]:
        shapes: tuple[Shape, ...] = ((), (1,), (1, 1), (rows,), (rows, 1))
        if self.block is not None:
            shapes = ((-(-rows // self.block[0]), -(-columns // self.block[1])),)
        return {
            "values": wanted(("F8_E4M3",), (rows, columns)),
            "scales": wanted((*SCALES, "F8_E8M0"), *shapes),
        }

    def format(self, headers: Mapping[str, Header]) -> Fp8Format:
        del headers
        return Fp8Format(name=self.label)

    def read(self, stored: QuantizedFormat, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> QuantizedWeight:
        del stored
        scales = parts["scales"]
        if self.block is None:
            scales = scales.reshape(-1, 1)
        block = self.block or (shape[0] // len(scales), shape[1])
        return layouts.fp8(parts["values"], scales, block)


@dataclass(frozen=True, kw_only=True)
class InverseFp8(Fp8):
    """Describes FP8 whose scales are called inverse, as in DeepSeek-V3, although they multiply."""

    marker = ".weight_scale_inv"
    suffixes: ClassVar[Mapping[str, str]] = {"values": ".weight", "scales": ".weight_scale_inv"}


@dataclass(frozen=True, kw_only=True)
class Mxfp4(Scheme):
    """Describes MXFP4 as compressed-tensors stores it."""

    label: str
    marker = ".weight_packed"
    suffixes: ClassVar[Mapping[str, str]] = {"blocks": ".weight_packed", "exponents": ".weight_scale"}

    def multiples(self) -> tuple[int, int]:
        return 1, MX_GROUP

    def wanted(self, rows: int, columns: int) -> Mapping[str, Wanted]:
        return {
            "blocks": wanted(("U8",), (rows, columns // 2)),
            "exponents": wanted(BYTES, (rows, columns // MX_GROUP)),
        }

    def format(self, headers: Mapping[str, Header]) -> GroupFormat:
        del headers
        return GroupFormat(
            name=self.label, bits=4, group_size=MX_GROUP, table=FP4_TABLE, scale_dtype=torch.float8_e8m0fnu
        )

    def read(self, stored: QuantizedFormat, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> QuantizedWeight:
        assert isinstance(stored, GroupFormat)
        blocks, exponents = (parts[name].view(torch.uint8).reshape(shape[0], -1) for name in ("blocks", "exponents"))
        return layouts.mxfp4(stored, blocks, exponents)


@dataclass(frozen=True, kw_only=True)
class ExpertsMxfp4(Mxfp4):
    """Describes MXFP4 as gpt-oss stores it: the experts of a layer in one tensor."""

    marker = "_blocks"
    suffixes: ClassVar[Mapping[str, str]] = {"blocks": "_blocks", "exponents": "_scales"}
    weight = "_blocks"

    def wanted(self, rows: int, columns: int) -> Mapping[str, Wanted]:
        return {
            "blocks": wanted(("U8",), (rows, columns // MX_GROUP, MX_GROUP // 2)),
            "exponents": wanted(("U8",), (rows, columns // MX_GROUP)),
        }
