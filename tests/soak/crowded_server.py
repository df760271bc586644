"""Two thousand connections, half of them silent, slow or broken, on a server whose engine is killed every minute.

    python -m tests.soak.crowded_server [--minutes 60] [--connections 2000] [--seed 0] [SERVE FLAGS ...]

The server may open 1,024 descriptors, fewer than there are clients. Half of the clients are correct: each keeps one
connection and sends a request every minute or so, of which 5 % must fail alone (a value that is refused, or a prompt
that makes the model compute NaN). The others are of the kinds in HOSTILE. A process of its own asks /health ten times a
second, each time on a new connection. The exit status is 1 if a correct request failed otherwise than by a 429 or by
the death of its engine, if a request that must fail did not, or if descriptors, threads, memory or the log grew.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from random import Random
from typing import Any

import httpx
from safetensors.torch import load_file, save_file
from server_load import Measured, children, hostile_bytes, http_request, wait_until_idle
from server_process import ServerProcess, server_process

import splitfuse
from splitfuse.models.sources.hub import open_model
from splitfuse.text.tokenizer import Tokenizer

MAX_FILES = 1024
MAX_FRONT_MEMORY = 3 * 10**9  # bytes
PATIENCE = 180.0  # seconds that a correct client waits for its answer
SECONDS_BETWEEN_REQUESTS = 60.0
SECONDS_BETWEEN_DEATHS = 60.0
SHARE_THAT_FAILS = 0.05
POISON = "zebra"  # its first token's embedding is NaN in the model that is served
BUNDLED = Path(splitfuse.__file__).parent / "assets" / "storyteller"
WORDS = (
    "Anna",
    "Erik",
    "has",
    "had",
    "a",
    "the",
    "red",
    "old",
    "boat",
    "house",
    "cello",
    "and",
    "sails",
    "keeps",
    "by",
)

Address = tuple[str, int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--connections", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments, flags = parser.parse_known_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    model = _poisoned_model(folder / "model")
    with ExitStack() as stack:
        server = stack.enter_context(server_process(folder, f"soak-{folder.name}", "--model", str(model), *flags))
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (MAX_FILES, MAX_FILES))  # before it looks
        client = stack.enter_context(server.client())
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4 * arguments.connections + 256), hard))
        with httpx.Client(base_url=client.url, timeout=60, trust_env=False) as http:
            sys.exit(_soak(server, http, arguments.minutes, arguments.connections, arguments.seed))


def _poisoned_model(folder: Path) -> Path:
    """The bundled model, in which the embedding of one token is NaN; its head is a tensor of its own."""
    shutil.copytree(BUNDLED, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    token = Tokenizer.from_source(open_model(None)).encode(POISON)[-1]
    tensors["model.embed_tokens.weight"][token] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    return folder


@dataclass
class Outcomes:
    """What became of the clients' requests."""

    correct: Counter[str] = field(default_factory=Counter)
    must_fail: Counter[str] = field(default_factory=Counter)
    hostile: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)  # what must not happen, in full
    num_deaths: int = 0


def _soak(server: ServerProcess, http: httpx.Client, minutes: float, connections: int, seed: int) -> int:
    address = (str(http.base_url.host), http.base_url.port or 0)
    pid = server.process.pid
    asyncio.run(_crowd(address, Outcomes(), connections=connections, seconds=60, seed=seed - 1, pid=None))
    wait_until_idle(http)
    before, log_before = Measured.of(pid), server.log.stat().st_size + server.out.stat().st_size
    print(f"before, at rest: {before}", flush=True)
    outcomes, answers = Outcomes(), list[_Answer]()
    for half in range(2):
        health = _Health(address)
        health.start()
        crowd = _crowd(address, outcomes, connections=connections, seconds=30 * minutes, seed=seed + half, pid=pid)
        asyncio.run(crowd)
        answers += health.stop()
        wait_until_idle(http)
        print(f"after {30 * (half + 1) * minutes:.0f} s, at rest: {Measured.of(pid)}\n{_summary(answers)}", flush=True)
    after, log_after = Measured.of(pid), server.log.stat().st_size + server.out.stat().st_size
    peak = _peak_memory(pid)
    print(f"the front's peak {peak / 2**20:.0f} MiB; deaths of the engine: {outcomes.num_deaths}")
    print(f"log: {(log_after - log_before) / 2**20:.1f} MiB for {outcomes.correct.total()} correct requests")
    for name in "correct", "must_fail", "hostile":
        print(f"{name}: {dict(getattr(outcomes, name).most_common())}")
    print(_summary(answers))
    faults = outcomes.wrong[:20]
    if after.num_files > before.num_files or after.num_threads > before.num_threads:
        faults.append(f"descriptors or threads grew: {before} -> {after}")
    if after.anonymous > 1.1 * before.anonymous:
        faults.append(f"memory grew by {after.anonymous / before.anonymous - 1:.1%}")
    if peak > MAX_FRONT_MEMORY:
        faults.append(f"the front's peak memory was {peak / 10**9:.1f} GB")
    for fault in faults:
        print("WRONG:", fault)
    print(f"{len(outcomes.wrong)} requests went wrong" if outcomes.wrong else "no request went wrong")
    return 1 if faults else 0


