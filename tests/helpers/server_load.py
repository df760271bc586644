"""Rude clients by the hundred, and what is measured of a server before and after them. On plain sockets: a client
library would be too polite, and would hide who holds a connection."""

import asyncio
import json
import socket
import struct
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import httpx
from patience import PATIENCE

JSON_ROUTES = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
_LINGER_0 = struct.pack("ii", 1, 0)  # closing resets the connection


@dataclass(frozen=True)
class Measured:
    """One process at rest."""

    num_files: int
    num_threads: int
    anonymous: int  # bytes of memory that no file stands for: RssAnon

    @classmethod
    def of(cls, pid: int) -> "Measured":
        status = Path(f"/proc/{pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        return cls(
            len(list(Path(f"/proc/{pid}/fd").iterdir())),
            int(fields["Threads"]),
            int(fields["RssAnon"].split()[0]) * 1024,
        )


ENGINE, FRONT = "engine.remote.worker", "fronts.process"
"""Modules that processes of a server run, as their command lines have them."""


def children(pid: int, module: str = ENGINE) -> list[int]:
    """The engines that a server's process has started, or those of its processes that run another module."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    started = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    return [child for child in started if module.encode() in Path(f"/proc/{child}/cmdline").read_bytes()]


def metrics(http: httpx.Client) -> dict[str, float]:
    """Every sample without labels but the model's, by its name."""
    samples: dict[str, float] = {}
    for line in http.get("/metrics").text.splitlines():
        name, _, rest = line.partition("{")
        labels, _, value = rest.rpartition("} ")
        if not line.startswith("#") and "," not in labels:
            samples[name] = float(value)
    return samples


def wait_until_idle(http: httpx.Client) -> None:
    """Wait until /metrics says that no request holds anything; fail with the metrics that say otherwise."""
    names = ("num_requests_running", "num_requests_waiting", "outstanding_tokens", "kv_blocks_used")
    limit = time.monotonic() + PATIENCE
    while True:
        seen = metrics(http)
        busy = {name: seen[f"splitfuse:{name}"] for name in names}
        if not any(busy.values()):
            return
        assert time.monotonic() < limit, busy
        time.sleep(0.05)


def wait_until(condition: Callable[[], object], what: Callable[[], object] = lambda: "it never came true") -> None:
    """Until `condition` holds; `what` is said if it never does."""
    limit = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < limit, what()
        time.sleep(0.02)


# Clients -------------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """How clients fared."""

    statuses: dict[int, int] = field(default_factory=dict)
    hung_up: int = 0

    def count(self, status: int) -> None:
        self.statuses[status] = self.statuses.get(status, 0) + 1


def http_request(path: str, body: Any, *, keep_alive: bool = False) -> bytes:
    """A POST as it goes over the wire."""
    content = json.dumps(body).encode()
    connection = "keep-alive" if keep_alive else "close"
    return (
        f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: {connection}\r\n"
        f"content-length: {len(content)}\r\n\r\n"
    ).encode() + content


def random_request(random: Random) -> tuple[str, dict[str, Any]]:
    """A path and a body: streaming or not, short or long, one choice or several."""
    body: dict[str, Any] = {
        "max_tokens": random.randint(1, 120),
        "ignore_eos": True,
        "seed": random.getrandbits(32),
        "stream": random.random() < 0.5,
        "n": random.choice([1, 1, 1, 2, 3]),
    }
    text = " ".join(random.choices(["Anna", "has", "a", "red", "boat", "and", "sails."], k=random.randint(1, 200)))
    if random.random() < 0.5:
        return "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": text}]}
    return "/v1/completions", {**body, "prompt": [text, "The"] if random.random() < 0.2 else text}


async def crowd(address: tuple[str, int], *, count: int, seed: int) -> Tally:
    """So many clients at once, every second of which hangs up at a random moment: the more there are, the longer they
    are answered.
    """
    tally = Tally()
    randoms = [Random(seed * 1_000_003 + i) for i in range(count)]
    async with asyncio.TaskGroup() as group:
        for i, random in enumerate(randoms):
            group.create_task(_client(address, random, tally, i % 2 == 1, pause=count / 400))
    return tally


