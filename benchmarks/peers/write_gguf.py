"""Write a bf16 model folder as a GGUF file. Run by the Python that has the gguf package; needs no torch.

Reads safetensors by hand, because numpy has no bfloat16: the bits pass through as they are. Knows the two
architectures of our benchmark models, and byte-level tokenizers.
"""

from __future__ import annotations

import sys

if {"-h", "--help"} & set(sys.argv):  # before the imports of a peer that may not be installed
    raise SystemExit(print(__doc__))

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf  # type: ignore[import-not-found]  # of another environment
import numpy as np

ARCHITECTURES = {"LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA, "Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2}
BF16 = gguf.GGMLQuantizationType.BF16


def main() -> None:
    model, target = Path(sys.argv[1]), Path(sys.argv[2])
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    architecture = ARCHITECTURES[config["architectures"][0]]
    writer = gguf.GGUFWriter(target, gguf.MODEL_ARCH_NAMES[architecture])
    add_sizes(writer, config, model.name)
    add_vocabulary(writer, json.loads((model / "tokenizer.json").read_text(encoding="utf-8")), config)
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    for name, bits in tensors(model / "model.safetensors"):
        renamed = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if renamed is None:
            raise SystemExit(f"{name} has no name in GGUF")
        if architecture is gguf.MODEL_ARCH.LLAMA and name.endswith(("q_proj.weight", "k_proj.weight")):
            bits = interleave_halves(bits, config["num_attention_heads" if ".q_" in name else "num_key_value_heads"])
        if bits.ndim == 1:  # norms and biases: llama.cpp wants them in fp32
            writer.add_tensor(renamed, (bits.astype(np.uint32) << 16).view(np.float32))
        else:
            writer.add_tensor(renamed, np.ascontiguousarray(bits).view(np.uint8), raw_dtype=BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors(file: Path) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Yield name and bits, as uint16 of the tensor's shape."""
    data = np.memmap(file, np.uint8, "r")
    start = 8 + int(data[:8].view(np.uint64)[0])
    header = json.loads(bytes(data[8:start]))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] != "BF16":
            raise SystemExit(f"{name} is stored as {entry['dtype']}, not BF16")
        first, last = entry["data_offsets"]
        yield name, np.frombuffer(data[start + first : start + last].tobytes(), np.uint16).reshape(entry["shape"])


def interleave_halves(bits: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """Reorder rows of q or k for llama.cpp's Llama, which rotates neighbours where Hugging Face rotates halves."""
    rows, columns = bits.shape
    return bits.reshape(num_heads, 2, rows // num_heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def add_sizes(writer: gguf.GGUFWriter, config: dict[str, Any], name: str) -> None:
    """Add the sizes of config.json."""
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])


def add_vocabulary(writer: gguf.GGUFWriter, tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    """Add the byte-level BPE of tokenizer.json."""
    special = {token["id"] for token in tokenizer["added_tokens"]}
    ids: dict[str, int] = tokenizer["model"]["vocab"]
    tokens = sorted(ids, key=ids.__getitem__)
    kinds = [gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for i in range(len(tokens))]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


if __name__ == "__main__":
    main()
