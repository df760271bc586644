"""Which device is chosen, and what is said about it; GPUs are simulated."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from specs import make_spec

from splitfuse.config.engine import EngineConfig
from splitfuse.errors import ConfigError
from splitfuse.kernels.reference import ReferenceBackend
from splitfuse.kernels.triton import capabilities as triton
from splitfuse.runtime import device, memory_planner
from splitfuse.runtime.device import DeviceChoice, choose_device
from splitfuse.runtime.machine import GIB

SIZES = {"num_layers": 2, "intermediate_size": 96, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
SPEC = make_spec(vocab_size=100, hidden_size=64, max_position=1000, **SIZES)


def choose(**settings: Any) -> DeviceChoice:
    device._choose_gpu.cache_clear()
    return choose_device(EngineConfig.from_settings(settings))


def simulate(monkeypatch: pytest.MonkeyPatch, *free: float, capability: tuple[int, int] = (9, 0)) -> None:
    """Let there be GPUs of 80 GiB, of which so many GiB are free."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(device, "available_memory", lambda name: int(free[int(name.removeprefix("cuda:"))] * GIB))
    monkeypatch.setattr(triton, "find_spec", lambda _: object())
    monkeypatch.setattr(triton, "launch_obstacle", lambda: None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_nothing_to_say() -> None:
    assert choose() == DeviceChoice("cpu") and choose().remarks == ()


def test_the_gpu_with_most_room_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate(monkeypatch, 50, 70)
    assert choose().remarks == ("device: cuda:1, as 70.0 of 80.0 GiB are free on cuda:1",)
    assert choose(device="cuda:0") == DeviceChoice("cuda:0")
    assert choose(device="cpu").remarks == ()


def test_a_gpu_without_room_is_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate(monkeypatch, 30)
    assert choose() == DeviceChoice(
        "cpu", "only 30.0 of 80.0 GiB are free on cuda:0; --device cuda:0 takes it all the same"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_where_triton_cannot_launch_kernels_the_cpu_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    launch_obstacle = triton.launch_obstacle
    simulate(monkeypatch, 70)
    monkeypatch.setattr(triton, "launch_obstacle", launch_obstacle.__wrapped__)  # not kept for other tests
    found = choose()
    assert found.name == "cpu" and "Triton cannot launch kernels, which needs gcc or clang" in found.why


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"kernels": "avx2"}, "kernels=avx2"),
        ({"num_threads": 2}, "num_threads=2"),
    ],
)
def test_settings_that_need_the_cpu_get_it(
    settings: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate(monkeypatch, 70)
    assert choose(**settings) == DeviceChoice("cpu", f"{reason} needs it")


def test_ranks_take_neighbours_that_all_have_room(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate(monkeypatch, 79, 45, 60, 70, 30)
    choice = choose(tensor_parallel_size=2)
    assert choice == DeviceChoice("cuda:2", "60.0 of 80.0 GiB are free on cuda:2 to cuda:3")
    for settings, devices in (
        ({"tensor_parallel_size": 2}, ("cuda:2", "cuda:3")),
        ({"tensor_parallel_size": 3, "device": "cuda"}, ("cuda:0", "cuda:1", "cuda:2")),
        ({"tensor_parallel_size": 2, "device": "cuda:1"}, ("cuda:1", "cuda:2")),
        ({"device": "cuda"}, ("cuda",)),
    ):
        assert device.rank_devices(EngineConfig.from_settings(settings)) == devices
    assert choose(tensor_parallel_size=4).name == "cuda:0"
    assert choose(tensor_parallel_size=5).why.startswith("only 30.0 of 80.0 GiB are free on cuda:0 to cuda:4")
    assert choose(tensor_parallel_size=6).why == "tensor_parallel_size=6 needs as many GPUs, and there are 5"
    assert choose(tensor_parallel_size=6, device="cpu").name == "cpu"
    with pytest.raises(ConfigError, match="needs 3 GPUs from cuda:3 on, and PyTorch finds 2: use at most that"):
        device.rank_devices(EngineConfig.from_settings({"device": "cuda:3", "tensor_parallel_size": 3}))


def test_a_rank_has_what_the_gpu_with_least_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate(monkeypatch, 70, 20)
    monkeypatch.setattr(memory_planner, "available_memory", device.available_memory)
    config = EngineConfig.from_settings({"device": "cuda:0", "tensor_parallel_size": 2})
    plan = memory_planner.plan_memory(SPEC, config, backend=ReferenceBackend())
    assert plan.available == 19 * GIB
    left = "20.000 GiB are free on cuda:0 or cuda:1, too few for gpu_memory_share=0.9: of these 1.000 GiB are left for "
    assert left in str(plan)
    assert "each of 2 ranks on cuda:0, cuda:1, which divide the model; they add up by torch.distributed" in str(plan)
    assert device.ranks_of_device(config) == 1


def test_a_gpu_that_the_kernels_do_not_run_on_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate(monkeypatch, 70, capability=(7, 0))
    assert choose().why == "float16 with the Triton kernels needs compute capability 7.5, and cuda:0 has 7.0"
    simulate(monkeypatch, 70, capability=(8, 0))
    assert choose(kv_cache_dtype="fp8").name == "cpu"
    assert choose().name == "cuda:0"


def test_an_engine_takes_no_more_than_its_share_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate(monkeypatch, 70)
    half = EngineConfig.from_settings({"device": "cuda:0", "gpu_memory_share": 0.5})
    assert memory_planner._gpu_share(half) == 40 * GIB
    assert memory_planner._kv_share(half) == 1.0
    on_cpu = EngineConfig.from_settings({"device": "cpu"})
    assert memory_planner._gpu_share(on_cpu) is None and memory_planner._kv_share(on_cpu) < 1.0
    with pytest.raises(ConfigError, match=r"gpu_memory_share must be from 0.05 to 1, not 1.5"):
        EngineConfig.from_settings({"gpu_memory_share": 1.5})
