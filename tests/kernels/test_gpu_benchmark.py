"""The stages of `python -m benchmarks.gpu`, rehearsed on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from backends import runnable

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["9.0", "8.0", "8.6"])
@pytest.mark.parametrize("name", [pytest.param("triton", marks=runnable("triton-float32"))])
def test_every_kernel_compiles_for_a_gpu(capability: str, name: str, tmp_path: Path) -> None:
    del name
    command = [sys.executable, "-m", "benchmarks.gpu", "--stage", "compile", "--capability", capability]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "attention 128" in done.stdout and "delta net" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("triton", marks=runnable("triton-float32"))])
def test_steps_of_one_kind_need_the_programs_of_the_first(name: str) -> None:
    del name
    command = [sys.executable, "-m", "benchmarks.gpu", "--stage", "launches"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "7b: 256 decodes" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["parity", "tune", "kernels", "steps", "policies", "peers"])
@pytest.mark.parametrize("name", [pytest.param("triton", marks=runnable("triton-float32"))])
def test_a_rehearsal_ends_well(stage: str, name: str) -> None:
    del name
    command = [sys.executable, "-m", "benchmarks.gpu", "--stage", stage, "--rehearse"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"stage {stage}:" in done.stdout and " failed: " not in done.stdout
