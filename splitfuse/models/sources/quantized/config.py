"""Reads quantization_config: every field of it is honoured, refused by name, or a remark on how the file was made."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from splitfuse.errors import UnsupportedModelError, brief
from splitfuse.kernels.quantized import FP8_GROUP
from splitfuse.models.families.config_json import ConfigJson
from splitfuse.models.sources.quantized.schemes import (
    Awq,
    ExpertsMxfp4,
    Fp8,
    Gptq,
    InverseFp8,
    Mxfp4,
    PackedIntegers,
    PlainIntegers,
    Scheme,
)

SECTIONS = ("quantization_config", "compression_config")
"""Names of the section in config.json, of which the second is that of old files of compressed-tensors."""

CALIBRATION = {
    *("tokenizer", "dataset", "damp_percent", "damp_auto_increment", "true_sequential", "static_groups", "meta", "mse"),
    *("act_group_aware", "model_seqlen", "batch_size", "pad_token_id", "desc_act", "quant_method", "method", "version"),
    *("block_name_to_quantize", "module_name_preceding_first_block", "modules_in_block_to_quantize", "provider"),
    *("cache_block_outputs", "max_input_length", "backend", "use_cuda_fp16", "use_exllama", "disable_exllama"),
    *("exllama_config", "exllama_version", "model_name_or_path", "model_file_base_name", "lm_head", "failsafe"),
    *("offload_to_disk", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "hyb_act", "process", "uri", "adapter"),
    # of AutoRound, which also writes files that are called GPTQ or AWQ
    *("iters", "lr", "minmax_lr", "nsamples", "seqlen", "autoround_version", "enable_quanted_input", "amp", "seed"),
    *("gradient_accumulate_steps", "enable_minmax_tuning", "enable_norm_bias_tuning", "low_gpu_mem_usage", "sampler"),
    *("scale_dtype", "train_bs", "to_quant_block_names", "act_dynamic", "act_group_size", "act_sym", "act_data_type"),
    *("enable_alg_ext", "enable_torch_compile", "disable_opt_rtn"),
}
"""Fields that say how a file of GPTQ, AWQ or AutoRound was made, or how other engines are to compute it; of desc_act
and lm_head the tensors tell.
"""
OBSERVED = {"observer", "observer_kwargs", "scale_dtype", "zp_dtype"}
"""Fields of weights in compressed-tensors that say how the file was made; of the dtypes the tensors tell."""

REFUSED = {
    "bitsandbytes": "load the model it was made of, with --quantization int8 or int4",
    "bitnet": "load a bf16 copy",
    "hqq": "load the model it was made of, with --quantization int8 or int4",
    "modelopt": "take a checkpoint in FP8 or of compressed-tensors",
    "quark": "take a checkpoint in FP8 or of compressed-tensors",
}
"""Methods that are known and not read -> what to do."""

HALVES = "dtype=auto is bfloat16 for quantized checkpoints that say float16, as this one does"
"""Remark on such a checkpoint."""
MOST_WILDCARDS = 4
"""Number of wildcards that a pattern of module names may have: each multiplies the time by the length of a name."""
MOST_CHOICES = 64
"""Number of ways that a pattern may have to choose among its alternatives: these multiply too."""
LONGEST_PATTERN = 1000
LONGEST_MODULE = 200
"""Number of characters of a module's name that patterns are compared with."""


@dataclass(frozen=True)
class Group:
    """Describes the layers that are stored in one scheme, by the targets of compressed-tensors."""

    scheme: Scheme
    targets: tuple[str, ...] = ("Linear",)


@dataclass(frozen=True)
class Quantization:
    """Describes how a checkpoint is quantized. Which of its layers are, the tensors tell: none of `ignored` may be.

    `aside` are endings of tensors of quantized layers that nothing here reads, `remarks` sentences that say so.
    """

    groups: tuple[Group, ...]
    ignored: frozenset[str] = frozenset()
    aside: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    def scheme(self, module: str, marker: str) -> Scheme | None:
        """Return the scheme with this marker of a quantized layer: of a group that names it, else that has a pattern
        for its name, else that has all linear layers; None if there is none.
        """
        groups = [group for group in self.groups if group.scheme.marker == marker]
        for matches in (_is_named, _has_pattern, _is_linear):
            for group in groups:
                if any(matches(target, module) for target in group.targets):
                    return group.scheme
        return None


