"""What holds for the whole suite, set before anything imports PyTorch.

`make test` runs two pytest workers on two cores. An idle OpenMP thread spins by default, and would take the core from
the other worker's tests: here it sleeps. In a worker an engine gets one thread unless its test asks for more, as those
do that compare threads.
"""

import gc
import os
from collections.abc import Generator, Iterator
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


def reason_to_skip(item: pytest.Item) -> str | None:
    """The reason of a mark that skips a test here; None if there is none, or it is for pytest to evaluate."""
    for mark in item.iter_markers():
        if mark.name == "skip":
            return str(mark.kwargs.get("reason") or next(iter(mark.args), "unconditional skip"))
        conditions = (mark.kwargs["condition"],) if "condition" in mark.kwargs else mark.args
        if mark.name == "skipif" and any(condition is True for condition in conditions):
            return mark.kwargs.get("reason")
    return None


@pytest.hookimpl(trylast=True)  # of the cases that -m leaves
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let one case stand for all that are skipped for the same reason, such as a variant of the kernels that this CPU
    cannot run, and say how many they are.
    """
    skipped: dict[str, list[pytest.Item]] = {}
    for item in items:
        if reason := reason_to_skip(item):
            skipped.setdefault(reason, []).append(item)
    for reason, cases in skipped.items():
        if len(cases) > 1:  # a condition counts before `skip`
            cases[0].add_marker(pytest.mark.skipif(True, reason=f"{reason} ({len(cases)} cases)"), append=False)
    left_out = {case for _, *others in skipped.values() for case in others}
    items[:] = [item for item in items if item not in left_out]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Exempt the modules and the cases from garbage collections: of their million objects each would take half a
    second.
    """
    gc.disable()  # until they are all there
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True, scope="session")
def frozen_once() -> Iterator[None]:
    """Let no pipeline or server of this process collect and freeze everything again: hundreds of them are made."""
    from splitfuse.engine import garbage

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(garbage, "freeze", lambda: None)
        yield


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line here: a second faster than in a process of its own."""
    return runner(monkeypatch, capsys)
