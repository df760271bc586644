"""Draining and scaling a running server, by the client and by commands: answers go on at other engines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import pytest
from command_line import Run
from server_process import server_process

import splitfuse


def answer(client: splitfuse.Client, seed: int) -> str:
    sampling = {"max_new_tokens": 150, "ignore_eos": True, "temperature": 1.0, "seed": seed}
    return "".join(piece.text for piece in client("Tom lives in", stream=True, **sampling))


@contextmanager
def closed_loop(client: splitfuse.Client, expected: Sequence[str]) -> Iterator[None]:
    """Ask for each answer again as soon as it has come, until the context ends: then there are some whenever an engine
    is drained, on however fast a machine. Asserts that each is the expected one.
    """
    is_over = Event()

    def ask(seed: int) -> None:
        while not is_over.is_set():
            assert answer(client, seed) == expected[seed]

    with ThreadPoolExecutor(len(expected)) as pool:
        asking = [pool.submit(ask, seed) for seed in range(len(expected))]
        try:
            yield
        finally:
            is_over.set()
        for each in asking:
            each.result()


def test_answers_go_on_while_engines_are_drained_and_restarted(tmp_path: Path, run: Run) -> None:
    name = "drained"
    with server_process(tmp_path, name, "--replicas", "2", "--num-threads", "1") as server, server.client() as client:
        expected = [answer(client, seed) for seed in range(2)]
        with closed_loop(client, expected):
            while not (done := client.drain(0))["moved"]:
                client.drain(0, undo=True)
        assert done["drained"] == [0]
        assert "no other engine" in run("drain", f"{name}/1").err  # would take the requests
        assert f"{name}/0 is taking requests again" in run("drain", f"{name}/0", "--undo").out
        assert f"{name} is restarted" in run("drain", name, "--restart").out
        assert answer(client, 0) == expected[0]
        assert "there is no engine 7: this server has 2" in run("drain", f"{name}/7").err


@pytest.mark.slow  # tests/engine/test_scaling.py has the same without HTTP
def test_replicas_are_added_and_ended_while_answers_go_on(tmp_path: Path, run: Run) -> None:
    name = "scaled"
    flags = ("--replicas", "1", "--max-replicas", "2", "--num-threads", "1", "--ttft", "60s")
    with server_process(tmp_path, name, *flags) as server, server.client() as client:
        expected = [answer(client, seed) for seed in range(2)]
        with closed_loop(client, expected):
            assert run("scale", name, 2).out == f"{name} has 2 replicas; requests that went on elsewhere: 0\n"
            while not (done := client.scale(1))["moved"]:
                client.scale(2)
        assert done["replicas"] == 1
        assert "there cannot be 3 replicas, but 1 to 2: cores and memory are divided" in run("scale", name, 3).err
        assert client.scale(2) == {"replicas": 2, "moved": 0}
        listed = run("ps").out
        assert f"{name}/0  here" in listed and f"{name}/1  here" in listed and "100%" in listed
        assert [each["state"] for each in client.engines()] == ["ready", "ready"]
