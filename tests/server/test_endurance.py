"""Disconnecting, many and unusual clients leave nothing behind. The server's processes are measured from outside."""

import asyncio
import json
import os
import resource
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from running_server import RunningServer
from server_load import (
    PATIENCE,
    Measured,
    children,
    crowd,
    http_request,
    metrics,
    noise,
    wait_until,
    wait_until_idle,
)
from server_process import ServerProcess, server_process

from splitfuse.core.sampling_params import SamplingParams
from splitfuse.text.generation import Generation
from splitfuse.text.service import Pause

FEW, MANY = 60, 1000
MEMORY_MARGIN = 0.05


class Examined:
    """A server's processes, and a way to talk to it."""

    def __init__(self, server: ServerProcess, url: str) -> None:
        self.server = server
        self.http = httpx.Client(base_url=url, timeout=PATIENCE, trust_env=False)
        self.address = (self.http.base_url.host, self.http.base_url.port or 0)
        self.front, (self.engine,) = server.process.pid, children(server.process.pid)

    def at_rest(self) -> dict[str, Measured]:
        """Wait until no request holds anything."""
        wait_until_idle(self.http)
        return {"front": Measured.of(self.front), "engine": Measured.of(self.engine)}

    def wait_for_files(self, before: dict[str, Measured]) -> dict[str, Measured]:
        """Until no process has more open files than `before`: a connection that was reset is closed a moment later."""
        counts = [m.num_files for m in before.values()]
        wait_until(
            lambda: all(m.num_files <= count for m, count in zip(self.at_rest().values(), counts, strict=True)),
            lambda: f"open files left: {self.at_rest()}, and before {before}",
        )
        return self.at_rest()

    def is_well(self) -> None:
        """It answers, and computes."""
        assert self.http.get("/health").json() == {"status": "ok"}
        assert self.http.get("/ready").status_code == 200
        body = {"prompt": "Hi", "max_tokens": 3, "ignore_eos": True}
        assert self.http.post("/v1/completions", json=body).json()["usage"]["completion_tokens"] == 3


@pytest.fixture(scope="module")
def examined(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Examined]:
    folder = tmp_path_factory.mktemp("endurance")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(folder))  # none of the user's own deployments is seen
        with server_process(folder, "endurance") as server, server.client() as client:
            yield Examined(server, client.url)


def test_random_bytes_leave_a_server_alive(examined: Examined) -> None:
    _withstand_noise(examined, 200)


@pytest.mark.slow
def test_random_bytes_on_5000_connections_leave_a_server_alive(examined: Examined) -> None:
    _withstand_noise(examined, 5000)


def _withstand_noise(examined: Examined, count: int) -> None:
    examined.is_well()
    before = examined.at_rest()
    tally = asyncio.run(noise(examined.address, count=count, seed=count))
    after = examined.wait_for_files(before)
    examined.is_well()
    assert children(examined.front) == [examined.engine], "the engine was replaced"
    print(f"{count} connections of noise: {tally}\nbefore {before}\nafter  {after}")
    assert 400 in tally.statuses and not any(status >= 500 for status in tally.statuses)


