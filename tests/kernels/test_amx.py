"""The tiles of AMX: emulated instructions against what Intel's manual says they compute, in exact arithmetic, and the
decision whether the processor's own can be used.
"""

from __future__ import annotations

import ctypes
import math
from fractions import Fraction

import pytest
import torch
from backends import variants, why_not
from torch import Tensor

from splitfuse.kernels.cpu import library
from splitfuse.kernels.cpu.backend import CpuBackend
from splitfuse.kernels.weights import WeightRole

LEAST_NORMAL = 2.0**-126
AMX = [case for case in variants() if case.id == "avx512_amx"]


def product(variant: str, qvalues: bool, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """c [16, 16] + a [16, K] b [K, 16] by one instruction. b is laid out as a panel is: neighbours in K in a word."""
    width = 4 if qvalues else 2
    words = b.view(16, width, 16).transpose(1, 2).contiguous()
    function = getattr(library._load(), f"sf_tile_product_{variant}")
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_int32, *[ctypes.c_void_p] * 3], None
    total = c.clone()
    function(None, qvalues, a.contiguous().data_ptr(), words.data_ptr(), total.data_ptr())
    return total


def to_fp32(value: Fraction | float) -> float:
    """The nearest fp32, of two the even one; 0 for a subnormal one."""
    if isinstance(value, float):
        return value
    if value == 0:
        return 0.0
    exponent = max(math.floor(math.log2(abs(value.numerator))) - math.floor(math.log2(value.denominator)), -200)
    while abs(value) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (exponent - 23)
    rounded = float(round(value / unit) * unit)
    if abs(rounded) > torch.finfo(torch.float32).max:
        return math.copysign(math.inf, rounded)
    return 0.0 if abs(rounded) < LEAST_NORMAL else rounded


def normal(value: float) -> float:
    return 0.0 if abs(value) < LEAST_NORMAL else value


def add_product(total: float, x: float, y: float) -> float:
    """total + x y, rounded once."""
    if all(map(math.isfinite, (total, x, y))):
        return to_fp32(Fraction(total) + Fraction(x) * Fraction(y))
    return total + x * y


def manual(a: Tensor, b: Tensor, c: Tensor) -> list[float]:
    """One row of TDPBF16PS: a [32], b [32, 16], c [16]."""
    out = []
    for n in range(16):
        sums = [0.0, 0.0]
        for k in range(32):
            sums[k % 2] = add_product(sums[k % 2], normal(float(a[k])), normal(float(b[k, n])))
        out.append(add_product(normal(float(c[n])), add_product(sums[0], 1.0, sums[1]), 1.0))
    return out


def operands(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    a, b, c = torch.randn(16, 32), torch.randn(32, 16), torch.randn(16, 16)
    if kind == "far apart":  # order and rounding show
        a, b = (t * torch.exp2(torch.randint(-30, 30, t.shape).float()) for t in (a, b))
    elif kind == "subnormal operands":
        a[:, ::3], b[::3] = a[:, ::3] * 2.0**-128, b[::3] * 2.0**120
        a[:, 1::3], b[1::3] = a[:, 1::3] * 2.0**125, b[1::3] * 2.0**-128
        b[:, 5], c[:, 5] = 0.0, 2.0**-127
    elif kind == "subnormal results":
        a, b, c = a * 2.0**-64, b * 2.0**-63, c * 0
    elif kind == "infinite":
        a[0, 3], a[1, 5], b[7, 2], c[3, 4], a[5] = math.inf, math.nan, -math.inf, math.inf, 3e38
    return a.bfloat16(), b.bfloat16(), c


@pytest.mark.parametrize("variant", AMX)
@pytest.mark.parametrize("kind", ["normal", "far apart", "subnormal operands", "subnormal results", "infinite"])
def test_bf16_products_are_those_of_the_manual(variant: str, kind: str) -> None:
    a, b, c = operands(kind)
    ours = product(variant, False, a, b, c)
    for row in range(8):
        wanted = torch.tensor(manual(a[row], b, c[row]))
        assert torch.equal(ours[row].nan_to_num(nan=7e37), wanted.nan_to_num(nan=7e37))
    assert (ours == 0).any() == ("subnormal" in kind)


@pytest.mark.parametrize("variant", AMX)
def test_int8_products_are_those_of_the_manual(variant: str) -> None:
    a = torch.randint(-128, 128, (16, 64), dtype=torch.int8)
    b = torch.randint(0, 256, (64, 16), dtype=torch.uint8)
    a[0], b[:, 0] = -128, 255
    c = torch.randint(-(2**31), 2**31, (16, 16), dtype=torch.int32)
    assert torch.equal(product(variant, True, a, b, c), (a.long() @ b.long() + c).int())  # which wraps


@pytest.mark.parametrize("variant", AMX)
@pytest.mark.parametrize(("quantization", "group"), [("int8", 128), ("int4", 64), ("int4", 128)])
@pytest.mark.parametrize("columns", [33, 130, 1029])
def test_groups_give_the_bits_of_avx512(variant: str, quantization: str, group: int, columns: int) -> None:
    """Sums of whole numbers are exact, and few rows are multiplied without tiles."""
    x, weight = torch.randn(40, columns).bfloat16(), torch.randn(70, columns).bfloat16()
    results = []
    for name in (variant, "avx512"):
        backend = CpuBackend(variant=name, num_threads=2, quantization=quantization, group_size=group)
        results.append(backend.linear(x, backend.pack([weight], role=WeightRole.O)))
    assert torch.equal(*results)


@pytest.mark.skipif(why_not("avx2") is not None, reason="the C++ kernels cannot be used here")
def test_the_probe_ends_whatever_the_machine_does() -> None:
    found = library._load().sf_amx_state()
    assert found in (0, 1, *library.AMX_OBSTACLES)
    assert library._load().sf_amx_state() == found
