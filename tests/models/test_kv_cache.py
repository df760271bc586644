"""Sizes of the cache, and what happens when they are wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from backends import variants

from splitfuse.errors import ConfigError, MemoryPlanError
from splitfuse.kernels.cpu.backend import CpuBackend
from splitfuse.kernels.interface import Backend
from splitfuse.kernels.layers import ConvSpec
from splitfuse.kernels.reference import ReferenceBackend
from splitfuse.models.families.registry import spec_from_config
from splitfuse.models.kv_cache import KVCache, block_bytes

SIZES = {
    "vocab_size": 10,
    "hidden_size": 24,
    "intermediate_size": 8,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
}
SPEC = spec_from_config({"architectures": ["LlamaForCausalLM"], **SIZES})
DEEPSEEK = spec_from_config({"architectures": ["DeepseekV3ForCausalLM"], **SIZES})


def cache(*, num_blocks: int, block_size: int, backend: Backend | None = None) -> KVCache:
    return KVCache(
        SPEC,
        num_blocks=num_blocks,
        block_size=block_size,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        backend=backend or ReferenceBackend(),
    )


def test_block_bytes_is_what_is_allocated() -> None:
    size = block_bytes(SPEC, block_size=16, dtype=torch.bfloat16, backend=ReferenceBackend())
    assert size == 5 * 2 * 16 * 3 * 4 * 2
    assert sum(store.nbytes for store in cache(num_blocks=7, block_size=16).layers) == 7 * size


def test_layers_may_keep_keys_and_values_of_unequal_sizes() -> None:
    first, *others = SPEC.layers
    wide = replace(first, mixer=replace(first.mixer, num_kv_heads=2, head_dim=8))
    spec, backend = replace(SPEC, layers=(wide, *others)), ReferenceBackend()
    size = block_bytes(spec, block_size=16, dtype=torch.bfloat16, backend=backend)
    assert size == 2 * 16 * (2 * 8 + 4 * 3 * 4) * 2
    options = {"block_size": 16, "dtype": torch.bfloat16, "device": torch.device("cpu"), "backend": backend}
    assert sum(store.nbytes for store in KVCache(spec, num_blocks=7, **options).layers) == 7 * size


@pytest.mark.parametrize("make_backend", [CpuBackend, ReferenceBackend])
def test_a_block_moves_with_the_keys_and_values_of_all_layers(make_backend: Callable[[], Backend]) -> None:
    """Those of windows and of unequal heads too; a layer that reads another's has none of its own."""
    first, second, third, *others = SPEC.layers
    layers = (
        replace(first, mixer=replace(first.mixer, num_kv_heads=2, head_dim=8)),
        replace(second, mixer=replace(second.mixer, window=7)),
        replace(third, mixer=replace(third.mixer, kv_layer=1)),
        *others,
    )
    spec, backend = replace(SPEC, layers=layers), make_backend()
    options = {"block_size": 32, "dtype": torch.bfloat16, "device": torch.device("cpu"), "backend": backend}
    caches = [KVCache(spec, num_blocks=4, **options) for _ in range(2)]
    for cache, byte in zip(caches, (0, 1), strict=True):
        for store in cache.layers:
            backend.fill_kv(store, byte)
    assert caches[0].block_bytes == block_bytes(spec, block_size=32, dtype=torch.bfloat16, backend=backend)
    moved = torch.randint(256, (caches[0].block_bytes,), dtype=torch.uint8)
    caches[1].write_block(2, moved)
    out = torch.zeros_like(moved)
    caches[1].read_block(2, out)
    assert torch.equal(out, moved)
    caches[0].write_block(3, out)
    out.zero_()
    caches[0].read_block(3, out)
    assert torch.equal(out, moved)
    caches[1].read_block(1, out)
    assert out.eq(1).all()


@pytest.mark.parametrize("make_backend", [CpuBackend, ReferenceBackend])
def test_latent_attention_keeps_one_vector_of_a_token(make_backend: Callable[[], Backend]) -> None:
    """512 elements and 64 rotated ones for all heads, in bf16: 1.125 KiB a token and layer."""
    backend = make_backend()
    size = block_bytes(DEEPSEEK, block_size=64, dtype=torch.bfloat16, backend=backend)
    assert size == 5 * 64 * 1152
    options = {"block_size": 64, "dtype": torch.bfloat16, "device": torch.device("cpu"), "backend": backend}
    assert sum(store.nbytes for store in KVCache(DEEPSEEK, num_blocks=3, **options).layers) == 3 * size


def test_latent_attention_refuses_an_int8_cache() -> None:
    with pytest.raises(ConfigError, match="kv_cache_dtype=int8 is not supported with latent attention"):
        block_bytes(DEEPSEEK, block_size=64, dtype=torch.bfloat16, backend=CpuBackend(kv_int8=True))


@pytest.mark.parametrize("kv_int8", [False, True])
@pytest.mark.parametrize("variant", variants())
def test_block_bytes_of_the_cpp_kernels(variant: str, kv_int8: bool) -> None:
    """Heads are filled up to 32 elements; in int8 each token and head has two scales in fp32."""
    backend = CpuBackend(variant=variant, kv_int8=kv_int8)
    size = block_bytes(SPEC, block_size=64, dtype=torch.bfloat16, backend=backend)
    assert size == 5 * 2 * 64 * 3 * (32 + 4 if kv_int8 else 32 * 2)
    stores = cache(num_blocks=7, block_size=64, backend=backend).layers
    assert sum(store.nbytes for store in stores) == 7 * size


def test_out_of_memory() -> None:
    with pytest.raises(MemoryPlanError, match=r"choose a smaller num_blocks$"):
        cache(num_blocks=10**12, block_size=16)


@pytest.mark.parametrize("variant", variants())
def test_out_of_memory_in_cpp(variant: str) -> None:
    with pytest.raises(MemoryPlanError, match="choose a smaller num_blocks"):
        cache(num_blocks=10**12, block_size=32, backend=CpuBackend(variant=variant))


def test_out_of_memory_names_the_states_of_a_hybrid() -> None:
    mixer = ConvSpec(num_channels=2**20, conv_size=3)
    spec = replace(SPEC, layers=(replace(SPEC.layers[0], mixer=mixer), *SPEC.layers[1:]))
    wanted = (
        r"no memory for a KV cache of 1 blocks \(0\.0 GiB\) and 128000000 recurrent states \(1000000\.0 GiB\): "
        "choose a smaller num_blocks or max_num_seqs$"
    )
    with pytest.raises(MemoryPlanError, match=wanted):
        KVCache(
            spec,
            num_blocks=1,
            block_size=16,
            dtype=torch.bfloat16,
            device=torch.device("cpu"),
            backend=ReferenceBackend(),
            num_states=128 * 10**6,
        )


def test_block_size_is_checked_by_the_backend() -> None:
    with pytest.raises(ConfigError, match="block_size"):
        cache(num_blocks=1, block_size=0)
