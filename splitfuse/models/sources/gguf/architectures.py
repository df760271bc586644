"""Lists the architectures of GGUF files that are read: their metadata as a config.json, their tensors by the names of
transformers, in its order.

Keys and tensor names are those of llama.cpp's converter. What of a file changes the network is honoured or refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from splitfuse.errors import UnsupportedModelError, WeightsError, brief
from splitfuse.models.sources.gguf.container import TensorInfo
from splitfuse.models.sources.gguf.metadata import Metadata
from splitfuse.models.sources.source import MOST_EXPERTS

Config: TypeAlias = dict[str, Any]
Tensors: TypeAlias = Mapping[str, TensorInfo]
Floats: TypeAlias = Callable[[str], list[float]]
"""Reads a short tensor of fp32."""

REMARKS = (
    *("vocab_size", "tensor_data_layout", "rope.scaling.finetuned"),
    *("attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon"),
)
"""Keys that do not change a network: the vocabulary is that of the embedding, and norms have one epsilon."""
ROPE_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"

_LAYER = re.compile(r"blk\.(?P<layer>\d{1,9})\.(?P<module>.+)")
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_NORM = {"ffn_norm": "post_attention_layernorm"}
_MLP = {
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    **{f"ffn_{part}_exps": f"mlp.experts.{{expert}}.{part}_proj" for part in ("gate", "up", "down")},
}
_MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{expert}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{expert}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{expert}.w2",
}
_DECODER = {**_ATTENTION, **_NORM, **_MLP}
_NORMS_BEHIND = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}


@dataclass(frozen=True)
class Architecture:
    """Describes an architecture: what changes its config, and transformers' names of the modules of a layer.

    With `permuted`, rows of queries and keys lie as ggml's rope of neighbouring elements wants them. With `plus_one`,
    norms are stored with the one that transformers adds. `flat` are modules of one row whose tensor lacks that
    dimension. `epsilon` is the config's name of that of norms; attention has biases if the
    module `biased` has one.
    """

    architecture: str
    model_type: str
    modules: Mapping[str, str]
    read: Callable[[Metadata, Config], Config] = lambda _metadata, _config: {}
    permuted: bool = False
    plus_one: bool = False
    flat: tuple[str, ...] = ()
    epsilon: str = "rms_norm_eps"
    biased: str = "attn_output"


def _llama(metadata: Metadata, _config: Config) -> Config:
    if not metadata.integer("expert_count", 0):
        return {}
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": metadata.integer("expert_count"),
        "num_experts_per_tok": metadata.integer("expert_used_count"),
    }


def _granite(metadata: Metadata, config: Config) -> Config:
    if not metadata.flag("rope.scaling.finetuned", True):  # what llama.cpp knows by it that there is no rope
        raise UnsupportedModelError(
            f"{metadata.location}: granite.rope.scaling.finetuned false, no rope, is not supported"
        )
    return {
        "attention_multiplier": metadata.number("attention.scale", config["head_dim"] ** -0.5),
        "embedding_multiplier": metadata.number("embedding_scale", 1.0),
        "residual_multiplier": metadata.number("residual_scale", 1.0),
        "logits_scaling": metadata.number("logit_scale", 1.0),
    }


def _qwen_moe(metadata: Metadata, _config: Config) -> Config:
    read: Config = {
        "num_experts": metadata.integer("expert_count"),
        "num_experts_per_tok": metadata.integer("expert_used_count"),
        "moe_intermediate_size": metadata.integer("expert_feed_forward_length"),
        "norm_topk_prob": metadata.flag("expert_weights_norm", metadata.architecture == "qwen3moe"),
    }
    if metadata.architecture == "qwen2moe":
        read["shared_expert_intermediate_size"] = metadata.integer("expert_shared_feed_forward_length")
    return read


def _gemma(_metadata: Metadata, _config: Config) -> Config:
    return {"hidden_act": "gelu_pytorch_tanh"}


def _gemma2(metadata: Metadata, config: Config) -> Config:
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": _gemma_scalar(config, 46),
        "sliding_window": metadata.integer("attention.sliding_window"),
        "attn_logit_softcapping": metadata.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": metadata.number("final_logit_softcapping", 30.0),
    }


def _gemma3(metadata: Metadata, config: Config) -> Config:
    full = {**config.pop("rope_parameters"), "rope_theta": metadata.number("rope.freq_base", 1e6)}
    local = {"rope_type": "default", "rope_theta": metadata.number("rope.freq_base_swa", 1e4)}
    cap = "final_logit_softcapping"
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": _gemma_scalar(config, 62),
        **_windows(metadata, config),
        "rope_parameters": {"full_attention": full, "sliding_attention": local},
        **({cap: metadata.number(cap)} if cap in metadata else {}),
    }


def _gemma_scalar(config: Config, layers_of_27b: int) -> float:
    """Return what scores are divided by the root of: files do not say, so that it is told by the number of layers."""
    if config["num_hidden_layers"] == layers_of_27b:
        return float(config["hidden_size"] // config["num_attention_heads"])
    return float(config["head_dim"])


def _phi3(metadata: Metadata, _config: Config) -> Config:
    return {"sliding_window": metadata.integer("attention.sliding_window", 0) or None}


def _smollm3(_metadata: Metadata, _config: Config) -> Config:
    return {"no_rope_layer_interval": 4}


def _starcoder2(metadata: Metadata, config: Config) -> Config:
    return {
        "hidden_act": "gelu_pytorch_tanh",
        "use_bias": config.pop("mlp_bias") and config.pop("attention_bias"),
        "sliding_window": metadata.integer("attention.sliding_window", 0) or None,
    }


def _arcee(_metadata: Metadata, _config: Config) -> Config:
    return {"hidden_act": "relu2"}


def _olmoe(metadata: Metadata, _config: Config) -> Config:
    return {
        "num_experts": metadata.integer("expert_count"),
        "num_experts_per_tok": metadata.integer("expert_used_count"),
        "norm_topk_prob": metadata.flag("expert_weights_norm", False),
    }


def _gpt_oss(metadata: Metadata, config: Config) -> Config:
    rope = config["rope_parameters"]
    if rope["rope_type"] == "yarn":
        rope["truncate"] = False
    return {
        **_windows(metadata, config),
        "num_local_experts": metadata.integer("expert_count"),
        "num_experts_per_tok": metadata.integer("expert_used_count"),
        "intermediate_size": metadata.integer("expert_feed_forward_length"),
    }


def _cohere2(metadata: Metadata, config: Config) -> Config:
    return {"logit_scale": metadata.number("logit_scale"), **_windows(metadata, config)}


def _command_r(metadata: Metadata, _config: Config) -> Config:
    return {"logit_scale": metadata.number("logit_scale")}


def _exaone4(metadata: Metadata, config: Config) -> Config:
    if not metadata.integer("attention.sliding_window", 0):
        return {"sliding_window": None}
    return _windows(metadata, config)


def _olmo2(metadata: Metadata, config: Config) -> Config:
    """Return what OLMo 3 has besides, whose files have the same architecture: windows, in layers with a plain rope."""
    if not metadata.integer("attention.sliding_window", 0):
        return {}
    rope = config.pop("rope_parameters")
    local = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    return {
        "architectures": ["Olmo3ForCausalLM"],
        "model_type": "olmo3",
        "rope_parameters": {"full_attention": rope, "sliding_attention": local},
        **_windows(metadata, config),
    }


def _windows(metadata: Metadata, config: Config) -> Config:
    """Return the sliding window and, where a file says so, which layers have it; else the family knows."""
    count, key = config["num_hidden_layers"], "attention.sliding_window_pattern"
    windows: Config = {"sliding_window": metadata.integer("attention.sliding_window")}
    if key not in metadata:
        return windows
    inside = metadata.flags(key, count)
    return {**windows, "layer_types": ["sliding_attention" if each else "full_attention" for each in inside]}


ARCHITECTURES = {
    "llama": Architecture(
        "LlamaForCausalLM",
        "llama",
        {**_DECODER, **_MIXTRAL},
        _llama,
        permuted=True,
    ),
    "granite": Architecture("GraniteForCausalLM", "granite", _DECODER, _granite, permuted=True),
    "smollm3": Architecture("SmolLM3ForCausalLM", "smollm3", _DECODER, _smollm3, permuted=True),
    "qwen2": Architecture("Qwen2ForCausalLM", "qwen2", _DECODER),
    "qwen3": Architecture("Qwen3ForCausalLM", "qwen3", {**_DECODER, **_HEAD_NORMS}),
    "qwen2moe": Architecture(
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        {
            **_ATTENTION,
            **_NORM,
            **_EXPERTS,
            "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
            **{f"ffn_{part}_shexp": f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")},
        },
        _qwen_moe,
        flat=("ffn_gate_inp_shexp",),
    ),
    "qwen3moe": Architecture(
        "Qwen3MoeForCausalLM", "qwen3_moe", {**_ATTENTION, **_NORM, **_EXPERTS, **_HEAD_NORMS}, _qwen_moe
    ),
    "gemma": Architecture("GemmaForCausalLM", "gemma", _DECODER, _gemma, plus_one=True),
    "gemma2": Architecture(
        "Gemma2ForCausalLM",
        "gemma2",
        {**_DECODER, **_NORMS_BEHIND, "ffn_norm": "pre_feedforward_layernorm"},
        _gemma2,
        plus_one=True,
    ),
    "gemma3": Architecture(
        "Gemma3ForCausalLM",
        "gemma3_text",
        {**_DECODER, **_HEAD_NORMS, **_NORMS_BEHIND, "ffn_norm": "pre_feedforward_layernorm"},
        _gemma3,
        plus_one=True,
    ),
    "phi3": Architecture(
        "Phi3ForCausalLM",
        "phi3",
        {**_DECODER, "attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
        _phi3,
    ),
    "starcoder2": Architecture(
        "Starcoder2ForCausalLM",
        "starcoder2",
        {**_DECODER, "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
        _starcoder2,
        epsilon="norm_epsilon",
    ),
    "olmo2": Architecture("Olmo2ForCausalLM", "olmo2", {**_ATTENTION, **_MLP, **_HEAD_NORMS, **_NORMS_BEHIND}, _olmo2),
    "cohere2": Architecture("Cohere2ForCausalLM", "cohere2", _DECODER, _cohere2, epsilon="layer_norm_eps"),
    "command-r": Architecture("CohereForCausalLM", "cohere", _DECODER, _command_r, epsilon="layer_norm_eps"),
    "exaone4": Architecture(
        "Exaone4ForCausalLM", "exaone4", {**_ATTENTION, **_MLP, **_HEAD_NORMS, **_NORMS_BEHIND}, _exaone4
    ),
    "glm4": Architecture(
        "Glm4ForCausalLM",
        "glm4",
        {
            **_DECODER,
            "ffn_up": "mlp.gate_up_proj",
            "post_attention_norm": "post_self_attn_layernorm",
            "post_ffw_norm": "post_mlp_layernorm",
        },
        biased="attn_q",
    ),
    "arcee": Architecture("ArceeForCausalLM", "arcee", _DECODER, _arcee, permuted=True),
    "ernie4_5": Architecture("Ernie4_5ForCausalLM", "ernie4_5", _DECODER),
    "hunyuan-dense": Architecture(
        "HunYuanDenseV1ForCausalLM",
        "hunyuan_v1_dense",
        {**_DECODER, "attn_q_norm": "self_attn.query_layernorm", "attn_k_norm": "self_attn.key_layernorm"},
    ),
    "olmoe": Architecture("OlmoeForCausalLM", "olmoe", {**_ATTENTION, **_NORM, **_EXPERTS, **_HEAD_NORMS}, _olmoe),
    "seed_oss": Architecture(
        "SeedOssForCausalLM",
        "seed_oss",
        {**_ATTENTION, **_MLP, "post_attention_norm": "post_attention_layernorm"},
        biased="attn_q",
    ),
    "gpt-oss": Architecture(
        "GptOssForCausalLM",
        "gpt_oss",
        {
            **_ATTENTION,
            **_EXPERTS,
            "attn_sinks.weight": "self_attn.sinks",
            "post_attention_norm": "post_attention_layernorm",
            "ffn_gate_inp": "mlp.router",
        },
        _gpt_oss,
    ),
}
"""Architecture of a GGUF file -> how it is read."""


def find_architecture(metadata: Metadata) -> Architecture:
    """Return the entry of ARCHITECTURES. Raises UnsupportedModelError for one that is not read."""
    if metadata.architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{metadata.location}: the architecture {brief(metadata.architecture)} of GGUF files is not read; those "
            f"that are: {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[metadata.architecture]


def read_config(metadata: Metadata, tensors: Tensors, floats: Floats) -> Config:
    """Return a config.json of the network. Raises ModelError for metadata that makes no sense or is not supported."""
    found = find_architecture(metadata)
    if "token_embd.weight" not in tensors:
        raise WeightsError(f"{metadata.location} has no tensor token_embd.weight: it is not a whole language model")
    heads, hidden = metadata.integer("attention.head_count", least=1), metadata.integer("embedding_length", least=1)
    head_dim = metadata.integer("attention.key_length", hidden // heads, least=1)
    if (value_dim := metadata.integer("attention.value_length", head_dim)) != head_dim:
        raise UnsupportedModelError(
            f"{metadata.location}: {metadata.architecture}.attention.value_length {value_dim} other than the "
            f"{head_dim} of keys is not supported"
        )
    norm = "attention.layer_norm_rms_epsilon" if found.epsilon == "rms_norm_eps" else "attention.layer_norm_epsilon"
    config: Config = {
        "architectures": [found.architecture],
        "model_type": found.model_type,
        "dtype": _dtype(tensors),
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": metadata.integer("feed_forward_length", least=1),
        "num_hidden_layers": metadata.integer("block_count", least=1),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.integer("attention.head_count_kv", heads, least=1),
        "head_dim": head_dim,
        "max_position_embeddings": metadata.integer("context_length", least=1),
        found.epsilon: metadata.number(norm),
        "attention_bias": f"blk.0.{found.biased}.bias" in tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in tensors,
        "rope_parameters": _rope(metadata, tensors, floats, head_dim),
    }
    if not metadata.flag("attention.causal", True):
        raise UnsupportedModelError(f"{metadata.location}: attention to later tokens is not supported")
    if metadata.integer("expert_gating_func", 1) != 1:
        raise UnsupportedModelError(f"{metadata.location}: experts that are not chosen by a softmax are not supported")
    config |= found.read(metadata, config)
    metadata.refuse_unread(REMARKS)
    return config


def _dtype(tensors: Tensors) -> str:
    """Return the dtype of the matrices, bfloat16 if they are quantized or of several."""
    types = {each.type.name for each in tensors.values() if len(each.shape) > 1}
    only = types.pop() if len(types) == 1 else ""
    return {"F32": "float32", "F16": "float16"}.get(only, "bfloat16")


def _rope(metadata: Metadata, tensors: Tensors, floats: Floats, head_dim: int) -> Config:
    """Return the rope_parameters."""
    rope: Config = {"rope_type": "default", "rope_theta": metadata.number("rope.freq_base", 10_000.0)}
    rotated = metadata.integer("rope.dimension_count", head_dim, least=1)
    if rotated != head_dim:
        rope["partial_rotary_factor"] = rotated / head_dim
    kind = metadata.text("rope.scaling.type", "none")
    length = metadata.integer("context_length")
    scaled = kind != "none" and metadata.number("rope.scaling.factor", 1.0) != 1.0
    if LONG_FACTORS in tensors and SHORT_FACTORS in tensors:
        rope |= {
            "rope_type": "longrope",
            "long_factor": floats(LONG_FACTORS),
            "short_factor": floats(SHORT_FACTORS),
            "original_max_position_embeddings": metadata.integer("rope.scaling.original_context_length", length),
            "attention_factor": metadata.number("rope.scaling.attn_factor", 1.0),
        }
        kind = "none" if kind == "longrope" else kind
    elif ROPE_FACTORS in tensors:  # the frequencies of Llama 3, for texts of any length
        factors = floats(ROPE_FACTORS)
        rope |= {
            "rope_type": "longrope",
            "long_factor": factors,
            "short_factor": factors,
            "original_max_position_embeddings": length,
            "attention_factor": 1.0,
        }
    if kind not in ("none", "linear", "yarn") or (scaled and rope["rope_type"] != "default"):
        raise UnsupportedModelError(
            f"{metadata.location}: {metadata.architecture}.rope.scaling.type {brief(kind)} is not supported here"
        )
    if scaled:
        rope |= {"rope_type": kind, "factor": metadata.number("rope.scaling.factor")}
    if scaled and kind == "yarn":
        original = metadata.integer("rope.scaling.original_context_length", least=1)
        rope |= {"original_max_position_embeddings": original, **_yarn(metadata)}
    metadata.integer("rope.scaling.original_context_length", 0)
    return rope


def _yarn(metadata: Metadata) -> Config:
    """Return what further fields of YaRN say."""
    if metadata.number("rope.scaling.yarn_ext_factor", 1.0) != 1.0:
        raise UnsupportedModelError(
            f"{metadata.location}: a {metadata.architecture}.rope.scaling.yarn_ext_factor other than 1 is not supported"
        )
    names = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow", "attention_factor": "yarn_attn_factor"}
    keys = {name: f"rope.scaling.{key}" for name, key in names.items()}
    return {name: metadata.number(key) for name, key in keys.items() if key in metadata}


@dataclass(frozen=True)
class Located:
    """Says where a tensor of transformers' lies: in a tensor of the file, or that of an expert in one of all experts.
    `heads` is set where rows of heads lie in the order of ggml.
    """

    info: TensorInfo
    shape: tuple[int, ...]
    expert: int | None = None
    heads: int | None = None
    plus_one: bool = False


def locate(metadata: Metadata, tensors: Tensors, config: Config) -> dict[str, Located]:
    """Return the tensors by the names of transformers; those that have none keep their own."""
    found = find_architecture(metadata)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    located: dict[str, Located] = {}
    for info in tensors.values():
        if info.name in (ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS):
            continue
        module, _, kind = info.name.rpartition(".")
        layer, own = "", module
        if (match := _LAYER.fullmatch(module)) is not None:
            layer, own = match["layer"], match["module"]
        name = _name(found, layer, own, kind) or info.name
        shape = (1, *info.shape) if own in found.flat and len(info.shape) == 1 else info.shape
        permuted = heads.get(own) if found.permuted and shape[0] % (2 * heads.get(own, 1)) == 0 else None
        plus_one = found.plus_one and own.endswith("norm")
        if "{expert}" not in name:
            located[name] = Located(info, shape, heads=permuted, plus_one=plus_one)
        elif len(shape) < 2 or shape[0] > MOST_EXPERTS:
            raise WeightsError(
                f"{metadata.location}: tensor {info.name:.200} of experts has shape {brief(list(shape))}"
            )
        else:
            for expert in range(shape[0]):
                located[name.format(expert=expert)] = Located(info, shape[1:], expert)
    return located


def _name(found: Architecture, layer: str, module: str, kind: str) -> str | None:
    """Return what transformers calls the weight or bias of a module, if it has that."""
    if not layer:
        return f"{_OUTER[module]}.{kind}" if module in _OUTER else None
    if f"{module}.{kind}" in found.modules:
        return f"model.layers.{layer}.{found.modules[f'{module}.{kind}']}"
    return f"model.layers.{layer}.{found.modules[module]}.{kind}" if module in found.modules else None
