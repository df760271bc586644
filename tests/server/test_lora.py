"""LoRA adapters as models of a server: listed, chosen by name, loaded and unloaded by an administrator."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from patience import PATIENCE
from running_server import RunningServer, running_server
from safetensors.torch import load_file
from tiny_adapters import ATTENTION, module_shapes, save_adapter

import splitfuse
from splitfuse.config.engine import EngineConfig
from splitfuse.config.server import ServerConfig
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.engine.client import EngineClient, EngineState
from splitfuse.engine.engine import Engine
from splitfuse.engine.messages import (
    AdapterLoaded,
    Add,
    LoadAdapter,
    UnloadAdapter,
    decode_command,
    decode_report,
    encode,
)
from splitfuse.engine.remote.launcher import SubprocessLauncher
from splitfuse.engine.remote.supervisor import SupervisedEngine
from splitfuse.engine.router import Router
from splitfuse.engine.stream import Stream
from splitfuse.engine.thread import AsyncEngine
from splitfuse.errors import (
    AdapterError,
    ConfigError,
    EngineUnavailableError,
    InvalidRequestError,
    ModelNotFoundError,
)
from splitfuse.models.sources.hub import BUNDLED_MODEL
from splitfuse.runtime.loading import LoadedModel
from splitfuse.server.lifecycle import run_server

PROMPT = "Once upon a time"
KEYS = {"user": "a-users-key", "admin": "an-administrators-key"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    shapes = module_shapes(load_file(BUNDLED_MODEL / "model.safetensors"), ATTENTION)
    parent = tmp_path_factory.mktemp("adapters")
    return [save_adapter(parent / f"folder-{n}", shapes, seed=n) for n in range(2)]


@pytest.fixture(scope="module")
def lora_server(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"{KEYS['user']} name=user\n{KEYS['admin']} name=root admin=yes\n")
    keys.chmod(0o600)
    with running_server(ServerConfig(api_key_file=str(keys)), lora=[f"first={folders[0]}"]) as server:
        yield server


def post(server: RunningServer, path: str, key: str = "admin", **body: Any) -> httpx.Response:
    with server.http(headers={"authorization": f"Bearer {KEYS[key]}"}) as http:
        return http.post(path, json=body)


def complete(server: RunningServer, model: str | None) -> str:
    answer = post(server, "/v1/completions", "user", model=model, prompt=PROMPT, max_tokens=12, temperature=0)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == (model or "storyteller")
    text: str = answer.json()["choices"][0]["text"]
    return text


def fingerprint(server: RunningServer, model: str) -> str:
    answer = post(server, "/v1/completions", "user", model=model, prompt=PROMPT, max_tokens=1)
    name: str = answer.json()["system_fingerprint"]
    return name


@pytest.fixture(scope="module")
def wanted(folders: list[Path]) -> dict[str | None, str]:
    pipe = splitfuse.pipeline(lora=[f"first={folders[0]}", f"second={folders[1]}"])
    with pytest.raises(InvalidRequestError, match="no adapter 'third' is loaded; those that are: first, second"):
        pipe(PROMPT, adapter="third")
    first, again = pipe.embed([PROMPT, PROMPT], adapter="first")
    assert first == again != pipe.embed(PROMPT)[0] != pipe.embed(PROMPT, adapter="second")[0] != first
    return {name: pipe(PROMPT, adapter=name, max_new_tokens=12)[0].generated_text for name in (None, "first", "second")}


def test_adapters_are_models(lora_server: RunningServer, wanted: dict[str | None, str]) -> None:
    assert len(set(wanted.values())) == 3
    assert complete(lora_server, None) == complete(lora_server, "storyteller") == wanted[None]
    assert complete(lora_server, "first") == wanted["first"]
    client = openai.OpenAI(base_url=f"{lora_server.url}/v1", api_key=KEYS["user"])
    assert [(each.id, each.parent) for each in client.models.list()] == [  # type: ignore[attr-defined]
        ("storyteller", None),
        ("first", "storyteller"),
    ]
    assert client.models.retrieve("first").id == "first"
    stream = client.completions.create(model="first", prompt=PROMPT, max_tokens=12, temperature=0, stream=True)
    assert "".join(event.choices[0].text for event in stream) == wanted["first"]
    with splitfuse.client(lora_server.url, api_key=KEYS["user"]) as ours:
        assert ours(PROMPT, max_new_tokens=12, adapter="first")[0].generated_text == wanted["first"]
    answer = post(lora_server, "/v1/completions", model="second", prompt=PROMPT)
    assert answer.status_code == 404
    assert "this server has 'storyteller', 'first'" in answer.json()["error"]["message"]


def test_administrator_loads_and_unloads(
    lora_server: RunningServer, folders: list[Path], wanted: dict[str | None, str]
) -> None:
    load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
    second = {"lora_name": "second", "lora_path": str(folders[1])}
    refused = post(lora_server, load, "user", **second)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "no_administrator")
    assert "write admin=yes after a key in it" in refused.json()["error"]["message"]
    assert post(lora_server, unload, "user", lora_name="first").status_code == 403

    loaded = post(lora_server, load, **second)
    assert (loaded.status_code, loaded.json()["id"], loaded.json()["parent"]) == (200, "second", "storyteller")
    assert complete(lora_server, "second") == wanted["second"]
    again = post(lora_server, load, **second)
    assert (again.status_code, again.json()["error"]["param"]) == (400, "lora_name")
    prints = [fingerprint(lora_server, name) for name in ("storyteller", "first", "second")]
    assert post(lora_server, load, **second | {"lora_path": str(folders[0])}, load_inplace=True).status_code == 200
    assert complete(lora_server, "second") == wanted["first"]
    assert len(set(prints)) == 3 and fingerprint(lora_server, "second") == prints[1]

    for path, message in (
        ("/nowhere", "there is no folder /nowhere with an adapter"),
        (str(BUNDLED_MODEL), "has no adapter_config.json"),
    ):
        answer = post(lora_server, load, lora_name="third", lora_path=path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_adapter")
        assert message in answer.json()["error"]["message"]
    for name in ("storyteller", "a b"):
        assert post(lora_server, load, lora_name=name, lora_path=str(folders[0])).status_code == 400

    gone = post(lora_server, unload, lora_name="second")
    assert (gone.status_code, gone.json()) == (200, {"id": "second", "deleted": True, "object": "model"})
    assert post(lora_server, unload, lora_name="second").status_code == 404
    assert post(lora_server, "/v1/completions", model="second", prompt=PROMPT).status_code == 404
    lora_server.wait_until(lambda: len(lora_server.engine.executor.adapters) == 1)


def test_request_keeps_an_adapter_that_is_unloaded_before_it_begins(
    lora_server: RunningServer, folders: list[Path], wanted: dict[str | None, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, opened = lora_server.client, lora_server.client.open

    def open_late(request: Add) -> Stream:
        client.unload_adapter("second")
        return opened(request)

    post(lora_server, "/v1/load_lora_adapter", lora_name="second", lora_path=str(folders[1]))
    with monkeypatch.context() as patch:
        patch.setattr(client, "open", open_late)
        assert complete(lora_server, "second") == wanted["second"]
    assert "second" not in client.adapters
    lora_server.wait_until(lambda: len(lora_server.engine.executor.adapters) == 1)


def test_name_that_is_being_loaded_is_not_ready(
    lora_server: RunningServer, folders: list[Path], wanted: dict[str | None, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
    second = {"lora_name": "second", "lora_path": str(folders[1])}
    go_on, read = threading.Event(), LoadedModel.load_adapter

    def read_late(self: LoadedModel, path: str) -> Any:
        assert go_on.wait(PATIENCE)
        return read(self, path)

    monkeypatch.setattr(LoadedModel, "load_adapter", read_late)
    with ThreadPoolExecutor() as threads:
        try:
            loaded = threads.submit(post, lora_server, load, **second)
            lora_server.wait_until(lambda: "second" in lora_server.client.loading_adapters)
            for answer in (
                post(lora_server, load, lora_name="second", lora_path=str(folders[0])),
                post(lora_server, unload, lora_name="second"),
                post(lora_server, "/v1/completions", model="second", prompt=PROMPT),
            ):
                assert answer.status_code == 503
                assert "the adapter 'second' is being loaded" in answer.json()["error"]["message"]
        finally:
            go_on.set()
        assert loaded.result().status_code == 200
    assert complete(lora_server, "second") == wanted["second"]
    assert post(lora_server, unload, lora_name="second").status_code == 200


def test_replicas_load_an_adapter_all_or_none(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig.from_settings({"num_blocks": 64, "num_threads": 1})
    first = Engine.load(config)
    replicas = [AsyncEngine(first), AsyncEngine(Engine(config, first.model))]

    async def fail(name: str, path: str) -> None:
        raise AdapterError(f"{name} is gone from {path}")

    async def scenario() -> None:
        client = Router(replicas)
        await client.start()
        try:
            with monkeypatch.context() as patch, pytest.raises(AdapterError, match="a is gone"):
                patch.setattr(replicas[1], "load_adapter", fail)
                await client.load_adapter("a", str(folders[0]))
            assert not client.adapters and not replicas[0].adapters
            load = replicas[1].load_adapter
            with monkeypatch.context() as patch, pytest.raises(AdapterError, match="not the same for all engines"):
                patch.setattr(replicas[1], "load_adapter", lambda name, _: load(name, str(folders[1])))
                await client.load_adapter("a", str(folders[0]))
            assert not client.adapters and not replicas[0].adapters
            await client.load_adapter("a", str(folders[0]))
            digest = client.adapters["a"]
            before = await answer_of(client, "a")
            client.hold_adapter(digest)
            await client.load_adapter("a", str(folders[1]))
            assert client.adapters["a"] != digest
            assert await tokens_of(client, digest) == before
            client.let_go_adapter(digest)
            with pytest.raises(EngineUnavailableError, match="no engine is ready that has the adapter of the request"):
                await tokens_of(client, digest)
            with pytest.raises(EngineUnavailableError, match="the adapter of the request is not loaded any more"):
                await tokens_of(replicas[0], digest)
        finally:
            await client.close()

    asyncio.run(scenario())


def test_an_adapter_that_is_gone_at_a_restart_is_lacking(
    folders: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"num_blocks": 64, "num_threads": 1, "lora": [f"gone={tmp_path}/gone", f"first={folders[0]}"]}
    config = EngineConfig.from_settings(settings)
    with pytest.raises(ModelNotFoundError, match="there is no folder"):
        Engine.load(config)
    assert list(Engine.load(config, is_restart=True).adapters) == ["first"]
    assert "the LoRA adapter gone is not loaded again: there is no folder" in caplog.text


def test_adapter_needs_another_name_than_the_model(folders: list[Path]) -> None:
    with pytest.raises(ConfigError, match="lora gives an adapter the name 'storyteller' of the model itself"):
        asyncio.run(run_server(EngineConfig.from_settings({"lora": f"storyteller={folders[0]}"}), ServerConfig()))


async def answer_of(client: EngineClient, adapter: str) -> list[int]:
    return await tokens_of(client, client.adapters[adapter])


async def tokens_of(client: EngineClient, digest: str) -> list[int]:
    add = Add("one", (5, 6, 7, 8), SamplingParams(max_tokens=8), adapter=digest)
    async with client.open(add) as stream:
        return [token async for output in stream for token in output.token_ids]


def test_messages_about_adapters_cross_processes() -> None:
    for command in (LoadAdapter("a", "folder"), UnloadAdapter("ab"), Add("x", (1,), SamplingParams(), adapter="ab")):
        assert decode_command(encode(command)) == command
    for report in (AdapterLoaded("a", "digest"), AdapterLoaded("a", error="absent")):
        assert decode_report(encode(report)) == report


@pytest.mark.slow
def test_adapters_come_back_with_a_process(folders: list[Path], tmp_path: Path) -> None:
    gone = shutil.copytree(folders[0], tmp_path / "gone")
    settings = {"num_blocks": 64, "num_threads": 1, "lora": [f"first={folders[0]}", f"gone={gone}"]}
    config = EngineConfig.from_settings(settings)

    async def scenario() -> None:
        engine = SupervisedEngine(SubprocessLauncher(config))
        client = Router([engine])
        await client.start()
        try:
            await client.load_adapter("second", str(folders[1]))
            client.unload_adapter("first")
            with pytest.raises(AdapterError, match="no folder /nowhere"):
                await client.load_adapter("third", "/nowhere")
            before = await answer_of(client, "second")
            shutil.rmtree(gone)
            assert engine.pid is not None
            os.kill(engine.pid, signal.SIGKILL)
            async with asyncio.timeout(PATIENCE):
                while client.adapters:
                    await asyncio.sleep(0.01)
                with pytest.raises(EngineUnavailableError):
                    await client.load_adapter("second", str(folders[1]))
                while not client.adapters:
                    assert client.state is not EngineState.READY or "second" in client.loading_adapters
                    await asyncio.sleep(0.01)
            assert list(client.adapters) == ["second"] and await answer_of(client, "second") == before
        finally:
            await client.close()

    asyncio.run(scenario())
