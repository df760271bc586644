"""What the C++ kernels are not made to compute: every number that could lead them out of their memory is refused, and
tensors that are not what the C++ functions take for granted are our own bugs.
"""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import backends
import pytest
import torch
from backends import CPU, pack_experts, variants
from torch import Tensor

from splitfuse.errors import ConfigError, KernelError
from splitfuse.kernels.batch import RaggedBatch
from splitfuse.kernels.cpu import library, structs
from splitfuse.kernels.cpu.backend import MAX_HEAD_DIM, PIECE, CpuBackend
from splitfuse.kernels.cpu.layer_structs import MOST_TAPS
from splitfuse.kernels.cpu.library import BROKEN_RULES, VARIANTS, choose_variant, supported_variants
from splitfuse.kernels.drawing import Filter
from splitfuse.kernels.interface import NetworkPlan, Store
from splitfuse.kernels.layers import AttentionSpec, ConvSpec, LayerSpec, MlpSpec, NormSpec, RouterSpec
from splitfuse.kernels.weights import LayerWeights, MlpWeights, NetworkWeights, WeightRole

POSITIONS, BLOCKS, BLOCK_SIZE, VOCABULARY, HIDDEN = 100, 4, 32, 11, 32
GOOD: dict[str, Any] = {  # two requests: 3 tokens of one with 35 positions, 1 of one with 32
    "block_tables": [[2, 0], [3, 0]],
    "ids": [0, 10, 5, 5],
    "positions": [32, 33, 34, 31],
    "slot_mapping": [0, 1, 2, 127],
    "query_start": [0, 3, 4],
    "seq_lens": [35, 32],
    "state_reads": [-1, -1],
    "state_writes": [-1, -1],
    "logit_rows": [2, 3],
}
BROKEN = [  # the rule, and what of GOOD is replaced
    (1, {"positions": [32, -1, 34, 31]}),
    (1, {"positions": [32, 33, 34, POSITIONS]}),
    (1, {"positions": [2**31 - 1, 33, 34, 31]}),
    (2, {"slot_mapping": [0, 1, 2, BLOCKS * BLOCK_SIZE]}),
    (2, {"slot_mapping": [-2, 1, 2, 3]}),
    (3, {"query_start": [1, 3, 4]}),
    (3, {"query_start": [0, 3, 3]}),
    (3, {"query_start": [0, 3, 5]}),
    (3, {"query_start": [0, 5, 4]}),
    (3, {"query_start": [0, -1, 4]}),
    (4, {"seq_lens": [2, 32]}),
    (4, {"seq_lens": [35, 0]}),
    (4, {"seq_lens": [35, -5]}),
    (4, {"seq_lens": [65, 32]}),
    (4, {"seq_lens": [2**31 - 1, 32]}),
    (5, {"block_tables": [[2, 0], [BLOCKS, 0]]}),
    (5, {"block_tables": [[2, -1], [3, 0]]}),
    (6, {"ids": [0, VOCABULARY, 5, 5]}),
    (6, {"ids": [0, 1, 5, -1]}),
    (7, {"logit_rows": [2, 4]}),
    (7, {"logit_rows": [-1, 3]}),
]
CASES = [
    pytest.param(*case.values, number, rule, changes, id=f"{case.id}-rule-{rule}-{number}", marks=case.marks)
    for number, (rule, changes) in enumerate(BROKEN)
    for case in variants()
]


def store_of(backend: CpuBackend, **changes: Any) -> Store:
    shape = {"num_blocks": BLOCKS, "block_size": BLOCK_SIZE, "num_kv_heads": 1, "head_dim": 16} | changes
    return backends.allocate_kv(backend, dtype=torch.bfloat16, device=CPU, **shape)


