"""Servers with roles and with loans, by the command line and over HTTP."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from patience import PATIENCE
from server_process import ServerProcess, server_process

import splitfuse

STORY = "Once upon a time, there was a little girl named Lily. She had a red ball and a big dog. "
ROLES = ("--replicas=2", "--roles=prompt:1,generation:1", "--num-threads=1")
LOANS = ("--replicas=2", "--kv-loans", "--num-threads=1", "--num-blocks=52")
"""Caches of 1,664 tokens, of which an engine lends a tile of 512."""


def http(server: ServerProcess) -> httpx.Client:
    with server.client() as client:
        return httpx.Client(base_url=client.url, timeout=PATIENCE, trust_env=False)


def metric(client: httpx.Client, name: str, label: str = "") -> float:
    found = re.search(rf"^splitfuse:{name}\{{.*{label}.*\}} (\S+)$", client.get("/metrics").text, re.MULTILINE)
    assert found is not None, name
    return float(found[1])


def complete(client: httpx.Client, prompt: str, **fields: Any) -> tuple[str, dict[str, Any]]:
    """Return the text that follows, and where its time went."""
    body = {"prompt": prompt, "temperature": 0, "ignore_eos": True, "splitfuse_timing": True, **fields}
    answer = client.post("/v1/completions", json=body).raise_for_status().json()
    return answer["choices"][0]["text"], answer["splitfuse_timing"]


def alone(prompt: str, max_tokens: int) -> str:
    """Return the text that one engine with room for all gives."""
    with splitfuse.pipeline(num_blocks=400) as pipe:
        return pipe(prompt, temperature=0, max_new_tokens=max_tokens, ignore_eos=True)[0].generated_text


def refusal(*flags: str) -> str:
    command = [sys.executable, "-m", "splitfuse.cli", "serve", "--port=0", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode != 0
    return done.stderr


@pytest.mark.slow
def test_a_server_with_roles_answers_as_one_without(tmp_path: Path) -> None:
    with server_process(tmp_path, "roles", *ROLES) as server, http(server) as client:
        text, timing = complete(client, STORY * 6, max_tokens=60)
        assert text == alone(STORY * 6, 60) and timing["resumed"] == 1
        assert metric(client, "resumed_requests_total", 'cause="hand_over"') == 1.0
        assert complete(client, STORY, max_tokens=1)[1]["resumed"] == 0, "one token is the prompt engine's"
        for index, role in enumerate(("prompt", "generation")):
            assert metric(client, "engine_ready", f'engine="{index}".*role="{role}"') == 1.0
        listed = subprocess.run(
            [sys.executable, "-m", "splitfuse.cli", "ps"], capture_output=True, text=True, timeout=PATIENCE, check=True
        )
        shown = [row for each in listed.stdout.splitlines() if (row := each.split())]
        assert {row[0]: row[2] for row in shown if "/" in row[0]} == {"roles/0": "prompt", "roles/1": "generation"}


@pytest.mark.slow
def test_a_server_with_loans_answers_what_no_cache_holds(tmp_path: Path) -> None:
    with server_process(tmp_path, "loans", *LOANS) as server, http(server) as client:
        text, timing = complete(client, STORY * 43, max_tokens=100)
        assert timing["on_loan"] and text == alone(STORY * 43, 100)
        text, timing = complete(client, STORY, max_tokens=100)
        assert not timing["on_loan"] and text == alone(STORY, 100)
        assert metric(client, "kv_lent_blocks") == 0.0


@pytest.mark.slow
def test_roles_and_loans_that_cannot_be_are_refused_by_a_sentence() -> None:
    assert "roles" in refusal("--replicas=2", "--roles=prompt:2")
    assert "roles" in refusal("--replicas=3", "--roles=prompt:1,generation:1")
    assert "kv_loans needs another engine to lend" in refusal("--kv-loans")
    assert "kv_loans needs another engine to lend" in refusal(*ROLES, "--kv-loans")