def _peak_memory(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


async def _crowd(
    address: Address, outcomes: Outcomes, *, connections: int, seconds: float, seed: int, pid: int | None
) -> None:
    """So many clients, half of them correct, for so long; with a `pid`, the engine of that server is killed."""
    end = asyncio.get_running_loop().time() + seconds
    clients = []
    for number in range(connections):
        random = Random(1_000_003 * seed + number)
        client = _correct_client if number % 2 else _hostile_client
        clients.append(asyncio.create_task(client(address, random, outcomes, end)))
    killer = asyncio.create_task(_kill_engines(pid, outcomes)) if pid is not None else None
    _, hanging = await asyncio.wait(clients, timeout=seconds + 2 * PATIENCE)
    if hanging:
        outcomes.wrong.append(f"{len(hanging)} clients hang {2 * PATIENCE:.0f} s after the end")
    for task in (*hanging, *([] if killer is None else [killer])):
        task.cancel()
    await asyncio.wait(clients)
    for task in clients:
        if not task.cancelled():
            task.result()


async def _kill_engines(pid: int, outcomes: Outcomes) -> None:
    while True:
        await asyncio.sleep(SECONDS_BETWEEN_DEATHS)
        engines = children(pid)
        if engines:
            with suppress(ProcessLookupError):
                os.kill(engines[0], signal.SIGKILL)
                outcomes.num_deaths += 1


# Correct clients -----------------------------------------------------------------------------------------------------


async def _correct_client(address: Address, random: Random, outcomes: Outcomes, end: float) -> None:
    loop = asyncio.get_running_loop()
    connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
    await asyncio.sleep(random.random() * SECONDS_BETWEEN_REQUESTS)
    while loop.time() < end:
        path, body, expected = _request(random)
        counter = outcomes.correct if expected is None else outcomes.must_fail
        try:
            if connection is None or connection[0].at_eof() or connection[1].is_closing():
                counter["new connections"] += connection is not None
                connection = await asyncio.wait_for(asyncio.open_connection(*address), PATIENCE)
            connection[1].write(http_request(path, body, keep_alive=True))
            outcome = await asyncio.wait_for(_read_answer(connection[0]), PATIENCE)
        except (OSError, EOFError, TimeoutError) as error:
            outcome = f"{type(error).__name__}: {error}"
        counter[outcome if len(outcome) < 60 else outcome[:60]] += 1
        if not _is_right(outcome, expected):
            outcomes.wrong.append(f"{path} {str(body)[:120]}: {outcome}, not {expected or '200'}")
        if not outcome[0].isdigit() and connection is not None:
            connection[1].close()
            connection = None
        await asyncio.sleep(min(random.expovariate(1 / SECONDS_BETWEEN_REQUESTS), max(end - loop.time(), 0.0)))
    if connection is not None:
        connection[1].close()


def _is_right(outcome: str, expected: str | None) -> bool:
    if outcome.startswith(("429 ", "503 engine_unavailable")):
        return True
    return outcome.startswith("200" if expected is None else expected)


def _request(random: Random) -> tuple[str, dict[str, Any], str | None]:
    """A path, a body, and the beginning of the outcome that it must have if it must fail."""
    text = " ".join(random.choices(WORDS, k=random.randint(3, 60)))
    body: dict[str, Any] = {
        "max_tokens": random.randint(1, 24),
        "ignore_eos": True,
        "seed": random.getrandbits(32),
        "stream": random.random() < 0.5,
    }
    chat = random.random() < 0.5
    path = "/v1/chat/completions" if chat else "/v1/completions"
    if random.random() < SHARE_THAT_FAILS:
        wrong = random.choice(
            [
                {"temperature": -1.0},
                {"max_tokens": 10**9},
                {"logit_bias": {"99999": 1}},
                {"top_p": 0},
                {"no_such_parameter": 1},
                {"stop": [""]},
                {"n": 10**6},
                None,
            ]
        )
        if wrong is None:
            return "/v1/completions", body | {"prompt": f"{text} {POISON}", "stream": False}, "500 request_failed"
        body |= wrong
        return path, body | _prompt(text, chat=chat), "400 "
    return path, body | _prompt(text, chat=chat), None


def _prompt(text: str, *, chat: bool) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}


