"""Random LoRA adapters for the tiny models, written as PEFT writes them, and their oracle: merged into the weights."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EVERYTHING = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def module_shapes(weights: Mapping[str, Tensor], endings: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Rows and columns of the modules whose names end so."""
    endings = tuple(f".{ending}.weight" for ending in endings)
    return {
        name.removesuffix(".weight"): (weight.shape[0], weight.shape[1])
        for name, weight in weights.items()
        if name.endswith(endings)
    }


def save_adapter(
    folder: Path,
    shapes: Mapping[str, tuple[int, int]],
    *,
    seed: int = 0,
    size: float = 0.3,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """Write an adapter of these modules; `config` are fields of adapter_config.json. Its effect is as large as that of
    the weights.
    """
    generator = torch.Generator().manual_seed(seed)
    fields: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "use_rslora": False}
    fields |= config
    tensors = {}
    for module, (rows, columns) in shapes.items():
        rank = _of(fields.get("rank_pattern") or {}, module, fields["r"])
        for side, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            values = torch.randn(shape, generator=generator) * size / math.sqrt(math.sqrt(rank))
            tensors[f"base_model.model.{module}.lora_{side}.weight"] = values.to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def deltas(folder: Path) -> dict[str, Tensor]:
    """What an adapter adds to the weight of each module: scale * B @ A."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            rank, alpha = len(a), _of(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
            scale = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
            found[module] = scale * (tensors[name.replace("lora_A", "lora_B")].double() @ a.double())
    return found


def merged(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """A copy of a model with an adapter added to its weights."""
    model = deepcopy(model)
    modules = dict(model.named_modules())
    with torch.no_grad():
        for module, delta in deltas(folder).items():
            weight = modules[module].weight
            weight.copy_((weight.double() + delta).to(weight.dtype))
    return model


def _of(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    return next((value for key, value in pattern.items() if module.endswith(key)), default)
