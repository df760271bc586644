"""Write model folders of the shapes we measure, with random weights, which every engine can load.

`python -m benchmarks.models 15m|0.5b|1.1b|7b|moe FOLDER`. The same name gives the same bytes each time. The output of
such a model is noise; only its speed is meaningful.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

VOCAB_SIZE = 32_000
MAX_POSITION = 4096
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2
STD = 0.02
SEED = 0
LARGEST_FILE = 4 * 10**9  # bytes of weights in a file, and in memory while they are written


@dataclass(frozen=True)
class ModelShape:
    """The properties of a network that decide its speed."""

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    tied_embeddings: bool
    qkv_bias: bool = False
    rope_theta: float = 10_000.0
    head_size: int | None = None  # if the heads do not divide hidden_size among them
    head_norms: bool = False
    num_experts: int = 0  # intermediate_size is that of each
    experts_per_token: int = 0

    @property
    def head_dim(self) -> int:
        return self.head_size or self.hidden_size // self.num_heads


SHAPES = {
    "15m": ModelShape("LlamaForCausalLM", 288, 6, 6, 6, 768, tied_embeddings=True),
    "0.5b": ModelShape(  # Qwen2.5-0.5B's, but for the vocabulary
        "Qwen2ForCausalLM", 896, 24, 14, 2, 4864, tied_embeddings=True, qkv_bias=True, rope_theta=1_000_000.0
    ),
    "1.1b": ModelShape("LlamaForCausalLM", 2048, 22, 32, 4, 5632, tied_embeddings=False),  # TinyLlama's
    "7b": ModelShape(  # Mistral-7B-v0.2's: 32,000 tokens in the vocabulary, no window
        "MistralForCausalLM", 4096, 32, 32, 8, 14336, tied_embeddings=False, rope_theta=1_000_000.0
    ),
    "moe": ModelShape(  # Qwen3-30B-A3B's, but for 8 layers instead of 48, and the vocabulary
        "Qwen3MoeForCausalLM",
        2048,
        8,
        32,
        4,
        768,
        tied_embeddings=False,
        rope_theta=1_000_000.0,
        head_size=128,
        head_norms=True,
        num_experts=128,
        experts_per_token=8,
    ),
}
MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}


def write_model(shape: ModelShape, folder: Path) -> int:
    """Write config, weights and tokenizer into `folder`; return the bytes of the weights."""
    write_without_weights(shape, folder)
    return write_weights(random_weights(shape), folder)


def write_without_weights(shape: ModelShape, folder: Path) -> None:
    """Write config and tokenizer into `folder`: enough for `--load-format dummy`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config(shape))
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    tokenizer().save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", tokenizer_config())


def write_weights(weights: Iterable[tuple[str, Tensor]], folder: Path) -> int:
    """Write one file, or several with an index; return the bytes of the weights. One file at a time is in memory."""
    shards: list[list[str]] = []
    total, pending = 0, dict[str, Tensor]()

    def write() -> None:
        save_file(pending, folder / f"{len(shards)}.part", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, weight in weights:
        if pending and sum(each.nbytes for each in pending.values()) + weight.nbytes > LARGEST_FILE:
            write()
        pending[name] = weight
        total += weight.nbytes
    write()
    if len(shards) == 1:
        (folder / "0.part").rename(folder / "model.safetensors")
        return total
    places: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"{number}.part").rename(folder / file)
        places |= dict.fromkeys(names, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})
    return total


def config(shape: ModelShape) -> dict[str, Any]:
    """Return the contents of config.json."""
    fields = {
        "architectures": [shape.architecture],
        "model_type": MODEL_TYPES[shape.architecture],
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_POSITION,
        "rms_norm_eps": 1e-6,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": shape.tied_embeddings,
        "vocab_size": VOCAB_SIZE,
        "initializer_range": STD,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
    if shape.architecture == "MistralForCausalLM":
        fields["sliding_window"] = None
    if shape.head_size is not None:
        fields["head_dim"] = shape.head_size
    if shape.num_experts:
        fields |= {
            "num_experts": shape.num_experts,
            "num_experts_per_tok": shape.experts_per_token,
            "moe_intermediate_size": shape.intermediate_size,
            "norm_topk_prob": True,
        }
    return fields


def random_weights(shape: ModelShape) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor by its name in the checkpoint: norms are ones, all others normally distributed."""
    generator = torch.Generator().manual_seed(SEED)

    def normal(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=torch.bfloat16).normal_(0.0, STD, generator=generator)

    def ones(size: int = shape.hidden_size) -> Tensor:
        return torch.ones(size, dtype=torch.bfloat16)

    def mlp(prefix: str) -> Iterator[tuple[str, Tensor]]:
        for part in ("gate", "up"):
            yield f"{prefix}.{part}_proj.weight", normal(inner, hidden)
        yield f"{prefix}.down_proj.weight", normal(hidden, inner)

    hidden, inner = shape.hidden_size, shape.intermediate_size
    rows = {"q": shape.num_heads * shape.head_dim} | dict.fromkeys("kv", shape.num_kv_heads * shape.head_dim)
    yield "model.embed_tokens.weight", normal(VOCAB_SIZE, hidden)
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", ones()
        for part, size in rows.items():
            yield f"{prefix}.self_attn.{part}_proj.weight", normal(size, hidden)
            if shape.qkv_bias:
                yield f"{prefix}.self_attn.{part}_proj.bias", normal(size)
        if shape.head_norms:
            yield f"{prefix}.self_attn.q_norm.weight", ones(shape.head_dim)
            yield f"{prefix}.self_attn.k_norm.weight", ones(shape.head_dim)
        yield f"{prefix}.self_attn.o_proj.weight", normal(hidden, rows["q"])
        yield f"{prefix}.post_attention_layernorm.weight", ones()
        if not shape.num_experts:
            yield from mlp(f"{prefix}.mlp")
            continue
        yield f"{prefix}.mlp.gate.weight", normal(shape.num_experts, hidden)
        for expert in range(shape.num_experts):
            yield from mlp(f"{prefix}.mlp.experts.{expert}")
    yield "model.norm.weight", ones()
    if not shape.tied_embeddings:
        yield "lm_head.weight", normal(VOCAB_SIZE, hidden)


def tokenizer() -> Tokenizer:
    """Return a byte-level BPE of VOCAB_SIZE tokens: the bytes, and pairs of them."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # ASCII first
    room = VOCAB_SIZE - len(SPECIAL_TOKENS) - len(letters)
    merges = list(islice(product(letters, letters), room))
    tokens = (*SPECIAL_TOKENS, *letters, *(first + second for first, second in merges))
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(list(SPECIAL_TOKENS))
    assert bpe.get_vocab_size() == VOCAB_SIZE
    return bpe


def tokenizer_config() -> dict[str, Any]:
    """Return the contents of tokenizer_config.json."""
    unknown, begin, end = SPECIAL_TOKENS
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": unknown,
        "bos_token": begin,
        "eos_token": end,
        "pad_token": end,  # or transformers adds one, and the vocabulary is no longer the model's
        "model_max_length": MAX_POSITION,
        "clean_up_tokenization_spaces": False,
    }


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write indented JSON."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    start = time.perf_counter()
    size = write_model(SHAPES[arguments.shape], arguments.folder)
    print(f"{arguments.folder}: {size / 1e9:.3f} GB of weights, written in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
