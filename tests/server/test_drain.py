"""Draining and scaling a running server, by the client and by commands: answers go on at other engines."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from patience import PATIENCE
from server_process import server_process

PROMPT, MANY = "Tom lives in", 300


def command(*arguments: str) -> str:
    """Run a command of splitfuse, and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "splitfuse.cli", *arguments], capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr


def drain(*arguments: str) -> str:
    return command("drain", *arguments)


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


@pytest.mark.slow  # tests/engine/test_scaling.py has the same without HTTP
def test_replicas_are_added_and_ended_while_answers_go_on(tmp_path: Path) -> None:
    name = "scaled"
    flags = ("--replicas", "1", "--max-replicas", "2", "--num-threads", "1", "--ttft", "60s")
    with server_process(tmp_path, name, *flags) as server, server.client() as client:
        begun = Barrier(3, timeout=PATIENCE)

        def answer(seed: int, *, wait: bool) -> str:
            text = ""
            for piece in client(
                PROMPT, stream=True, max_new_tokens=2 * MANY, ignore_eos=True, temperature=1.0, seed=seed
            ):
                if not text and wait:
                    begun.wait()
                text += piece.text
            return text

        expected = [answer(seed, wait=False) for seed in range(2)]
        assert command("scale", name, "2") == f"{name} has 2 replicas; requests that went on elsewhere: 0\n"
        with ThreadPoolExecutor(2) as pool:
            answers = [pool.submit(answer, seed, wait=True) for seed in range(2)]
            begun.wait()
            client.drain(0)  # to the other one, and all back
            client.drain(0, undo=True)
            assert client.scale(1) == {"replicas": 1, "moved": 2}
            assert [each.result() for each in answers] == expected
        assert "there cannot be 3 replicas, but 1 to 2: cores and memory are divided" in command("scale", name, "3")
        assert client.scale(2) == {"replicas": 2, "moved": 0}
        listed = command("ps")
        assert f"{name}/0  here" in listed and f"{name}/1  here" in listed and "100%" in listed
        assert [each["state"] for each in client.engines()] == ["ready", "ready"]
