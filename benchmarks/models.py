"""Writes model folders of the shapes we measure, with random weights: real files, which every engine can load.

`python -m benchmarks.models 15m|0.5b|1.1b FOLDER`. The same name gives the same bytes each time. Knows no engine; what
such a model says is noise, and only its speed means anything.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
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


@dataclass(frozen=True)
class ModelShape:
    """What of a network decides its speed."""

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    tied_embeddings: bool
    qkv_bias: bool = False
    rope_theta: float = 10_000.0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


SHAPES = {
    "15m": ModelShape("LlamaForCausalLM", 288, 6, 6, 6, 768, tied_embeddings=True),
    "0.5b": ModelShape(  # Qwen2.5-0.5B's, but for the vocabulary
        "Qwen2ForCausalLM", 896, 24, 14, 2, 4864, tied_embeddings=True, qkv_bias=True, rope_theta=1_000_000.0
    ),
    "1.1b": ModelShape("LlamaForCausalLM", 2048, 22, 32, 4, 5632, tied_embeddings=False),  # TinyLlama's
}


def write_model(shape: ModelShape, folder: Path) -> int:
    """Write config, weights and tokenizer into `folder`, which is made; bytes of the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = dict(random_weights(shape))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", config(shape))
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    tokenizer().save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", tokenizer_config())
    return sum(weight.nbytes for weight in weights.values())


def config(shape: ModelShape) -> dict[str, Any]:
    """config.json."""
    return {
        "architectures": [shape.architecture],
        "model_type": shape.architecture.removesuffix("ForCausalLM").lower(),
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


def random_weights(shape: ModelShape) -> Iterator[tuple[str, Tensor]]:
    """Every tensor by its name in the checkpoint: normal, but for norms, which are ones."""
    generator = torch.Generator().manual_seed(SEED)

    def normal(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=torch.bfloat16).normal_(0.0, STD, generator=generator)

    def ones() -> Tensor:
        return torch.ones(shape.hidden_size, dtype=torch.bfloat16)

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
        yield f"{prefix}.self_attn.o_proj.weight", normal(hidden, rows["q"])
        yield f"{prefix}.post_attention_layernorm.weight", ones()
        for part in ("gate", "up"):
            yield f"{prefix}.mlp.{part}_proj.weight", normal(inner, hidden)
        yield f"{prefix}.mlp.down_proj.weight", normal(hidden, inner)
    yield "model.norm.weight", ones()
    if not shape.tied_embeddings:
        yield "lm_head.weight", normal(VOCAB_SIZE, hidden)


def tokenizer() -> Tokenizer:
    """A byte-level BPE of just VOCAB_SIZE tokens: the bytes, and as many pairs of them as there is room for."""
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
    """tokenizer_config.json."""
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
    """Readable JSON."""
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
