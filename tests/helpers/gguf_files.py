"""Writes tiny GGUF files by the `gguf` package, as llama.cpp's converter does: the keys, the names of tensors and their
order of each architecture.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
import torch
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

MODULES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.query_layernorm": "attn_q_norm",
    "self_attn.key_layernorm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.router": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    **{f"mlp.shared_expert.{part}_proj": f"ffn_{part}_shexp" for part in ("gate", "up", "down")},
}
NORMS_BEHIND = {
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "pre_feedforward_layernorm": "ffn_norm",
}
OTHER_MODULES = {
    "gemma2": NORMS_BEHIND,
    "gemma3": NORMS_BEHIND,
    "olmo2": NORMS_BEHIND,
    "exaone4": NORMS_BEHIND,
    "glm4": {"post_self_attn_layernorm": "post_attention_norm", "post_mlp_layernorm": "post_ffw_norm"},
    "gpt-oss": {"post_attention_layernorm": "post_attention_norm"},
    "seed_oss": {"post_attention_layernorm": "post_attention_norm"},
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "gemma3_text": "gemma3",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "olmo3": "olmo2",
    "hunyuan_v1_dense": "hunyuan-dense",
    "cohere": "command-r",
    "gpt_oss": "gpt-oss",
}
"""model_type of transformers -> architecture of GGUF files, where they differ."""
INTERLEAVED = ("llama", "granite", "smollm3", "arcee")


def random_blocks(name: str, rows: int, count: int) -> NDArray[np.uint8]:
    """Draw blocks [rows, count, bytes] of a type: random bytes, but for the numbers in fp16, which are finite."""
    rng = np.random.default_rng(20)
    blocks = rng.integers(0, 256, (rows, count, gguf.GGML_QUANT_SIZES[Type[name]][1]), dtype=np.uint8)
    places = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "MXFP4": ()}.get(name, (0,))
    for begin in (*places, 2) if name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K") else places:
        blocks[..., begin : begin + 2] = rng.normal(size=(rows, count)).astype(np.float16)[..., None].view(np.uint8)
    return blocks


def write(
    model: PreTrainedModel,
    path: Path,
    *,
    types: Mapping[str, Type] | Type = Type.F32,
    tokenizer: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """Write a model in a type, or matrices in the types of `types` by a part of their name. `changes` are further or
    other values of metadata by their key without the architecture.
    """
    config = model.config
    arch = ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(str(path), arch)
    for key, value in {**keys(model, arch), **changes}.items():
        put(writer, f"{arch}.{key}", value)
    for key, value in (tokenizer or {}).items():
        put(writer, f"tokenizer.{key}", value)
    for name, tensor in tensors(model, arch).items():
        wanted = types if isinstance(types, Type) else next((t for part, t in types.items() if part in name), Type.F32)
        kind = wanted if tensor.ndim > 1 and "ffn_gate_inp" not in name else Type.F32
        put_tensor(writer, name, tensor, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_parts(model: PreTrainedModel, stem: Path) -> list[Path]:
    """Write a model in two files, as llama.cpp splits them: the metadata is in the first."""
    arch = ARCHITECTURES.get(model.config.model_type, model.config.model_type)
    listed = list(tensors(model, arch).items())
    paths = [stem.with_name(f"{stem.name}-{number:05}-of-00002.gguf") for number in (1, 2)]
    for number, path in enumerate(paths):
        writer = gguf.GGUFWriter(str(path), arch)
        for key, value in (keys(model, arch) if number == 0 else {}).items():
            put(writer, f"{arch}.{key}", value)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(listed))
        for name, tensor in listed[number::2]:
            put_tensor(writer, name, tensor, Type.F32)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


def put(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add a value of the type that converters write."""
    match value:
        case None:
            pass
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def put_tensor(writer: gguf.GGUFWriter, name: str, tensor: Tensor, kind: Type) -> None:
    """Add a tensor, quantized."""
    array = np.ascontiguousarray(tensor.float().numpy())
    if kind is Type.F32:
        writer.add_tensor(name, array)
    else:
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)


def keys(model: PreTrainedModel, arch: str) -> dict[str, Any]:
    """The metadata of the architecture."""
    config = model.config
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1.0)),
        "vocab_size": config.vocab_size,
    }
    for field in ("layer_norm_eps", "norm_epsilon", "rms_norm_eps"):
        if hasattr(config, field):
            key = "layer_norm_rms_epsilon" if field == "rms_norm_eps" else "layer_norm_epsilon"
            values[f"attention.{key}"] = getattr(config, field)
    if rope["rope_type"] in ("linear", "yarn"):
        values |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
        if rope["rope_type"] == "yarn":
            values["rope.scaling.yarn_beta_fast"] = rope.get("beta_fast")
            values["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    if rope["rope_type"] == "longrope":
        values["rope.scaling.original_context_length"] = config.original_max_position_embeddings
        values["rope.scaling.attn_factor"] = rope["attention_factor"]
    if (
        arch in ("gemma2", "gemma3", "phi3", "starcoder2", "gpt-oss", "cohere2", "exaone4")
        or config.model_type == "olmo3"
    ):
        values["attention.sliding_window"] = config.sliding_window
    if hasattr(config, "layer_types") and arch in ("exaone4", "olmo2") and values.get("attention.sliding_window"):
        values["attention.sliding_window_pattern"] = [kind == "sliding_attention" for kind in config.layer_types]
    if arch in ("gemma2", "gemma3"):
        values["final_logit_softcapping"] = config.final_logit_softcapping
        values["attn_logit_softcapping"] = config.attn_logit_softcapping
    if arch == "gemma3":
        values["rope.freq_base_swa"] = float(config.rope_parameters["sliding_attention"]["rope_theta"])
    if arch == "granite":
        values |= {"attention.scale": config.attention_multiplier, "embedding_scale": config.embedding_multiplier}
        values |= {"residual_scale": config.residual_multiplier, "logit_scale": config.logits_scaling}
    if arch in ("cohere2", "command-r"):
        values["logit_scale"] = config.logit_scale
    if experts := getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None):
        values |= {"expert_count": experts, "expert_used_count": config.num_experts_per_tok}
        if arch not in ("llama", "olmoe"):
            inner = getattr(config, "moe_intermediate_size", config.intermediate_size)
            values["expert_feed_forward_length"] = inner
        if arch == "qwen2moe":
            values["expert_shared_feed_forward_length"] = config.shared_expert_intermediate_size
    return values


