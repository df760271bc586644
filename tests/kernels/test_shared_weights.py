"""Weights in memory that several processes map: packed once, the same for all."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from backends import variants

from splitfuse.kernels.cpu.backend import CpuBackend
from splitfuse.kernels.cpu.memory import HUGE_PAGE, SharedWeights
from splitfuse.kernels.sharing import WeightSharing
from splitfuse.kernels.weights import WeightRole

SHAPES = [(WeightRole.QKV, (96, 128)), (WeightRole.GATE_UP, (64, 128)), (WeightRole.HEAD, (300, 70))]


@pytest.fixture
def file() -> Iterator[int]:
    fd = os.memfd_create("test")
    yield fd
    os.close(fd)


def pieces(role: WeightRole, shape: tuple[int, int]) -> list[torch.Tensor]:
    torch.manual_seed(len(role.value))
    return [torch.randn(*shape).bfloat16()]


def test_plain_weights_are_shared_too(file: int) -> None:
    table, norm = torch.randn(300, 70), [torch.randn(5), torch.randn(3)]
    own, first, second = (CpuBackend(num_threads=1) for _ in range(3))
    first.share_weights(WeightSharing(file, filled=False), 2**20)
    second.share_weights(WeightSharing(file, filled=True), 2**20)
    for weight in ([table], norm):
        wanted = own.pack(weight, role=WeightRole.PLAIN, dtype=torch.bfloat16)
        found = [backend.pack(weight, role=WeightRole.PLAIN, dtype=torch.bfloat16) for backend in (first, second)]
        assert torch.equal(wanted, torch.cat(weight).bfloat16())
        assert all(torch.equal(one, wanted) for one in found)
        found[0][0] += 1
        assert torch.equal(found[0], found[1])  # one memory


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("variant", variants())
def test_another_process_finds_what_was_packed(variant: str, quantization: str | None, file: int) -> None:
    own, first, second = (CpuBackend(variant=variant, num_threads=1, quantization=quantization) for _ in range(3))
    os.write(file, b"\xff" * 4096)  # left by a process that died while packing
    first.share_weights(WeightSharing(file, filled=False), 2**20)
    packed = [first.pack(pieces(*of), role=of[0]) for of in SHAPES]
    first.finish_loading()
    second.share_weights(WeightSharing(file, filled=True), 2**20)
    for of, ours in zip(SHAPES, packed, strict=True):
        wanted = own.pack(pieces(*of), role=of[0]).memory
        found = second.pack([torch.zeros(of[1]).bfloat16()], role=of[0])  # it does not look at what it is given
        assert torch.equal(ours.memory, wanted)
        assert torch.equal(found.memory, wanted)
        assert found.data == found.memory.data_ptr() != ours.data


def test_taking_more_than_planned_fails(file: int) -> None:
    weights = SharedWeights(WeightSharing(file, filled=False), 3)
    assert weights.take(2 * HUGE_PAGE).data_ptr() % HUGE_PAGE == 0  # room for 3 bytes, and what pages add
    with pytest.raises(AssertionError, match="more weights than were planned"):
        weights.take(1)


def test_filled_weights_are_read_only(file: int) -> None:
    weights = SharedWeights(WeightSharing(file, filled=False), 100)
    weights.take(100).fill_(7)
    code = (
        "from splitfuse.kernels.cpu.memory import SharedWeights\n"
        "from splitfuse.kernels.sharing import WeightSharing\n"
        f"weights = SharedWeights(WeightSharing({file}, filled=True), 100)\n"
        "found = weights.take(100)\n"
        "assert found.sum() == 700\n"
        "print('read', flush=True)\n"
        "found.fill_(1)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], pass_fds=[file], capture_output=True, text=True)
    assert ended.stdout == "read\n"
    assert ended.returncode == -11  # SIGSEGV


def test_more_than_the_machine_has(file: int) -> None:
    with pytest.raises((RuntimeError, OSError)):
        SharedWeights(WeightSharing(file, filled=False), 2**62)
