"""Servers with KV tiers: the next turn after a restart, after an engine's death, and on the other replica."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from patience import PATIENCE
from server_process import ServerProcess, server_process, wait_until

STORY = "Once upon a time, there was a little girl named Lily. She had a red ball and a big dog. " * 12


def url_of(server: ServerProcess) -> str:
    server.wait_for("splitfuse serves ")
    found = re.search(r"on (http\S+) ", server.said)
    assert found is not None
    return found[1]


def complete(server: ServerProcess, prompt: str, *, key: str = "") -> tuple[str, int]:
    """The text that follows, and how many tokens of the prompt were not computed."""
    body: dict[str, Any] = {"model": "", "prompt": prompt, "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    del body["model"]
    headers = {"Content-Type": "application/json", **({"X-Api-Key": key} if key else {})}
    request = Request(f"{url_of(server)}/v1/completions", json.dumps(body).encode(), headers)
    with urlopen(request, timeout=PATIENCE) as response:
        answer = json.load(response)
    return answer["choices"][0]["text"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def metric(server: ServerProcess, name: str) -> float:
    with urlopen(f"{url_of(server)}/metrics", timeout=PATIENCE) as response:
        found = re.search(rf"^splitfuse:kv_tier_{name}\{{.*\}} (\S+)$", response.read().decode(), re.MULTILINE)
    assert found is not None, name
    return float(found[1])


@pytest.mark.slow
def test_a_restarted_server_answers_the_next_turn_from_the_disk(tmp_path: Path) -> None:
    flags = ("--kv-disk-tier", f"{tmp_path}/kv:64MiB")
    with server_process(tmp_path, "first", *flags) as server:
        answer, cached = complete(server, STORY)
        assert cached == 0
        server.terminate()
        server.process.wait(PATIENCE)
    with server_process(tmp_path, "second", *flags) as server:
        text, cached = complete(server, STORY + answer)
        assert cached > 200 and metric(server, "fetched_blocks_total") == -(-cached // 32)
        again, _ = complete(server, STORY)
        assert again == answer and metric(server, "dropped_blocks_total") == 0
    with server_process(tmp_path, "alone") as server:
        assert complete(server, STORY + answer) == (text, 0)
    with server_process(tmp_path, "third", *flags, "--quantization", "int8") as server:
        assert complete(server, STORY)[1] == 0, "of other weights"
        assert metric(server, "dropped_blocks_total") >= cached // 32


@pytest.mark.slow
def test_replicas_that_are_started_again_find_the_blocks_of_each_api_key(tmp_path: Path) -> None:
    flags = ("--replicas", "2", "--kv-disk-tier", f"{tmp_path}/kv:64MiB", "--api-key", "one", "--api-key", "two")
    with server_process(tmp_path, "first", *flags) as server:
        answer, cached = complete(server, STORY, key="one")
        assert cached == 0 and complete(server, STORY, key="two") == (answer, 0), "of others nothing is seen"
        server.terminate()
        server.process.wait(PATIENCE)
    with server_process(tmp_path, "second", *flags) as server:
        for key in ("one", "two"):
            again, cached = complete(server, STORY, key=key)
            assert again == answer and cached > 200


@pytest.mark.slow
def test_an_engine_that_is_started_again_finds_what_it_had_computed(tmp_path: Path) -> None:
    with server_process(tmp_path, "one", "--kv-memory-tier", "64MiB") as server:
        answer, cached = complete(server, STORY)
        assert cached == 0
        wait_until(lambda: metric(server, "saved_blocks_total") * 32 > 200 or complete(server, "Hello there.") is None)
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
        engine = next(int(pid) for pid in children if b"remote.worker" in Path(f"/proc/{pid}/cmdline").read_bytes())
        os.kill(engine, signal.SIGKILL)
        server.wait_for("the engine is ready again")
        again, cached = complete(server, STORY)
        assert again == answer and cached > 200
