"""A server whose engine is killed at random moments gives the texts that it gives otherwise: soak/engine_deaths.py."""

import pytest

from tests.soak import engine_deaths

PARTS = [range(first, first + 5) for first in range(0, 20, 5)]


@pytest.mark.slow
@pytest.mark.parametrize("runs", PARTS, ids=lambda runs: f"{runs[0]}-{runs[-1]}")
@pytest.mark.parametrize("case", engine_deaths.CASES)
def test_texts_are_those_without_a_kill(case: str, runs: range) -> None:
    assert engine_deaths.signal_all(case, runs, ["--num-threads=1"])
