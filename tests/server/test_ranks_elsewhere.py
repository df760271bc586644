"""Ranks of two machines, in network namespaces, compute what ranks of one do that add up as they do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from engine_process import make_key
from patience import PATIENCE
from two_machines import FIRST, SECOND, SECOND_ADDRESS, two_machines, within

FLAGS = ("--num-blocks=100", "--num-threads=1", "--tensor-parallel-size=2")
PROMPTS = ("Once upon a time", "The river", "A long day")


@contextmanager
def rank(address: str, key: str, prefix: Sequence[str] = ()) -> Iterator[subprocess.Popen[str]]:
    """Run `splitfuse rank`."""
    command = [*prefix, sys.executable, "-m", "splitfuse.cli", "rank", "--listen", address, "--key-file", key]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        while "splitfuse rank listens on" not in (line := process.stderr.readline()):
            assert line, "it has ended"
        yield process
    finally:
        process.terminate()
        process.wait()


def generate(*flags: str, prefix: Sequence[str] = ()) -> list[tuple[Any, ...]]:
    """Return the tokens of greedy and seeded answers."""
    command = [*prefix, sys.executable, "-m", "splitfuse.cli", "generate", *PROMPTS, *FLAGS, *flags]
    command += ["--max-new-tokens=40", "--seed=7", "--temperature=0.7", "--ignore-eos"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    return [(each["text"], each["token_ids"]) for each in map(json.loads, done.stdout.splitlines())]


@pytest.mark.slow
def test_ranks_of_two_machines_give_what_ranks_of_one_give(tmp_path: Path) -> None:
    key = make_key(tmp_path)
    with rank("127.0.0.1:9177", key):
        here = generate("--rank=127.0.0.1:9177", f"--rank-key-file={key}")
    with two_machines(), rank(f"{SECOND_ADDRESS}:9177", key, within(SECOND)) as other:
        flags = (f"--rank={SECOND_ADDRESS}:9177", f"--rank-key-file={key}")
        assert generate(*flags, prefix=within(FIRST)) == here
        assert generate(*flags, prefix=within(FIRST)) == here  # it serves the next one
        os.kill(other.pid, signal.SIGKILL)
    assert len(here) == len(PROMPTS) and all(len(tokens) == 40 for _, tokens in here)


@pytest.mark.slow
def test_a_rank_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    key, other = make_key(tmp_path), make_key(tmp_path / "other", "f" * 32)

    def error(address: str, key: str) -> str:
        command = [sys.executable, "-m", "splitfuse.cli", "generate", "x", *FLAGS, f"--rank={address}"]
        done = subprocess.run([*command, f"--rank-key-file={key}"], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        return done.stderr.splitlines()[-1]

    assert "nothing listens at rank 127.0.0.1:9178" in error("127.0.0.1:9178", key)
    with rank("127.0.0.1:9179", key):
        assert "rank 127.0.0.1:9179 has another key: give both the same secret" in error("127.0.0.1:9179", other)
