"""Reads hybrids of Mamba-2 and attention: Bamba, Granite 4, and Nemotron-H, whose layers are a mixer or an MLP each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from splitfuse.errors import ModelError, brief
from splitfuse.kernels.layers import ExpertsSpec, MambaSpec, Mixer, MlpSpec, NormSpec, RouterSpec
from splitfuse.models.families.common import (
    DECODER_NAMES,
    LEGACY_LAYER_TYPES,
    Family,
    WeightNames,
    accept_only,
    biased_attention,
    decoder,
    further_layers,
    layer_types,
    mlp,
    num_layers,
    plain_mlp,
    read_attention,
    sigmoid_router,
    with_biases,
)
from splitfuse.models.families.config_json import ConfigJson, is_number
from splitfuse.models.families.layouts import Layout, Place, Stored, conv1d, of_expert
from splitfuse.models.families.llama import (
    GRANITE_MOE_IN_MEMORY,
    GRANITE_MOE_NAMES,
    granite_attention,
    granite_decoder,
)
from splitfuse.models.families.rope_config import read_rope
from splitfuse.models.spec import ModelSpec

PATTERN = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
"""Kinds of layers by the characters of `hybrid_override_pattern`."""
INFINITY = ({"__float__": "Infinity"}, math.inf)
"""Values of config.json for a number without limit: as transformers 5 writes it, and as Python does."""
EXECUTION_FIELDS = (
    *("mamba_chunk_size", "mamba_ssm_cache_dtype", "use_mamba_kernels"),
    *("time_step_min", "time_step_max", "time_step_floor", "time_step_rank"),
)
"""Fields that say how a state is computed, kept and first trained, not what it is."""
Z, V, B, C, DT = range(5)
"""Parts of a Mamba's projection, in the order in which they are stored; V, B and C are convolved."""


def _parts(name: str, *wanted: int, convolved: bool = False) -> Stored:
    """Return the rows of these parts of a tensor that has those of all, or of those that are convolved."""

    def sizes(place: Place) -> list[int]:
        assert place.layer is not None and isinstance(place.layer.mixer, MambaSpec)
        spec = place.layer.mixer
        values, shared = spec.num_heads * spec.head_dim, spec.num_groups * spec.state_dim
        return [values, shared, shared] if convolved else [values, values, shared, shared, spec.num_heads]

    def take(tensor: Tensor, place: Place) -> Tensor:
        parts = tensor.split_with_sizes(sizes(place))
        return torch.cat([parts[part - convolved] for part in wanted])

    return Stored(name, take, lambda shape, place: (sum(sizes(place)), *shape[1:]))


def _mamba_names(mixer: str) -> Mapping[str, Layout]:
    """Return the names of a Mamba's weights, which begin with `mixer`."""
    channels = _parts(f"{mixer}.conv1d.weight", C, B, V, convolved=True)
    taps = conv1d(channels.name)
    return {
        "in_proj": (_parts(f"{mixer}.in_proj.weight", C, B, V, Z),),
        "in_proj_bias": (_parts(f"{mixer}.in_proj.bias", C, B, V, Z),),
        "gates": (_parts(f"{mixer}.in_proj.weight", DT),),
        "gates_bias": (_parts(f"{mixer}.in_proj.bias", DT),),
        "conv": (Stored(taps.name, lambda tensor, place: taps.take(channels.take(tensor, place), place), taps.shape),),
        "conv_bias": (_parts(f"{mixer}.conv1d.bias", C, B, V, convolved=True),),
        "decay": (Stored(f"{mixer}.A_log", lambda tensor, _: tensor.float().exp()),),
        "decay_bias": (f"{mixer}.dt_bias",),
        "skip": (f"{mixer}.D",),
        "out_norm": (f"{mixer}.norm.weight",),
        "out_proj": (f"{mixer}.out_proj.weight",),
        "out_proj_bias": (f"{mixer}.out_proj.bias",),
    }


_MLP = [key for key in DECODER_NAMES if key.startswith("mlp.")]
_SHARED = {
    "gate_up": ("model.layers.{layer}.shared_mlp.input_linear.weight",),
    "down": ("model.layers.{layer}.shared_mlp.output_linear.weight",),
}
GRANITE_HYBRID_NAMES: WeightNames = {
    **GRANITE_MOE_NAMES,
    **_mamba_names("model.layers.{layer}.mamba"),
    **{f"{mlp}.{name}": stored for mlp in ("mlp", "shared") for name, stored in _SHARED.items()},
}

BAMBA_NAMES: WeightNames = {
    **DECODER_NAMES,
    **{key: tuple(str(name).replace(".mlp.", ".feed_forward.") for name in DECODER_NAMES[key]) for key in _MLP},
    "norm": ("model.final_layernorm.weight",),
    "mlp_norm": ("model.layers.{layer}.pre_ff_layernorm.weight",),
    **_mamba_names("model.layers.{layer}.mamba"),
}


