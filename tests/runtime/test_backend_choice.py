"""Which kernels the settings and the machine give, and what is said where they contradict each other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from backends import BACKENDS, runnable, variants

import splitfuse
from splitfuse.config.engine import DTYPES, KERNELS, QUANTIZATIONS, EngineConfig
from splitfuse.errors import ConfigError, KernelError
from splitfuse.kernels.cpu import library
from splitfuse.kernels.cpu.backend import CpuBackend
from splitfuse.kernels.interface import Backend, Capabilities
from splitfuse.kernels.onednn import OneDnnBackend
from splitfuse.kernels.reference import ReferenceBackend
from splitfuse.kernels.triton import capabilities as triton
from splitfuse.models.weights import DTYPES as DTYPES_OF_WEIGHTS
from splitfuse.runtime import backend_choice
from splitfuse.runtime.backend_choice import BACKENDS as BACKENDS_BY_NAME
from splitfuse.runtime.backend_choice import choose_backend
from splitfuse.runtime.machine import usable_cores

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ONLY_CPP: list[dict[str, Any]] = [
    {"quantization": "int8"},
    {"quantization": "int4"},
    {"kv_cache_dtype": "int8"},
    {"num_threads": 2},
    {"batch_invariant": True},
]
IN_TRITON = ("kv_cache_dtype", "quantization", "batch_invariant")
"""Settings among those that the Triton kernels honour too."""
NOT_COMPILED = "the C++ kernels were not compiled"


def choose(dtype: torch.dtype = BF16, **settings: Any) -> Backend:
    return choose_backend(EngineConfig.from_settings(settings), dtype)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which there was no compiler."""
    monkeypatch.setenv("SPLITFUSE_KERNEL_LIBRARY", "absent.so")
    monkeypatch.setattr(library, "_load", library._load.__wrapped__)


@pytest.mark.parametrize("variant", variants())
def test_named_kernels_get_every_setting(variant: str) -> None:
    plain = choose(kernels=variant)
    assert isinstance(plain, CpuBackend)
    assert (plain.variant, plain.quantization, plain.group_size, plain.kv_int8) == (variant, None, None, False)
    full = choose(
        kernels=variant, quantization="int4", quantization_group_size=128, kv_cache_dtype="int8", num_threads=3
    )
    assert isinstance(full, CpuBackend)
    assert (full.num_threads, full.quantization, full.group_size, full.kv_int8) == (3, "int4", 128, True)


@pytest.mark.parametrize("variant", variants()[-1:])
def test_best_supported_variant_is_the_default(variant: str) -> None:
    del variant  # the least of them: if it runs, there is one to choose
    chosen = choose()
    assert isinstance(chosen, CpuBackend)
    supported = library.supported_variants()
    assert chosen.variant == next(name for name in supported if not library.is_emulated(name))
    assert chosen.num_threads == usable_cores()


@pytest.mark.parametrize("dtype", [FP16, FP32])
def test_other_dtypes_are_computed_by_the_reference(dtype: torch.dtype) -> None:
    assert type(choose(dtype)) is ReferenceBackend
    assert type(choose(dtype, kernels="reference")) is ReferenceBackend
    assert type(choose(BF16, kernels="reference")) is ReferenceBackend


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_reference_computes_and_says_so() -> None:
    chosen = choose(device="cuda")
    assert type(chosen) is ReferenceBackend and chosen.describe().endswith(": PyTorch finds no NVIDIA GPU")


@pytest.mark.parametrize("name", [pytest.param("triton", marks=runnable("triton-float32"))])
def test_triton_kernels_are_interpreted_if_they_are_named(name: str) -> None:
    chosen = choose(FP32, kernels=name, kv_cache_dtype="int8")
    assert chosen.describe() == "Triton kernels: cpu, interpreted; weights as activations, KV cache int8"
    assert type(choose(FP32)) is ReferenceBackend
    with pytest.raises(ConfigError, match="Triton kernels compute in float16 or float32, not in bfloat16: set dtype="):
        choose(BF16, kernels=name)


def test_gpus_that_the_triton_kernels_do_not_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton, "find_spec", lambda _: object())
    monkeypatch.setattr(triton, "launch_obstacle", lambda: None)

    def reason(capability: tuple[int, int], dtype: torch.dtype = FP16, kv_dtype: str = "auto") -> str | None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        return triton.obstacle("cuda:1", dtype, kv_dtype)

    assert reason((7, 0)) == "float16 with the Triton kernels needs compute capability 7.5, and cuda:1 has 7.0"
    assert reason((7, 5), BF16) == "bfloat16 with the Triton kernels needs compute capability 8.0, and cuda:1 has 7.5"
    assert reason((8, 6), BF16, "fp8") == "fp8 with the Triton kernels needs compute capability 8.9, and cuda:1 has 8.6"
    assert reason((7, 5)) is reason((8, 0), BF16, "int8") is reason((9, 0), BF16, "fp8") is None
    monkeypatch.setattr(triton, "find_spec", lambda _: None)
    assert reason((9, 0)) == "Triton is not installed (pip install triton)"


