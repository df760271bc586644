"""The stages of `python -m benchmarks.gpu`, rehearsed on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from backends import runnable

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["parity", "tune", "kernels", "steps", "policies"])
@pytest.mark.parametrize("name", [pytest.param("triton", marks=runnable("triton-float32"))])
def test_a_rehearsal_ends_well(stage: str, name: str) -> None:
    """`peers` needs packages that the tests do not install, and transformers waits for minutes without psutil."""
    del name
    command = [sys.executable, "-m", "benchmarks.gpu", "--stage", stage, "--rehearse"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"stage {stage}:" in done.stdout
