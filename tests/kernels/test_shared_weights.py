"""Weights in memory that several processes map: packed once, the same for all."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from backends import variants

from splitfuse.kernels.cpu.backend import CpuKernels
from splitfuse.kernels.cpu.memory import HUGE_PAGE, SharedWeights

SHAPES = [("qkv", (96, 128)), ("gate_up", (64, 128)), ("head", (300, 70))]


@pytest.fixture
def file() -> Iterator[int]:
    fd = os.memfd_create("test")
    yield fd
    os.close(fd)


def pieces(role: str, shape: tuple[int, int]) -> list[torch.Tensor]:
    torch.manual_seed(len(role))
    return [torch.randn(*shape).bfloat16()]


def test_what_is_not_packed_is_shared_too(file: int) -> None:
    table, norm = torch.randn(300, 70), [torch.randn(5), torch.randn(3)]
    own, first, second = (CpuKernels(num_threads=1) for _ in range(3))
    first.shared_weights = SharedWeights(file, filled=False)
    second.shared_weights = SharedWeights(file, filled=True)
    for kernels in (first, second):
        assert kernels.shared_weights is not None
        kernels.shared_weights.begin(2**20)
    for weight in ([table], norm):
        wanted = own.pack(weight, role="plain", dtype=torch.bfloat16)
        found = [kernels.pack(weight, role="plain", dtype=torch.bfloat16) for kernels in (first, second)]
        assert torch.equal(wanted, torch.cat(weight).bfloat16())
        assert all(torch.equal(one, wanted) for one in found)
        found[0][0] += 1
        assert torch.equal(found[0], found[1])  # one memory


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("variant", variants())
def test_whoever_maps_them_finds_what_was_packed(variant: str, quantization: str | None, file: int) -> None:
    own, first, second = (CpuKernels(variant=variant, num_threads=1, quantization=quantization) for _ in range(3))
    os.write(file, b"\xff" * 4096)  # left by somebody who died while packing
    first.shared_weights = SharedWeights(file, filled=False)
    first.shared_weights.begin(2**20)
    packed = [first.pack(pieces(*of), role=of[0]) for of in SHAPES]
    first.shared_weights.finish()
    second.shared_weights = SharedWeights(file, filled=True)
    second.shared_weights.begin(2**20)
    for of, ours in zip(SHAPES, packed, strict=True):
        wanted = own.pack(pieces(*of), role=of[0]).memory
        found = second.pack([torch.zeros(of[1]).bfloat16()], role=of[0])  # it does not look at what it is given
        assert torch.equal(ours.memory, wanted)
        assert torch.equal(found.memory, wanted)
        assert found.struct.data == found.memory.data_ptr() != ours.struct.data


def test_no_more_is_taken_than_was_asked_for(file: int) -> None:
    weights = SharedWeights(file, filled=False)
    weights.begin(3)
    assert weights.take(HUGE_PAGE).data_ptr() % HUGE_PAGE == 0
    with pytest.raises(AssertionError, match="more weights than were planned"):
        weights.take(1)


def test_who_finds_them_cannot_change_them(file: int) -> None:
    weights = SharedWeights(file, filled=False)
    weights.begin(100)
    weights.take(100).fill_(7)
    code = (
        "from splitfuse.kernels.cpu.memory import SharedWeights\n"
        f"weights = SharedWeights({file}, filled=True)\n"
        "weights.begin(100)\n"
        "found = weights.take(100)\n"
        "assert found.sum() == 700\n"
        "print('read', flush=True)\n"
        "found.fill_(1)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], pass_fds=[file], capture_output=True, text=True)
    assert ended.stdout == "read\n"
    assert ended.returncode == -11  # SIGSEGV


def test_more_than_there_is(file: int) -> None:
    with pytest.raises((RuntimeError, OSError)):
        SharedWeights(file, filled=False).begin(2**62)