def _is_named(target: str, module: str) -> bool:
    return target == module


def _has_pattern(target: str, module: str) -> bool:
    return target.startswith("re:") and len(module) <= LONGEST_MODULE and re.match(target[3:], module) is not None


def _is_linear(target: str, _: str) -> bool:
    return target == "Linear"


def read_quantization(values: Mapping[str, Any]) -> Quantization | None:
    """Return how the checkpoint with this config.json is quantized, or None if it is not.

    >>> values = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
    >>> read_quantization({"quantization_config": values}).groups[0].scheme.label
    'AWQ int4'

    Raises UnsupportedModelError for a method or a field that is not read.
    """
    text = values.get("text_config")
    for place in (values, text if isinstance(text, dict) else {}):
        for section in SECTIONS:
            if place.get(section):
                found = _read(ConfigJson(place).section(section))
                halves = "float16" in (place.get("dtype"), place.get("torch_dtype"))
                return replace(found, remarks=(*found.remarks, HALVES)) if halves else found
    return None


def _read(config: ConfigJson) -> Quantization:
    method = config.text("quant_method", "gptq" if "bits" in config else "compressed-tensors").lower()
    if method in REFUSED:
        raise UnsupportedModelError(f"checkpoints quantized by {method} are not read: {REFUSED[method]}")
    if method not in METHODS:
        raise UnsupportedModelError(
            f"quantization_config: the quant_method {brief(method)} is not known: {', '.join(METHODS)} are"
        )
    return METHODS[method](config)


def _refuse_unread(config: ConfigJson, remarks: Collection[str] = (), place: str = "") -> None:
    """Raise UnsupportedModelError for a field that nothing has read, unless its value says nothing."""
    for name in config.unread():
        value = config.raw(name)
        if name not in remarks and value not in (None, False, "", [], {}):
            raise UnsupportedModelError(
                f"quantization_config: {place}{name:.100} = {brief(value)} is not known here, and may change what the "
                "tensors mean"
            )


def _only(config: ConfigJson, place: str = "", **values: Any) -> None:
    """Raise UnsupportedModelError if a field is there and has another than the values that are read."""
    for name, allowed in values.items():
        value = config.raw(name)
        value = value.lower() if isinstance(value, str) else value
        if value is not None and value not in allowed:
            raise UnsupportedModelError(
                f"quantization_config: {place}{name} = {brief(config.raw(name))} is not read: "
                f"{' or '.join(json.dumps(each) for each in allowed)} is"
            )


def _ignored(config: ConfigJson, *names: str) -> frozenset[str]:
    """Return the layers that are named as not quantized."""
    lists = [config.texts(name) for name in names if name in config]
    return frozenset(name for each in lists for name in each if not name.startswith("re:"))


def _group_size(config: ConfigJson) -> int | None:
    """Return the columns of a group, or None for all columns of a row."""
    size = config.integer("group_size", 128, least=-1)
    if size == 0:
        raise UnsupportedModelError("quantization_config: group_size = 0 is not read: -1 is one group a row")
    return None if size == -1 else size


def _gptq(config: ConfigJson) -> Quantization:
    _only(config, bits=(2, 4, 8), act_bits=(16, 32), pack_dtype=("int32",), is_marlin_format=(False,))
    kinds = ("gptq", "gptq_v2")
    _only(config, checkpoint_format=kinds, format=kinds)
    version = config.text("checkpoint_format", config.text("format", "gptq")).lower()
    bits, symmetric = config.integer("bits"), config.flag("sym", True)
    dynamic = config.section("dynamic")
    for pattern in dynamic:
        if not pattern.startswith("-:"):
            raise UnsupportedModelError(
                f"quantization_config: dynamic {brief(pattern)}, which quantizes some layers otherwise, is not read: "
                'only layers that are left out ("-:...") are'
            )
    scheme = Gptq(
        label=f"GPTQ int{bits}",
        bits=bits,
        group_size=_group_size(config),
        zeros=not symmetric,
        minus_one=version == "gptq",
        wraps=_is_of_gptqmodel(config.section("meta")),
    )
    found = Quantization((Group(scheme),), _ignored(config, "modules_to_not_convert"))
    _refuse_unread(config, CALIBRATION)
    return found


