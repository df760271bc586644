"""Reads Gemma 4: layers with a window and those without have heads of two sizes and ropes of two kinds. Some models
take keys as values, or in their upper layers those of a layer below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from splitfuse.errors import ModelError, UnsupportedModelError, brief
from splitfuse.kernels.layers import (
    AttentionSpec,
    ExpertsSpec,
    MlpSpec,
    NormPlace,
    NormSpec,
    RouterSpec,
    TokenInputSpec,
)
from splitfuse.models.families.common import (
    DECODER_NAMES,
    Family,
    WeightNames,
    accept_only,
    activation,
    decoder,
    head_norms,
    mlp,
    num_layers,
    optional_number,
    read_attention,
)
from splitfuse.models.families.config_json import ConfigJson
from splitfuse.models.families.gemma import outside_layers
from splitfuse.models.families.layouts import Layout, Place, Stored, of_expert
from splitfuse.models.families.rope_config import read_rope
from splitfuse.models.spec import ModelSpec, RopeSpec

SLIDING, FULL = "sliding_attention", "full_attention"
DEFAULT_ROPES = {
    SLIDING: {"rope_theta": 1e4},
    FULL: {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
}


def _projections(end: str) -> Callable[[Place], Layout]:
    """Return the tensors of queries, keys and values: of queries alone where the others are another layer's, and keys
    in place of values where they are the same.
    """

    def layout(place: Place) -> Layout:
        mixer = place.attention
        parts = "q" if mixer.kv_layer is not None else "qkk" if mixer.value_is_key else "qkv"
        return tuple(f"model.layers.{{layer}}.self_attn.{part}_proj.{end}" for part in parts)

    return layout


GEMMA4_NAMES: WeightNames = {
    **DECODER_NAMES,
    "qkv": _projections("weight"),
    "qkv_bias": _projections("bias"),
    "post_attn_norm": ("model.layers.{layer}.post_attention_layernorm.weight",),
    "mlp_norm": ("model.layers.{layer}.pre_feedforward_layernorm.weight",),
    "post_mlp_norm": ("model.layers.{layer}.post_feedforward_layernorm.weight",),
    "output_scale": ("model.layers.{layer}.layer_scalar",),
    "token_inputs": ("model.embed_tokens_per_layer.weight",),
    "token_projection": ("model.per_layer_model_projection.weight",),
    "token_input_norm": ("model.per_layer_projection_norm.weight",),
    "token_gate": ("model.layers.{layer}.per_layer_input_gate.weight",),
    "token_out": ("model.layers.{layer}.per_layer_projection.weight",),
    "token_norm": ("model.layers.{layer}.post_per_layer_input_norm.weight",),
    "shared.gate_up": DECODER_NAMES["mlp.gate_up"],
    "shared.down": DECODER_NAMES["mlp.down"],
    "post_shared_norm": ("model.layers.{layer}.post_feedforward_layernorm_1.weight",),
    "router_norm": (Stored("model.layers.{layer}.router.scale", lambda scale, _: scale.float() * len(scale) ** -0.5),),
    "router": ("model.layers.{layer}.router.proj.weight",),
    "expert_scale": ("model.layers.{layer}.router.per_expert_scale",),
    "expert_norm": ("model.layers.{layer}.pre_feedforward_layernorm_2.weight",),
    "w13": (of_expert(Stored("model.layers.{layer}.experts.gate_up_proj")),),
    "w2": (of_expert(Stored("model.layers.{layer}.experts.down_proj")),),
    "post_expert_norm": ("model.layers.{layer}.post_feedforward_layernorm_2.weight",),
}


def gemma4(config: ConfigJson) -> ModelSpec:
    """Return the network of a Gemma4ForCausalLM."""
    accept_only(config, use_bidirectional_attention="vision")
    kinds = _kinds(config)
    attentions = _attentions(config, kinds)
    dense = mlp(config, activation=activation(config, "hidden_activation", "gelu_pytorch_tanh"))
    wide = replace(dense, intermediate_size=2 * dense.intermediate_size)
    double = config.flag("use_double_wide_mlp", False)
    size = config.integer("hidden_size_per_layer_input", 256, least=0)
    rows = config.integer("vocab_size_per_layer_input", 262_144)
    if size and rows < config.integer("vocab_size"):
        raise ModelError(f"config.json: vocab_size_per_layer_input {rows} is smaller than vocab_size")
    mlps = [wide if double and each.kv_layer is not None else dense for each in attentions]
    return decoder(
        config,
        attentions,
        [_with_experts(config, each) for each in mlps] if config.flag("enable_moe_block", False) else mlps,
        ropes=_ropes(config, kinds, attentions),
        layer={
            "norms": NormPlace.AROUND,
            "output_scale": True,
            "token_input": TokenInputSpec(size=size, activation=dense.activation) if size else None,
        },
        token_input_rows=rows if size else 0,
        logit_softcap=optional_number(config, "final_logit_softcapping", None),
        **outside_layers(config),
    )


def gemma4_unified(config: ConfigJson) -> ModelSpec:
    """Return the network of a Gemma4UnifiedForCausalLM: Gemma 4 12B, without embeddings of single layers."""
    return gemma4(config.with_defaults({"hidden_size_per_layer_input": 0, "sliding_window": 1024}))


def _with_experts(config: ConfigJson, dense: MlpSpec) -> ExpertsSpec:
    """Return experts next to a layer's MLP."""
    router = RouterSpec(
        num_experts=config.integer("num_experts"),
        top_k=config.integer("top_k_experts"),
        renormalize=True,
        expert_scale=True,
    )
    expert = replace(dense, intermediate_size=config.integer("moe_intermediate_size"))
    return ExpertsSpec(router=router, expert=expert, shared=dense, own_norm=_norm(config))


