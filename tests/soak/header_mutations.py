"""Try thousands of broken and hostile files of weights: `python -m tests.soak.header_mutations [--count N] [--seed N]`.

Headers of GGUF and safetensors files are cut short, lie about lengths, offsets, types and shapes, or repeat names;
quantization_config has other values. Each must be read whole, or be refused by a ModelError of one sentence, in a
process that may take 128 MiB more than it has. Prints each one that does neither, with its seed, and a summary;
`--only SEED` tries one and says what became of it.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import tiny_models
import torch
from quantized_folders import fp8, gptq, packed, quantize
from tiny_tokenizers import byte_fallback, byte_level

from splitfuse.errors import ModelError
from splitfuse.models.families.registry import load_spec
from splitfuse.models.sources.hub import open_model
from splitfuse.models.weights import check_weights, stored_parameters
from splitfuse.text.tokenizer import Tokenizer

MEMORY = 128 * 2**20
SECONDS = 5.0
LONGEST = 800
"""Bounds of a refusal: bytes of memory, seconds of computing, and characters of the sentence without the path."""
NUMBERS = (0, 1, 2, 7, 31, 255, 2**16, 10**9, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)
WORDS = (
    "",
    "x",
    "llama",
    "general.alignment",
    "blk.0.attn_q.weight",
    "é" * 40,
    "a" * 70_000,
    "\0",
    "none",
    "token_embd",
)
Type = gguf.GGMLQuantizationType
TARGETS = ("re:.*", "re:" + "a?" * 40 + "a" * 40, "re:" + "(a|a)" * 40, "re:.*.*.*.*x", "Linear")
QUANTIZED: dict[str, tuple[Any, dict[str, Any]]] = {
    "gptq": (
        partial(gptq, group_size=-1),
        {"quant_method": "gptq", "bits": 4, "group_size": -1, "sym": True, "desc_act": False},
    ),
    "fp8": (partial(fp8, block=(32, 128)), {"quant_method": "fp8", "weight_block_size": [32, 128]}),
    "packed": (
        partial(packed, group_size=None),
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {
                        "num_bits": 4,
                        "type": "int",
                        "symmetric": True,
                        "strategy": "group",
                        "group_size": 32,
                        "dynamic": False,
                    },
                }
            },
        },
    ),
}
"""Folder -> a layer of it, one group or block a row, and its quantization_config."""


def make_bases(root: Path) -> list[Path]:
    """Write GGUF files, dense and quantized, with tokenizers of both kinds, and folders of safetensors, likewise."""
    root.mkdir(parents=True)
    few = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    small = tiny_models.make("llama", lambda: tiny_models.llama(**few))
    experts = tiny_models.make("qwen3-moe")
    vocabularies = [gguf_files.tokenizer_metadata(make()) for make in (byte_level, byte_fallback)]
    dense = gguf_files.write(small, root / "dense.gguf", tokenizer=vocabularies[0])
    types = {"attn": Type.Q8_0, "ffn": Type.Q4_1}
    quantized = gguf_files.write(small, root / "quantized.gguf", types=types, tokenizer=vocabularies[1])
    mixture = gguf_files.write(experts, root / "experts.gguf", tokenizer=vocabularies[1])
    small.save_pretrained(root / "folder")
    for name, (layer, config) in QUANTIZED.items():
        quantize(root / "folder", root / name, layer, config)
    return [dense, quantized, mixture, *(root / name / "model.safetensors" for name in ("folder", *QUANTIZED))]


def mutate(bases: list[Path], folder: Path, seed: int) -> tuple[str, str]:
    """Write a broken copy of a base, the same for the same seed; return the model's path, and what was done."""
    rng = random.Random(seed)
    base = rng.choice(bases)
    content = bytearray(base.read_bytes())
    if base.suffix == ".gguf":
        change = rng.choice((_cut, _bytes, _bytes, _number, _number, _number, _text, _shift, _entry, _entry))
        what = change(content, rng)
        (folder / "model.gguf").write_bytes(content)
        return str(folder / "model.gguf"), f"{base.name}: {what}"
    config = json.loads((base.parent / "config.json").read_text())
    if "quantization_config" in config and rng.random() < 0.7:
        what = _value(config["quantization_config"], rng)
    else:
        what = _safetensors(content, rng)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / base.name).write_bytes(content)
    return str(folder), f"{base.parent.name}: {what}"