def _is_of_gptqmodel(meta: ConfigJson) -> bool:
    """Return whether GPTQModel 0.9 or later wrote the file: it writes zero points of 0 right."""
    said = meta.raw("quantizer")
    for each in said if isinstance(said, list) else [said]:
        version = re.match(r"gptqmodel:(\d{1,4})\.(\d{1,4})", each) if isinstance(each, str) else None
        if version and (int(version[1]), int(version[2])) >= (0, 9):
            return True
    return False


def _awq(config: ConfigJson) -> Quantization:
    _only(config, bits=(4,), act_bits=(16, 32), zero_point=(True,), pack_dtype=("int32",))
    _only(config, version=("gemm",), format=("gemm",), checkpoint_format=("gemm",))
    scheme = Awq(label="AWQ int4", bits=config.integer("bits", 4), group_size=_group_size(config), zeros=True)
    found = Quantization((Group(scheme),), _ignored(config, "modules_to_not_convert"))
    _refuse_unread(config, CALIBRATION | {"sym", "dynamic"})
    return found


def _auto_round(config: ConfigJson) -> Quantization:
    _only(config, data_type=("int",), packing_format=("auto_round:auto_gptq", "auto_round:auto_awq"))
    _only(config, act_bits=(16, 32))
    others = config.section("extra_config")
    for name in others:
        each = others.raw(name)
        if (
            not isinstance(each, dict)
            or each.get("bits") not in (16, 32)
            or set(each) - {"bits", "data_type", "act_bits"}
        ):
            raise UnsupportedModelError(
                f"quantization_config: extra_config of {brief(name)}, which quantizes it otherwise, is not read: only "
                "layers of 16 bits are"
            )
    own = ConfigJson({name: config.raw(name) for name in ("bits", "group_size", "sym")}, "quantization_config.")
    read = _gptq if config.text("packing_format", "auto_round:auto_gptq").endswith("gptq") else _awq
    scheme = read(own).groups[0].scheme
    assert isinstance(scheme, Gptq | Awq)
    _refuse_unread(config, CALIBRATION)
    return Quantization((Group(replace(scheme, label=f"AutoRound int{scheme.bits}")),))


def _fp8(config: ConfigJson) -> Quantization:
    _only(config, activation_scheme=("dynamic", "static"), fmt=("e4m3", "float8_e4m3fn"), expert_dtype=("fp8",))
    _only(config, scale_fmt=("float", "ue8m0"))
    block: tuple[int, int] | None = None
    if "weight_block_size" in config:
        sizes = config.integers("weight_block_size", [])
        if not _is_block(sizes):
            raise UnsupportedModelError(
                f"quantization_config: weight_block_size {brief(sizes)} is not read: two numbers are, the second a "
                f"multiple of {FP8_GROUP}"
            )
        block = sizes[0], sizes[1]
    label = _fp8_label(block)
    config.raw("modules_to_convert")  # the tensors tell
    found = Quantization(
        (Group(InverseFp8(label=label, block=block)), Group(Fp8(label=label, block=block))),
        _ignored(config, "modules_to_not_convert", "ignored_layers", "ignore"),
        aside=(".input_scale", ".activation_scale", ".input_scale_inv", *KV_SCALES),
        remarks=(_unquantized_inputs(f"{config.text('activation_scheme', 'dynamic')} FP8"), *_kv_remark(config)),
    )
    _refuse_unread(config, {"quant_method", "dequantize"})
    return found