def _norm(config: ConfigJson) -> NormSpec:
    return NormSpec(eps=config.number("rms_norm_eps", 1e-6))


def _kinds(config: ConfigJson) -> list[str]:
    """Return the kind of each layer: by default every sixth sees all, and the last one always does."""
    count = num_layers(config)
    kinds = [FULL if (number + 1) % 6 == 0 else SLIDING for number in range(count)]
    if "layer_types" in config:
        kinds = config.texts("layer_types")
        if len(kinds) != count or set(kinds) - {SLIDING, FULL}:
            raise ModelError(f"config.json: layer_types must be {count} times {SLIDING} or {FULL}, not {brief(kinds)}")
    return [*kinds[:-1], FULL]


def _attentions(config: ConfigJson, kinds: list[str]) -> list[AttentionSpec]:
    first_reuse = len(kinds) - config.integer("num_kv_shared_layers", 0, least=0, most=len(kinds))
    same, biased = config.flag("attention_k_eq_v", False), config.flag("attention_bias", False)
    window = config.integer("sliding_window", 512)
    layers = []
    for number, (kind, sizes) in enumerate(zip(kinds, _sizes(config, kinds, same), strict=True)):
        kv_layer = None
        if number >= first_reuse:
            if kind not in kinds[:first_reuse]:
                raise ModelError(f"config.json: num_kv_shared_layers leaves no {kind} layer that has keys and values")
            kv_layer = first_reuse - 1 - kinds[first_reuse - 1 :: -1].index(kind)
        attention = read_attention(
            config.with_values(sizes),
            num_kv_heads=4,
            head_dim=256,
            rope=sorted(set(kinds)).index(kind),
            window=window if kind == SLIDING else None,
            qkv_bias=biased,
            o_bias=biased,
            qk_norm=head_norms(config),
            v_norm=_norm(config) if kv_layer is None else None,
            value_is_key=same and kind == FULL and kv_layer is None,
            kv_layer=kv_layer,
            scale=1.0,
        )
        layers.append(attention)
    return layers


def _sizes(config: ConfigJson, kinds: list[str], same: bool) -> list[dict[str, Any]]:
    """Return what each layer says of its heads: by `per_layer_config`, as transformers writes it, else by the fields of
    the labs' checkpoints for layers without a window.
    """
    if "per_layer_config" in config:
        section = config.section("per_layer_config")
        layers = {int(name): section.section(name) for name in section if name.isdecimal()}
        sizes = {number: {field: layer.raw(field) for field in layer} for number, layer in layers.items()}
        unknown = {field for layer in sizes.values() for field in layer} - {"head_dim", "num_key_value_heads"}
        if unknown or len(layers) < len(list(section)) or set(layers) - set(range(len(kinds))):
            raise UnsupportedModelError(
                "config.json: per_layer_config must be by the numbers of layers, and give head_dim and "
                f"num_key_value_heads alone, not {brief(config.raw('per_layer_config'))}"
            )
        each = [sizes.get(number, {}) for number in range(len(kinds))]
        for kind in set(kinds):
            alike = [own for own, its in zip(each, kinds, strict=True) if its == kind]
            head_dims = sorted({config.with_values(own).integer("head_dim", 256) for own in alike})
            if len(head_dims) > 1:
                raise UnsupportedModelError(
                    f"config.json: per_layer_config gives {kind} layers heads of {brief(head_dims)}: give those that "
                    "share a rope one head_dim"
                )
        return each
    full = {"head_dim": config.integer("global_head_dim", 512)}
    if same and "num_global_key_value_heads" in config:
        full["num_key_value_heads"] = config.integer("num_global_key_value_heads")
    return [full if kind == FULL else {} for kind in kinds]


def _ropes(config: ConfigJson, kinds: list[str], attentions: list[AttentionSpec]) -> list[RopeSpec]:
    """Return the rope of each kind of layer."""
    sections = config.section("rope_parameters") if "rope_parameters" in config else ConfigJson(DEFAULT_ROPES)
    if unknown := set(sections) - {SLIDING, FULL}:
        raise UnsupportedModelError(f"rope_parameters must be those of {SLIDING} and {FULL}; it has {sorted(unknown)}")
    heads = {kind: attention.head_dim for kind, attention in zip(kinds, attentions, strict=True)}
    return [read_rope(config, head_dim=heads[kind], section=sections.section(kind)) for kind in sorted(heads)]


FAMILIES = {
    "Gemma4ForCausalLM": Family("gemma4_text", gemma4, GEMMA4_NAMES),
    "Gemma4ForConditionalGeneration": Family("gemma4", gemma4, GEMMA4_NAMES, text_types=("gemma4_text",)),
    "Gemma4UnifiedForCausalLM": Family("gemma4_unified_text", gemma4_unified, GEMMA4_NAMES),
    "Gemma4UnifiedForConditionalGeneration": Family(
        "gemma4_unified", gemma4_unified, GEMMA4_NAMES, text_types=("gemma4_unified_text",)
    ),
}
