"""Vision-language checkpoints, loaded for their text: layouts of their config and tensors, and what is left aside."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from ragged_requests import Request, Runner
from safetensors.torch import load_file, save_file

from splitfuse.config.engine import EngineConfig
from splitfuse.errors import ModelError, UnsupportedModelError, WeightsError
from splitfuse.kernels.reference import ReferenceBackend
from splitfuse.models.families.registry import load_spec
from splitfuse.models.sources.files import SINGLE_FILE
from splitfuse.models.sources.folder import ModelFolder
from splitfuse.models.weights import check_weights, load_decoder
from splitfuse.runtime.loading import load_model

VISION = ("qwen2-vision", "qwen3-vision", "mistral3-vision", "gemma3-vision")
PROMPT = [5, 90, 17, 3, 3, 41, 8, 77, 60, 1]


@pytest.fixture(scope="module", params=[*VISION, "gemma4-vision-per-layer-embeddings", "llama4-vision"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    tiny_models.save(request.param, folder)
    return folder


def logits(folder: Path) -> torch.Tensor:
    source = ModelFolder(folder)
    weights = source.weights()
    spec = check_weights(weights, load_spec(source))
    cpu = torch.device("cpu")
    decoder = load_decoder(weights, spec, dtype=torch.float32, device=cpu, backend=ReferenceBackend())
    request = Request(list(PROMPT))
    Runner(decoder, block_size=4).step([(request, len(PROMPT))])
    return torch.stack(request.logits)


def changed(saved: Path, folder: Path, rename: Callable[[str], str], **fields: Any) -> Path:
    """Write the checkpoint with other names of its tensors and other fields, None for those that are left out."""
    tensors = {rename(name): tensor for name, tensor in load_file(saved / SINGLE_FILE).items()}
    save_file({name: tensor for name, tensor in tensors.items() if name}, folder / SINGLE_FILE)
    config = json.loads((saved / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value != "-"}))
    return folder


def plain_name(name: str) -> str:
    """Return the name that the tensor has in transformers."""
    name = name.replace("language_model.lm_head.", "lm_head.").replace("language_model.model.", "model.language_model.")
    name = re.sub(r"^model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1.", name)
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"


def before_version_5(name: str) -> str:
    name = plain_name(name)
    name = name.replace("lm_head.", "language_model.lm_head.").replace("model.language_model.", "language_model.model.")
    return name.removeprefix("model.")


def of_qwen(name: str) -> str:
    """As in Qwen2.5-VL's files: the text is `model.`, the rest has a name of its own."""
    name = plain_name(name)
    text = name.startswith(("model.language_model.", "lm_head."))
    return name.replace("model.language_model.", "model.") if text else name.removeprefix("model.")


@pytest.mark.parametrize("layout", [plain_name, before_version_5, of_qwen])
def test_layouts_of_names(saved: Path, tmp_path: Path, layout: Callable[[str], str]) -> None:
    assert torch.equal(logits(changed(saved, tmp_path, layout)), logits(saved))


def test_text_config_may_be_flat_or_have_what_the_whole_says(saved: Path, tmp_path: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    text = {name: value for name, value in config["text_config"].items() if name not in ("dtype", "model_type")}
    assert torch.equal(logits(changed(saved, tmp_path, str, text_config=text)), logits(saved))
    spec = load_spec(ModelFolder(changed(saved, tmp_path, str, text_config=text, dtype="bfloat16")))
    assert spec.dtype == "bfloat16"
    if "Qwen2" in config["architectures"][0]:
        flat = text | {"tie_word_embeddings": config["tie_word_embeddings"]}
        flat["rope_scaling"] = {"type": "mrope", "mrope_section": flat["rope_parameters"]["mrope_section"]}
        flat["rope_theta"] = flat.pop("rope_parameters")["rope_theta"]
        assert torch.equal(logits(changed(saved, tmp_path, str, text_config="-", **flat)), logits(saved))


def test_what_is_left_aside_is_counted(saved: Path) -> None:
    settings = {"model": str(saved), "num_blocks": 8, "kernels": "reference"}
    plan = str(load_model(EngineConfig.from_settings(settings)).plan)
    assert "text alone is computed, images are refused; left aside: " in plan
    assert "tensors of vision" in plan


def test_other_tensors_are_still_refused(saved: Path, tmp_path: Path) -> None:
    folder = changed(saved, tmp_path, lambda name: name.replace("norm.weight", "norm.weird"))
    with pytest.raises(WeightsError, match="weights missing"):
        logits(folder)
    tensors = load_file(saved / SINGLE_FILE)
    save_file(tensors | {"model.unheard_of.weight": torch.zeros(3)}, tmp_path / SINGLE_FILE)
    with pytest.raises(WeightsError, match=r"does not use \(1\): model\.unheard_of"):
        logits(folder)


def test_towers_are_refused_where_there_is_no_wrapper(tmp_path: Path) -> None:
    tiny_models.save("llama-gqa", tmp_path)
    expected = logits(tmp_path)
    tensors = load_file(tmp_path / SINGLE_FILE)
    save_file(tensors | {"mtp.fc.weight": torch.zeros(3)}, tmp_path / SINGLE_FILE)
    assert torch.equal(logits(tmp_path), expected)
    save_file(tensors | {"vision_tower.fc.weight": torch.zeros(3)}, tmp_path / SINGLE_FILE)
    with pytest.raises(WeightsError, match=r"does not use \(1\): vision_tower\.fc"):
        logits(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "whisper"}, "text_config of the model_type 'whisper' is not supported here: only one of"),
        ({"hidden_size": "x"}, "config.json: text_config.hidden_size must be a whole number"),
        ({"hidden_size": None}, "config.json has no text_config.hidden_size"),
    ],
)
def test_fields_of_the_text_are_named(saved: Path, tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    text = json.loads((saved / "config.json").read_text())["text_config"]
    with pytest.raises(ModelError, match=message):
        load_spec(ModelFolder(changed(saved, tmp_path, str, text_config=text | fields)))


def test_sections_of_mrope_must_be_those_of_a_head(tmp_path: Path) -> None:
    tiny_models.save("qwen2-vision", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["rope_parameters"]["mrope_section"] = [1, 2, 2]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"mrope_section \[1, 2, 2\] must add up to the 4 pairs that are rotated"):
        load_spec(ModelFolder(tmp_path))


def test_eos_tokens_of_the_text(saved: Path, tmp_path: Path) -> None:
    text = json.loads((saved / "config.json").read_text())["text_config"]
    folder = changed(saved, tmp_path, str, text_config=text | {"eos_token_id": [7, 8]}, eos_token_id=None)
    assert ModelFolder(folder).eos_token_ids() == (7, 8)
    assert ModelFolder(changed(saved, tmp_path, str, eos_token_id=9)).eos_token_ids() == (9,)


def test_quantization_of_the_whole_is_that_of_the_text(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="quantization_config"):
        load_spec(ModelFolder(changed(saved, tmp_path, str, quantization_config={"quant_method": "aqlm"})))