def _value(values: Any, rng: random.Random) -> str:
    """Put another value in the place of one, at any depth."""
    key = rng.choice(list(values) if isinstance(values, dict) else range(len(values)))
    if isinstance(values[key], dict | list) and values[key] and rng.random() < 0.9:
        return f"{key}: {_value(values[key], rng)}"
    values[key] = rng.choice(
        (*NUMBERS, -1, 4, 8, 0.5, None, True, False, *WORDS, *TARGETS, [], {}, [2**40, 128], ["x"])
    )
    return f"{key} = {str(values[key])[:60]}"


def _cut(content: bytearray, rng: random.Random) -> str:
    del content[rng.randrange(len(content)) :]
    return f"cut to {len(content)} bytes"


def _bytes(content: bytearray, rng: random.Random) -> str:
    places = sorted(rng.randrange(_header_size(content)) for _ in range(rng.choice((1, 1, 2, 8))))
    for place in places:
        content[place] = rng.randrange(256)
    return f"other bytes at {places}"


def _number(content: bytearray, rng: random.Random) -> str:
    """Write another number where one is: a version, count, length, type, size or offset."""
    places = _places(content)
    place, code = rng.choice(places)
    value = rng.choice((*NUMBERS, len(content), len(content) - place, rng.randrange(2**16)))
    value %= 2 ** (8 * struct.calcsize(code))
    struct.pack_into(f"<{code}", content, place, value)
    return f"{value} at {place}"


def _text(content: bytearray, rng: random.Random) -> str:
    """Put another text in the place of one."""
    texts = [place for place, code in _places(content) if code == "Q" and _is_text(content, place)]
    place = rng.choice(texts)
    (length,) = struct.unpack_from("<Q", content, place)
    others = [rng.choice(texts) for _ in range(3)]
    copied = [bytes(content[at + 8 : at + 8 + struct.unpack_from("<Q", content, at)[0]]) for at in others]
    text = rng.choice((*(word.encode() for word in WORDS), *copied, b"\xff\xfe"))
    content[place : place + 8 + length] = struct.pack("<Q", len(text)) + text
    return f"the text {text[:40]!r} at {place}"


def _shift(content: bytearray, rng: random.Random) -> str:
    place, size = rng.randrange(_header_size(content)), rng.randrange(1, 40)
    if rng.random() < 0.5:
        del content[place : place + size]
        return f"{size} bytes fewer at {place}"
    content[place:place] = rng.randbytes(size)
    return f"{size} bytes more at {place}"


def _entry(content: bytearray, rng: random.Random) -> str:
    """Add an entry of metadata, known or not, of any type and value."""
    keys = [key for key in _keys(content) if not key.startswith("tokenizer.ggml.tokens")]
    key = rng.choice((*keys, "general.alignment", "split.count", "llama.rope.scaling.type", "llama.attention.scale"))
    kind = rng.randrange(14)
    value = {
        **{number: struct.pack(f"<{code}", 1) for number, code in enumerate("BbHhIi")},
        6: struct.pack("<f", rng.choice((0.0, -1.0, float("nan"), float("inf"), 1e30, 3.0))),
        7: bytes([rng.randrange(3)]),
        8: struct.pack("<Q", 3) + b"abc",
        9: struct.pack("<IQ", rng.randrange(13), rng.choice((0, 1, 3, 10**9, 2**61))) + rng.randbytes(24),
        10: struct.pack("<Q", rng.choice(NUMBERS)),
        11: struct.pack("<q", -1),
        12: struct.pack("<d", 0.5),
        13: b"",
    }[kind]
    (count,) = struct.unpack_from("<Q", content, 16)
    struct.pack_into("<Q", content, 16, count + 1)
    name = key.encode()
    content[24:24] = struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value
    return f"{key} of type {kind}: {value[:40]!r}"


def _safetensors(content: bytearray, rng: random.Random) -> str:
    (size,) = struct.unpack_from("<Q", content)
    match rng.randrange(5):
        case 0:
            return _cut(content, rng)
        case 1:
            value = rng.choice((*NUMBERS, size - 1, size + 1))
            struct.pack_into("<Q", content, 0, value)
            return f"a header of {value} bytes"
        case 2:
            place = 8 + rng.randrange(size)
            content[place] = rng.randrange(256)
            return f"another byte at {place}"
    header = json.loads(content[8 : 8 + size])
    name = rng.choice([name for name in header if name != "__metadata__"])
    field = rng.choice(("dtype", "shape", "data_offsets", "name"))
    shapes: list[Any] = [[10**9, 10**9], [2**63, 2], [0, 2**64], ["a"], [[1]], [4, 0]]
    odd = [None, [], {}, -1, 1.5, "F32", "I8", "F8_E4M3", *shapes]
    if field == "name":
        header[rng.choice(WORDS)] = header.pop(name)
    else:
        header[name][field] = rng.choice(odd)
    text = json.dumps(header).encode()
    if rng.random() < 0.1:
        text = b"[" * 100_000 + text
    content[: 8 + size] = struct.pack("<Q", len(text)) + text
    return f"{field} of {name} is {str(header.get(name, {}))[:80]}"