def network_of(backend: CpuBackend) -> Callable[..., Tensor]:
    """One layer of two heads of 16, as one call of a step's parts."""

    def linear(role: WeightRole, *rows: int, columns: int) -> Any:
        return backend.pack([torch.randn(n, columns) for n in rows], role=role)

    ones = torch.ones(HIDDEN)
    layer = LayerWeights(
        attn_norm=ones,
        qkv=linear(WeightRole.QKV, 32, 16, 16, columns=HIDDEN),
        o=linear(WeightRole.O, HIDDEN, columns=32),
        mlp_norm=ones,
        mlp=MlpWeights(
            gate_up=linear(WeightRole.GATE_UP, 48, 48, columns=HIDDEN), down=linear(WeightRole.DOWN, HIDDEN, columns=48)
        ),
    )
    head = linear(WeightRole.HEAD, VOCABULARY, columns=HIDDEN)
    spec = LayerSpec(
        mixer=AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=16),
        mlp=MlpSpec(intermediate_size=48, activation="silu"),
    )
    fused = backend.compile_network(
        NetworkPlan(
            layers=(spec,),
            weights=NetworkWeights(embed=head, layers=(layer,), norm=ones, head=head),
            ropes=((torch.ones(POSITIONS, 8), torch.zeros(POSITIONS, 8)),),
            norm=NormSpec(eps=1e-5),
        )
    )
    assert fused is not None

    def compute(store: Store, parts: dict[str, Any]) -> Tensor:
        packed = torch.cat([torch.tensor(part, dtype=torch.int32).flatten() for part in parts.values()])
        return fused([store], RaggedBatch(packed, 4, 2, 2, num_rows=len(parts["logit_rows"])))

    return compute


def rope_store(backend: CpuBackend, store: Store, parts: dict[str, Any], **changes: Any) -> Tensor:
    options: dict[str, Any] = {
        "positions": torch.tensor(parts["positions"]),
        "slot_mapping": torch.tensor(parts["slot_mapping"]),
        "cos": torch.ones(POSITIONS, 8),
        "sin": torch.zeros(POSITIONS, 8),
        "store": store,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 16,
    }
    return backends.rope_store(backend, torch.randn(4, 64), **options | changes)


def attend(backend: CpuBackend, store: Store, parts: dict[str, Any], **changes: Any) -> Tensor:
    named = {name: torch.tensor(parts[name]) for name in ("query_start", "seq_lens", "block_tables")}
    options: dict[str, Any] = {"q": torch.randn(4, 2, 16).bfloat16(), "store": store, "num_kv_heads": 1, "scale": 1.0}
    return backends.attend(backend, **options | named | changes)


def conv(backend: CpuBackend, *, conv_size: int = 3, num_states: int = 1, state_write: int = 0) -> Tensor:
    """Convolve the first two tokens of a request, from a state of zeros."""
    spec = ConvSpec(num_channels=8, conv_size=conv_size)
    states = backend.allocate_states(spec, num_slots=num_states, device=CPU)
    numbers = {"query_start": [0, 2], "state_reads": [-1], "state_writes": [state_write]}
    batch: Any = SimpleNamespace(**{name: torch.tensor(each, dtype=torch.int32) for name, each in numbers.items()})
    return backend.conv(torch.ones(2, 24), states, spec, batch, LayerWeights(conv=torch.ones(conv_size, 8)))


@pytest.mark.parametrize("variant", variants())
def test_a_good_step_is_computed(variant: str) -> None:
    backend = CpuBackend(variant=variant, num_threads=1)
    store = store_of(backend)
    assert rope_store(backend, store, GOOD).shape == attend(backend, store, GOOD).shape == (4, 2, 16)
    assert network_of(backend)(store, GOOD).shape == (2, HIDDEN)


def test_every_rule_has_a_case() -> None:
    elsewhere = {8, 9}  # test_recurrent.py, test_lora.py
    assert {rule for rule, _ in BROKEN} | elsewhere == set(BROKEN_RULES)


@pytest.mark.parametrize(("variant", "number", "rule", "changes"), CASES)
def test_a_step_that_leads_out_of_memory_is_refused(
    variant: str, number: int, rule: int, changes: dict[str, Any]
) -> None:
    del number
    backend = CpuBackend(variant=variant, num_threads=1)
    store, broken = store_of(backend), GOOD | changes
    before = store.memory.clone()
    with pytest.raises(IndexError) as refusal:
        network_of(backend)(store, broken)
    assert str(refusal.value) == f"a step that cannot be computed: {BROKEN_RULES[rule]}"
    for operation, rules in ((rope_store, (1, 2)), (attend, (3, 4, 5))):
        if rule in rules:
            with pytest.raises(IndexError) as refusal:
                operation(backend, store, broken)
            assert str(refusal.value) == f"a step that cannot be computed: {BROKEN_RULES[rule]}"
    assert torch.equal(store.memory, before)