@pytest.mark.parametrize("name", [backend for backend in BACKENDS if backend.id == "torch"])
def test_torch_is_chosen_by_name(name: str) -> None:
    chosen = choose(kernels=name)
    assert isinstance(chosen, OneDnnBackend)
    assert "kernels=torch" in chosen.describe()


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", [backend for backend in BACKENDS if backend.id == "torch"])
def test_without_a_compiler_pytorch_computes_and_says_so(name: str) -> None:
    del name
    chosen = choose()
    assert isinstance(chosen, OneDnnBackend)
    for lost in ("no quantization", "no int8 KV cache", "no equal bits", "the speed", NOT_COMPILED):
        assert lost in chosen.describe()


@pytest.mark.usefixtures("uncompiled")
def test_without_a_compiler_named_kernels_are_refused() -> None:
    for name in library.VARIANTS:
        with pytest.raises(KernelError, match=r"not compiled \(absent.so is missing\)"):
            choose(kernels=name)


@pytest.mark.parametrize("setting", ONLY_CPP)
@pytest.mark.parametrize(
    ("dtype", "settings", "why"),
    [
        (FP32, {}, "the C++ kernels compute in bfloat16, not in float32: set dtype=bfloat16"),
        (FP16, {}, "the C++ kernels compute in bfloat16, not in float16: set dtype=bfloat16"),
        (BF16, {"device": "cuda"}, "the C++ kernels run on the CPU, not on cuda"),
        (BF16, {"kernels": "reference"}, "kernels=reference"),
        (BF16, {"kernels": "torch"}, "kernels=torch"),
    ],
)
def test_cpp_settings_need_cpp_kernels(
    dtype: torch.dtype, settings: dict[str, Any], why: str, setting: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError) as refusal:
        choose(dtype, **settings, **setting)
    ((name, value),) = setting.items()
    able = "the C++ kernels"
    if name in IN_TRITON:
        able += " or the Triton kernels"
        why = "PyTorch finds no NVIDIA GPU" if "device" in settings else why
    assert str(refusal.value) == f"{name}={value} needs {able}, which cannot be used: {why}"


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("setting", ONLY_CPP)
def test_cpp_settings_without_a_compiler(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"needs the C\+\+ kernels.*, which cannot be used: .*not compiled"):
        choose(**setting)


@pytest.mark.parametrize("kernels", ["avx512_bf16", "avx512", "avx2"])
@pytest.mark.parametrize(
    ("dtype", "settings", "why"),
    [
        (FP32, {}, "the C++ kernels compute in bfloat16, not in float32: set dtype=bfloat16"),
        (FP16, {}, "the C++ kernels compute in bfloat16, not in float16: set dtype=bfloat16"),
        (BF16, {"device": "cuda:1"}, "the C++ kernels run on the CPU, not on cuda:1"),
    ],
)
def test_named_kernels_contradict_other_settings(
    kernels: str, dtype: torch.dtype, settings: dict[str, Any], why: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        choose(dtype, kernels=kernels, **settings)
    assert str(refusal.value) == f"kernels={kernels} cannot be used: {why}"


def test_variant_that_this_cpu_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = {f"sf_supports_{name}": lambda name=name: int(name == "avx2") for name in library.VARIANTS}
    monkeypatch.setattr(library, "_load", lambda: SimpleNamespace(**cpu, sf_amx_state=lambda: 1))
    with pytest.raises(ConfigError, match="this CPU cannot run the avx512 kernels; it can run avx2"):
        choose(kernels="avx512")


def test_pytorch_kernels_run_on_the_cpu_alone() -> None:
    with pytest.raises(ConfigError, match="torch cannot be used: PyTorch's kernels run on the CPU, not on cuda"):
        choose(kernels="torch", device="cuda")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_pytorch_kernels_compute_or_say_why_not(dtype: str) -> None:
    """oneDNN does not have every dtype on every CPU."""
    try:
        pipe = splitfuse.pipeline(kernels="torch", dtype=dtype, num_blocks=64)
    except ConfigError as refusal:
        assert f"kernels=torch cannot be used: oneDNN does not multiply {dtype} here" in str(refusal)
        return
    assert pipe("Once upon a time", max_new_tokens=3)[0].generated_length == 3


@pytest.mark.usefixtures("uncompiled")
def test_without_compiler_and_onednn_the_reference_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("bf16 path needs another cpu")

    monkeypatch.setattr(OneDnnBackend, "pack", refuse)
    assert type(choose()) is ReferenceBackend
    with pytest.raises(ConfigError, match="oneDNN does not multiply bfloat16 here"):
        choose(kernels="torch")


def test_a_new_row_is_taken_where_it_suits(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(ReferenceBackend):
        capabilities = Capabilities(name="the other kernels", devices=("cuda",), kv_dtypes=("int8",))

    row = backend_choice.Candidate(Other.capabilities, lambda _, why: Other(why))
    monkeypatch.setattr(backend_choice, "AUTO", (row, *backend_choice.AUTO))
    assert type(choose(FP32)) is ReferenceBackend
    assert type(choose(FP32, device="cuda")) is type(choose(device="cuda", kv_cache_dtype="int8")) is Other
    with pytest.raises(ConfigError, match=r"num_threads=2 needs the C.. kernels, which .* run on the CPU, not on cuda"):
        choose(device="cuda", num_threads=2)
    with pytest.raises(ConfigError, match=r"int8 needs the other kernels or the C.. kernels.*, .* compute in bfloat16"):
        choose(FP32, kv_cache_dtype="int8")


@pytest.mark.parametrize("variant", variants())
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"quantization": "int8", "quantization_group_size": 64},
            "quantization_group_size=64 .* int8: use 128",
        ),
        ({"block_size": 16}, "block_size=16 is not a positive multiple of 32, which the C.. kernels need: use 32"),
    ],
)
def test_unsupported_settings_fail_before_loading(variant: str, settings: dict[str, Any], message: str) -> None:
    announced: list[object] = []
    wanted = EngineConfig.from_settings({"kernels": variant, **settings})
    with pytest.raises(ConfigError, match=message):
        splitfuse.Engine.load(wanted, announce=announced.append)
    assert announced == []


