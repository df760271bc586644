"""LoRA in the engine: bits that no company, preemption or prefix hit changes, and adapters that come and go."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from forced_preemption import force_preemptions
from guessed_drafts import guess
from safetensors.torch import load_file
from tiny_adapters import EVERYTHING, module_shapes, save_adapter

from splitfuse.config.engine import EngineConfig
from splitfuse.core.request_output import RequestOutput
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.engine.engine import Engine
from splitfuse.engine.loop import EngineLoop
from splitfuse.errors import AdapterError, ConfigError, InvalidRequestError

NUM_ADAPTERS = 8
PROMPT = [5, 17, 60, 3, 3, 41, 88, 2] * 5  # longer than a block of 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_models.save("llama-gqa", folder)
    return folder


@pytest.fixture(scope="module")
def folders(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    shapes = module_shapes(load_file(model / "model.safetensors"), EVERYTHING)
    parent = tmp_path_factory.mktemp("adapters")
    return [save_adapter(parent / str(n), shapes, seed=n, r=(2, 16)[n % 2]) for n in range(NUM_ADAPTERS)]


def test_an_adapter_that_is_gone_does_not_end_the_engine_of_the_next_server(
    model: Path, folders: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(folders[0], copied)
    engine = load(model, f"gone={copied}", f"there={folders[1]}")
    loop = EngineLoop(engine, lambda _: None)
    engine.adapters.unload("gone")
    engine.adapters.unload("there")
    shutil.rmtree(copied)
    watched: list[float] = []
    abort_all = engine.abort_all
    engine.abort_all = lambda: (watched.append(loop._step_began), abort_all())  # type: ignore[assignment]
    loop.close()
    assert engine.adapters.keys() == {"there"}
    assert "the LoRA adapter gone is not loaded again" in caplog.text
    assert watched[0] > 0.0 == loop._step_began, "the watchdog looks at this too"


def load(model: Path, *lora: str, **settings: Any) -> Engine:
    chosen = {"model": str(model), "dtype": "bfloat16", "num_threads": 2, "lora": lora, **settings}
    return Engine.load(EngineConfig.from_settings(chosen))


def named(folders: list[Path]) -> list[str]:
    return [f"a{number}={folder}" for number, folder in enumerate(folders)]


def drain(engine: Engine) -> dict[str, list[RequestOutput]]:
    seen: dict[str, list[RequestOutput]] = {}
    while engine.has_unfinished:
        for output in engine.step():
            seen.setdefault(output.request_id, []).append(output)
    return seen


def answers(engine: Engine, adapters: dict[str, str], **params: Any) -> dict[str, Any]:
    """The tokens and log-probabilities of one request for each name, all at once."""
    for name, digest in adapters.items():
        engine.add_request(name, PROMPT, SamplingParams(max_tokens=12, logprobs=2, **params), adapter=digest)
    found = {}
    for name, outputs in drain(engine).items():
        assert outputs[-1].error is None
        logprobs = [entry for output in outputs if output.logprobs for entry in output.logprobs]
        found[name] = ([token for output in outputs for token in output.token_ids], logprobs)
    return found


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_answers_are_equal_alone_in_company_and_preempted(
    quantization: str | None, model: Path, folders: list[Path]
) -> None:
    engine = load(model, *named(folders), quantization=quantization, max_num_batched_tokens=48)
    digests = {"": "", **engine.adapters}
    together = answers(engine, digests)
    assert len({str(answer) for answer in together.values()}) == NUM_ADAPTERS + 1
    again = answers(engine, digests)  # the prompts' blocks are cached: each adapter's own
    plain = load(model, quantization=quantization)
    assert answers(plain, {"": ""})[""] == together[""]
    for name, digest in engine.adapters.items():
        assert answers(plain_with(plain, name, folders), {name: digest})[name] == together[name] == again[name]
    drafting = guess(engine, lambda request: together[request.request_id][0])
    assert answers(engine, digests) == together and drafting.accepted > 20
    force_preemptions(engine)
    assert answers(engine, digests) == together and engine.scheduler.queue.num_preemptions


def plain_with(engine: Engine, name: str, folders: list[Path]) -> Engine:
    """The engine with one adapter more."""
    engine.adapters.load(name, str(folders[int(name[1:])]))
    return engine


def test_prefix_cache_is_of_one_adapter(model: Path, folders: list[Path]) -> None:
    engine = load(model, *named(folders[:2]))
    cached = {}
    for step, name in enumerate(("a0", "", "a1", "a0", "")):
        engine.add_request(str(step), PROMPT, SamplingParams(max_tokens=1), adapter=engine.adapters.get(name, ""))
        cached[step] = max(output.num_cached_tokens for output in drain(engine)[str(step)])
    assert cached == {0: 0, 1: 0, 2: 0, 3: 32, 4: 32}


def test_adapter_stays_until_its_last_request_has_ended(model: Path, folders: list[Path]) -> None:
    engine = load(model, f"sql={folders[0]}")
    old = engine.adapters["sql"]
    wanted = answers(engine, {"x": old})["x"][0]
    engine.add_request("running", PROMPT, SamplingParams(max_tokens=12), adapter=old)
    engine.step()
    new = engine.adapters.load("sql", str(folders[1]))  # another under the same name
    assert new != old == engine.scheduler.queue.running[0].adapter
    engine.add_request("newer", PROMPT, SamplingParams(max_tokens=12), adapter=new)
    outputs = drain(engine)
    assert [token for output in outputs["running"] for token in output.token_ids][-11:] == wanted[-11:]
    engine.adapters.unload("sql")
    assert not engine.executor.adapters
    with pytest.raises(InvalidRequestError, match="the adapter of the request is not loaded any more"):
        engine.add_request("late", PROMPT, SamplingParams(max_tokens=1), adapter=new)


@pytest.mark.parametrize("text", ["sql", "=path", "sql=", ""])
def test_setting_needs_a_name_and_a_path(text: str) -> None:
    with pytest.raises(ConfigError, match="lora must be name=path, such as sql=adapters/sql"):
        EngineConfig.from_settings({"lora": text})


def test_settings_name_each_adapter_once(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lora gives the name 'a' to two adapters"):
        EngineConfig.from_settings({"lora": ["a=x", "a=y"]})
    with pytest.raises(AdapterError, match="has no adapter_config"):
        load(model, f"a={tmp_path}")
