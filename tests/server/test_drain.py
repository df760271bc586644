"""Draining an engine of a running server, by the client and by the command: answers go on at the other one."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

from patience import PATIENCE
from server_process import server_process

PROMPT, MANY = "Tom lives in", 300


def drain(*arguments: str) -> str:
    """Run `splitfuse drain`, and return what it prints."""
    command = [sys.executable, "-m", "splitfuse.cli", "drain", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_answers_go_on_while_engines_are_drained_and_restarted(tmp_path: Path) -> None:
    name = "drained"
    with server_process(tmp_path, name, "--replicas", "2", "--num-threads", "1") as server, server.client() as client:
        seeds = range(2)
        begun = Barrier(len(seeds) + 1, timeout=PATIENCE)

        def answer(seed: int, *, wait: bool) -> str:
            text = ""
            for piece in client(PROMPT, stream=True, max_new_tokens=MANY, ignore_eos=True, temperature=1.0, seed=seed):
                if not text and wait:
                    begun.wait()
                text += piece.text
            return text

        expected = [answer(seed, wait=False) for seed in seeds]
        with ThreadPoolExecutor(len(seeds)) as pool:
            answers = [pool.submit(answer, seed, wait=True) for seed in seeds]
            begun.wait()
            done = client.drain(0)
            assert done["drained"] == [0] and done["moved"] >= 1
            assert [each.result() for each in answers] == expected
        assert "no other engine" in drain(f"{name}/1")  # would take the requests
        assert f"{name}/0 is taking requests again" in drain(f"{name}/0", "--undo")
        assert f"{name} is restarted" in drain(name, "--restart")
        assert answer(0, wait=False) == expected[0]
        assert "there is no engine 7: this server has 2" in drain(f"{name}/7")