async def _read_answer(reader: asyncio.StreamReader) -> str:
    """The status of a whole answer, with the code of its error."""
    head = await reader.readuntil(b"\r\n\r\n")
    status = head[9:12].decode()
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if line)
    if b"content-length" in fields:
        content = await reader.readexactly(int(fields[b"content-length"]))
    else:
        content = b""
        while size := int(await reader.readline(), 16):
            content += await reader.readexactly(size)
            await reader.readline()
        await reader.readline()
        if b"data: [DONE]" in content:
            return status
        content = content.rstrip().rpartition(b"data: ")[2]
        status = "503" if b"engine_unavailable" in content else "stream"
    if status == "200":
        return status
    try:
        error = json.loads(content)["error"]
    except (ValueError, KeyError, TypeError):
        return f"{status} unreadable {content[-200:]!r}"
    return f"{status} {error['code']} {error['message']}"


# Hostile clients -----------------------------------------------------------------------------------------------------

Act = Callable[[asyncio.StreamReader, asyncio.StreamWriter, Random], Awaitable[None]]


async def _silent(reader: asyncio.StreamReader, _: asyncio.StreamWriter, __: Random) -> None:
    await reader.read(1)


async def _half_head(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: Random) -> None:
    writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n")
    await reader.read(1)


async def _half_body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: Random) -> None:
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
    await reader.read(1)