@pytest.mark.parametrize("variant", variants())
@pytest.mark.parametrize("state_write", [-1, 0])
def test_a_store_of_no_states_has_no_slot_to_write(variant: str, state_write: int) -> None:
    with pytest.raises(IndexError, match="a state slot that does not exist"):
        conv(CpuBackend(variant=variant, num_threads=1), num_states=0, state_write=state_write)


@pytest.mark.parametrize("variant", variants())
def test_most_taps_of_a_convolution(variant: str) -> None:
    backend = CpuBackend(variant=variant, num_threads=1)
    assert conv(backend, conv_size=MOST_TAPS).float().tolist() == [[1.0] * 8, [2.0] * 8]
    with pytest.raises(AssertionError):
        conv(backend, conv_size=MOST_TAPS + 1)


@pytest.mark.parametrize("variant", variants())
def test_blocks_beyond_the_length_of_a_request_may_be_anything(variant: str) -> None:
    backend = CpuBackend(variant=variant, num_threads=1)
    attend(backend, store_of(backend), GOOD | {"block_tables": [[2, 0], [3, 10**6]]})


@pytest.mark.parametrize("variant", variants())
@pytest.mark.parametrize("ids", [[0, VOCABULARY], [-1], [2**31 - 1]])
def test_ids_outside_the_table_are_refused(variant: str, ids: list[int]) -> None:
    backend = CpuBackend(variant=variant, num_threads=1)
    table = torch.randn(VOCABULARY, HIDDEN).bfloat16()
    for each in (table, backend.pack([table], role=WeightRole.HEAD)):
        with pytest.raises(IndexError, match="a token id is not below 11, the rows of the embedding table"):
            backend.embed(torch.tensor(ids), each)


@pytest.mark.parametrize("variant", variants())
@pytest.mark.parametrize("expert", [-1, 3])
def test_unknown_experts_are_refused(variant: str, expert: int) -> None:
    backend = CpuBackend(variant=variant, num_threads=1)
    packed = pack_experts(backend, torch.randn(3, 32, 16), torch.randn(3, 16, 16))
    x, weights = torch.randn(2, 16).bfloat16(), torch.rand(2, 2)
    with pytest.raises(IndexError, match="an expert id is not below 3, the number of experts"):
        backends.experts(backend, x, torch.tensor([[0, 1], [2, expert]]), weights, packed)


