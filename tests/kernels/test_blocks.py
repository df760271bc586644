"""Blocks are copied out of a store and into another one, byte for byte, and no other block is touched."""

from __future__ import annotations

import pytest
import torch
from backends import BACKENDS, CPU, BackendCase, Requests, allocate_kv, attend, emulation_slow, kv_bytes, latent_spec
from backends import make_case as backend_case

from splitfuse.kernels.cpu.backend import CpuBackend
from splitfuse.kernels.interface import Backend, Store
from splitfuse.kernels.layers import LatentSpec

SIZE = 64


def read(backend: Backend, store: Store, block: int, num_bytes: int) -> torch.Tensor:
    out = torch.full((num_bytes,), 7, dtype=torch.uint8)
    backend.read_block(store, block, out)
    return out


@pytest.mark.parametrize("kind", ["heads", "latent", "int8"])
@pytest.mark.parametrize("name", emulation_slow(BACKENDS))
def test_a_block_means_the_same_in_another_store(name: str, kind: str) -> None:
    case = backend_case(name)
    if kind == "int8":
        if not isinstance(case.backend, CpuBackend):
            pytest.skip("keys and values in 8 bits are the C++ kernels' own")
        int8 = CpuBackend(variant=case.backend.variant, num_threads=2, kv_int8=True)
        case = BackendCase(int8, case.narrow, case.wide, case.sums, case.attention)
    latent: LatentSpec | None = latent_spec(48, 16) if kind == "latent" else None
    shape = {"block_size": SIZE, "num_kv_heads": 1 if latent else 2, "head_dim": 48, "latent": latent}
    requests = Requests.random([150], **shape)  # type: ignore[arg-type]
    store, backend = requests.store(case), case.backend
    num_bytes = kv_bytes(backend, dtype=case.narrow, **shape)  # type: ignore[arg-type]
    other = allocate_kv(backend, num_blocks=9, dtype=case.narrow, device=CPU, **shape)  # type: ignore[arg-type]
    backend.fill_kv(other, 1)
    places = torch.tensor([[6, 0, 8]], dtype=torch.int32)
    for source, target in zip(requests.block_tables[0].tolist(), places[0].tolist(), strict=True):
        backend.write_block(other, target, read(backend, store, source, num_bytes))
        assert torch.equal(read(backend, other, target, num_bytes), read(backend, store, source, num_bytes))
    for untouched in {*range(9)} - {*places[0].tolist()}:
        assert read(backend, other, untouched, num_bytes).eq(1).all()
    q = torch.randn(5, 2, 48, dtype=case.narrow)
    step = {"query_start": torch.tensor([0, 5]), "seq_lens": torch.tensor([150])}
    step = {key: value.int() for key, value in step.items()}
    here, there = (
        attend(backend, q, each, block_tables=table, num_kv_heads=1 if latent else 2, latent=latent, **step)
        for each, table in ((store, requests.block_tables), (other, places))
    )
    assert torch.equal(here, there) and here.isfinite().all()