def tensors(model: PreTrainedModel, arch: str) -> dict[str, Tensor]:
    """The tensors by the names and in the order of GGUF."""
    state, config = model.state_dict(), model.config
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module = name.rpartition(".")[0]
        layer, _, rest = module.removeprefix("model.layers.").partition(".")
        if ".experts" in name:
            found |= expert_tensors(f"blk.{layer}", name.rpartition("experts.")[2], tensor, arch)
            continue
        if name.endswith("self_attn.sinks"):
            found[f"blk.{layer}.attn_sinks.weight"] = tensor
            continue
        if rest in ("self_attn.q_proj", "self_attn.k_proj") and arch in INTERLEAVED:
            heads = config.num_attention_heads if "q_proj" in rest else config.num_key_value_heads
            tensor = tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        found[gguf_name(name, arch)] = tensor.squeeze() if "shared_expert_gate" in rest else tensor
    if arch.startswith("gemma"):
        found = {name: tensor + 1 if "norm" in name else tensor for name, tensor in found.items()}
    return found | rope_factors(model)


def gguf_name(name: str, arch: str) -> str:
    """The name of a tensor of transformers, outside experts."""
    module, _, kind = name.rpartition(".")
    if module in OUTER:
        return f"{OUTER[module]}.{kind}"
    layer, _, rest = module.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{(MODULES | OTHER_MODULES.get(arch, {}))[rest]}.{kind}"


def expert_tensors(layer: str, name: str, tensor: Tensor, arch: str) -> dict[str, Tensor]:
    """The tensors of all experts of a layer, which transformers keeps as one with gate and up."""
    if name == "down_proj":
        return {f"{layer}.ffn_down_exps.weight": tensor.transpose(1, 2) if arch == "gpt-oss" else tensor}
    if name == "down_proj_bias":
        return {f"{layer}.ffn_down_exps.bias": tensor}
    kind = "bias" if name.endswith("bias") else "weight"
    if arch == "gpt-oss":
        tensor = tensor if kind == "bias" else tensor.transpose(1, 2)
        gate, up = tensor[:, 0::2], tensor[:, 1::2]
    else:
        gate, up = tensor.chunk(2, dim=1)
    return {f"{layer}.ffn_gate_exps.{kind}": gate, f"{layer}.ffn_up_exps.{kind}": up}


def rope_factors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of frequencies, of Llama 3 and LongRoPE."""
    rope = model.config.rope_parameters
    if rope.get("rope_type") == "longrope":
        return {f"rope_factors_{kind}.weight": torch.tensor(rope[f"{kind}_factor"]) for kind in ("long", "short")}
    if rope.get("rope_type") != "llama3":
        return {}
    head_dim = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
    factors = []
    for pair in range(0, head_dim, 2):
        turns = rope["original_max_position_embeddings"] / (2 * math.pi * rope["rope_theta"] ** (pair / head_dim))
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return {"rope_freqs.weight": torch.tensor(factors)}


def tokenizer_metadata(tokenizer: tokenizers.Tokenizer, **changes: Any) -> dict[str, Any]:
    """The metadata of a BPE tokenizer as converters write it, by keys without "tokenizer."; `changes` win."""
    content = json.loads(tokenizer.to_str())
    model = content["model"]
    ids = tokenizer.get_vocab(with_added_tokens=True)
    tokens = sorted(ids, key=lambda token: ids[token])
    kinds = {each["content"]: 3 if each["special"] else 4 for each in content["added_tokens"]}
    types = [kinds.get(token, 6 if re.fullmatch("<0x[0-9A-F]{2}>", token) else 1) for token in tokens]
    merges = [tuple(merge) for merge in model["merges"]]
    values: dict[str, Any] = {"ggml.tokens": tokens, "ggml.token_type": types, "ggml.add_bos_token": True}
    if model["byte_fallback"]:
        ranks = {left + right: float(-rank) for rank, (left, right) in reversed(list(enumerate(merges)))}
        values |= {"ggml.model": "llama", "ggml.scores": [ranks.get(token, -1e6) for token in tokens]}
    else:
        values |= {"ggml.model": "gpt2", "ggml.pre": "gpt-2", "ggml.merges": list(map(" ".join, merges))}
    for role, token in {"bos": "<s>", "eos": "</s>", "unknown": "<unk>"}.items():
        if token in ids:
            values[f"ggml.{role}_token_id"] = ids[token]
    return values | {key.replace("__", "."): value for key, value in changes.items()}


def write_tokenizer(path: Path, values: Mapping[str, Any], architecture: str = "llama") -> Path:
    """Write a file of a tokenizer alone."""
    writer = gguf.GGUFWriter(str(path), architecture)
    for key, value in values.items():
        put(writer, f"tokenizer.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path