def test_config_lists_what_the_kernels_support() -> None:
    """The settings list it again, as neither may import the other."""
    assert CpuBackend.capabilities.quantizations == triton.ON_GPUS.quantizations == QUANTIZATIONS
    assert ("auto", *BACKENDS_BY_NAME) == KERNELS
    assert ("auto", *DTYPES_OF_WEIGHTS) == DTYPES


# --- threads ----------------------------------------------------------------------------------------------------------


def machine(
    root: Path, monkeypatch: pytest.MonkeyPatch, *, cgroup: str | None, files: Mapping[str, str], cores: int = 8
) -> int:
    """The cores we may use where there are `cores`, with our control groups as proc names them, and `files` of them by
    their place under sys/fs/cgroup.
    """
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    if cgroup is not None:
        (root / "proc/self").mkdir(parents=True)
        (root / "proc/self/cgroup").write_text(cgroup)
    for name, content in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return usable_cores(root)


def quota(folder: str, microseconds: int) -> dict[str, str]:
    """The files of a version 1 group that pays for so many in 100,000; -1: for all."""
    return {f"{folder}/cpu.cfs_quota_us": str(microseconds), f"{folder}/cpu.cfs_period_us": "100000"}


@pytest.mark.parametrize(
    ("content", "cores"),
    [
        ("max 100000", 8),
        ("400000 100000", 4),
        ("450000 100000", 4),
        ("50000 100000", 1),
        ("9900000 100000", 8),
        ("", 8),
        ("no numbers", 8),
        ("100000 0", 8),
    ],
)
def test_a_control_group_limits_threads(
    content: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert machine(tmp_path, monkeypatch, cgroup="0::/\n", files={"cpu.max": content}) == cores


@pytest.mark.parametrize(
    ("cgroup", "files", "cores"),
    [
        pytest.param("0::/user/me\n", {"user/me/cpu.max": "300000 100000"}, 3, id="v2-our-own"),
        pytest.param(
            "0::/user/me\n", {"user/me/cpu.max": "max 100000", "user/cpu.max": "200000 100000"}, 2, id="v2-a-parent"
        ),
        pytest.param(
            "0::/user/me\n",
            {"user/me/cpu.max": "300000 100000", "user/cpu.max": "500000 100000", "cpu.max": "700000 100000"},
            3,
            id="v2-the-smallest-is-ours",
        ),
        pytest.param(
            "0::/user/me\n",
            {"user/me/cpu.max": "700000 100000", "user/cpu.max": "max 100000", "cpu.max": "250000 50000"},
            5,
            id="v2-the-smallest-is-the-top",
        ),
        pytest.param("0::/user/me\n", {"user/you/cpu.max": "100000 100000"}, 8, id="v2-another"),
        pytest.param("0::/seen/from/outside\n", {"cpu.max": "400000 100000"}, 4, id="v2-in-a-container"),
        pytest.param("3:cpu:/jobs/7\n0::/\n", quota("cpu/jobs/7", 250_000), 2, id="v1"),
        pytest.param(
            "3:cpu,cpuacct:/jobs/7\n", quota("cpu/jobs", 300_000) | quota("cpu/jobs/7", -1), 3, id="v1-a-parent"
        ),
        pytest.param("3:cpu,cpuacct:/seen/from/outside\n", quota("cpu", 600_000), 6, id="v1-in-a-container"),
        pytest.param("3:cpu:/\n", quota("cpu", -1), 8, id="v1-unlimited"),
        pytest.param(
            "3:cpuset:/x\n2:cpuacct:/x\n", quota("cpu", 100_000) | quota("cpuset/x", 100_000), 8, id="v1-others"
        ),
        pytest.param("", {"cpu.max": "100000 100000"}, 8, id="in-none"),
    ],
)
def test_the_tightest_control_group_counts(
    cgroup: str, files: Mapping[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert machine(tmp_path, monkeypatch, cgroup=cgroup, files=files) == cores


def test_without_control_groups_every_core_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine(tmp_path, monkeypatch, cgroup=None, files={}, cores=5) == 5