def _nemotron_names(network: str) -> Mapping[str, Layout]:
    """Return the names of Nemotron-H, but those of experts; most begin with `network`."""
    layer = f"{network}.layers.{{layer}}"
    mixer = f"{layer}.mixer"
    mlps = {
        f"{mlp}.{name}": (f"{place}.{name}_proj.weight",)
        for mlp, place in (("mlp", mixer), ("shared", f"{mixer}.shared_experts"))
        for name in ("up", "down")
    }
    return {
        "embed": (f"{network}.embeddings.weight",),
        "norm": (f"{network}.norm_f.weight",),
        "head": ("lm_head.weight",),
        "attn_norm": (f"{layer}.norm.weight",),
        "mlp_norm": (f"{layer}.norm.weight",),
        "qkv": tuple(f"{mixer}.{part}_proj.weight" for part in "qkv"),
        "o": (f"{mixer}.o_proj.weight",),
        "router": (f"{mixer}.gate.weight",),
        "choice_bias": (f"{mixer}.gate.e_score_correction_bias",),
        **with_biases(mlps),
        **_mamba_names(mixer),
    }


NEMOTRON_H_NAMES: WeightNames = {
    **_nemotron_names("backbone"),
    "w1": ("backbone.layers.{layer}.mixer.experts.{expert}.up_proj.weight",),
    "w2": ("backbone.layers.{layer}.mixer.experts.{expert}.down_proj.weight",),
}
NEMOTRON_H_IN_MEMORY: WeightNames = {
    **_nemotron_names("model"),
    "w1": (of_expert(Stored("model.layers.{layer}.mixer.experts.up_proj")),),
    "w2": (of_expert(Stored("model.layers.{layer}.mixer.experts.down_proj")),),
}


def granite_moe_hybrid(config: ConfigJson) -> ModelSpec:
    """Return the network of a GraniteMoeHybridForCausalLM: Granite 4, with experts or without."""
    accept_only(config, hidden_act="silu", normalization_function="rmsnorm")
    mamba = _wide_mamba(config, eps=1e-6)
    attention, rope = granite_attention(config), config.text("position_embedding_type", "nope")
    accept_only(config, position_embedding_type="rope" if rope == "rope" else "nope")
    if rope == "nope":
        attention = replace(attention, rope=None)
    kinds = layer_types(config) if "layer_types" in config else ["linear_attention"] * num_layers(config)
    kinds = [LEGACY_LAYER_TYPES.get(kind, kind) for kind in kinds]
    mixers: list[Mixer] = [mamba if kind == "linear_attention" else attention for kind in kinds]
    dense = mlp(config, config.integer("shared_intermediate_size", 1024))
    inner: MlpSpec | ExpertsSpec = dense
    if count := config.integer("num_local_experts", 8, least=0):
        router = RouterSpec(num_experts=count, top_k=config.integer("num_experts_per_tok", 2), renormalize=True)
        inner = ExpertsSpec(router=router, expert=mlp(config), shared=dense)
    return granite_decoder(config, mixers, inner, **({} if rope == "rope" else {"ropes": ()}))


def bamba(config: ConfigJson) -> ModelSpec:
    """Return the network of a BambaForCausalLM: attention rotates half of each head."""
    accept_only(config, hidden_act="silu", mamba_use_mlp=True)
    mamba, attention = _wide_mamba(config, eps=1e-5), biased_attention(config, num_kv_heads=8)
    attending = set(config.integers("attn_layer_indices", []))
    mixers: list[Mixer] = [attention if number in attending else mamba for number in range(num_layers(config))]
    rope = read_rope(config, head_dim=attention.head_dim, share=0.5)
    return decoder(config, mixers, mlp(config, bias=config.flag("mlp_bias", False)), ropes=(rope,), norm_eps=1e-5)