async def _large_half_body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: Random) -> None:
    writer.write(b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 16000000\r\n\r\n{"prompt":"')
    for _ in range(15):
        writer.write(b"a" * 2**20)
        await writer.drain()
    await reader.read(1)


async def _byte_by_byte(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, random: Random) -> None:
    for byte in http_request("/v1/completions", {"prompt": "Anna has", "max_tokens": 2}, keep_alive=True):
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(random.random())
    await reader.read(1)


async def _reads_nothing(_: asyncio.StreamReader, writer: asyncio.StreamWriter, random: Random) -> None:
    body = {"prompt": "Anna has", "max_tokens": 500, "ignore_eos": True, "stream": True, "n": 2, "logprobs": 5}
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    writer.write(http_request("/v1/completions", body))
    await asyncio.sleep(60 * random.random())


async def _hangs_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter, random: Random) -> None:
    body = {"prompt": "Anna has", "max_tokens": 300, "ignore_eos": True, "stream": random.random() < 0.5}
    writer.write(http_request("/v1/completions", body, keep_alive=True))
    if random.random() < 0.5:
        await asyncio.sleep(random.random())
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    await asyncio.sleep(random.random())


async def _noise(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, random: Random) -> None:
    for piece in hostile_bytes(random):
        writer.write(piece)
        await asyncio.sleep(random.random() * 0.01)
    with suppress(TimeoutError):
        await asyncio.wait_for(reader.read(100_000), 2.0)


async def _hostile_json(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, random: Random) -> None:
    content = random.choice(
        [
            b'{"prompt":' + b"[" * 5_000_000,
            b'{"prompt":[' + b"{}," * 5_000_000 + b"0]}",
            b'{"prompt":"x","stop":[' + b'"",' * 3_000_000 + b'""]}',
            b'{"prompt":"' + b"word " * 3_000_000 + b'"}',
            b'{"messages":[{"role":"user","content":"' + b"\\u00e9" * 2_500_000 + b'"}]}',
        ]
    )
    path = b"/v1/chat/completions" if content.startswith(b'{"m') else b"/v1/completions"
    writer.write(b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (path, len(content)))
    for start in range(0, len(content), 2**16):
        writer.write(content[start : start + 2**16])
        await writer.drain()
    await reader.read(1)


HOSTILE: dict[str, tuple[Act, float]] = {
    "silent": (_silent, 20),
    "half a head": (_half_head, 20),
    "half a body": (_half_body, 20),
    "half of a large body": (_large_half_body, 2),
    "byte by byte": (_byte_by_byte, 15),
    "reads nothing": (_reads_nothing, 4),
    "hangs up": (_hangs_up, 10),
    "noise": (_noise, 8),
    "hostile JSON": (_hostile_json, 1),
}
"""The kinds of hostile clients, and how many of a hundred are of each."""


async def _hostile_client(address: Address, random: Random, outcomes: Outcomes, end: float) -> None:
    loop = asyncio.get_running_loop()
    kinds, weights = list(HOSTILE), [weight for _, weight in HOSTILE.values()]
    await asyncio.sleep(random.random() * SECONDS_BETWEEN_REQUESTS)
    while loop.time() < end:
        kind = random.choices(kinds, weights)[0]
        outcomes.hostile[kind] += 1
        writer = None
        try:
            reader, writer = await asyncio.wait_for(asyncio.open_connection(*address), PATIENCE)
            await asyncio.wait_for(HOSTILE[kind][0](reader, writer, random), min(120.0, max(end - loop.time(), 1.0)))
        except (OSError, EOFError, TimeoutError) as error:
            outcomes.hostile[f"{kind}: {type(error).__name__}"] += 1
        finally:
            if writer is not None:
                writer.transport.abort()
        await asyncio.sleep(min(random.expovariate(1 / 20.0), max(end - loop.time(), 0.0)))


# /health -------------------------------------------------------------------------------------------------------------


_Answer = tuple[datetime, float]  # when it came, and after how many seconds


def _summary(answers: list[_Answer]) -> str:
    """The delays of /health, and when the longest were."""
    delays = sorted(delay for _, delay in answers)
    quantiles = {share: delays[min(int(share * len(delays)), len(delays) - 1)] for share in (0.5, 0.99, 0.999, 1)}
    slowest = sorted(sorted(answers, key=lambda answer: answer[1])[-40:])
    return (
        f"/health: {len(delays)} asked, {sum(delay >= _Health.LIMIT for delay in delays)} without an answer; "
        + ", ".join(f"p{100 * share:g} {1000 * delay:.1f} ms" for share, delay in quantiles.items())
        + "; slowest "
        + ", ".join(f"{1000 * delay:.0f} at {when:%H:%M:%S.%f}"[:-5] for when, delay in slowest)
    )


class _Health:
    """Asks /health ten times a second in a process of its own."""

    LIMIT = 10.0
    """Seconds after which the answer is given up."""

    def __init__(self, address: Address) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_ask_health, args=(address, theirs), daemon=True)

    def start(self) -> None:
        self._process.start()

    def stop(self) -> list[_Answer]:
        self._ours.send(None)
        answers: list[_Answer] = self._ours.recv()
        self._process.join()
        return answers


def _ask_health(address: Address, pipe: Any) -> None:
    answers: list[_Answer] = []
    due = time.monotonic()
    while not pipe.poll(max(due - time.monotonic(), 0)):
        began = max(due, time.monotonic() - 0.1)
        due = max(due + 0.1, time.monotonic() - 1.0)
        try:
            with socket.create_connection(address, timeout=_Health.LIMIT) as connection:
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                answered = connection.recv(100).startswith(b"HTTP/1.1 200")
        except OSError:
            answered = False
        answers.append((datetime.now(), time.monotonic() - began if answered else _Health.LIMIT))
    pipe.send(answers)


if __name__ == "__main__":
    main()
