"""Need, have and the sizes that follow; and that every value an error names does fit."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import variants
from specs import make_experts, make_spec

from splitfuse.config.engine import CacheConfig, EngineConfig
from splitfuse.core.kv.fetching import INBOX_BYTES, STAGED_BYTES
from splitfuse.errors import ConfigError, MemoryPlanError
from splitfuse.kernels.cpu.backend import CpuBackend
from splitfuse.kernels.interface import StepSizes
from splitfuse.kernels.layers import AttentionSpec, ConvSpec
from splitfuse.kernels.reference import ReferenceBackend
from splitfuse.kernels.sharing import WeightSharing
from splitfuse.kernels.weights import WeightRole
from splitfuse.models.spec import LongRopeScaling, RopeSpec
from splitfuse.runtime import loading
from splitfuse.runtime.backend_choice import choose_backend
from splitfuse.runtime.loading import parse_device
from splitfuse.runtime.machine import GIB, anonymous_bytes, available_memory
from splitfuse.runtime.memory_plan import INDEX_BYTES, MemoryPlan
from splitfuse.runtime.memory_planner import plan_memory, tier_bytes

SIZES: dict[str, Any] = {
    "dtype": "float32",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "max_position": 1000,
}
SPEC = make_spec(**SIZES)
# Embedding, head and norm; then for each layer norms, q, k, v, o, gate, up and down.
WEIGHTS = 4 * (2 * 100 * 64 + 64 + 3 * (2 * 64 + 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96))
NORMS = 4 * (64 + 3 * 2 * 64)  # always in fp32
BLOCK = 4 * 3 * 2 * 32 * 2 * 16  # bytes x layers x keys and values x positions x heads x elements
TOKEN = 4 * (4 * 64 + 4 * 96 + 3 * 4 * 16)
HEAD = 64 * 100 * 20
ACTIVATIONS = 256 * TOKEN + HEAD
FIXED = WEIGHTS + ACTIVATIONS


def plan(available: int, **settings: Any) -> MemoryPlan:
    return plan_memory(SPEC, EngineConfig.from_settings(settings), backend=ReferenceBackend(), available=available)


def test_what_other_ranks_give_to_be_added_up_counts() -> None:
    """Ranks that share memory have what all compute in it; others have their heads and inner elements alone."""
    here: dict[str, Any] = {"tensor_parallel_size": 2, "max_num_batched_tokens": 100, "dtype": "bfloat16"}
    elsewhere = {**here, "rank": ["10.0.0.2:9100"], "rank_key_file": "key"}
    plans = [
        plan_memory(SPEC, EngineConfig.from_settings(settings), backend=CpuBackend(num_threads=1), available=GIB)
        for settings in (here, elsewhere)
    ]
    gathered, added = (each.activations for each in plans)
    assert added - gathered == 100 * (2 * 64 * 8 - 4 * (4 * 96 + 3 * 4 * 16) // 2)


STATE = 2 * 4 * 64 * 1000
RECURRENT = replace(SPEC.layers[0], mixer=ConvSpec(num_channels=64, conv_size=1001))
HYBRID = replace(SPEC, architecture="Lfm2ForCausalLM", layers=(RECURRENT, RECURRENT, SPEC.layers[0]))


def hybrid_plan(available: int, **settings: Any) -> MemoryPlan:
    """A plan for a network whose first layers have a recurrent state."""
    return plan_memory(HYBRID, EngineConfig.from_settings(settings), backend=ReferenceBackend(), available=available)


def refusal(available: int, **settings: Any) -> str:
    with pytest.raises(MemoryPlanError) as error:
        plan(available, **settings)
    assert "need" in str(error.value) and "have" in str(error.value)
    return str(error.value)


def offers(message: str) -> list[dict[str, Any]]:
    """The settings that the last line of a refusal names, each an offer of its own."""
    last = message.splitlines()[-1]
    assert last.endswith("would fit")
    values: Mapping[str, type] = {"dtype": str, "kv_cache_memory_gib": float}
    return [
        {name: values.get(name, int)(value.removesuffix("MiB"))} for name, value in re.findall(r"(\w+)=([\w.]+)", last)
    ]


def test_sizes_are_those_computed_by_hand() -> None:
    found = plan(FIXED + 100 * BLOCK, num_blocks=40)
    assert (found.weights, found.block, found.activations) == (WEIGHTS, BLOCK, ACTIVATIONS)
    assert found.kv_cache == 40 * BLOCK
    assert found.need == FIXED + 40 * BLOCK
    assert (found.max_model_len, found.model_len_lowered) == (1000, False)
    half = plan(FIXED + 100 * BLOCK, num_blocks=40, dtype="bfloat16")
    assert (half.weights, half.block) == ((WEIGHTS + NORMS) // 2, BLOCK // 2)


def test_a_tier_that_is_too_large_is_told_which_would_fit() -> None:
    have = FIXED + 1000 * BLOCK + 2**29
    message = refusal(have, kv_memory_tier="500GiB")
    (offer,) = (each for each in offers(message) if "kv_memory_tier" in each)
    fitting = plan(have, kv_memory_tier=f"{offer['kv_memory_tier']}MiB", max_model_len=32)
    assert have - fitting.need < 2**20 + 32 * BLOCK, "not much less than there is room for"
    with pytest.raises(MemoryPlanError, match="leaving out kv_disk_tier would fit"):
        plan(FIXED + 1000 * BLOCK, kv_disk_tier="/kv:1GiB")
    with pytest.raises(MemoryPlanError, match="leaving out kv_memory_tier and kv_disk_tier would fit"):
        plan(FIXED + 1000 * BLOCK, kv_memory_tier="1GiB", kv_disk_tier="/kv:1GiB")


def test_the_index_of_a_tier_is_planned() -> None:
    without = plan(FIXED + 2**31).tiers
    memory, disk = 2**30, 10 * 2**30
    found = plan(FIXED + 2**33, kv_memory_tier="1GiB", kv_disk_tier="/kv:10GiB").tiers
    assert without == 0
    assert found == memory + INBOX_BYTES + STAGED_BYTES + INDEX_BYTES * ((memory + disk) // BLOCK)


def test_large_tiers_have_room_for_more_blocks_on_their_way() -> None:
    size = 64 * 2**30
    found = plan(FIXED + 2 * size, kv_memory_tier="64GiB").tiers
    assert found == size + size // 16 + size // 32 + INDEX_BYTES * (size // BLOCK)
    half = tier_bytes(CacheConfig(kv_memory_tier="64GiB"), num_sharers=2)
    assert half == size // 2 + size // 32 + size // 64


def test_tiers_are_not_in_the_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitfuse.runtime.memory_planner.available_memory", lambda _: 2**33)
    have = FIXED + 1000 * BLOCK
    with_tier = plan(have, device="cuda", kv_memory_tier="7GiB")
    assert with_tier == plan(have, device="cuda")
    with pytest.raises(MemoryPlanError, match=r"of the machine's memory, and 8\.000 GiB are free"):
        plan(have, device="cuda", kv_memory_tier="8GiB")


def test_experts_and_their_activations_are_planned() -> None:
    experts = make_experts(10, 3, 40)
    spec = make_spec(**SIZES, architecture="Qwen3MoeForCausalLM", experts=experts, dense_layers={1})
    config = EngineConfig.from_settings({"max_num_batched_tokens": 256})
    found = plan_memory(spec, config, backend=ReferenceBackend(), available=2**30)
    assert found.weights == WEIGHTS + 4 * 2 * (10 * 64 + 10 * 3 * 64 * 40 - 3 * 64 * 96)
    assert found.activations == 256 * 4 * (4 * 64 + 3 * 2 * (64 + 40) + 10 + 3 * 4 * 16) + HEAD


def test_open_budget_takes_a_share_of_free_memory() -> None:
    """The largest that is chosen among whose activations are a sixteenth of what the weights leave; 256 at least."""
    for most in (0, 255, 256, 1000, 1024, 1500, 2048, 9000):
        found = plan(max(WEIGHTS + 16 * most * TOKEN, FIXED + 100 * BLOCK))
        expected = max(budget for budget in (256, 384, 512, 768, 1024, 1536, 2048) if budget <= max(most, 256))
        assert found.max_num_batched_tokens == expected
        assert found.activations == expected * TOKEN + HEAD
    assert plan(FIXED + 100 * BLOCK, max_num_batched_tokens=300).max_num_batched_tokens == 300


def test_open_cache_takes_at_most_half_of_free_memory() -> None:
    per_request = -(-1000 // 32)
    assert plan(FIXED + 10_000 * BLOCK).num_blocks == 64 * per_request
    assert plan(FIXED + 10_000 * BLOCK, max_num_seqs=3).num_blocks == 3 * per_request
    assert plan(FIXED + 100 * BLOCK).num_blocks == 50


def test_a_cache_given_in_gib_is_whole_blocks() -> None:
    assert plan(FIXED + 100 * BLOCK, kv_cache_memory_gib=45.9 * BLOCK / GIB).num_blocks == 45


def test_open_length_is_lowered_to_the_cache() -> None:
    found = plan(FIXED + 100 * BLOCK, num_blocks=3)
    assert (found.max_model_len, found.model_len_lowered) == (3 * 32 + 1, True)
    assert "longest request: 97 tokens (the model allows more" in str(found)
    least = plan(FIXED + 100 * BLOCK, num_blocks=1, block_size=1)
    assert least.max_model_len == 2


def test_the_plan_prints_need_and_have() -> None:
    lines = str(plan(FIXED + 100 * BLOCK, num_blocks=40)).splitlines()
    assert lines[0] == ReferenceBackend().describe()
    assert [line.split()[0] for line in lines[1:]] == ["weights", "activations", "KV", "need", "have", "longest"]
    assert lines[3].endswith("40 blocks of 32: 1280 tokens")


def test_the_plan_says_that_all_requests_are_rotated_as_long_ones() -> None:
    scaling = LongRopeScaling(
        short_factors=(1.0,) * 8, long_factors=(2.0,) * 8, attention_factor=1.0, original_max_position=600
    )
    spec = replace(SPEC, ropes=(RopeSpec(theta=1e4, rotary_dim=16, scaling=scaling),))
    for settings, is_long in (({}, True), ({"max_model_len": 601}, True), ({"max_model_len": 600}, False)):
        found = plan_memory(spec, EngineConfig.from_settings(settings), backend=ReferenceBackend(), available=GIB)
        assert ("rope: as in texts of more than 600 tokens, for all requests" in str(found)) == is_long


def test_states_of_a_hybrid_are_planned_with_their_snapshots() -> None:
    found = hybrid_plan(GIB)
    assert found.state == STATE
    assert (found.num_states, found.max_num_seqs, found.num_seqs_lowered) == (4 * 64, 64, False)
    assert found.need == found.weights + found.activations + 256 * STATE + found.kv_cache
    assert found.state == 62.5 * found.block and found.snapshot_interval == 64 * 32, "whole budgets of 8 blocks"
    assert hybrid_plan(GIB, max_num_batched_tokens=33).snapshot_interval == 31 * 64
    assert hybrid_plan(GIB, max_num_batched_tokens=9000).snapshot_interval == 9024, "no more than one in a step"
    lines = str(found).splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["weights", "activations", "states", "KV"]
    assert lines[3].endswith("256 recurrent states, snapshots included, for 64 running requests")
    assert hybrid_plan(GIB, enable_prefix_caching=False).num_states == 2 * 64


def test_fewer_requests_run_if_their_states_do_not_fit() -> None:
    plan = hybrid_plan(GIB, max_num_batched_tokens=256)
    fixed = plan.weights + plan.activations
    found = hybrid_plan(fixed + 4 * 21 * STATE, max_num_batched_tokens=256)
    assert (found.num_states, found.max_num_seqs, found.num_seqs_lowered) == (21, 10, True)
    assert str(found).splitlines()[-1] == "running requests: 10 at most, as there is no memory for more states"
    assert found.need <= found.available
    least = hybrid_plan(fixed + 2 * STATE + found.block, max_num_batched_tokens=256)
    assert (least.num_states, least.max_num_seqs, least.num_blocks) == (2, 1, 1)
    with pytest.raises(MemoryPlanError, match="the model does not fit into memory"):
        hybrid_plan(fixed + 2 * STATE)


def test_anonymous_memory_is_what_the_system_says(tmp_path: Path) -> None:
    measured = anonymous_bytes()
    assert measured is None or 2**20 < measured < 2**40
    (tmp_path / "proc/self").mkdir(parents=True)
    assert anonymous_bytes(tmp_path) is None
    for content, found in (("Name:\tpython\nRssAnon:\t    12 kB\n", 12 * 1024), ("Name:\tpython\n", None)):
        (tmp_path / "proc/self/status").write_text(content)
        assert anonymous_bytes(tmp_path) == found


def test_length_beyond_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_model_len is 1001, but the model has 1000 positions: use at most that"):
        plan(FIXED + 100 * BLOCK, max_model_len=1001)


@pytest.mark.parametrize(
    ("available", "settings", "names"),
    [
        pytest.param(FIXED, {}, {"max_num_batched_tokens", "dtype"}, id="no-room-for-a-block"),
        pytest.param(FIXED - 100_000, {}, {"max_num_batched_tokens", "dtype"}, id="weights-too-large"),
        pytest.param(WEIGHTS, {"max_num_batched_tokens": 1}, {"dtype"}, id="only-halving-the-weights-helps"),
        pytest.param(
            FIXED, {"dtype": "bfloat16", "max_num_batched_tokens": 10**6}, {"max_num_batched_tokens"}, id="huge-budget"
        ),
        pytest.param(FIXED + 50 * BLOCK, {"num_blocks": 51}, {"num_blocks", "kv_cache_memory_gib"}, id="cache"),
        pytest.param(
            FIXED + 50 * BLOCK, {"kv_cache_memory_gib": 1.0}, {"num_blocks", "kv_cache_memory_gib"}, id="cache-in-gib"
        ),
        pytest.param(
            FIXED + 50 * BLOCK,
            {"max_model_len": 1000},
            {"max_model_len", "num_blocks", "kv_cache_memory_gib"},
            id="half-of-what-is-free-holds-no-such-request",
        ),
        pytest.param(
            FIXED + 20 * BLOCK, {"max_model_len": 1000}, {"max_model_len"}, id="all-that-is-free-holds-no-such-request"
        ),
        pytest.param(
            FIXED + 50 * BLOCK,
            {"max_model_len": 900, "num_blocks": 7},
            {"max_model_len", "num_blocks", "kv_cache_memory_gib"},
            id="few-blocks",
        ),
        pytest.param(
            FIXED + 50 * BLOCK, {"kv_cache_memory_gib": 1e-9}, {"num_blocks", "kv_cache_memory_gib"}, id="no-block"
        ),
    ],
)
def test_every_value_that_a_refusal_names_fits(available: int, settings: dict[str, Any], names: set[str]) -> None:
    named = offers(refusal(available, **settings))
    assert {name for offer in named for name in offer} == names
    for offer in named:
        size = {"num_blocks", "kv_cache_memory_gib"}
        kept = {k: v for k, v in settings.items() if not (k in size and size & offer.keys())}
        found = plan(available, **{**kept, **offer})
        assert 0 < found.need <= available
        assert found.num_blocks * found.block_size + 1 >= found.max_model_len >= 2


def plan_in_cpp(available: int, **settings: Any) -> MemoryPlan:
    """With C++ kernels, and so small a budget that a smaller one would not help."""
    config = EngineConfig.from_settings({"dtype": "bfloat16", "max_num_batched_tokens": 1, **settings})
    return plan_memory(SPEC, config, backend=choose_backend(config, torch.bfloat16), available=available)


@pytest.mark.parametrize("variant", variants()[-1:])
@pytest.mark.parametrize(
    ("settings", "room_for", "spare", "offer"),
    [
        pytest.param({}, {"quantization": "int8"}, 0, "int8", id="the-one-that-loses-less"),
        pytest.param({}, {"quantization": "int8"}, -1, "int4", id="if-it-is-enough"),
        pytest.param({}, {"quantization": "int4"}, 0, "int4", id="the-smaller-one"),
        pytest.param({}, {"quantization": "int4"}, -1, None, id="none-is-enough"),
        pytest.param({"quantization": "int8"}, {"quantization": "int4"}, 0, "int4", id="from-int8"),
        pytest.param(
            {"quantization": "int8", "quantization_group_size": 128},
            {"quantization": "int4", "quantization_group_size": 128},
            0,
            "int4",
            id="in-the-same-groups",
        ),
        pytest.param({"quantization": "int4"}, {"quantization": "int4"}, -1, None, id="none-is-left"),
    ],
)
def test_quantization_is_offered_if_it_alone_fits(
    variant: str, settings: dict[str, Any], room_for: dict[str, Any], spare: int, offer: str | None
) -> None:
    least = plan_in_cpp(GIB, kernels=variant, num_blocks=1, **room_for).need + spare
    with pytest.raises(MemoryPlanError) as error:
        plan_in_cpp(least, kernels=variant, **settings)
    last = str(error.value).splitlines()[-1]
    if offer is None:
        assert last.startswith("no setting makes it fit")
        return
    assert last == f"quantization={offer} would fit"
    assert plan_in_cpp(least, kernels=variant, **{**settings, "quantization": offer}).need <= least


def test_the_largest_copy_of_a_weight_is_part_of_a_step() -> None:
    class Copying(ReferenceBackend):
        quantization = "int8"

        def copy_bytes(self, shape: Sequence[int], *, role: WeightRole, dtype: torch.dtype) -> int:
            return dtype.itemsize * math.prod(shape) if role is WeightRole.GATE_UP else 0

    found = plan_memory(SPEC, EngineConfig(), backend=Copying(), available=FIXED + GIB)
    assert found.activations == plan(FIXED + GIB).activations + 4 * 192 * 64


def test_cuda_graphs_keep_the_activations_of_their_steps() -> None:
    without, found = (plan(4 * GIB, num_blocks=4, cuda_graphs=each).activations for each in (False, True))
    assert found == 2 * without + GIB
    assert refusal(FIXED + BLOCK, cuda_graphs=True).endswith("\nleaving out cuda_graphs would fit")
    assert plan(FIXED + BLOCK).num_blocks == 1
    assert "leaving out" not in refusal(FIXED + BLOCK - 1, cuda_graphs=True)


def test_attention_of_cuda_graphs_is_padded() -> None:
    class Attending(ReferenceBackend):
        def attention_bytes(self, spec: AttentionSpec, sizes: StepSizes, dtype: torch.dtype) -> int:
            del spec, dtype
            asked.append(sizes)
            return GIB if sizes.is_padded else GIB // 4

    asked: list[StepSizes] = []
    settings = {"max_num_batched_tokens": 500, "max_num_seqs": 33, "max_model_len": 1000, "num_blocks": 32}

    def planned(available: int, *, cuda_graphs: bool) -> MemoryPlan:
        config = EngineConfig.from_settings({**settings, "cuda_graphs": cuda_graphs})
        return plan_memory(SPEC, config, backend=Attending(), available=available)

    without, found = (planned(8 * GIB, cuda_graphs=each) for each in (False, True))
    assert found.activations == 2 * (without.activations + 3 * GIB // 4) + GIB
    sizes, padded = ((each.num_tokens, each.num_requests, each.longest) for each in asked)
    assert (sizes, padded) == ((500, 33, 1000), (512, 40, 1024))
    with pytest.raises(MemoryPlanError, match=r"\nleaving out cuda_graphs would fit"):
        planned(without.need, cuda_graphs=True)


def test_refusal_says_when_nothing_fits() -> None:
    assert "no setting makes it fit: choose a smaller model" in refusal(WEIGHTS // 2)


# What there is ------------------------------------------------------------------------------------------------------


def machine(root: Path, *, cgroup: str, groups: Mapping[str, tuple[str, int, str]]) -> int:
    """What is available on a machine with 8 GiB left, our control group, and (limit, used, statistics) of some groups
    by folder.
    """
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:    {8 * 2**20} kB\nHugePages_Total:       0\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    for folder, (limit, used, stat) in groups.items():
        version_1 = folder.startswith("memory")
        names = ("limit_in_bytes", "usage_in_bytes") if version_1 else ("max", "current")
        group = root / "sys/fs/cgroup" / folder
        group.mkdir(parents=True, exist_ok=True)
        (group / f"memory.{names[0]}").write_text(f"{limit}\n")
        (group / f"memory.{names[1]}").write_text(f"{used}\n")
        (group / "memory.stat").write_text(stat)
    return available_memory("cpu", root=root)


def test_without_control_groups_the_machine_counts(tmp_path: Path) -> None:
    assert machine(tmp_path, cgroup="", groups={}) == 8 * GIB
    (tmp_path / "proc/self/cgroup").unlink()
    assert available_memory("cpu", root=tmp_path) == 8 * GIB


@pytest.mark.parametrize(
    ("cgroup", "groups", "have"),
    [
        pytest.param("0::/\n", {"": ("max", 5, "inactive_file 0\n")}, 8 * GIB, id="v2-unlimited"),
        pytest.param("0::/\n", {"": (str(3 * GIB), GIB, "inactive_file 0\n")}, 2 * GIB, id="v2-in-a-container"),
        pytest.param("0::/\n", {"": (str(3 * GIB), 2 * GIB, f"inactive_file {GIB}\n")}, 2 * GIB, id="v2-cached-files"),
        pytest.param("0::/\n", {"": (str(GIB), 2 * GIB, "inactive_file 0\n")}, 0, id="v2-over-its-limit"),
        pytest.param(
            "0::/user/me\n",
            {"user/me": ("max", GIB, "inactive_file 0\n"), "user": (str(4 * GIB), GIB, "inactive_file 0\n")},
            3 * GIB,
            id="v2-a-parent-limits",
        ),
        pytest.param(
            "5:cpu:/x\n4:memory:/jobs/7\n0::/\n",
            {"memory/jobs/7": (str(2 * GIB), GIB, "inactive_file 9\ntotal_inactive_file 4096\n")},
            GIB + 4096,
            id="v1",
        ),
        pytest.param("4:memory:/seen/from/outside\n", {"memory": (str(2 * GIB), GIB, "")}, GIB, id="v1-in-a-container"),
        pytest.param("4:memory:/\n", {"memory": (str(2**63 - 4096), GIB, "")}, 8 * GIB, id="v1-unlimited"),
    ],
)
def test_the_tightest_control_group_counts(
    tmp_path: Path, cgroup: str, groups: Mapping[str, tuple[str, int, str]], have: int
) -> None:
    assert machine(tmp_path, cgroup=cgroup, groups=groups) == have


def test_memory_without_linux(tmp_path: Path) -> None:
    assert available_memory("cpu", root=tmp_path) > 2**20


def test_available_memory_is_measured_by_default() -> None:
    config = EngineConfig.from_settings({"num_blocks": 1})
    assert plan_memory(SPEC, config, backend=ReferenceBackend()).available > 2**20


def test_bf16_checkpoint_and_tied_embeddings_are_counted() -> None:
    spec = replace(SPEC, dtype="bfloat16", tied_embeddings=True)
    found = plan_memory(spec, EngineConfig(), backend=ReferenceBackend(), available=GIB)
    assert found.weights == (WEIGHTS + NORMS) // 2 - 2 * 100 * 64


@pytest.mark.parametrize("device", ["nonsense", "", "cuda:99", "meta"])
def test_a_device_that_cannot_be_used_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match=f"device '{device}' cannot be used: "):
        parse_device(device)


@pytest.mark.parametrize("kernels", [*variants()[-1:], "reference"])
def test_memory_left_by_shared_weights_is_divided(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "available_memory", lambda _: GIB)
    config = EngineConfig.from_settings({"kernels": kernels, "num_blocks": 100})
    fd = os.memfd_create("test")
    first = loading.load_model(config, weight_sharing=WeightSharing(fd, filled=False, num_sharers=3)).plan
    second = loading.load_model(config, weight_sharing=WeightSharing(fd, filled=True, num_sharers=3)).plan
    later = WeightSharing(fd, filled=True, num_sharers=3, share=first.available)
    monkeypatch.setattr(loading, "available_memory", lambda _: GIB // 2)  # others have taken their shares
    assert loading.load_model(config, weight_sharing=later).plan.available == first.available
    monkeypatch.setattr(loading, "available_memory", lambda _: GIB // 4)
    scarce = loading.load_model(config, weight_sharing=later).plan
    os.close(fd)
    assert scarce.available == GIB // 4 + (0 if kernels == "reference" else first.weights)
    if kernels == "reference":  # each has its own
        assert first.available == second.available == GIB // 3
    else:
        assert first.available == first.weights + (GIB - first.weights) // 3
        assert second.available == second.weights + GIB // 3  # the weights are there already