def nemotron_h(config: ConfigJson) -> ModelSpec:
    """Return the network of a NemotronHForCausalLM: each layer is a Mamba, attention, an MLP or experts."""
    accept_only(config, attention_bias=False, mamba_proj_bias=False, mamba_hidden_act="silu", n_shared_experts=1)
    accept_only(config, sliding_window=None)
    kinds = _nemotron_kinds(config)
    config = config.with_defaults({"num_hidden_layers": len(kinds), "intermediate_size": 21504})
    config = config.with_defaults({"n_routed_experts": 8, "num_experts_per_tok": 2})
    norm = NormSpec(eps=config.number("layer_norm_epsilon", 1e-5))
    mixers: dict[str, Mixer] = {
        "linear_attention": _mamba(
            config,
            num_heads=config.integer("mamba_num_heads", 128),
            num_groups=config.integer("n_groups", 8),
            state_dim=config.integer("ssm_state_size", 128),
            head_dim=config.integer("mamba_head_dim", 64),
            conv_size=config.integer("conv_kernel", 4),
            norm=norm,
            bias=config.flag("use_bias", False),
            conv_bias=config.flag("use_conv_bias", True),
        ),
        "full_attention": read_attention(config, num_kv_heads=8, head_dim=128, rope=None),
    }
    dense: dict[str, Any] = {"act": "relu2", "field": "mlp_hidden_act", "bias": config.flag("mlp_bias", False)}
    shared = plain_mlp(config, config.integer("moe_shared_expert_intermediate_size", 7688), **dense)
    expert = plain_mlp(config, config.integer("moe_intermediate_size", 7688), **{**dense, "bias": False})
    mlps: dict[str, MlpSpec | ExpertsSpec] = {
        "mlp": plain_mlp(config, **dense),
        "moe": ExpertsSpec(router=sigmoid_router(config), expert=expert, shared=shared),
    }
    return decoder(
        config,
        [mixers.get(kind) for kind in kinds],
        [mlps.get(kind) for kind in kinds],
        ropes=(),
        norm=norm,
        further_layers=further_layers(config, 0),
    )


def _wide_mamba(config: ConfigJson, *, eps: float) -> MambaSpec:
    """Return the Mamba of Granite 4 and Bamba, as wide as `mamba_expand` says; `eps` is a default."""
    width, heads = (
        config.integer("hidden_size") * config.integer("mamba_expand", 2),
        config.integer("mamba_n_heads", 128),
    )
    automatic = config.raw("mamba_d_head") in (None, "auto")
    head_dim = max(width // heads, 1) if automatic else config.integer("mamba_d_head")
    if heads * head_dim != width:
        raise ModelError(
            f"config.json: mamba_expand x hidden_size is {width}, which {heads} heads of {head_dim} (mamba_n_heads, "
            "mamba_d_head) do not fill"
        )
    return _mamba(
        config,
        num_heads=heads,
        num_groups=config.integer("mamba_n_groups", 1),
        state_dim=config.integer("mamba_d_state", 256),
        head_dim=head_dim,
        conv_size=config.integer("mamba_d_conv", 4),
        norm=NormSpec(eps=config.number("rms_norm_eps", eps)),
        bias=config.flag("mamba_proj_bias", False),
        conv_bias=config.flag("mamba_conv_bias", True),
    )


def _mamba(config: ConfigJson, **fields: Any) -> MambaSpec:
    """Return the Mamba of a config; `fields` are those that each family calls in its own way."""
    for field in EXECUTION_FIELDS:
        config.raw(field)
    if "time_step_limit" not in config:
        return MambaSpec(**fields)
    stored = config.raw("time_step_limit")
    limits = [math.inf if each in INFINITY else each for each in stored] if isinstance(stored, list | tuple) else []
    if len(limits) != 2 or not all(map(is_number, limits)) or not 0 <= limits[0] <= limits[1]:
        raise ModelError(
            "config.json: time_step_limit must be the least and the largest time step, such as [0.0, Infinity], not "
            f"{brief(stored)}"
        )
    least, most = map(float, limits)
    return MambaSpec(**fields, dt_min=least, dt_max=None if most == math.inf else most)


def _nemotron_kinds(config: ConfigJson) -> list[str]:
    """Return the kind of each layer: from a list, or from a pattern such as "M-M*E"."""
    for field in ("layers_block_type", "layer_types"):
        if field in config:
            kinds = [LEGACY_LAYER_TYPES.get(kind, kind) for kind in config.texts(field)]
            if unknown := sorted(set(kinds) - set(PATTERN.values())):
                raise ModelError(f"config.json: {field} has {brief(unknown[0])}: use {', '.join(PATTERN.values())}")
            return kinds
    pattern = config.text("hybrid_override_pattern", "ME*-")
    if unknown := sorted(set(pattern) - set(PATTERN)):
        raise ModelError(
            f"config.json: hybrid_override_pattern has {brief(unknown[0])}: use M (Mamba), * (attention), - (MLP) and "
            "E (experts)"
        )
    return [PATTERN[kind] for kind in pattern]


FAMILIES = {
    "BambaForCausalLM": Family("bamba", bamba, BAMBA_NAMES),
    "GraniteMoeHybridForCausalLM": Family(
        "granitemoehybrid", granite_moe_hybrid, GRANITE_HYBRID_NAMES, alternatives=(GRANITE_MOE_IN_MEMORY,)
    ),
    "NemotronHForCausalLM": Family("nemotron_h", nemotron_h, NEMOTRON_H_NAMES, alternatives=(NEMOTRON_H_IN_MEMORY,)),
}
