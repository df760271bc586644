"""A fingerprint is equal where a seed gives equal answers, and differs where it may not."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from safetensors.torch import load_file, save_file

from splitfuse.config import EngineConfig
from splitfuse.models.sources.hub import open_model
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
