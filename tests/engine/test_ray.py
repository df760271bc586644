"""Engines on a Ray cluster of three nodes, on this machine: 127.0.0.2 to 127.0.0.4.

Needs the package `ray`; `make test-extras` installs it. It takes about a minute, and 1.5 GB of memory. All tests but
one have the same cluster, of which the last one removes a node.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import re
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE
from router_streams import closed_loop, read, requests, resumed, run, until
from server_process import server_process

from splitfuse.config.engine import EngineConfig
from splitfuse.config.server import ServerConfig
from splitfuse.core.request import SchedulingOptions
from splitfuse.engine.client import EngineState, LocalClient
from splitfuse.engine.messages import Add
from splitfuse.engine.remote.ray_cluster import DRIVER
from splitfuse.engine.replicas import make_replicas
from splitfuse.engine.router import Router
from splitfuse.errors import EngineUnavailableError

pytestmark = pytest.mark.extras

HEAD, *OTHERS = (f"127.0.0.{number}" for number in (2, 3, 4))
SETTINGS: dict[str, Any] = {"num_blocks": 400, "max_num_batched_tokens": 64, "num_threads": 1}
FAST_DEATH = {
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 500,
    "health_check_failure_threshold": 4,
    "health_check_initial_delay_ms": 500,
}
STORE = 80 * 2**20


class RayNodes:
    """The cluster: its head has no room for engines, the others have a CPU each."""

    def __init__(self, cluster: Any, nodes: dict[str, Any]) -> None:
        self.address: str = cluster.address
        self._cluster, self._nodes = cluster, nodes

    def remove(self, host: str) -> None:
        self._cluster.remove_node(self._nodes.pop(host), allow_graceful=False)


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("the extra ray is not installed")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_AUTH_MODE", "token")  # for all processes, before Ray reads it
        environment.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        environment.setenv("RAY_enable_worker_prestart", "0")  # processes that no test would use
        environment.setenv("RAY_prestart_worker_first_driver", "0")
        environment.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        from ray.cluster_utils import Cluster

        cluster = Cluster()

        def make(host: str, num_cpus: int = 1, **more: Any) -> Any:
            return cluster.add_node(
                node_ip_address=host,
                num_cpus=num_cpus,
                object_store_memory=STORE,
                include_dashboard=False,
                **more,
            )

        try:
            made = {HEAD: make(HEAD, 0, _system_config=FAST_DEATH)}
            made |= {host: make(host) for host in OTHERS}
            yield RayNodes(cluster, made)
        finally:
            cluster.shutdown()


@asynccontextmanager
async def on_ray(
    nodes: RayNodes, replicas: int, *, seconds: float = ServerConfig.ray_timeout, **settings: Any
) -> AsyncIterator[Router]:
    config = EngineConfig.from_settings({**SETTINGS, **settings})
    router = make_replicas(config, replicas=replicas, max_replicas=8, ray=nodes.address, ray_timeout=seconds)
    try:
        await router.start()
        yield router
    finally:
        await router.close()


def named(name: str, wanted: Sequence[Add]) -> list[Add]:
    salted = SchedulingOptions(cache_salt=name)  # no engine has anything of them
    return [Add(f"{name}{each.request_id}", each.prompt_token_ids, each.params, scheduling=salted) for each in wanted]


async def answers(router: Router, wanted: Sequence[Add]) -> list[list[int]]:
    return list(await asyncio.gather(*(read(router.open(each)) for each in wanted)))


def hosts(router: Router) -> list[str]:
    return [each.address.rpartition(":")[0] for each in router.engines if each.state is EngineState.READY]


@pytest.fixture(scope="module")
def wanted() -> list[Add]:
    return requests(6, max_tokens=200)


@pytest.fixture(scope="module")
def whole(wanted: list[Add]) -> list[list[int]]:
    """Return the answers of an engine of this machine, without Ray."""
    found: list[list[int]] = []

    async def test() -> None:
        router = make_replicas(EngineConfig.from_settings(SETTINGS))
        await router.start()
        found.extend(await answers(router, wanted))
        await router.close()

    run(test())
    return found


def process_of(engine: LocalClient, log: pytest.LogCaptureFixture) -> int:
    """Return the number of the process of an engine, which really runs on this machine."""
    found = re.search(rf"placed an engine at {re.escape(engine.address)} \(process (\d+)\)", log.text)
    assert found is not None
    return int(found[1])


def driver() -> int:
    """Return the number of our process that speaks with Ray."""
    (found,) = [each for each in Path("/proc").glob("[0-9]*") if is_driver(each)]
    return int(found.name)


def is_driver(process: Path) -> bool:
    try:
        parent = int((process / "stat").read_text().rpartition(") ")[2].split()[1])
        return parent == os.getpid() and DRIVER.encode() in (process / "cmdline").read_bytes()
    except OSError:  # it has ended
        return False


def test_no_token_is_lost_from_one_to_two_and_back(nodes: RayNodes, wanted: list[Add], whole: list[list[int]]) -> None:
    async def test() -> None:
        async with on_ray(nodes, 1) as router:
            streams = [router.open(each) for each in named("one", wanted)]
            reading = [asyncio.create_task(read(stream)) for stream in streams]
            assert await router.scale(2) == 0 and sorted(hosts(router)) == OTHERS
            assert await asyncio.gather(*reading) == whole
            async with closed_loop(router, named("two", wanted), whole, "two") as streams:
                await until(lambda: all(engine.num_open for engine in router.engines))
                num_moved = await router.scale(1)
                while not resumed(streams):  # each had ended before it could move
                    await router.scale(2)
                    num_moved = await router.scale(1)
            assert num_moved >= len(resumed(streams)) and len(hosts(router)) == 1

            with pytest.raises(EngineUnavailableError, match=r"needs 1 CPU on one node; node 127\.0\.0\.2 has 0 CPU"):
                await router.scale(3)  # there is room for one more
            assert router.num_replicas == 1 and len(hosts(router)) == 1
            assert await answers(router, named("after", wanted)) == whole

    run(test())


def test_what_fits_on_no_node_is_said_at_once(nodes: RayNodes) -> None:
    async def test() -> None:
        with pytest.raises(EngineUnavailableError, match=r"needs 64 CPU on one node; .*127\.0\.0\.3 has 1 CPU"):
            async with on_ray(nodes, 1, num_threads=64):
                raise AssertionError("it cannot be")

    run(test())


def test_a_wrong_token_is_said_in_a_sentence(nodes: RayNodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))

    async def test() -> None:
        with pytest.raises(EngineUnavailableError, match="RAY_AUTH_TOKEN"):
            async with on_ray(nodes, 1):
                raise AssertionError("it cannot be")

    run(test())


def test_a_cluster_of_this_machine_alone(wanted: list[Add], whole: list[list[int]]) -> None:
    async def test() -> None:
        router = make_replicas(EngineConfig.from_settings(SETTINGS), ray="local")
        try:
            await router.start()
            assert await answers(router, named("local", wanted)) == whole
        finally:
            await router.close()

    run(test())


@pytest.fixture(scope="module")
def killed_server(nodes: RayNodes, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Run a server with two engines by the command line, and kill it. Return the answers of one and of two engines."""
    flags = ("--ray", nodes.address, "--replicas", "1", "--num-threads", "1", "--num-blocks", "400")
    folder = tmp_path_factory.mktemp("on-ray")
    with server_process(folder, "on-ray", *flags) as server, server.client() as client:
        answers = client("Tom lives in", max_new_tokens=20)
        assert client.scale(2)["replicas"] == 2
        assert sorted(each["address"].rpartition(":")[0] for each in client.engines()) == OTHERS
        answers += client("Tom lives in", max_new_tokens=20)
        server.process.kill()
        server.process.wait()
    return [each.generated_text for each in answers]