def _is_block(sizes: list[int]) -> bool:
    """Return whether these are rows and columns of blocks of FP8 that are read."""
    return len(sizes) == 2 and 0 not in sizes and sizes[1] % FP8_GROUP == 0


def _fp8_label(block: tuple[int, int] | None) -> str:
    return "FP8" if block is None else f"FP8 in blocks of {block[0]} x {block[1]}"


def _fbgemm_fp8(config: ConfigJson) -> Quantization:
    ignored = _ignored(config, "modules_to_not_convert")
    _refuse_unread(config, {"quant_method", "activation_scale_ub"})  # a bound of FP8 inputs
    return Quantization(
        (Group(Fp8(label=_fp8_label(None), block=None)),),
        ignored,
        aside=(".input_scale_ub",),
        remarks=(_unquantized_inputs("dynamic FP8"),),
    )


KV_SCALES = (".k_scale", ".v_scale", ".q_scale", ".kv_scale")
"""Endings of the scales of keys and values in FP8, which are kept as kv_cache_dtype says."""


def _unquantized_inputs(kind: str) -> str:
    return f"inputs of linear layers are not rounded to {kind}, as this checkpoint's quantization_config has it"


def _kv_remark(config: ConfigJson) -> tuple[str, ...]:
    if config.raw("kv_cache_scheme"):
        return (
            "keys and values are kept as kv_cache_dtype says, not in the FP8 of this checkpoint's quantization_config",
        )
    return ()


def _mxfp4(config: ConfigJson) -> Quantization:
    found = Quantization((Group(ExpertsMxfp4(label="MXFP4")),), _ignored(config, "modules_to_not_convert"))
    _refuse_unread(config, {"quant_method", "dequantize"})
    return found


def _compressed_tensors(config: ConfigJson) -> Quantization:
    _only(config, quantization_status=("compressed", "frozen"))
    _refuse_sparse(config)
    groups, remarks = [], []
    whole = config.text("format", "dense")
    sections = config.section("config_groups")
    for name in sections:
        place = f"config_groups.{name:.50}."
        if not isinstance(sections.raw(name), dict):
            raise UnsupportedModelError(
                f"quantization_config: {place[:-1]} is a preset, which is not read: spell it out"
            )
        group = sections.section(name)
        targets = tuple(group.texts("targets"))
        for target in targets:
            _check_pattern(target)
        scheme = _compressed_scheme(group, group.text("format", whole), place)
        groups.append(Group(scheme, targets))
        if group.raw("output_activations"):
            raise UnsupportedModelError(f"quantization_config: {place}output_activations is not computed: leave it out")
        if "input_activations" in group:
            inputs = group.section("input_activations")
            kind = "dynamic" if inputs.raw("dynamic") else "static"
            width = f"{'FP' if inputs.raw('type') == 'float' else 'int'}{inputs.integer('num_bits', 8)}"
            remarks.append(_unquantized_inputs(f"{kind} {width}"))
        _refuse_unread(group, place=place)
    if not groups:
        raise UnsupportedModelError("quantization_config: config_groups is empty: it says what is quantized")
    found = Quantization(
        tuple(groups),
        _ignored(config, "ignore"),
        aside=(".input_scale", ".input_zero_point", ".input_global_scale", *KV_SCALES),
        remarks=tuple(dict.fromkeys([*remarks, *_kv_remark(config)])),
    )
    _refuse_unread(config, {"quant_method", "global_compression_ratio", "version", "run_compressed", "dequantize"})
    return found


def _refuse_sparse(config: ConfigJson) -> None:
    """Refuse weights that are sparse or rotated."""
    sparsity = config.section("sparsity_config")
    _only(sparsity, "sparsity_config.", format=("dense",))
    for name in ("transform_config", "moe_sparsity_config"):
        if config.raw(name):
            raise UnsupportedModelError(f"quantization_config: {name}, {brief(config.raw(name))}, is not computed")


