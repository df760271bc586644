"""Check that the phases of `splitfuse explain` add up to the wall-clock latency of mixed requests.

    python -m tests.soak.latency_sums [--requests N] [--clients N] [SERVE FLAGS ...]

Some are streams, some have several choices, stop strings or a deadline; some clients read slowly, some disconnect. The
KV cache is small, so some requests are preempted. The sum of phases is compared with the server's log, which reads a
clock twice per request, and with the client's own clock, from before it sends until it has all or disconnects. Slow
readers are compared with the log alone: the server has handed over what is still in the system's buffers. Goal: 1 %.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import httpx
from server_load import wait_until_idle
from server_process import server_process, wait_until
from stories import make_story

from splitfuse.core.latency.phases import LatencyPhase

TIGHT = ["--num-blocks", "72", "--max-num-batched-tokens", "128"]
GOAL = 0.01
RECEIVED = 4096  # bytes of the receive buffer of a slow reader


@dataclass(frozen=True)
class Planned:
    """A request and the behaviour of its client."""

    name: str
    kind: str
    body: dict[str, Any]

    @classmethod
    def random(cls, number: int) -> Planned:
        random = Random(number)
        kind = random.choices(
            ["whole", "stream", "choices", "stop", "deadline", "slow reader", "disconnects"], [6, 6, 2, 3, 1, 1, 3]
        )[0]
        text = "\n".join(make_story(random, 100, lambda s: len(s.split())).passage for _ in range(random.randint(1, 6)))
        body: dict[str, Any] = {"prompt": text, "max_tokens": random.randint(8, 200), "ignore_eos": True}
        body["stream"] = kind in ("stream", "slow reader", "disconnects") or random.random() < 0.3
        if kind == "choices":
            body |= {"n": 3, "temperature": 1.0, "seed": number, "max_tokens": random.randint(8, 60)}
        if kind == "stop":
            body["stop"] = [random.choice(["a", "keeps", "boat", "\n"])]
        if kind == "deadline":
            body |= {"splitfuse_deadline": random.uniform(0.05, 1.0), "max_tokens": 400}
        if kind == "slow reader":
            body |= {"logprobs": 5, "max_tokens": 300}
        return cls(f"soak-{number}", kind, body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--clients", type=int, default=16)
    arguments, flags = parser.parse_known_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    with (
        server_process(folder, f"soak-{folder.name}", *(flags or TIGHT)) as server,
        server.client() as client,
        httpx.Client(base_url=client.url, timeout=60, trust_env=False) as http,
    ):
        asked = [Planned.random(number) for number in range(arguments.requests)]
        address = (http.base_url.host, http.base_url.port or 0)
        seconds = asyncio.run(_ask_all(address, asked, arguments.clients))
        wait_until_idle(http)
        names = {each.name for each in asked}

        def records() -> dict[str, dict[str, Any]]:
            found = [json.loads(line) for line in server.printed.splitlines()]
            return {record["request_id"]: record for record in found if record["request_id"] in names}

        wait_until(lambda: len(records()) == len(asked))
        explained, forgotten = {}, 0
        for each in asked:
            answer = http.get(f"/v1/splitfuse/requests/{each.name}")
            if answer.status_code == 200:
                explained[each.name] = answer.json()
            else:  # it ended before an engine had it
                forgotten += 1
        _report(asked, explained, records(), seconds)
        print(f"{len(explained)} of {len(asked)} explained; {forgotten} ended before an engine had them")


def _report(
    asked: list[Planned],
    explained: dict[str, dict[str, Any]],
    records: dict[str, dict[str, Any]],
    seconds: dict[str, float],
) -> None:
    print(f"{'':<12} {'requests':>8} {'median s':>9}   {'against the log':>22}   {'against the client':>22}")
    print(f"{'':<12} {'':>8} {'':>9}   {'median':>10} {'worst':>11}   {'median':>10} {'worst':>11} {'> 1 %':>6}")
    for kind in (*sorted({each.kind for each in asked}), "all"):
        names = [e.name for e in asked if kind in (e.kind, "all") and e.name in explained]
        timed = [n for n in names if n in seconds]
        sums = {name: sum(explained[name]["phases"].values()) for name in names}
        log = [abs(sums[n] / records[n]["total_seconds"] - 1) for n in names]
        own = [abs(sums[n] / seconds[n] - 1) for n in timed]
        beyond = f"{median(own):10.4%} {max(own):11.4%} {sum(d > GOAL for d in own):6}" if own else "-"
        print(
            f"{kind:<12} {len(names):8} {median(sums.values()):9.3f}   {median(log):10.4%} {max(log):11.4%}   {beyond}"
        )
    totals = Counter[str]()
    touched = Counter[str]()
    for explanation in explained.values():
        totals.update(explanation["phases"])
        touched.update(explanation["phases"].keys())
    whole = sum(totals.values())
    print("\nphases of all requests together")
    for part in LatencyPhase:
        if part in totals:
            print(f"{totals[part] / whole:8.2%}  of {touched[part]:4} requests  {part.meaning}")
    off = sorted(
        ((sum(explained[n]["phases"].values()) - seconds[n], n) for n in explained if n in seconds),
        key=lambda x: -abs(x[0]),
    )
    print("\nfarthest from the client's clock, ms: " + ", ".join(f"{1000 * d:.2f}" for d, _ in off[:8]))


async def _ask_all(address: tuple[str, int], asked: list[Planned], clients: int) -> dict[str, float]:
    """Return the seconds that the client measured by request name, except for slow readers."""
    seconds: dict[str, float] = {}
    queue = iter(asked)
    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(_client(address, queue, seconds))
    return seconds


async def _client(address: tuple[str, int], queue: Iterator[Planned], seconds: dict[str, float]) -> None:
    for asked in queue:
        connection = socket.socket()
        if asked.kind == "slow reader":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVED)
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, address)
        reader, writer = await asyncio.open_connection(sock=connection, limit=RECEIVED)
        content = json.dumps(asked.body).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n"
            f"x-request-id: {asked.name}\r\ncontent-length: {len(content)}\r\n\r\n"
        )
        await asyncio.sleep(0.005)  # the server has accepted the connection
        began = time.monotonic()
        writer.write(head.encode() + content)
        if asked.kind == "disconnects":
            await asyncio.sleep(Random(asked.name).uniform(0.05, 1.0))
        elif asked.kind == "slow reader":
            while await reader.read(RECEIVED):
                await asyncio.sleep(0.05)
        else:
            while await reader.read(2**16):
                pass
        if asked.kind != "slow reader" and not (asked.kind == "disconnects" and reader.at_eof()):
            seconds[asked.name] = time.monotonic() - began
        writer.close()


if __name__ == "__main__":
    main()
