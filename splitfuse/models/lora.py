"""Reads LoRA adapters as PEFT saves them: a folder of adapter_config.json and adapter_model.safetensors.

Everything in it is honoured or refused: an adapter that would change less than its author meant is not loaded.
Pickles are never read.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from splitfuse.errors import AdapterError, brief
from splitfuse.kernels.layers import AttentionSpec
from splitfuse.kernels.lora import Adapter, LoraUpdate
from splitfuse.models.families.config_json import is_number, is_whole
from splitfuse.models.families.wrappers import PREFIXES
from splitfuse.models.parameters import Parameter, Part
from splitfuse.models.sources.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_json, read_file
from splitfuse.models.sources.source import listing
from splitfuse.models.spec import ModelSpec

MAX_RANK = 512
MAX_ALPHA = 1e6
MAX_WEIGHT = 65504.0
"""Largest number in the tensors of an adapter: that of float16, which all dtypes of models can hold."""
MAX_ADAPTER_BYTES = 2**32
"""Size of the largest file of an adapter that is read; it is in memory twice while it is loaded."""

PREFIX = "base_model.model."
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TARGETS = {"qkv": "qkv", "attn_gate": "attn_gate", "o": "o", "mlp.gate_up": "up", "mlp.up": "up", "mlp.down": "down"}
"""Name of a Parameter -> its target of kernels/lora.py."""

HONOURED = ("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "bias")
IGNORED = (
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "peft_version", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),  # which tensors there are says it
    *("lora_dropout", "eva_config", "velora_config", "runtime_config", "megatron_core", "qalora_group_size"),
)
"""Fields of adapter_config.json that change nothing of what an adapter computes."""
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights after which the weights of the model are still the adapter's base; after others, such as
pissa, they are not.
"""
_PLAIN_PATTERN = re.compile(r"\^?[\w.-]+")
_TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True)
class AdapterFiles:
    """Holds an adapter as its files say it: tensors by module and side, and how they are scaled. `digest` is a hash of
    the files' content.
    """

    location: str
    digest: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, Tensor]]


def read_adapter(folder: Path) -> AdapterFiles:
    """Read the files of an adapter. Raises AdapterError for what they should not say, or what is not supported."""
    config_bytes = _read(folder / ADAPTER_CONFIG)
    if config_bytes is None:
        raise AdapterError(f"{folder} has no {ADAPTER_CONFIG}: it is no adapter as PEFT's save_pretrained writes it")
    config = _checked_config(folder / ADAPTER_CONFIG, config_bytes)
    content = _read(folder / ADAPTER_WEIGHTS)
    if content is None:
        pickles = [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)]
        found = (
            f" but {listing(pickles)}, which is pickled: that can run code when opened and is not read; save the "
            "adapter again with PEFT's save_pretrained, which writes safetensors"
        )
        raise AdapterError(f"{folder} has no {ADAPTER_WEIGHTS}{found if pickles else ''}")
    try:
        tensors = load(content)
    except (SafetensorError, ValueError, KeyError, MemoryError) as error:
        raise AdapterError(f"{folder / ADAPTER_WEIGHTS} is not a whole safetensors file: {error!s:.200}") from error
    digest = hashlib.blake2b(hashlib.sha256(config_bytes).digest(), digest_size=16)
    digest.update(content)
    return AdapterFiles(str(folder), digest.hexdigest(), config, _by_module(folder / ADAPTER_WEIGHTS, tensors))


