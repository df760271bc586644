"""What adapters add to products, however a weight is packed: against the sums written out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from backends import BACKENDS, make_case, variants
from torch import Tensor

from splitfuse.kernels.cpu.backend import CpuBackend
from splitfuse.kernels.lora import LoraUpdate, StepAdapters
from splitfuse.kernels.quantized import GroupFormat, GroupQuantized
from splitfuse.kernels.weights import LayerWeights, MlpWeights, NetworkWeights, Weight, WeightRole

K = 96
OF_ROW = [1, -1, 0, 1, 2, -1, 1]  # the third adapter leaves the weight as it is


def updates(sizes: list[tuple[int, int, int]], columns: int = K) -> list[LoraUpdate]:
    """Updates of (first row, rows, rank), in numbers that bf16 holds."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape).bfloat16().float() / 8

    return [
        LoraUpdate(first_row=first, a=random(rank, columns), b=random(rows, rank), scale=0.5 + rank)
        for first, rows, rank in sizes
    ]


def network(**weights: Weight | MlpWeights) -> NetworkWeights:
    layers = (LayerWeights(), LayerWeights(**weights))
    return NetworkWeights(embed=None, layers=layers, norm=torch.ones(K), head=None)


def delta(x: Tensor, each: list[LoraUpdate], rows: int) -> Tensor:
    """What updates add to a product, in fp64."""
    total = torch.zeros(len(x), rows, dtype=torch.float64)
    for update in each:
        added = x.double() @ update.a.double().T @ update.b.double().T * update.scale
        total[:, update.first_row : update.first_row + len(update.b)] += added
    return total


def in_groups(bits: int, rows: int) -> GroupQuantized:
    """A quantized weight, of levels about zero."""
    levels, zeros = torch.randint(0, 2**bits, (rows, K)), torch.full((rows, K // 32), 2 ** (bits - 1))
    return GroupQuantized(
        format=GroupFormat(name=f"{bits} bits", bits=bits, group_size=32, zeros=True),
        levels=levels.to(torch.uint8),
        scales=torch.rand(rows, K // 32).half() / 2**bits,
        zeros=zeros.to(torch.uint8),
    )


ADAPTERS = [[(0, 33, 4), (33, 5, 9)], [(5, 11, 1), (20, 50, 16)], []]
ROWS = 70


@pytest.mark.parametrize("name", BACKENDS)
@torch.no_grad()
def test_products_with_adapters(name: str) -> None:
    torch.manual_seed(1)
    case = make_case(name)
    weight, x = torch.randn(ROWS, K).to(case.narrow), torch.randn(len(OF_ROW), K).to(case.narrow)
    adapters, packed = [updates(each) for each in ADAPTERS], case.backend.pack([weight], role=WeightRole.O)
    kept = [
        case.backend.pack_adapter([{}, {"o": each} if each else {}], network(o=packed), case.narrow)
        for each in adapters
    ]
    step = StepAdapters(tuple(kept), torch.tensor(OF_ROW, dtype=torch.int32))
    plain, ours = case.backend.linear(x, packed), case.backend.linear(x, packed, None, step.at(1, "o"))
    assert torch.equal(case.backend.linear(x, packed, None, step.at(0, "o")), plain)
    for row, number in enumerate(OF_ROW):
        added = delta(x[row : row + 1], adapters[number] if number >= 0 else [], ROWS)[0]
        wanted = x[row].double() @ weight.double().T + added
        magnitude = x[row].abs().double() @ weight.abs().double().T + 40 * added.abs()
        case.near(ours[row], wanted, magnitude)
        if number in (-1, 2):
            assert torch.equal(ours[row], plain[row])
        alone = replace(step, of_row=step.of_row[row : row + 1])
        if isinstance(case.backend, CpuBackend):
            assert torch.equal(case.backend.linear(x[row : row + 1], packed, None, alone.at(1, "o"))[0], ours[row])


@pytest.mark.parametrize(("variant", "quantization"), [*variants("int8"), *variants("int4")])
@pytest.mark.parametrize("columns", [100, 2100])
@torch.no_grad()
def test_adapters_of_quantized_weights(variant: str, quantization: str, columns: int) -> None:
    torch.manual_seed(3)
    backend = CpuBackend(variant=variant, num_threads=2, quantization=quantization)
    x, weight = torch.randn(len(OF_ROW), columns).bfloat16(), torch.randn(ROWS, columns).bfloat16()
    packed, adapters = backend.pack([weight], role=WeightRole.O), [updates(each, columns) for each in ADAPTERS]
    first, second = adapters[0]
    broken = [first, replace(second, a=torch.full_like(second.a, torch.inf))]
    kept = [
        backend.pack_adapter([{}, {"o": each} if each else {}], network(o=packed), x.dtype)
        for each in (adapters[0], broken, adapters[1], [])
    ]
    plain, step = backend.linear(x, packed), StepAdapters(tuple(kept), torch.tensor([0, -1, 1, 2, 2, 0, 3]).int())
    ours = backend.linear(x, packed, None, step.at(1, "o"))
    assert ours[2, 33:38].isnan().all()
    for row, each in {0: adapters[0], 1: [], 3: adapters[1], 4: adapters[1], 5: adapters[0], 6: []}.items():
        added = delta(x[row : row + 1], each, ROWS)[0]
        # x, a and b are rounded to 8 bits: to about 0.7 % of their size each, independently
        assert (ours[row].double() - plain[row] - added).norm() <= 0.025 * added.norm()
        alone = replace(step, of_row=step.of_row[row : row + 1])
        assert torch.equal(backend.linear(x[row : row + 1], packed, None, alone.at(1, "o"))[0], ours[row])


@pytest.mark.parametrize("variant", variants())
@torch.no_grad()
def test_adapters_of_gated_weights_and_of_weights_in_parts(variant: str) -> None:
    torch.manual_seed(2)
    backend = make_case(variant).backend
    x = torch.randn(len(OF_ROW), K).bfloat16()
    adapters = [updates(each) for each in ADAPTERS]
    of_row = torch.tensor(OF_ROW, dtype=torch.int32)
    gate_up = torch.randn(ROWS, K).bfloat16()
    gated = backend.pack(gate_up.chunk(2), role=WeightRole.GATE_UP)
    parts = backend.pack_quantized([in_groups(4, 33), in_groups(8, 37)], role=WeightRole.O, dtype=torch.bfloat16)
    assert parts.num_parts == 2
    weights = network(o=parts, mlp=MlpWeights(gate_up=gated))
    kept = [backend.pack_adapter([{}, {"o": each, "up": each} if each else {}], weights, x.dtype) for each in adapters]
    step = StepAdapters(tuple(kept), of_row)
    added = torch.cat([delta(x[r : r + 1], adapters[n] if n >= 0 else [], ROWS) for r, n in enumerate(OF_ROW)])
    ours = backend.linear(x, parts, None, step.at(1, "o"))
    assert torch.allclose(ours.double(), backend.linear(x, parts).double() + added, rtol=1e-5, atol=1e-3)
    gate, up = (x.double() @ gate_up.double().T + added).chunk(2, dim=1)
    inner = backend.gated(x, gated, None, "relu", step.at(1, "up")).double()
    assert torch.allclose(inner, gate.relu() * up, rtol=2e-2, atol=2e-2)