WRONG: dict[str, Callable[[CpuBackend], object]] = {
    "linear-of-fp32": lambda k: k.linear(torch.randn(2, 16), k.pack([torch.randn(4, 16)], role=WeightRole.O)),
    "linear-of-other-width": lambda k: k.linear(
        torch.randn(2, 17).bfloat16(), k.pack([torch.randn(4, 16)], role=WeightRole.O)
    ),
    "linear-of-columns": lambda k: k.linear(
        torch.randn(16, 2).bfloat16().T, k.pack([torch.randn(4, 16)], role=WeightRole.O)
    ),
    "linear-with-fp32-bias": lambda k: k.linear(
        torch.randn(2, 16).bfloat16(), k.pack([torch.randn(4, 16)], role=WeightRole.O), torch.randn(4)
    ),
    "linear-with-short-bias": lambda k: k.linear(
        torch.randn(2, 16).bfloat16(), k.pack([torch.randn(4, 16)], role=WeightRole.O), torch.randn(3).bfloat16()
    ),
    "linear-of-a-gated-weight": lambda k: k.linear(
        torch.randn(2, 16).bfloat16(), k.pack([torch.randn(4, 16)], role=WeightRole.GATE_UP)
    ),
    "gated-of-a-plain-weight": lambda k: k.gated(
        torch.randn(2, 16).bfloat16(), k.pack([torch.randn(4, 16)], role=WeightRole.O), None, "silu"
    ),
    "gated-of-fp32": lambda k: k.gated(
        torch.randn(2, 16), k.pack([torch.randn(4, 16)], role=WeightRole.GATE_UP), None, "silu"
    ),
    "norm-of-bf16": lambda k: k.norm(torch.randn(2, 16).bfloat16(), NormSpec(eps=1e-5), torch.ones(16)),
    "norm-with-bf16-weight": lambda k: k.norm(torch.randn(2, 16), NormSpec(eps=1e-5), torch.ones(16).bfloat16()),
    "norm-with-short-weight": lambda k: k.norm(torch.randn(2, 16), NormSpec(eps=1e-5), torch.ones(15)),
    "embed-of-fp32": lambda k: k.embed(torch.tensor([0]), torch.randn(3, 16)),
    "topk-of-bf16": lambda k: k.topk(torch.randn(2, 16).bfloat16(), 1),
    "draw-of-bf16": lambda k: k.draw(torch.randn(2, 16).bfloat16(), [0], [Filter(1.0)], [[0.5]]),
    "draw-of-columns": lambda k: k.draw(torch.randn(16, 2).T, [0], [Filter(1.0)], [[0.5]]),
    "draw-of-another-row": lambda k: k.draw(torch.randn(2, 16), [2], [Filter(1.0)], [[0.5]]),
    "draw-without-filters": lambda k: k.draw(torch.randn(2, 16), [0, 1], [Filter(1.0)], [[0.5], [0.5]]),
    "choose-of-fp32": lambda k: k.choose(torch.randn(2, 16), k.pack([torch.randn(4, 16)], role=WeightRole.HEAD)),
    "choose-of-other-width": lambda k: k.choose(
        torch.randn(2, 17).bfloat16(), k.pack([torch.randn(4, 16)], role=WeightRole.HEAD)
    ),
    "choose-with-too-few-filters": lambda k: k.choose(
        torch.randn(2, 16).bfloat16(), k.pack([torch.randn(4, 16)], role=WeightRole.HEAD), None, [Filter(1.0)], [0.5]
    ),
    "choose-without-numbers": lambda k: k.choose(
        torch.randn(2, 16).bfloat16(), k.pack([torch.randn(4, 16)], role=WeightRole.HEAD), None, [Filter(1.0)] * 2
    ),
    "choose-with-short-bias": lambda k: k.choose(
        torch.randn(2, 16).bfloat16(), k.pack([torch.randn(4, 16)], role=WeightRole.HEAD), torch.randn(3).bfloat16()
    ),
    "topk-of-columns": lambda k: k.topk(torch.randn(16, 2).T, 1),
    "experts-of-fp32": lambda k: backends.experts(
        k,
        torch.randn(1, 16),
        torch.tensor([[0]]),
        torch.ones(1, 1),
        pack_experts(k, torch.randn(1, 8, 16), torch.randn(1, 16, 4)),
    ),
    "experts-of-other-width": lambda k: backends.experts(
        k,
        torch.randn(1, 17).bfloat16(),
        torch.tensor([[0]]),
        torch.ones(1, 1),
        pack_experts(k, torch.randn(1, 8, 16), torch.randn(1, 16, 4)),
    ),
    "experts-twice": lambda k: backends.experts(
        k,
        torch.randn(1, 16).bfloat16(),
        torch.tensor([[1, 1]]),
        torch.ones(1, 2),
        pack_experts(k, torch.randn(2, 8, 16), torch.randn(2, 16, 4)),
    ),
    "route-of-bf16": lambda k: backends.route(k, torch.randn(1, 4).bfloat16(), 2, True),
    "route-of-other-experts": lambda k: k.route(
        torch.randn(1, 4), RouterSpec(num_experts=5, top_k=2, renormalize=True)
    ),
    "attend-of-fp32": lambda k: attend(k, store_of(k), GOOD, q=torch.randn(4, 2, 16)),
    "attend-of-other-heads": lambda k: attend(k, store_of(k, head_dim=32), GOOD),
    "attend-of-other-kv-heads": lambda k: attend(k, store_of(k, num_kv_heads=3), GOOD),
    "attend-with-too-few-sinks": lambda k: attend(k, store_of(k), GOOD, sinks=torch.zeros(1)),
    "attend-with-other-requests": lambda k: attend(k, store_of(k), GOOD, seq_lens=torch.tensor([35, 32, 1])),
    "attend-with-fewer-tables": lambda k: attend(k, store_of(k), GOOD, block_tables=torch.tensor([[2, 0]])),
    "rope-store-with-fewer-slots": lambda k: rope_store(k, store_of(k), GOOD, slot_mapping=torch.tensor([1, 2])),
    "rope-store-with-fewer-positions": lambda k: rope_store(
        k, store_of(k), GOOD, positions=torch.tensor([1]), slot_mapping=torch.tensor([1])
    ),
    "rope-store-with-other-heads": lambda k: rope_store(k, store_of(k, head_dim=32), GOOD),
    "rope-store-with-other-kv-heads": lambda k: rope_store(k, store_of(k, num_kv_heads=2), GOOD),
    "rope-store-with-wide-tables": lambda k: rope_store(
        k, store_of(k), GOOD, cos=torch.ones(POSITIONS, 9), sin=torch.ones(POSITIONS, 9)
    ),
    "rope-store-with-bf16-tables": lambda k: rope_store(
        k, store_of(k), GOOD, cos=torch.ones(POSITIONS, 8).bfloat16(), sin=torch.ones(POSITIONS, 8).bfloat16()
    ),
    "rope-store-with-unequal-tables": lambda k: rope_store(k, store_of(k), GOOD, sin=torch.ones(POSITIONS - 1, 8)),
    "rope-store-with-a-short-norm": lambda k: rope_store(k, store_of(k), GOOD, q_norm=torch.ones(8).bfloat16()),
    "packing-pieces-of-other-widths": lambda k: k.pack([torch.randn(4, 16), torch.randn(4, 15)], role=WeightRole.QKV),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("variant", variants())
def test_wrong_tensors_fail_an_assertion(variant: str, what: str) -> None:
    with pytest.raises(AssertionError):
        WRONG[what](CpuBackend(variant=variant, num_threads=1))


@pytest.mark.parametrize("variant", variants())
@pytest.mark.parametrize("size", [-32, 0, 1, 16, 31, 33, 48, 100])
def test_block_sizes(variant: str, size: int) -> None:
    backend = CpuBackend(variant=variant)
    for good in (32, 64, 96, 1024):
        backend.check_block_size(good)
    with pytest.raises(ConfigError, match=f"block_size={size} is not a positive multiple of 32"):
        backend.check_block_size(size)
    with pytest.raises(ConfigError, match="multiple of 32"):
        store_of(backend, block_size=size)


@pytest.mark.parametrize("variant", variants())
def test_piece_length_is_the_same_in_cpp(variant: str) -> None:
    """backend.py and csrc/kv_store.h both have its length; a block of fewer tokens has no piece, and no bytes."""
    store_bytes = CpuBackend(variant=variant, num_threads=1).library.store_bytes
    shorter, whole = (store_bytes(ctypes.byref(structs.Store(None, 1, n, 1, 32))) for n in (PIECE - 1, PIECE))
    assert shorter == 0 < whole


@pytest.mark.parametrize("variant", variants())
def test_heads_that_are_too_large(variant: str) -> None:
    backend = CpuBackend(variant=variant)
    store_of(backend, head_dim=MAX_HEAD_DIM)
    with pytest.raises(ConfigError, match=r"head_dim=1025 is too large for the C\+\+ kernels"):
        store_of(backend, head_dim=MAX_HEAD_DIM + 1)


@pytest.mark.parametrize("variant", variants())
def test_out_of_memory(variant: str) -> None:
    with pytest.raises(RuntimeError, match="no memory for"):
        store_of(CpuBackend(variant=variant), num_blocks=10**12)


# --- which library, which variant -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", variants())
def test_describe(variant: str) -> None:
    names = {"avx512_bf16": "AVX-512 (VNNI, bf16)", "avx512": "AVX-512 (VNNI)", "avx2": "AVX2"}
    name = names.get(variant) or ("AMX, emulated" if library.is_emulated(variant) else "AMX")
    assert CpuBackend(variant=variant, num_threads=1).describe() == (
        f"C++ kernels: {name}, 1 thread; weights bf16, KV cache bf16"
    )
    described = CpuBackend(variant=variant, num_threads=3, quantization="int4", kv_int8=True).describe()
    assert described == f"C++ kernels: {name}, 3 threads; weights int4 in groups of 64, KV cache int8"


@pytest.fixture
def other_library(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Makes another file the library, until the test ends."""

    def name(path: Path) -> None:
        monkeypatch.setenv("SPLITFUSE_KERNEL_LIBRARY", str(path))
        library._load.cache_clear()
        monkeypatch.setattr(library, "_load", library._load.__wrapped__)

    return name


def test_no_library(other_library: Callable[[Path], None], tmp_path: Path) -> None:
    other_library(tmp_path / "absent.so")
    for refused in (supported_variants, choose_variant, CpuBackend):
        with pytest.raises(KernelError, match=r"the C\+\+ kernels were not compiled .*: installing needs a C\+\+ comp"):
            refused()


def test_a_file_that_is_not_a_library(other_library: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "broken.so").write_bytes(b"\x7fELF nothing")
    other_library(tmp_path / "broken.so")
    with pytest.raises(KernelError, match=r"the C\+\+ kernels cannot be loaded"):
        CpuBackend()


def test_a_library_of_other_sources(
    other_library: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    edited = shutil.copytree(library.SOURCES, tmp_path / "csrc")
    other_library(library.LIBRARY)
    monkeypatch.setattr(library, "SOURCES", edited)
    assert supported_variants()
    with (edited / "interface.h").open("a") as file:
        file.write("\n")
    refusal = r"were compiled from other sources than those in .*csrc: compile them again with python setup.py"
    with pytest.raises(KernelError, match=refusal):
        CpuBackend()


def test_a_library_that_does_not_say_its_sources(other_library: Callable[[Path], None]) -> None:
    other_library(Path(torch._C.__file__))
    with pytest.raises(KernelError, match="were compiled from other sources"):
        CpuBackend()


def test_a_cpu_without_vector_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "supported_variants", lambda: ())
    with pytest.raises(KernelError, match="this CPU has neither AVX-512"):
        choose_variant()


def test_best_variant_by_default_and_only_supported_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for supported in (VARIANTS[1:], VARIANTS[2:], VARIANTS[3:]):
        monkeypatch.setattr(library, "_load", lambda supported=supported: cpu_of(*supported))
        assert choose_variant() == supported[0]
        assert choose_variant("avx2") == "avx2"
    with pytest.raises(ConfigError, match="this CPU cannot run the avx512 kernels; it can run avx2"):
        choose_variant("avx512")


def cpu_of(*variants: str, prefers: int = 1, amx_state: int = 1, emulates: int = 0) -> SimpleNamespace:
    """Returns a library on a CPU that can run these variants."""
    cpu = SimpleNamespace(
        sf_prefers_avx512_bf16=lambda: prefers, sf_amx_state=lambda: amx_state, sf_emulates_amx=lambda: emulates
    )
    for variant in VARIANTS:
        setattr(cpu, f"sf_supports_{variant}", lambda variant=variant: int(variant in variants))
    return cpu


@pytest.mark.parametrize(
    ("able", "prefers", "expected"),
    [
        (VARIANTS, 1, ("avx512_amx", "avx512_bf16", "avx512", "avx2")),
        (VARIANTS, 0, ("avx512_amx", "avx512", "avx512_bf16", "avx2")),
        (VARIANTS[1:], 1, ("avx512_bf16", "avx512", "avx2")),
        (VARIANTS[1:], 0, ("avx512", "avx512_bf16", "avx2")),
        (("avx512", "avx2"), 0, ("avx512", "avx2")),
        (("avx512", "avx2"), 1, ("avx512", "avx2")),
        (("avx2",), 0, ("avx2",)),
    ],
)
def test_bf16_dot_products_come_first_where_fast(
    monkeypatch: pytest.MonkeyPatch, able: tuple[str, ...], prefers: int, expected: tuple[str, ...]
) -> None:
    monkeypatch.setattr(library, "_load", lambda: cpu_of(*able, prefers=prefers))
    assert supported_variants() == expected
    assert choose_variant() == expected[0]


@pytest.mark.parametrize(("emulates", "chosen"), [(0, "avx512_amx"), (1, "avx512")])
def test_amx_is_the_default_unless_emulated(monkeypatch: pytest.MonkeyPatch, emulates: int, chosen: str) -> None:
    monkeypatch.setattr(library, "_load", lambda: cpu_of(*VARIANTS, prefers=0, amx_state=0, emulates=emulates))
    assert choose_variant() == chosen
    assert choose_variant("avx512_amx") == "avx512_amx"


def test_amx_announced_in_vain_is_logged_and_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "_load", lambda: cpu_of(*VARIANTS[1:], prefers=0, amx_state=4))
    why = "its instructions fail, as in a virtual machine that does not pass them on"
    library._warn_once.cache_clear()
    assert choose_variant() == choose_variant() == "avx512"
    assert caplog.messages == [f"this CPU announces AMX, but {why}: the avx512 kernels run instead"]
    with pytest.raises(ConfigError, match=rf"cannot run the avx512_amx kernels \({why}\); it can run avx512 and"):
        choose_variant("avx512_amx")
