"""benchmarks/peers without the peers: parsing, conversion, and the HTTP server of engines without one."""

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE

from benchmarks.peers.completions_server import Completion, RefusedError, Tokens, serve
from benchmarks.peers.contender import DRIVEN, SERVED, Contender
from benchmarks.peers.convert import converted
from splitfuse.bench.endpoint import Endpoint
from splitfuse.bench.load import closed_loop
from splitfuse.bench.workload import Independent, Lengths, LoadRequest

HOST = "127.0.0.1"

# How they are named --------------------------------------------------------------------------------------------------


def test_contender_has_kind_form_and_options() -> None:
    openvino = Contender.parse("openvino,precision=int8,max_num_batched_tokens=512,dynamic_split_fuse=false", SERVED)
    assert (openvino.kind, openvino.form) == ("openvino", "int8")
    assert openvino.options == {"max_num_batched_tokens": 512, "dynamic_split_fuse": False}
    assert Contender.parse("openvino", SERVED).form == "fp16"
    transformers = Contender.parse("transformers,max_batch_tokens=256", SERVED)
    assert transformers.options == {"max_batch_tokens": 256}
    assert transformers.model(Path("/models/x"), Path("/peers")) == Path("/models/x")  # it reads our folder as it is


@pytest.mark.parametrize(
    ("text", "kinds", "said"),
    [
        ("openvino,precision=BF16", SERVED, "openvino reads fp16, int8, not 'BF16'"),
        ("openvino", DRIVEN, "'openvino' is none of splitfuse, vllm, llama-server, llama-bench"),
        ("llama-bench", SERVED, "'llama-bench' is none of"),
        ("transformers,max_batch_tokens", SERVED, "'max_batch_tokens' should be name=value"),
    ],
)
def test_invalid_contender_is_rejected(text: str, kinds: tuple[str, ...], said: str) -> None:
    with pytest.raises(ValueError) as refusal:
        Contender.parse(text, kinds)
    assert said in str(refusal.value)


@pytest.mark.parametrize("script", ["drive_vllm", "serve_openvino", "write_gguf", "drive_llama_bench"])
def test_help_needs_no_peer(script: str) -> None:
    command = [sys.executable, "-m", f"benchmarks.peers.{script}", "--help"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert (ended.returncode, ended.stderr) == (0, "") and len(ended.stdout) > 40


def test_model_is_converted_once(tmp_path: Path) -> None:
    made = tmp_path / "0.5b-openvino" / "int8"
    made.mkdir(parents=True)
    assert Contender.parse("openvino,precision=int8", SERVED).model(tmp_path / "0.5b", tmp_path) == made
    with pytest.raises(FileNotFoundError, match=r"benchmarks\.peers\.install openvino"):
        converted(tmp_path / "0.5b", "fp16", tmp_path)  # who would make it is not there


# The front -----------------------------------------------------------------------------------------------------------


class Counting:
    """Says the prompt's length, and counts on: two tokens a piece. A prompt that begins with 13 fails halfway."""

    room = 64
    facts = {"version": "1"}  # noqa: RUF012

    def __init__(self) -> None:
        self.taken_back = asyncio.Event()
        self.eos_ignored: list[bool] = []

    async def generate(self, prompt: Tokens, max_tokens: int, *, ignore_eos: bool) -> AsyncGenerator[Tokens, None]:
        self.eos_ignored.append(ignore_eos)
        made = [len(prompt) + i for i in range(max_tokens)]
        try:
            for i in range(0, max_tokens, 2):
                await asyncio.sleep(0)
                if i >= max_tokens // 2 and prompt[0] == 13:
                    raise RuntimeError("thirteen")
                yield made[i : i + 2]
                if prompt[0] == 99:
                    await asyncio.Event().wait()
        except (asyncio.CancelledError, GeneratorExit):
            self.taken_back.set()
            raise

    async def run(self) -> None:
        await asyncio.Event().wait()


@asynccontextmanager
async def served(engine: Any) -> AsyncIterator[str]:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    task = asyncio.create_task(serve(engine, HOST, port))
    try:
        while True:
            with suppress(OSError):
                (await asyncio.open_connection(HOST, port))[1].close()
                break
            await asyncio.sleep(0.01)
        yield f"http://{HOST}:{port}"
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def test_tokens_are_counted_by_ids() -> None:
    async def run() -> None:
        engine = Counting()
        async with served(engine) as url:
            endpoint = Endpoint(url)
            await endpoint.start()
            assert (endpoint.room, endpoint.about["token_times"]) == (64, "token_ids")
            assert endpoint.about["ignores_eos"] and engine.eos_ignored[0] is False and engine.eos_ignored[-1] is True
            answer = await endpoint.ask(LoadRequest("x", 0, 0, (5, 6, 7), 5))
            assert (answer.error, answer.num_prompt_tokens, answer.tokens) == (None, 3, (3, 4, 5, 6, 7))
            failed = await endpoint.ask(LoadRequest("y", 0, 0, (13, 6), 8))
            assert failed.error == "thirteen" and len(failed.token_times) == 4
            workload = Independent(Lengths(20, 6, room=endpoint.room), endpoint.vocabulary)
            point = await closed_loop(endpoint, workload, clients=4, requests=12)
            assert all(record.error in (None, "thirteen") and record.token_times for record in point.records)

    asyncio.run(run())


def test_disconnect_aborts_the_request() -> None:
    async def run() -> None:
        engine = Counting()
        async with served(engine) as url:
            reader, writer = await asyncio.open_connection(HOST, int(url.rpartition(":")[2]))
            body = json.dumps({"prompt": [99], "max_tokens": 9, "temperature": 0, "stream": True}).encode()
            writer.write(b"POST /v1/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
            await reader.readuntil(b"data:")
            assert not engine.taken_back.is_set()
            writer.close()
            await engine.taken_back.wait()

    asyncio.run(run())


def test_dead_engine_ends_its_server() -> None:
    class Dying(Counting):
        async def run(self) -> None:
            raise RuntimeError("dead")

    async def run() -> None:
        await serve(Dying(), HOST, 0)

    with pytest.raises(ExceptionGroup) as group:
        asyncio.run(run())
    assert [str(error) for error in group.value.exceptions] == ["dead"]


GOOD: dict[str, Any] = {"prompt": [1, 2], "max_tokens": 4, "temperature": 0, "stream": True}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": "one"}, "list of token ids"),
        ({"prompt": []}, "list of token ids"),
        ({"prompt": [True]}, "list of token ids"),
        ({"max_tokens": 0}, "at least 1, not 0"),
        ({"max_tokens": 63}, "2 + 63, are over the room of 64"),
        ({"temperature": 1}, "temperature should be 0"),
        ({"stream": False}, "stream should be true"),
        ({"stream_options": {"continuous_usage_stats": True}}, "include_usage"),
        ({"logprobs": 1}, "'logprobs' is not served"),
    ],
)
def test_unsupported_parameter_is_rejected_by_name(change: dict[str, Any], said: str) -> None:
    assert Completion.parse(json.dumps(GOOD).encode(), 64) == Completion([1, 2], 4, False, False)
    with pytest.raises(RefusedError) as refusal:
        Completion.parse(json.dumps({**GOOD, **change}).encode(), 64)
    assert said in str(refusal.value)