def test_a_server_on_ray_by_the_command_line(killed_server: list[str]) -> None:
    assert len(killed_server) == 2 and len(set(killed_server)) == 1


@pytest.mark.usefixtures("killed_server")
def test_lost_engines_are_replaced_and_their_requests_go_on(
    nodes: RayNodes, wanted: list[Add], whole: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    """An actor is killed, then the process that speaks with Ray, and then a node is removed, amid the streams. Their
    places are those of a server that was killed.
    """

    caplog.set_level(logging.INFO)

    async def test() -> None:
        async with on_ray(nodes, 2, seconds=PATIENCE) as router:
            assert sorted(hosts(router)) == OTHERS, "spread over the nodes"
            assert await answers(router, named("first", wanted)) == whole

            for name in ("actor", "driver", "node"):
                lost = router.engines[0]
                host = lost.address.rpartition(":")[0]
                async with closed_loop(router, named(name, wanted), whole, name) as streams:
                    await until(lambda lost=lost: lost.num_open)
                    if name == "actor":
                        os.kill(process_of(lost, caplog), signal.SIGKILL)
                    elif name == "driver":
                        os.kill(driver(), signal.SIGKILL)
                    else:
                        await asyncio.to_thread(nodes.remove, host)
                    await until(lambda lost=lost: lost.state is not EngineState.READY)
                assert resumed(streams)
                if name != "node":
                    await until(lambda: len(hosts(router)) == 2)
                    assert sorted(hosts(router)) == OTHERS, "there are no other places"
            assert host not in hosts(router), "there is no place left"
            assert await answers(router, named("last", wanted)) == whole

    run(test())