def _compressed_scheme(group: ConfigJson, stored: str, place: str) -> Scheme:
    """Return the scheme of a group of compressed-tensors whose weights are `stored` so."""
    if "weights" not in group:
        raise UnsupportedModelError(f"quantization_config: {place}weights is absent: only weights are quantized here")
    weights, place = group.section("weights"), f"{place}weights."
    bits = weights.integer("num_bits", 8)
    kind, strategy = weights.text("type", "int"), weights.text("strategy", _strategy(weights))
    symmetric = weights.flag("symmetric", True)
    _only(
        weights, place, dynamic=(False,), actorder=(False, "weight", "static", "group", "dynamic"), is_mx=(True, False)
    )
    size = weights.integer("group_size", 0, least=-1)
    block = weights.integers("block_structure", []) if "block_structure" in weights else []
    _refuse_unread(weights, OBSERVED, place)
    said = f"{stored} of {kind}{bits}, by {strategy}"
    if kind == "int" and (strategy in ("tensor", "channel") or (strategy == "group" and size > 0)):
        packed = stored == "pack-quantized" and bits in (2, 4, 8) and (symmetric or strategy != "tensor")
        if packed or (stored in ("int-quantized", "naive-quantized") and bits == 8):
            return (PackedIntegers if packed else PlainIntegers)(
                label=f"compressed-tensors int{bits}",
                bits=bits,
                group_size=size if strategy == "group" else None,
                zeros=not symmetric,
                one_scale=strategy == "tensor",
            )
    if stored in ("float-quantized", "naive-quantized") and (kind, bits, symmetric) == ("float", 8, True):
        if strategy in ("tensor", "channel"):
            return Fp8(label=_fp8_label(None), block=None)
        if strategy == "block" and _is_block(block):
            return Fp8(label=_fp8_label((block[0], block[1])), block=(block[0], block[1]))
    if stored == "mxfp4-pack-quantized" and (kind, bits, size) == ("float", 4, 32):
        return Mxfp4(label="MXFP4")
    raise UnsupportedModelError(
        f"quantization_config: {place[:-1]} {brief(said)}{'' if symmetric else ', not symmetric'} is not read: "
        "pack-quantized of int4 and int8, int-quantized of int8, float-quantized of FP8 and mxfp4-pack-quantized are"
    )


def _strategy(weights: ConfigJson) -> str:
    """Return the strategy of weights that do not say it."""
    size = weights.integer("group_size", 0, least=-1)
    return "group" if size > 0 else "channel" if size else "tensor"


def _check_pattern(target: str) -> None:
    """Raise UnsupportedModelError for a pattern that is none, or that could take long to compare with a name."""
    if not target.startswith("re:"):
        return
    pattern = target[3:]
    if len(pattern) > LONGEST_PATTERN:
        raise UnsupportedModelError(
            f"quantization_config: the target {brief(target)} is not read: it has {len(pattern)} characters; at most "
            f"{LONGEST_PATTERN} are"
        )
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise UnsupportedModelError(
            f"quantization_config: the target {brief(target)} is no pattern: {error}"
        ) from error
    wildcards = len(re.findall(r"[*+]|\{\d*,\d*\}", pattern))
    plain = re.sub(r"(?<!\\)\(\?", "(", pattern)  # of groups that are not captured
    choices = 2 ** plain.count("?") * math.prod(part.count("|") + 1 for part in re.split("[()]", plain))
    if wildcards > MOST_WILDCARDS or choices > MOST_CHOICES or re.search(r"\)[*+{]|\(\?[aiLmsux-]", pattern):
        raise UnsupportedModelError(
            f"quantization_config: the target {brief(target)} is not read: it has more than {MOST_WILDCARDS} "
            f"wildcards or {MOST_CHOICES} ways to choose among alternatives, repeats a group, or has flags"
        )


METHODS: dict[str, Callable[[ConfigJson], Quantization]] = {
    "gptq": _gptq,
    "awq": _awq,
    "auto-round": _auto_round,
    "intel/auto-round": _auto_round,
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "fbgemm_fp8": _fbgemm_fp8,
    "mxfp4": _mxfp4,
}
"""Reader of each quant_method."""
