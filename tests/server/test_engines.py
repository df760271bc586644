"""Routes that change engines: what a client is told where that cannot be done."""

from __future__ import annotations

import pytest
from running_server import RunningServer

from splitfuse.engine.thread import AsyncEngine
from splitfuse.errors import ConfigError, MemoryPlanError, SplitfuseError

PLAN = MemoryPlanError("the KV cache does not fit into memory\nof 4 GiB the weights have 3\nnum_blocks=5 would fit")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PLAN, "a replica cannot be started: the KV cache does not fit into memory; num_blocks=5 would fit"),
        (ConfigError("the port 9101 is taken"), "a replica cannot be started: the port 9101 is taken"),
    ],
)
def test_why_a_replica_does_not_start_is_told(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, error: SplitfuseError, message: str
) -> None:
    async def scale(_engine: AsyncEngine, count: int) -> int:
        assert count == 2
        raise error

    monkeypatch.setattr(AsyncEngine, "num_replicas", 1)
    monkeypatch.setattr(AsyncEngine, "scale", scale)
    with server.http() as http:
        answer = http.post("/scale", json={"replicas": 2})
    told = answer.json()["error"]
    assert (answer.status_code, told["code"], told["message"]) == (503, "engine_unavailable", message)