def resolve_adapter(files: AdapterFiles, spec: ModelSpec, parameters: Sequence[Parameter]) -> Adapter:
    """Return the adapter for a network whose stored weights are `parameters`.

    Raises AdapterError for a module that the network does not have, or that adapters cannot change, for one that is
    there under two names, and for a tensor of a wrong shape.
    """
    modules = _modules(parameters)
    seen: dict[str, str] = {}
    layers: list[dict[str, list[LoraUpdate]]] = [{} for _ in spec.layers]
    for module, sides in files.tensors.items():
        stored = next((name for name in _names(module) if name in modules), None)
        name = f"{PREFIX}{module}.lora_A.weight"
        if stored is None:
            known = sorted({key.rpartition(".")[2] for key, found in modules.items() if _supported(spec, found)})
            raise AdapterError(
                f"{files.location} has the tensor {name:.200}, but {spec.architecture} has no module {module:.200}; "
                f"adapters may change {', '.join(known)}"
            )
        if (other := seen.setdefault(stored, module)) != module:
            raise AdapterError(
                f"{files.location} has the tensors {PREFIX}{other:.200}.lora_A.weight and {name:.200}, which are two "
                "names of one module: an adapter may have one"
            )
        places = modules[stored]
        if not _supported(spec, places):
            raise AdapterError(
                f"{files.location} has the tensor {name:.200}, but adapters of {_kind(places)} are not supported: only "
                "of the projections of attention and of dense MLPs"
            )
        a, b, scale = _checked_pair(files, module, sides, places[0][1])
        for parameter, part, first_row in places:
            assert parameter.layer is not None
            rows = part.row_numbers()
            if rows is None:
                raise AdapterError(
                    f"{files.location} has the tensor {name:.200}, but {part.piece.name} is not stored as rows that "
                    f"adapters can change: merge the adapter into the model"
                )
            update = LoraUpdate(first_row=first_row, a=a, b=b[rows], scale=scale)
            layers[parameter.layer].setdefault(TARGETS[parameter.name], []).append(update)
    return layers


def _read(path: Path) -> bytes | None:
    try:
        return read_file(path, MAX_ADAPTER_BYTES)
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error.strerror or error}") from error


def _checked_config(path: Path, content: bytes) -> dict[str, Any]:
    """Return adapter_config.json. Raises AdapterError for a field that asks for something that is not supported."""
    try:
        check_json(content)
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} cannot be read as JSON: {error!s:.200}") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path} must hold a JSON object, not {type(config).__name__}")

    def wrong(field: str, wanted: str) -> AdapterError:
        return AdapterError(f"{path}: {field} must be {wanted}, not {brief(config.get(field))}")

    if config.get("peft_type") != "LORA":
        raise wrong("peft_type", "LORA")
    if not _is_rank(config.get("r")):
        raise wrong("r", f"a rank from 1 to {MAX_RANK}")
    if not _is_alpha(config.get("lora_alpha")):
        raise wrong("lora_alpha", f"a number from {-MAX_ALPHA:.0f} to {MAX_ALPHA:.0f}")
    if not isinstance(config.setdefault("use_rslora", False), bool):
        raise wrong("use_rslora", "true or false")
    if config.get("bias", "none") != "none":
        raise wrong("bias", "none: biases are not changed by adapters here")
    start = config.get("init_lora_weights", True)
    if not any(start is each or start == each for each in PLAIN_STARTS) or isinstance(start, int) != isinstance(
        start, bool
    ):
        raise wrong(
            "init_lora_weights",
            "a start that leaves the model's own weights as they are (convert the adapter with PEFT's "
            "path_initial_model_for_weight_conversion)",
        )
    for field, is_valid, what in (
        ("rank_pattern", _is_rank, "ranks"),
        ("alpha_pattern", _is_alpha, f"numbers from {-MAX_ALPHA:.0f} to {MAX_ALPHA:.0f}"),
    ):
        pattern = config[field] = config.get(field) or {}
        if not isinstance(pattern, dict) or not all(map(is_valid, pattern.values())):
            raise wrong(field, f"an object of names of modules and {what}")
        if unread := [key for key in pattern if not _PLAIN_PATTERN.fullmatch(key)]:
            raise AdapterError(
                f"{path}: {field} has the key {brief(unread[0])}, a regular expression: only names of modules are read"
            )
    for field, value in config.items():
        if field not in HONOURED and field not in IGNORED and value not in (None, False, [], {}, ""):
            raise AdapterError(f"{path}: {field} = {brief(value)} is not supported: only plain LoRA without it")
    return config


def _is_rank(value: Any) -> bool:
    return is_whole(value) and 1 <= value <= MAX_RANK


def _is_alpha(value: Any) -> bool:
    return is_number(value) and abs(value) <= MAX_ALPHA