async def _client(address: tuple[str, int], random: Random, tally: Tally, hangs_up: bool, pause: float) -> None:
    path, body = random_request(random)
    message = http_request(path, body)
    reader, writer = await asyncio.open_connection(*address)
    connection = writer.get_extra_info("socket")
    try:
        if not hangs_up:
            writer.write(message)
            tally.count(_check_answer(await asyncio.wait_for(reader.read(), PATIENCE), body))
            return
        tally.hung_up += 1
        match random.randrange(4):
            case 0:  # in the middle of its own request
                writer.write(message[: random.randrange(len(message))])
            case 1:  # when so much of the answer has come
                writer.write(message)
                with suppress(asyncio.IncompleteReadError):
                    await asyncio.wait_for(reader.readexactly(random.randint(1, 4000)), PATIENCE)
            case _:  # at any time
                writer.write(message)
                await asyncio.sleep(random.expovariate(1 / pause))
        if random.random() < 0.5 and not writer.is_closing():
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_0)
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


def _check_answer(answer: bytes, body: dict[str, Any]) -> int:
    """The status of an answer, which must be whole."""
    head, _, content = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 "), answer[:200]
    status = int(head.split(b" ", 2)[1])
    if status == 200 and body["stream"]:
        assert b"data: [DONE]\n\n" in content and content.endswith(b"0\r\n\r\n"), content[-500:]
    else:
        assert json.loads(content), content[:200]
    return status


# Noise ---------------------------------------------------------------------------------------------------------------


def hostile_bytes(random: Random) -> Iterable[bytes]:
    """What a connection sends, piece by piece, before it is closed: hardly any of it is HTTP."""
    path = random.choice([*JSON_ROUTES, "/health", "/v1/models", "/", "/\0", "/%00%ff", "//", "*", "x"])
    good = http_request("/v1/completions", {"prompt": "Hi", "max_tokens": 3}, keep_alive=True)
    match random.randrange(14):
        case 0:
            return [random.randbytes(random.randint(1, 5000))]
        case 1:
            return [random.randbytes(100) + b"\r\n\r\n", random.randbytes(70000)]
        case 2:
            return [good[: random.randrange(1, len(good))]]
        case 3:
            return [
                b"GET /health HTTP/1.1\r\nhost: x\r\nx-long: " + b"a" * random.randint(60_000, 300_000) + b"\r\n\r\n"
            ]
        case 4:
            return [b"GET /health HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * random.randint(100, 20_000) + b"\r\n"]
        case 5:  # pipelined, the last one cut
            return [good * random.randint(2, 12) + good[: random.randrange(len(good))]]
        case 6:
            return [b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n", good]
        case 7:
            chunks = b"".join(b"%x\r\n%b\r\n" % (n, b"{" * n) for n in (1, 2, 3))
            broken = random.choice([b"ffffffffffffffffff\r\n", b"zz\r\n", b"-1\r\n", b"5\r\nabc", b"0\r\nx: y\r\n"])
            head = b"POST /tokenize HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
            return [head, chunks, broken]
        case 8:
            return [f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode("latin-1") * 3]
        case 9:
            content = random.randbytes(random.randint(1, 2000))
            head = (
                f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}"
            )
            return [head.encode("latin-1") + b"\r\n\r\n" + content]
        case 10:  # both lengths at once
            return [good.replace(b"\r\n\r\n", b"\r\ntransfer-encoding: chunked\r\n\r\n", 1)]
        case 11:
            upgrade = b"GET / HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
            return [upgrade + b"sec-websocket-key: x\r\nsec-websocket-version: 13\r\n\r\n", random.randbytes(200)]
        case 12:  # TLS to a server that has none
            return [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + random.randbytes(500)]
        case _:
            deep = b"[" * random.randint(1000, 200_000)
            content = b'{"prompt":' + deep
            head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(content)
            return [head + content]


async def noise(address: tuple[str, int], *, count: int, seed: int) -> Tally:
    """So many connections, 50 at a time, of which none says anything sensible to its end."""
    tally, places = Tally(), asyncio.Semaphore(50)

    async def one(random: Random) -> None:
        async with places:
            reader, writer = await asyncio.open_connection(*address)
            answer, connection = b"", writer.get_extra_info("socket")
            try:
                for piece in hostile_bytes(random):
                    writer.write(piece)
                    await asyncio.sleep(random.random() * 0.01)
                if random.random() < 0.7:  # else it closes without waiting for any answer
                    with suppress(TimeoutError):
                        answer = await asyncio.wait_for(reader.read(100_000), 2.0)
                if random.random() < 0.3 and not writer.is_closing():
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_0)
            except ConnectionError:
                pass
            finally:
                writer.close()
                with suppress(ConnectionError):
                    await writer.wait_closed()
            if answer.startswith(b"HTTP/1.1 "):
                tally.count(int(answer.split(b" ", 2)[1]))
            else:
                tally.hung_up += 1

    async with asyncio.TaskGroup() as group:
        for i in range(count):
            group.create_task(one(Random(seed * 1_000_003 + i)))
    return tally
