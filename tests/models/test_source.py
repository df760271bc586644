"""What a folder says apart from its network: EOS tokens, adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import tiny_tokenizers
from transformers import AutoTokenizer

from splitfuse.config.engine import EngineConfig
from splitfuse.errors import ModelError, ModelNotFoundError
from splitfuse.models.sources.folder import ModelFolder
from splitfuse.runtime.loading import LoadedModel, load_model


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_models.save("llama-gqa", folder)
    (folder / "generation_config.json").unlink()
    return folder


@pytest.fixture
def folder(weights: Path, tmp_path: Path) -> Path:
    for file in weights.iterdir():
        (tmp_path / file.name).symlink_to(file)
    return tmp_path


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def load(folder: Path) -> LoadedModel:
    return load_model(EngineConfig.from_settings({"model": str(folder), "num_blocks": 8}))


def added(content: str) -> dict[str, Any]:
    return {"content": content, "special": True}


@pytest.mark.parametrize("kind", tiny_tokenizers.KINDS)
@pytest.mark.parametrize(
    ("config", "token"),
    [
        ({"eos_token": "</s>"}, "</s>"),
        ({"eos_token": {"__type": "AddedToken", "content": "</s>"}}, "</s>"),
        ({"eos_token": "a"}, "a"),  # of the plain vocabulary
        ({"eos_token": "<end>", "added_tokens_decoder": {"{size}": added("<end>")}}, "<end>"),
        ({"eos_token": "nowhere"}, None),
        ({"eos_token": None}, None),
        ({"eos_token": 7}, None),
        ({}, "</s>"),  # from special_tokens_map.json
    ],
    ids=str,
)
def test_eos_token_of_the_tokenizer_counts(
    tmp_path: Path, kind: str, config: dict[str, Any], token: str | None
) -> None:
    tokenizer = tiny_tokenizers.KINDS[kind]()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    if not config:
        write(tmp_path / "special_tokens_map.json", {"eos_token": "</s>"})
    size = str(tokenizer.get_vocab_size())
    config = json.loads(json.dumps(config).replace("{size}", size))
    write(tmp_path / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **config})
    write(tmp_path / "config.json", {"eos_token_id": 5})
    ids = ModelFolder(tmp_path).eos_token_ids()
    if token is None:
        assert ids == (5,)
    else:
        assert ids == (5, AutoTokenizer.from_pretrained(tmp_path).eos_token_id)
        write(tmp_path / "config.json", {"eos_token_id": [ids[1], 5]})
        assert ModelFolder(tmp_path).eos_token_ids() == (ids[1], 5)


def test_tokenizer_that_cannot_be_read_has_no_eos_token(tmp_path: Path) -> None:
    write(tmp_path / "config.json", {})
    write(tmp_path / "tokenizer_config.json", {"eos_token": "</s>"})
    for content in ("", "[]", "{", '{"model": 3}', "[" * 10_000, '{"model": {"vocab": [["</s>"]]}}'):
        (tmp_path / "tokenizer.json").write_text(content)
        assert ModelFolder(tmp_path).eos_token_ids() == ()


def test_missing_eos_token_is_warned_of(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load(folder).eos_token_ids == ()
    assert f"{folder} names no EOS token" in caplog.text
    caplog.clear()
    write(folder / "generation_config.json", {"eos_token_id": 3})
    assert load(folder).eos_token_ids == (3,)
    assert not caplog.text


def test_adapter_is_named_and_not_applied(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(folder / "adapter_config.json", {"base_model_name_or_path": "owner/base"})
    load(folder)
    assert "holds an adapter of 'owner/base' too, which is not applied" in caplog.text
    (folder / "config.json").unlink()
    with pytest.raises(ModelNotFoundError, match="it holds an adapter of 'owner/base', not a model; merge the two"):
        load(folder)


def test_impossible_sizes_are_refused_before_anything_is_allocated(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    largest = 2**31 - 1
    experts = {"architectures": ["MixtralForCausalLM"], "num_local_experts": largest}
    for changes, message in (
        (experts, "2147483647 experts in 3 layers are 6442450941 in all; at most 100000"),
        ({"vocab_size": largest}, "has shape .97, 48., but config.json implies .2147483647, 48."),
        ({"intermediate_size": largest}, "has shape .72, 48., but config.json implies .2147483647, 48."),
        ({"num_key_value_heads": largest, "num_attention_heads": largest, "head_dim": 8}, "but config.json implies"),
        ({"num_hidden_layers": 10_000}, "weights missing from the checkpoint .89973.: .* and 89968 more"),
    ):
        write(folder / "config.json", config | changes)
        with pytest.raises(ModelError, match=message):
            load(folder)