def _by_module(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the two tensors of each module. Raises AdapterError for one of another name, or without its other."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in sorted(tensors.items()):
        match = _TENSOR.fullmatch(name.removeprefix(PREFIX))
        if match is None or not name.startswith(PREFIX):
            raise AdapterError(
                f"{path} has the tensor {name:.200}, which is not supported: only {PREFIX}MODULE.lora_A.weight and "
                "lora_B.weight are"
            )
        found.setdefault(match["module"], {})[match["side"]] = tensor
    if not found:
        raise AdapterError(f"{path} has no tensors")
    for module, sides in found.items():
        if len(sides) == 1:
            absent = "A" if "B" in sides else "B"
            raise AdapterError(f"{path} lacks the tensor {PREFIX}{module:.200}.lora_{absent}.weight")
    return found


def _checked_pair(
    files: AdapterFiles, module: str, sides: Mapping[str, Tensor], part: Part
) -> tuple[Tensor, Tensor, float]:
    """Return the tensors of a module and their scale. Raises AdapterError for a wrong shape, dtype or number."""
    config = files.config
    rank = _of_pattern(config["rank_pattern"], module, config["r"])
    alpha = _of_pattern(config["alpha_pattern"], module, config["lora_alpha"])
    shapes = {"A": (rank, *part.piece.shape[1:]), "B": (*part.piece.shape[:1], rank)}
    for side, shape in shapes.items():
        tensor, name = sides[side], f"{PREFIX}{module:.200}.lora_{side}.weight"
        if tensor.shape != shape:
            raise AdapterError(
                f"{files.location}: the tensor {name} has the shape {brief(list(tensor.shape))}, but the model and a "
                f"rank of {rank} imply {list(shape)}"
            )
        if tensor.dtype not in FLOAT_DTYPES:
            raise AdapterError(
                f"{files.location}: the tensor {name} is in {tensor.dtype}, which is no dtype of weights"
            )
        if not (tensor.abs() <= MAX_WEIGHT).all():
            raise AdapterError(
                f"{files.location}: the tensor {name} holds numbers that are not finite, or beyond {MAX_WEIGHT:.0f}"
            )
    return sides["A"], sides["B"], alpha / (math.sqrt(rank) if config["use_rslora"] else rank)


def _of_pattern(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """Return the value of the first key that a module's name ends in, as PEFT finds it."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _modules(parameters: Sequence[Parameter]) -> dict[str, list[tuple[Parameter, Part, int]]]:
    """Return where the rows of each module's weight went: its parameters, and the first row of each."""
    found: dict[str, list[tuple[Parameter, Part, int]]] = {}
    for parameter in parameters:
        first_row = 0
        for part in parameter.parts:
            if part.piece.name.endswith(".weight") and len(part.piece.shape) == 2:
                place = (parameter, part, first_row)
                found.setdefault(part.piece.name.removesuffix(".weight"), []).append(place)
            first_row += part.shape[0]
    return found


def _names(module: str) -> list[str]:
    """Return the names that a checkpoint may have for a module: transformers has several for the same one."""
    names = [module]
    for prefix in PREFIXES:
        if module.startswith(prefix):
            names += [other + module.removeprefix(prefix) for other in (*PREFIXES, "")]
            break
    return names


def _supported(spec: ModelSpec, places: Sequence[tuple[Parameter, Part, int]]) -> bool:
    for parameter, _, _ in places:
        if parameter.layer is None or parameter.expert is not None or parameter.name not in TARGETS:
            return False
        mixer = spec.layers[parameter.layer].mixer
        if isinstance(mixer, AttentionSpec) and mixer.latent is not None and not parameter.name.startswith("mlp."):
            return False
    return True


def _kind(places: Sequence[tuple[Parameter, Part, int]]) -> str:
    """Return what a module that adapters cannot change is."""
    parameter = places[0][0]
    if parameter.layer is None:
        return "embeddings and output heads"
    if parameter.expert is not None or parameter.name in ("router", "shared_gate") or "shared." in parameter.name:
        return "experts and routers"
    return "latent attention, recurrent mixers and layers' own inputs"
