"""What holds for the whole suite, set before anything imports PyTorch.

`make test` runs two pytest workers on two cores. An idle OpenMP thread spins by default, and would take the core from
the other worker's tests: here it sleeps. In a worker an engine gets one thread unless its test asks for more, as those
do that compare threads.
"""

import os
from pathlib import Path

import pytest
from command_line import Run, runner
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("SPLITFUSE_EMULATE_AMX", "1")  # the same results on every machine; "0": by the processor
if not Path("/dev/nvidiactl").exists():  # no GPU: Triton's kernels run in its interpreter, if their tests ask for them
    os.environ.setdefault("TRITON_INTERPRET", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Hypothesis fails an example that takes 200 ms, or whose data are slow to come by: on a busy machine any may.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line here: a second faster than in a process of its own."""
    return runner(monkeypatch, capsys)
