"""A fingerprint is equal where a seed gives equal answers, and differs where it may not."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from safetensors.torch import load_file, save_file

from splitfuse.config.engine import EngineConfig
from splitfuse.core.kv.names import BlockNamer
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.engine.engine import Engine
from splitfuse.models.sources.hub import open_model
from splitfuse.runtime.fingerprint import kv_fingerprint
from splitfuse.runtime.loading import load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_models.save("llama-plain", folder)
    return folder


def fingerprint(folder: Path, **settings: Any) -> str:
    config = {"model": str(folder), "kernels": "reference", "dtype": "float32", "num_blocks": 8, **settings}
    return load_model(EngineConfig.from_settings(config)).fingerprint


def test_settings_that_change_no_token_change_no_fingerprint(folder: Path) -> None:
    plain = fingerprint(folder)
    for settings in ({"max_num_batched_tokens": 7}, {"block_size": 16, "num_blocks": 20}, {"max_num_seqs": 3}):
        assert fingerprint(folder, **settings) == plain


def test_settings_that_may_change_tokens_change_the_fingerprint(folder: Path) -> None:
    names = [
        fingerprint(folder, **settings)
        for settings in (
            {},
            {"dtype": "bfloat16"},
            {"max_model_len": 50},
            {"kernels": "torch"},
            {"load_format": "dummy"},
            {"tokenizer": "another"},
        )
    ]
    assert len(set(names)) == len(names)


def names(folder: Path, key: bytes, **settings: Any) -> set[bytes]:
    """Return the names of the blocks that an engine has published."""
    config = {"model": str(folder), "kernels": "reference", "dtype": "float32", "num_blocks": 8, "block_size": 4}
    engine = Engine.load(EngineConfig.from_settings({**config, **settings}), name_key=key)
    engine.add_request("a", range(1, 12), SamplingParams(max_tokens=1))
    while engine.has_unfinished:
        engine.step()
    namer, made = BlockNamer(engine.limits.block_size, key=key, fingerprint=engine.model.kv_fingerprint), list[bytes]()
    namer.extend(made, range(1, 12))
    blocks = engine.allocator.match(range(1, 12), list(made))
    assert len(blocks) == len(made) == 11 // engine.limits.block_size, "the router's names are not those of the cache"
    return set(made)


def test_blocks_have_equal_names_where_their_bytes_are_equal(folder: Path) -> None:
    plain = names(folder, b"key")
    for settings in ({"max_num_batched_tokens": 7}, {"num_blocks": 20}, {"max_num_seqs": 3}):
        assert names(folder, b"key", **settings) == plain


def test_blocks_of_other_bytes_or_another_key_have_no_name_in_common(folder: Path) -> None:
    others = {"dtype": "bfloat16"}, {"kernels": "torch"}, {"load_format": "dummy"}, {"block_size": 2}
    made = [names(folder, b"key"), names(folder, b"other"), *(names(folder, b"key", **other) for other in others)]
    assert len(set.union(*made)) == sum(map(len, made))


def test_another_layout_or_shard_has_another_fingerprint() -> None:
    made = {
        kv_fingerprint(
            {"model": "a", "tokenizer": tokenizer}, layout=layout, block_size=32, long_rope=long, shard=shard
        )
        for tokenizer in "xy"
        for layout, long, shard in ((1, False, "1/1"), (2, False, "1/1"), (1, True, "1/1"), (1, False, "1/2"))
    }
    assert len(made) == 4  # the tokenizer has no part in it


@pytest.mark.parametrize("file", ["generation_config.json", "tokenizer.json", "model.safetensors"])
def test_files_of_another_content_change_the_digest(folder: Path, tmp_path: Path, file: str) -> None:
    tiny_models.save("llama-plain", tmp_path)
    assert open_model(str(tmp_path)).digest() == open_model(str(folder)).digest()
    if file.endswith(".json"):
        (tmp_path / file).write_text(json.dumps({"eos_token_id": 7}))
    else:
        tensors = load_file(tmp_path / file)
        tensors["model.embed_tokens.weight"] *= 2
        save_file(tensors, tmp_path / file, metadata={"format": "pt"})
    assert open_model(str(tmp_path)).digest() != open_model(str(folder)).digest()
