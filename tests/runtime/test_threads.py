"""Threads: how they wait, and how many there are."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping

import pytest
import torch
from backends import runnable

from splitfuse.config.engine import EngineConfig
from splitfuse.runtime import loading
from splitfuse.runtime.loading import load_model


@pytest.mark.parametrize(
    ("given", "count"),
    [
        ({}, "10000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, "None"),
    ],
)
def test_openmp_spins_as_long_as_the_user_says(given: Mapping[str, str], count: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    code = """if True:
        import os, sys, splitfuse.engine.remote.worker
        print(os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules)
    """
    printed = subprocess.check_output([sys.executable, "-c", code], env=environment | given, text=True)
    assert printed.split() == [count, "False"]  # PyTorch's library reads it when it is loaded


@pytest.fixture
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize("kernels", ["auto", pytest.param("torch", marks=runnable("torch")), "reference"])
def test_a_quota_of_one_core_gives_one_thread(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "usable_cores", lambda: 1)
    dtype = "float32" if kernels == "reference" else "bfloat16"
    load_model(EngineConfig.from_settings({"kernels": kernels, "dtype": dtype, "num_blocks": 8}))
    assert torch.get_num_threads() == 1