def test_clients_that_disconnect_leave_nothing_behind(examined: Examined) -> None:
    asyncio.run(crowd(examined.address, count=FEW, seed=0))
    before = examined.at_rest()
    tally = asyncio.run(crowd(examined.address, count=FEW, seed=1))
    examined.wait_for_files(before)
    assert tally.statuses == {200: FEW // 2} and tally.hung_up == FEW // 2
    examined.is_well()


@pytest.mark.slow
def test_1000_clients_half_of_which_disconnect_leave_nothing(examined: Examined) -> None:
    for seed in (1, 2):
        asyncio.run(crowd(examined.address, count=MANY, seed=seed))
    before = examined.at_rest()
    tally = asyncio.run(crowd(examined.address, count=MANY, seed=3))
    after = examined.wait_for_files(before)
    print(f"{MANY} clients: {tally}\nbefore {before}\nafter  {after}\n{metrics(examined.http)}")
    assert tally.hung_up == MANY // 2 and tally.statuses.keys() <= {200, 429}
    for process, measured in after.items():
        assert abs(measured.anonymous / before[process].anonymous - 1) <= MEMORY_MARGIN, process
        assert measured.num_threads <= before[process].num_threads
    examined.is_well()


def test_an_engine_restart_is_retried(examined: Examined) -> None:
    limits = resource.prlimit(examined.front, resource.RLIMIT_NOFILE)
    resource.prlimit(examined.front, resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        os.kill(examined.engine, signal.SIGKILL)
        examined.server.wait_for("could not be started: Too many open files; starting it again")
    finally:
        resource.prlimit(examined.front, resource.RLIMIT_NOFILE, limits)
    wait_until(lambda: examined.http.get("/ready").status_code == 200)
    (examined.engine,) = children(examined.front)
    examined.is_well()


def test_a_client_that_never_reads_is_disconnected(tmp_path: Path) -> None:
    """Its answer is larger than what the system keeps for it, so its request cannot end by itself."""
    body = {"prompt": "Anna", "max_tokens": 2000, "ignore_eos": True, "stream": True, "logprobs": 100}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        with server_process(tmp_path, "unread", "--client-timeout", "1") as server, server.client() as client:
            address = urlsplit(client.url)
            before = Measured.of(server.process.pid).num_files
            with socket.create_connection((address.hostname, address.port)) as connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                connection.sendall(http_request("/v1/completions", body))
                wait_until(lambda: '"status": 499' in server.printed)
                wait_until(lambda: Measured.of(server.process.pid).num_files == before)


def test_clients_that_disconnect_leave_no_task(server: RunningServer) -> None:
    with server.http() as http:
        address = (http.base_url.host, http.base_url.port or 0)
        chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
        http.post("/v1/chat/completions", json=chat).raise_for_status()  # the process that renders templates stays
    server.assert_idle()

    async def tasks() -> list[str]:
        own = asyncio.current_task()
        return sorted(str(task.get_coro()) for task in asyncio.all_tasks() if task is not own)

    before, num_files = server.call(tasks()), len(list(Path("/proc/self/fd").iterdir()))
    tally = asyncio.run(crowd(address, count=FEW, seed=2))
    assert sum(tally.statuses.values()) == tally.hung_up == FEW // 2
    server.assert_idle()
    wait_until(lambda: len(server.call(tasks())) <= len(before), lambda: server.call(tasks()))
    wait_until(lambda: len(list(Path("/proc/self/fd").iterdir())) <= num_files)


def test_a_slow_reader_reads_the_same(server: RunningServer) -> None:
    params = SamplingParams(max_tokens=40, n=4, temperature=1.0, seed=7, ignore_eos=True)

    async def read_slowly() -> None:
        request = await server.service.encode("Anna has", params)
        generations = server.service.begin([request], request_id="slow")
        texts: dict[int, str] = {}

        def take(generation: Generation, text: str) -> Pause:
            texts[generation.choice] = texts.get(generation.choice, "") + text

            async def read_piece() -> None:
                while server.client.outstanding_tokens:  # all is computed before the second piece is read
                    await asyncio.sleep(0.01)
                assert generation.text == texts[generation.choice], "a piece tells of a later state"

            return read_piece

        await server.service.run(generations, take)
        assert len(texts) == 4

    server.call(read_slowly())


# Odd characters ------------------------------------------------------------------------------------------------------

# Characters of two, three and four bytes, joined and combining ones, marks that programs drop, and plain spaces.
ODD = "é€中😀👩‍👧🏽क्ष́ﷺ\ufeff\u200b\u2028\x00\t\n\r \u00a0\U0010fffd" + 4 * "中😀🚲"


def test_pieces_of_50_unusual_texts_join_to_the_whole(server: RunningServer) -> None:
    asyncio.run(_compare_streams(server, 50))


@pytest.mark.slow
def test_pieces_of_2000_unusual_texts_join_to_the_whole(server: RunningServer) -> None:
    asyncio.run(_compare_streams(server, 2000))


async def _compare_streams(server: RunningServer, count: int) -> None:
    places, seen = asyncio.Semaphore(8), ""
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE, trust_env=False) as http:

        async def compare(random: Random) -> str:
            async with places:
                # Few characters, of which all bytes are as likely: some come out whole.
                odd = {"prompt": "".join(random.choices(ODD, k=random.choice([1, 1, 1, 2, 8])))}
                body = _odd_request(random, (await http.post("/tokenize", json=odd)).json()["tokens"])
                whole = (await http.post("/v1/completions", json=body)).json()
                answer = await http.post("/v1/completions", json={**body, "stream": True})
            events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
            assert events.pop() == "[DONE]"
            for choice in whole["choices"]:
                parts = [c for event in events for c in json.loads(event)["choices"] if c["index"] == choice["index"]]
                assert "".join(part["text"] for part in parts) == choice["text"], body
                assert [p["finish_reason"] for p in parts if p["finish_reason"]] == [choice["finish_reason"]], body
                if body["logprobs"] is not None:
                    for name, values in choice["logprobs"].items():
                        lists = [part["logprobs"][name] or [] for part in parts if part["logprobs"]]
                        assert [value for values in lists for value in values] == (values or []), (name, body)
            return "".join(choice["text"] for choice in whole["choices"])

        for texts in range(0, count, 100):
            seen += "".join(await asyncio.gather(*(compare(Random(texts + i)) for i in range(min(100, count - texts)))))
    lengths = {len(character.encode()) for character in seen}
    assert lengths == {1, 2, 3, 4} and "\ufffd" in seen, "the texts are not odd enough to show anything"
    print(f"{count} requests, {len(seen)} characters, {len(set(seen))} different")


def _odd_request(random: Random, odd_ids: list[int]) -> dict[str, Any]:
    """One that gives whole, cut and impossible characters, and sometimes ends at one of them."""
    biased = random.random() < 0.7
    stop = random.choice([None, None, ["é"], ["\ufffd\ufffd", "中"], ["😀", " ", "€é"]])
    return {
        "prompt": random.choice(["Anna has", "é€", [[7], [8, 9]]]),
        "max_tokens": random.randint(1, 60),
        "temperature": random.choice([8.0, 20.0]) if biased else random.choice([2.0, 100.0]),
        "logit_bias": {str(i): 100 for i in odd_ids} if biased else {},
        "seed": random.getrandbits(40),
        "n": random.choice([1, 2]),
        "ignore_eos": True,
        "stop": stop,
        "logprobs": random.choice([None, None, 0, 3]),
        "echo": random.random() < 0.2,
    }
