"""GGUF files: blocks as the `gguf` package dequantizes them, networks of every architecture against transformers, and
what is wrong with a file.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import numpy as np
import pytest
import tiny_models
import torch
from backends import variants
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize
from gguf_files import write
from ragged_requests import Request, Runner
from torch import Tensor
from transformers import (
    Cohere2ForCausalLM,
    Exaone4ForCausalLM,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Olmo3ForCausalLM,
    PreTrainedModel,
)

from splitfuse.errors import ModelError
from splitfuse.kernels.cpu.backend import CpuBackend
from splitfuse.kernels.interface import Backend
from splitfuse.kernels.reference import ReferenceBackend
from splitfuse.models.decoder import Decoder
from splitfuse.models.families.registry import load_spec
from splitfuse.models.sources.gguf.architectures import ARCHITECTURES
from splitfuse.models.sources.gguf.blocks import FORMATS, unpack
from splitfuse.models.sources.gguf.container import TYPES
from splitfuse.models.sources.gguf.model import GgufModel
from splitfuse.models.storage import describe_kept
from splitfuse.models.weights import check_weights, load_decoder

PROMPT = [5, 17, 3, 88, 42, 9, 0, 61, 33, 75, 12, 50]


def load(path: Path, dtype: torch.dtype = torch.float32, backend: Backend | None = None) -> Decoder:
    source = GgufModel(path)
    weights = source.weights()
    spec = check_weights(weights, load_spec(source))
    backend = backend or ReferenceBackend()
    return load_decoder(weights, spec, dtype=dtype, device=torch.device("cpu"), backend=backend)


def assert_same_logits(model: PreTrainedModel, decoder: Decoder, tolerance: float = 1e-4) -> None:
    with torch.no_grad():
        oracle = model(input_ids=torch.tensor([PROMPT])).logits[0]
    assert (logits(decoder) - oracle).abs().max() <= tolerance * oracle.abs().max()


def logits(decoder: Decoder) -> Tensor:
    request = Request(PROMPT)
    Runner(decoder, block_size=32).step([(request, request.num_pending)])
    return torch.stack(request.logits)


# --- blocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_blocks_are_dequantized_as_by_gguf_bit_for_bit(name: str) -> None:
    kind = next(each for each in TYPES.values() if each.name == name)
    blocks = gguf_files.random_blocks(name, 33, 3)
    expected = dequantize(blocks.reshape(33, -1), Type[name])
    weight = unpack(name, torch.from_numpy(blocks))
    assert weight.shape == (33, 3 * kind.block_size)
    assert np.array_equal(weight.dequantize(torch.float32).numpy().view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("name", FORMATS)
def test_the_numbers_of_blocks_have_the_types_that_their_format_says(name: str) -> None:
    """Kernels that keep them as they are stored go by it."""
    kind = next(each for each in TYPES.values() if each.name == name)
    weight, stored = unpack(name, torch.zeros(2, 3, kind.block_bytes, dtype=torch.uint8)), FORMATS[name]
    levels = weight.levels.view(2, -1, stored.group_size)
    assert weight.levels.dtype == (torch.int8 if stored.signed else torch.uint8)
    assert weight.scales.shape == levels.shape[:2] and (weight.mins is not None) == stored.mins
    if stored.super_groups is None:
        assert {each.dtype for each in (weight.scales, weight.mins) if each is not None} == {stored.scale_dtype}
    else:
        assert weight.super_scales is not None and weight.super_scales.dtype == stored.scale_dtype
        assert weight.scales.dtype == (torch.uint8 if stored.mins else torch.int8)
        assert weight.scales.shape[1] == weight.super_scales.shape[1] * stored.super_groups


# --- architectures ----------------------------------------------------------------------------------------------------

GEMMA3_ROPES = {
    "sliding_attention": tiny_models.rope("default"),
    "full_attention": tiny_models.rope("linear", factor=8.0, rope_theta=1e6),
}
GPT_OSS_ROPE = tiny_models.rope("yarn", factor=4.0, original_max_position_embeddings=32, truncate=False)
OWN_VARIANTS: dict[str, Callable[[], PreTrainedModel]] = {
    "gemma2-scale-of-heads": lambda: tiny_models.tiny(
        Gemma2ForCausalLM, head_dim=16, query_pre_attn_scalar=16, num_hidden_layers=4, sliding_window=6
    ),
    "gemma3-scale-of-heads": lambda: tiny_models.tiny(
        Gemma3ForCausalLM,
        head_dim=16,
        query_pre_attn_scalar=16,
        num_hidden_layers=7,
        sliding_window=6,
        rope_parameters=GEMMA3_ROPES,
    ),
    "llama-tied-wide-heads": lambda: tiny_models.llama(tie_word_embeddings=True, head_dim=12, attention_bias=True),
    "mixtral": tiny_models.mixtral,
    "gpt-oss-yarn": lambda: tiny_models.gpt_oss(rope_parameters=GPT_OSS_ROPE),
    "exaone4-windows": lambda: tiny_models.tiny(Exaone4ForCausalLM, num_hidden_layers=5, sliding_window=6, head_dim=10),
    "cohere2-windows": lambda: tiny_models.tiny(Cohere2ForCausalLM, num_hidden_layers=5, sliding_window=7),
    "olmo3-yarn": lambda: tiny_models.tiny(
        Olmo3ForCausalLM,
        num_hidden_layers=5,
        sliding_window=6,
        rope_parameters={
            "full_attention": tiny_models.rope("yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=8.0),
            "sliding_attention": tiny_models.rope("default"),
        },
    ),
    "qwen3-moe-all": lambda: tiny_models.qwen3_moe(norm_topk_prob=True),
}
VARIANTS = (
    *("llama-gqa", "llama-rope-llama3", "llama-rope-yarn", "llama-rope-linear"),
    *("mistral-no-window", "granite", "smollm3", "qwen2", "qwen3", "qwen2-moe", "gemma", "phi3", "phi3-window"),
    *(
        "phi3-longrope-short",
        "starcoder2",
        "olmo2",
        "exaone4-no-window",
        "glm4",
        "granite-biases",
        "arcee",
        "seed-oss",
        "ernie",
        "hunyuan-dense-biases",
        "olmoe",
        "cohere-untied",
    ),
    *OWN_VARIANTS,
)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(variant: str, tmp_path: Path) -> None:
    model = tiny_models.make(variant, OWN_VARIANTS.get(variant))
    assert_same_logits(model, load(write(model, tmp_path / "model.gguf")))


# Types of matrices by a part of their names in files of mixed types, as Q4_K_M has them.
MIXED = {"attn_v": Type.Q8_0, "ffn_down": Type.Q5_1, "token_embd": Type.Q4_0, "attn": Type.Q4_1, "ffn": Type.F16}


def test_mixed_types_are_loaded_as_they_dequantize(tmp_path: Path) -> None:
    """Rows of heads too, which lie in another order."""
    model = tiny_models.make("llama", lambda: tiny_models.llama(hidden_size=96, intermediate_size=128, head_dim=16))
    path = write(model, tmp_path / "model.gguf", types=MIXED)
    state, reader = model.state_dict(), gguf.GGUFReader(path)
    ours = load(path)
    for tensor in reader.tensors:
        if tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            continue
        name = next(n for n in state if gguf_files.gguf_name(n, "llama") == tensor.name)
        state[name] = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    for layer, weights in enumerate(ours.weights.layers):
        prefix = f"model.layers.{layer}.self_attn"
        q, k, v = weights.qkv.split((96, 32, 32))
        assert torch.equal(v, state[f"{prefix}.v_proj.weight"])
        for part, rows in (("q", q), ("k", k)):
            original = state[f"{prefix}.{part}_proj.weight"]
            assert 0 < (rows - original).abs().max() < 0.1 * original.abs().max()
            state[f"{prefix}.{part}_proj.weight"] = rows
    model.load_state_dict(state)
    assert_same_logits(model, ours)


def test_quantized_experts_are_loaded_one_by_one(tmp_path: Path) -> None:
    model = tiny_models.make(
        "qwen3-moe", lambda: tiny_models.qwen3_moe(hidden_size=64, moe_intermediate_size=32, norm_topk_prob=True)
    )
    path = write(model, tmp_path / "model.gguf", types={"exps": Type.Q8_0})
    layer = load(path).weights.layers[1]
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    gate, up, down = (stored[f"blk.1.ffn_{part}_exps.weight"] for part in ("gate", "up", "down"))
    gate, up, down = (torch.from_numpy(dequantize(each.data, each.tensor_type)) for each in (gate, up, down))
    for expert, (w13, w2) in enumerate(zip(layer.w13, layer.w2, strict=True)):
        assert torch.equal(w13, torch.cat((gate[expert], up[expert]))) and torch.equal(w2, down[expert])


@pytest.mark.parametrize("variant", variants())
def test_cpp_kernels_keep_the_types_of_a_file(variant: str, tmp_path: Path) -> None:
    """As files of gpt-oss have them; the network is near to that in fp32, although inputs are rounded to 8 bits. Tokens
    visit all experts: which of them are the best may change by rounding.
    """
    sizes = {"hidden_size": 64, "intermediate_size": 32, "head_dim": 16, "num_local_experts": 5}
    model = tiny_models.make("gpt-oss-of-32", lambda: tiny_models.gpt_oss(num_experts_per_tok=5, **sizes))
    types = {"exps.weight": Type.MXFP4, "attn_v": Type.Q5_1, "attn": Type.Q8_0}
    types |= {"token_embd": Type.Q4_0, "output.": Type.Q5_0}
    path = write(model, tmp_path / "model.gguf", types=types)
    backend = CpuBackend(variant=variant, num_threads=1)
    ours, exact = logits(load(path, torch.bfloat16, backend)), logits(load(path))
    assert (ours - exact).abs().max() <= 0.05 * exact.abs().max()
    weights, spec = GgufModel(path).weights(), load_spec(GgufModel(path))
    [line, *_] = describe_kept(weights, spec, backend, torch.bfloat16)
    assert "45 of MXFP4 kept as stored" in line and "dequantized" not in line


def test_norms_of_gemma_keep_their_bits(tmp_path: Path) -> None:
    """They are stored with the one that is added to those of transformers."""
    model = tiny_models.make("gemma")
    decoder = load(write(model, tmp_path / "model.gguf"))
    assert torch.equal(decoder.weights.norm, model.model.norm.weight + 1)
    assert torch.equal(decoder.weights.layers[1].mlp_norm, model.model.layers[1].post_attention_layernorm.weight + 1)


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(path: Path) -> str:
    with pytest.raises(ModelError) as error:
        load(path)
    assert str(path) in str(error.value)
    return str(error.value)


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert "the architecture 'mamba' of GGUF files is not read; those that are: llama" in refused(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention.head_count_kv": [2, 2, 2]}, "llama.attention.head_count_kv must be a whole number from 1"),
        ({"attention.value_length": 6}, "llama.attention.value_length 6 other than the 8 of keys is not supported"),
        ({"block_count": None}, "has no llama.block_count in its metadata"),
        ({"rope.scaling.type": "dynamic", "rope.scaling.factor": 2.0}, "llama.rope.scaling.type 'dynamic'"),
        ({"rope.freq_base": -1.0}, "llama.rope.freq_base must be a positive finite number, not -1.0"),
        ({"attn_logit_softcapping": 30.0}, "has llama.attn_logit_softcapping = 30.0, which is not supported"),
        ({"expert_gating_func": 2}, "experts that are not chosen by a softmax"),
        ({"attention.causal": False}, "attention to later tokens is not supported"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0}, "llama.rope.scaling.original_context_length"),
        ({"block_count": "three"}, "llama.block_count must be a whole number from 1 to 2147483647, not 'three'"),
    ],
)
def test_metadata_is_honoured_or_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert message in refused(write(tiny_models.make("llama-gqa"), tmp_path / "model.gguf", **changes))


def test_the_page_of_models_lists_what_is_read() -> None:
    page = Path(__file__).parents[2] / "docs" / "models.md"
    [architectures] = re.findall(r"^\| architectures \| (.*) \|$", page.read_text(), re.MULTILINE)
    assert re.sub(r" \([^)]*\)", "", architectures).split(", ") == sorted(ARCHITECTURES)


def test_granite_without_rope_is_refused(tmp_path: Path) -> None:
    path = write(tiny_models.make("granite"), tmp_path / "model.gguf", **{"rope.scaling.finetuned": False})
    assert "granite.rope.scaling.finetuned false, no rope, is not supported" in refused(path)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_names_of_tensors_are_those_of_the_gguf_package(name: str) -> None:
    """Its map leads from transformers' names, of experts one by one those of all together, to those of a file."""
    arch = next(each for each, text in gguf.MODEL_ARCH_NAMES.items() if text == name)
    theirs = gguf.get_tensor_name_map(arch, 1)
    for module, target in ARCHITECTURES[name].modules.items():
        if "block_sparse_moe" in target:
            target = (
                f"layers.0.feed_forward.experts.{target[-2:]}" if "expert" in target else f"model.layers.0.{target}"
            )
        else:
            target = f"model.layers.0.{target}".replace(".{expert}", "")
        expected = (f"blk.0.{module.removesuffix('.weight')}", None)  # None: the architecture has no such tensor
        assert theirs.get_name(target.removesuffix(".weight")) in expected
