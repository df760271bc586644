"""Broken, contradictory and hostile model folders: each loads as in transformers, or is refused in a sentence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def mutations(count: int, seed: int) -> None:
    """Try them in a process of its own, which has not computed anything before it forks."""
    command = [sys.executable, "-m", "tests.soak.folder_mutations", f"--count={count}", f"--seed={seed}"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-2000:]
    assert f"{count} folders, 0 at fault" in ended.stdout


def test_some_mutations_of_folders_load_or_are_refused() -> None:
    mutations(12, seed=100_000)


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_5000_mutations_of_folders_load_or_are_refused() -> None:
    mutations(5000, seed=0)