# --- where the numbers of a GGUF file are -----------------------------------------------------------------------------


def _places(content: bytearray) -> list[tuple[int, str]]:
    """Return the offset and code of the numbers of a header, lengths of texts too, but those in arrays."""
    return _walk(content)[0]


def _keys(content: bytearray) -> list[str]:
    return _walk(content)[1]


def _header_size(content: bytearray) -> int:
    return _walk(content)[2]


def _is_text(content: bytearray, place: int) -> bool:
    (length,) = struct.unpack_from("<Q", content, place)
    return length < 200 and place > 24 and bytes(content[place + 8 : place + 8 + length]).isascii()


def _walk(content: bytearray) -> tuple[list[tuple[int, str]], list[str], int]:
    places, keys = [(4, "I"), (8, "Q"), (16, "Q")], []
    at = 24

    def number(code: str) -> int:
        nonlocal at
        places.append((at, code))
        (value,) = struct.unpack_from(f"<{code}", content, at)
        at += struct.calcsize(code)
        return int(value)

    def text() -> str:
        nonlocal at
        length = number("Q")
        at += length
        return content[at - length : at].decode()

    num_tensors, num_entries = struct.unpack_from("<QQ", content, 8)
    widths = dict(enumerate((1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8)))
    for _ in range(num_entries):
        keys.append(text())
        kind = number("I")
        if kind == 9:
            kind, count = number("I"), number("Q")
            if kind == 8:
                for _ in range(count):
                    text()
            else:
                at += count * widths[kind]
        elif kind == 8:
            text()
        elif widths[kind] in (4, 8):
            number({4: "I", 8: "Q"}[widths[kind]])
        else:
            at += widths[kind]
    for _ in range(num_tensors):
        text()
        for _ in range(number("I")):
            number("Q")
        number("I")
        number("Q")
    return places, keys, at


# --- checking ---------------------------------------------------------------------------------------------------------


def read_whole(path: str) -> None:
    """Read everything of a model as loading does. Raises ModelError."""
    source = open_model(path)
    source.digest()
    source.eos_token_ids()
    spec = load_spec(source)
    weights = source.weights()
    spec = check_weights(weights, spec)
    for piece in {piece for each in stored_parameters(weights, spec) for piece in each.pieces}:
        if weights.quantization(piece.name) is None:
            with weights.read(piece) as tensor:
                tensor.float().sum()
        else:
            with weights.read_quantized(piece) as quantized:
                quantized.dequantize(torch.bfloat16)
    if path.endswith(".gguf"):
        Tokenizer.from_source(source)


def check(path: str) -> tuple[str, str]:
    """Return what became of a model, "read", "refused" or "broken", and the words."""
    began = time.process_time()
    try:
        read_whole(path)
    except ModelError as error:
        words = str(error).replace(path, "")
        if len(words) > LONGEST or time.process_time() - began > SECONDS:
            return "broken", f"{time.process_time() - began:.1f} s: {words[:2000]}"
        return "refused", words
    except BaseException:
        return "broken", traceback.format_exc()[-3000:]
    return "read", ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first one; the others count on")
    parser.add_argument("--only", type=int, help="try this seed alone")
    arguments = parser.parse_args()
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="headers-") as temporary:
        root = Path(temporary)
        bases = make_bases(root / "bases")
        torch.set_num_threads(1)
        for base in bases:
            assert check(str(base if base.suffix == ".gguf" else base.parent)) == ("read", ""), base
        _limit_memory()
        first, count = (arguments.seed, arguments.count) if arguments.only is None else (arguments.only, 1)
        folder = root / "model"
        folder.mkdir()
        for seed in range(first, first + count):
            for file in folder.iterdir():
                file.unlink()
            path, what = mutate(bases, folder, seed)
            verdict, words = check(path)
            counts[verdict] += 1
            if verdict == "broken" or arguments.only is not None:
                print(f"seed {seed}: {what}\n  {verdict}: {words}", flush=True)
    print(f"{count} files: {counts['read']} read, {counts['refused']} refused, {counts['broken']} broken")
    sys.exit(counts["broken"] > 0)


def _limit_memory() -> None:
    """Let this process map MEMORY more than it has: what is larger fails."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main()
