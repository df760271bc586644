"""Tries broken, contradictory and hostile model folders: each loads with transformers' own tokens, or is refused in a
sentence, within bounds of time and memory.

`Bases` has tiny models of all families with tokenizers; `mutate` copies one and changes a file of it, the same for the
same seed; `check` loads the result in a forked process with limits, and compares it with transformers in
another. Call it where torch and splitfuse are imported and nothing has been computed: a fork has no threads of OpenMP.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import random
import resource
import select
import shutil
import signal
import struct
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import odd_files
import tiny_models
import tiny_tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import splitfuse
import splitfuse.api  # not in each forked process
from splitfuse.models.sources.files import INDEX_FILE

VOCAB_SIZE = 420  # more than the tokenizers have
SECONDS, MEBIBYTES = 5.0, 500.0
STUCK_SECONDS = 120.0  # by the clock, on a busy machine
BOMB_BYTES = 3 * 2**30  # more than that is not allocated even by what fails
LONGEST_SENTENCE = 700
TOLERANCE = 1e-3  # of the largest logit: how near the best one a chosen token must be
PROMPT = [5, 6, 7, 8, 9, 10, 11]
TEXTS = ("Hello, world! This is a story.", "naïve 世界 <x> </s> b", " two  spaces\n")
TALK = [{"role": "user", "content": "Hello there"}]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}{{ bos_token }}"


class Bases:
    """Models of all variants, one in three in shards, each kind of tokenizer in turn. One is written when it is first
    asked for.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        get_checkpoint_conversion_mapping("llama")  # builds tables that each forked process would build
        gc.freeze()

    def path(self, variant: str) -> Path:
        path = self._folder / variant
        if not path.exists():
            in_child(lambda: _write_base(variant, path), STUCK_SECONDS)
        return path


def _write_base(variant: str, path: Path) -> None:
    tiny_models.VOCAB_SIZE = VOCAB_SIZE
    number = list(tiny_models.VARIANTS).index(variant)
    tiny_models.save(variant, path, max_shard_size="60KB" if number % 3 == 0 else "1GB")
    kind = sorted(tiny_tokenizers.KINDS)[number % 3]
    tiny_tokenizers.KINDS[kind]().save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tiny_tokenizers.BOS,
        "eos_token": tiny_tokenizers.EOS,
        "chat_template": TEMPLATE,
        "model_max_length": 128,
        "added_tokens_decoder": {"500": {"content": "<x>", "special": True, "normalized": False}},
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config if number % 2 else config | {"extra": 1}))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3], "temperature": 0.7}))


# --- mutations --------------------------------------------------------------------------------------------------------

FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "template", "weights")


def mutate(bases: Bases, folder: Path, seed: int) -> str:
    """Write a mutation of one of the models into `folder`, and return what it is."""
    rng = random.Random(seed)
    base = bases.path(rng.choice(sorted(tiny_models.VARIANTS)))
    shutil.copytree(base, folder, symlinks=True)
    file = rng.choice(FILES)
    if file == "template":
        return f"{base.name}: template {_mutate_template(folder, rng)}"
    if file == "weights":
        return f"{base.name}: {_mutate_weights(folder, rng)}"
    if file == "config.json" and rng.random() < 0.4:
        return f"{base.name}: config.json {_mutate_fields(folder / file, rng)}"
    if file == "tokenizer.json" and rng.random() < 0.4:
        return f"{base.name}: tokenizer.json {_mutate_tokenizer(folder / file, rng)}"
    return f"{base.name}: {file} {_mutate_json(folder / file, rng)}"


def _mutate_json(path: Path, rng: random.Random) -> str:
    if rng.random() < 0.15:
        return _mutate_file(path, rng)
    if rng.random() < 0.2:
        return _mutate_bytes(path, rng)
    values = json.loads(path.read_text())
    done = [_mutate_value(values, rng) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    _write_json(path, values)
    return "; ".join(done)


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values).replace('"@digits"', "9" * 5000).replace('"@deep"', "[" * 900 + "]" * 900))


def _containers(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield all objects and lists with their paths; of long ones only some of the elements."""
    if isinstance(value, dict | list) and value:
        yield name, value
        items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
        for key, each in items[:30] + items[-3:]:
            yield from _containers(each, f"{name}.{key}")


def _mutate_value(values: Any, rng: random.Random) -> str:
    """Change one value somewhere in a JSON tree."""
    name, container = rng.choice(list(_containers(values)) or [("", {"": 0})])
    keys = list(container) if isinstance(container, dict) else list(range(len(container)))
    key = rng.choice(keys)
    place, old = f"{name}.{key}"[:80], container[key]
    match rng.randrange(8):
        case 0:
            del container[key]
            return f"{place} deleted"
        case 1 if isinstance(container, dict):
            container[f"{key}_"[: rng.randrange(1, 40)]] = container.pop(key)
            return f"{place} renamed"
        case 2:
            other = rng.choice(keys)
            container[key], container[other] = container[other], container[key]
            return f"{place} exchanged with {other}"
        case 3 | 4 if isinstance(old, int | float) and not isinstance(old, bool):
            container[key] = rng.choice(
                (old + 1, old - 1, old * 2, old // 2, -old, float(old), str(old), [old], old * 1000)
            )
        case 3 if isinstance(old, str):
            cut = rng.randrange(len(old) + 1)
            container[key] = rng.choice(
                (old[:cut], old + "x", old.upper(), old[::-1], old * 3, [old], {"content": old})
            )
        case _:
            container[key] = copy.deepcopy(rng.choice(HOSTILE))
    return f"{place} = {str(container[key])[:60]!r}"


TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

HOSTILE: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        3,
        7,
        2**31 - 1,
        2**31,
        2**32,
        2**63 - 1,
        2**63,
        2**64,
        10**30,
        "@digits",
        "@deep",
    ),
    *(
        0.5,
        1e308,
        5e-324,
        -1.0,
        float("nan"),
        float("inf"),
        "",
        "x",
        "9",
        "x" * 100_000,
        "\ud800",
        "\0",
        "</s>",
        [],
        {},
    ),
    *([0], ["a"], [[[]]], {"a": 1}, [0] * 100_000, {str(i): i for i in range(50_000)}, [{}] * 50_000),
)

FIELDS: dict[str, tuple[Any, ...]] = {
    "hidden_size": (1, 47, 96, 2**31 - 1),
    "intermediate_size": (1, 71, 2**31 - 1),
    "num_hidden_layers": (0, 1, 2, 4, 10_000, 2**31 - 1),
    "num_attention_heads": (1, 2, 3, 5, 2**31 - 1),
    "num_key_value_heads": (1, 2, 3, 6, 2**31 - 1),
    "head_dim": (1, 2, 7, 8, 2**20, None),
    "vocab_size": (1, 419, 421, 2**31 - 1),
    "max_position_embeddings": (1, 7, 10**6, 2**31 - 1),
    "rms_norm_eps": (0, 1e-30, 1e-3, 1e30, 1e308),
    "rope_theta": (1, 1.0001, 1e-3, 1e6, 1e300),
    "rope_scaling": (
        {},
        None,
        [],
        {"type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"factor": 2.0},
    ),
    "rope_parameters": (
        {},
        None,
        {"rope_type": "yarn", "factor": 1e300},
        {"rope_type": "longrope"},
        {"full_attention": {}},
    ),
    "partial_rotary_factor": (0.5, 0.25, 1e-3, 0.3, 2),
    "tie_word_embeddings": (True, False, None, 1),
    "hidden_act": ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "swish", "quick_gelu"),
    "attention_bias": (True, False),
    "mlp_bias": (True, False),
    "sliding_window": (1, 2, 5, None, 2**31 - 1, 0),
    "use_sliding_window": (True, False),
    "max_window_layers": (0, 1, 3, 2**31 - 1),
    "layer_types": (["full_attention"] * 3, ["sliding_attention"] * 3, ["full_attention"] * 10**5, []),
    "num_experts": (1, 2, 5, 10, 11, 2**31 - 1, 0),
    "num_local_experts": (1, 2, 5, 10, 11, 2**31 - 1, 0),
    "num_experts_per_tok": (0, 1, 2, 5, 11, 2**31 - 1),
    "moe_intermediate_size": (1, 19, 2**31 - 1),
    "decoder_sparse_step": (0, 1, 2, 3, 2**31 - 1),
    "mlp_only_layers": ([0], [0, 1, 2], [2**70], list(range(10**5)), [-1]),
    "norm_topk_prob": (True, False),
    "dtype": ("float32", "bfloat16", "float16", "float64", "int8", "torch.float32", "x" * 10**5),
    "architectures": (
        ["LlamaForCausalLM"],
        ["Qwen2ForCausalLM"],
        ["MixtralForCausalLM"],
        ["x" * 10**6],
        [],
        [[]],
        "Llama",
    ),
    "model_type": ("llama", "qwen2", "mixtral", "gpt2", ""),
    "quantization_config": ({}, {"quant_method": "gptq"}, None),
    "eos_token_id": (0, 5, [5, 6], 10**9, -1, [], [[5]], "5", 5.0),
    "attn_logit_softcapping": (0.0, 30.0, None),
}


def _mutate_fields(path: Path, rng: random.Random) -> str:
    """Give one to three fields of a config values that mean something."""
    values = json.loads(path.read_text())
    done = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        name = rng.choice(list(FIELDS))
        values[name] = copy.deepcopy(rng.choice(FIELDS[name]))
        done.append(f"{name} = {str(values[name])[:60]}")
    _write_json(path, values)
    return "; ".join(done)


def _replace(content: str, **pattern: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


PARTS_OF_TOKENIZERS: dict[str, tuple[Any, ...]] = {
    "normalizer": (
        *(None, {"type": "Lowercase"}, {"type": "NFKC"}, {"type": "Prepend", "prepend": "x" * 1000}, {"type": "Nmt"}),
        *(_replace("", Regex="("), _replace("", Regex="(a+)+$"), _replace("", Regex=r"\p{L}" * 20_000)),
        *(_replace("ab", String="a"), {"type": "Strip", "strip_left": True, "strip_right": True}),
        *({"type": "Precompiled", "precompiled_charsmap": text} for text in ("", "AAAA", "A" * 100_000)),
        {"type": "Sequence", "normalizers": [_replace("aa", String="a")] * 8},
    ),
    "pre_tokenizer": (
        *(None, {"type": "Whitespace"}, {"type": "Digits", "individual_digits": True}, {"type": "BertPreTokenizer"}),
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False},
        {"type": "Metaspace", "replacement": "two", "prepend_scheme": "always", "split": True},
        {"type": "Split", "pattern": {"Regex": r"\s+"}, "behavior": "Isolated", "invert": False},
        {"type": "Split", "pattern": {"Regex": "[" * 100}, "behavior": "Removed", "invert": True},
    ),
    "decoder": (
        *(None, {"type": "Fuse"}, {"type": "ByteFallback"}, {"type": "WordPiece", "prefix": "##", "cleanup": True}),
        {"type": "Strip", "content": "a", "start": 9, "stop": 9},
        {"type": "Sequence", "decoders": [_replace("aaaaaaaaa", String="a")] * 3},
        {"type": "CTC", "pad_token": "a", "word_delimiter_token": "b", "cleanup": True},
        {"type": "BPEDecoder", "suffix": ""},
    ),
    "post_processor": (
        *(None, {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}),
        {"type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", 10**9]},
        {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
        {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "x", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"x": {"id": "x", "ids": [0, 10**6], "tokens": ["x", "y"]}},
        },
    ),
    "truncation": ({"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 0},),
    "padding": (
        {
            "strategy": {"Fixed": 2**40},
            "direction": "Left",
            "pad_to_multiple_of": 2**40,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "x",
        },
    ),
    "added_tokens": tuple(
        [{"id": number, "content": content, **dict.fromkeys(TOKEN_FLAGS, flag)}]
        for number, content, flag in (
            (0, "Hello", True),
            (10**6, "story", False),
            (2**32 - 1, "x" * 1000, True),
            (3, "", False),
        )
    ),
    "model": (
        *(
            {"type": "WordLevel", "vocab": {"Hello": 0, "world": 1}, "unk_token": token}
            for token in ("Hello", "missing")
        ),
        {
            "type": "WordPiece",
            "vocab": {"H": 0, "##e": 1},
            "unk_token": "H",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 2**40,
        },
        {"type": "BPE", "vocab": {"a": 0, "b": 2**32 - 1}, "merges": [], "byte_fallback": True},
        {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0], ["b", float("nan")]]},
        {"type": "Unigram", "unk_id": 0, "vocab": [["", 0.0], ["a" * 30_000, -1e308]]},
    ),
}


def _mutate_tokenizer(path: Path, rng: random.Random) -> str:
    """Give one or two parts of a tokenizer other ones that mean something."""
    values = json.loads(path.read_text())
    done = []
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice(list(PARTS_OF_TOKENIZERS))
        values[name] = copy.deepcopy(rng.choice(PARTS_OF_TOKENIZERS[name]))
        done.append(f"{name} = {str(values[name])[:100]}")
    _write_json(path, values)
    return "; ".join(done)


def _mutate_bytes(path: Path, rng: random.Random) -> str:
    """Damage a file as text."""
    content = path.read_bytes()
    place = rng.randrange(max(len(content), 1))
    name, content = rng.choice(
        (
            ("cut short", content[:place]),
            (
                "with a byte flipped",
                content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :],
            ),
            ("with a hole", content[:place] + content[place + rng.randrange(1, 100) :]),
            ("with a part twice", content[:place] + content[max(place - 50, 0) :]),
            ("with garbage", content[:place] + rng.randbytes(20) + content[place:]),
            ("with a mark of UTF-8", b"\xef\xbb\xbf" + content),
            ("in UTF-16", content.decode(errors="replace").encode("utf-16")),
            ("with something after it", content + b"}"),
            ("twice", content * 2),
            ("empty", b""),
            ("deep", b"[" * 200_000),
            ("deep and whole", b'{"a":' * 5000 + b"1" + b"}" * 5000),
            ("of many lists", b'{"model_type": "llama", "a": [' + b"[]," * 3_000_000 + b"[]]}"),
            ("of many objects", b"[" + b'{"":0},' * 1_000_000 + b"{}]"),
            ("of 40 MB of text", b'{"a": "' + b"x" * 40_000_000 + b'"}'),
            ("of blanks", b" " * 20_000_000 + content),
        )
    )
    path.write_bytes(content)
    return name


def _mutate_file(path: Path, rng: random.Random) -> str:
    """Put something else in place of a file."""
    path.unlink()
    kind = rng.choice((*odd_files.KINDS, "random bytes"))
    if kind == "random bytes":
        path.write_bytes(rng.randbytes(1000))
    else:
        odd_files.put_odd_file(path, kind)
    return f"replaced by: {kind}"


TEMPLATES = (
    "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}",
    "{{ raise_exception('no') }}",
    "{% if messages | length > 1 %}{{ raise_exception('one turn') }}{% endif %}{{ messages[0].content }}",
    "{{ messages[0]['content'].upper() | trim | tojson }}{{ strftime_now('%Y') }}",
    "{% for m in messages %}",
    "{{ messages | nonsense }}",
    "{{ 7 ** (9 ** 9) }}",
    "{{ 'a' * 2 ** 40 }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ x }}" * 20_000,
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{% for m in messages %}" * 30 + "{% endfor %}" * 30,
    "x" * 300_000,
    "{% include 'x' %}",
    "{% set n = namespace(a=1) %}{% set n.a = 2 %}{{ n.a }}{{ messages[-1].content }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ '%2000000000d' % 1 }}",
    "",
)
TAGS = (
    "{%",
    "%}",
    "{{",
    "}}",
    "{#",
    "if ",
    " else ",
    " endfor ",
    "|",
    "'",
    "(",
    ")",
    "messages",
    "loop.index",
    "[0]",
    ".x",
)


def _mutate_template(folder: Path, rng: random.Random) -> str:
    source = rng.choice(TEMPLATES)
    if rng.random() < 0.5:
        source, place = TEMPLATE, rng.randrange(len(TEMPLATE))
        for _ in range(rng.randrange(1, 4)):
            source = source[:place] + rng.choice(TAGS) + source[place + rng.randrange(6) :]
    if rng.random() < 0.5:
        (folder / "chat_template.jinja").write_text(source)
    else:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        listed = [{"name": "default", "template": source}, {"name": "tool_use", "template": "x"}]
        config["chat_template"] = rng.choice((source, source, listed, listed[1:], {"default": source}, [source], [{}]))
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return repr(source[:80])


def _mutate_weights(folder: Path, rng: random.Random) -> str:
    index = folder / INDEX_FILE
    if index.exists() and rng.random() < 0.5:
        return f"index {_mutate_json(index, rng)}"
    path = rng.choice(sorted(folder.glob("*.safetensors")))
    if rng.random() < 0.3:
        return f"{path.name} {_mutate_tensors(path, rng)}"
    if rng.random() < 0.15:
        return f"{path.name} {_mutate_file(path, rng)}"
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    match rng.randrange(6):
        case 0:
            size = rng.choice((0, 1, size - 1, size + 1, size * 2, 2**31, 2**63, 2**64 - 1, 10**9))
            path.write_bytes(struct.pack("<Q", size) + content[8:])
            return f"header of {size} bytes"
        case 1:
            return f"{path.name} {_mutate_bytes(path, rng)}"
        case 2:
            path.write_bytes(content[: rng.randrange(len(content))] if rng.random() < 0.5 else content + b"\0" * 8)
            return f"{path.name} of another size"
    done = _mutate_value(header, rng)
    text = json.dumps(header, ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return f"header of {path.name}: {done}"


def _mutate_tensors(path: Path, rng: random.Random) -> str:
    """Write a whole file with other tensors."""
    tensors = load_file(path)
    name = rng.choice(list(tensors))
    tensor = tensors[name]
    match rng.randrange(9):
        case 0:
            del tensors[name]
        case 1:
            tensors["lm_head.weight"] = torch.randn(VOCAB_SIZE, 48)
        case 2:
            tensors[name] = tensor.to(
                rng.choice((torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.bool))
            )
        case 3:
            tensors[name] = tensor[..., :-1].contiguous()
        case 4:
            tensors[name] = torch.full_like(tensor, float("nan"))
        case 5:
            tensors[f"{name}.extra"] = torch.zeros(1)
        case 6 if "model.embed_tokens.weight" in tensors:
            tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
        case 7 if "model.embed_tokens.weight" in tensors:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        case _:
            tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, path, {"format": "pt"})
    return f"with other tensors, of {name}"


# --- checking ---------------------------------------------------------------------------------------------------------


@dataclass
class Verdict:
    """What became of a mutation. `fault` says what is wrong, if anything is."""

    kind: str  # loaded, refused or broken
    oracle: str  # equal, failed or not asked
    words: str
    seconds: float
    mebibytes: float
    fault: str | None = None


def check(folder: Path) -> Verdict:
    """Load a folder, and compare what it says with transformers."""
    ended = in_child(lambda: _ours(folder), STUCK_SECONDS, limited=True)
    answer = ended.answer or {"kind": "broken", "words": f"the process ended with {ended.status}"}
    kind, words = answer["kind"], answer["words"]
    verdict = Verdict(kind, "not asked", words, ended.seconds, ended.mebibytes)
    if kind == "broken":
        verdict.fault = "no error of ours"
    elif kind == "refused":
        if ended.seconds > SECONDS or ended.mebibytes > MEBIBYTES:
            verdict.fault = "too much time or memory"
        elif not words or len(words.replace(str(folder), "")) > LONGEST_SENTENCE or "Traceback" in words:
            verdict.fault = "no sentence"
    else:
        oracle = in_child(lambda: _theirs(folder, answer), STUCK_SECONDS)
        theirs = oracle.answer or {"kind": "failed", "words": f"ended with {oracle.status}"}
        verdict.oracle = theirs["kind"]
        if theirs["kind"] == "different":
            verdict.fault = f"not as transformers: {theirs['words']}"
        elif theirs["kind"] == "failed":
            verdict.words = theirs["words"]
    return verdict


def _ours(folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    try:
        pipe = splitfuse.pipeline(str(folder), dtype="float32", num_blocks=16)
    except splitfuse.SplitfuseError as error:
        return {"kind": "refused", "words": f"{type(error).__name__}: {error}"}
    limit = pipe.engine.max_model_len - len(PROMPT)
    answer: dict[str, Any] = {"kind": "loaded", "words": ""}
    try:
        response = pipe([PROMPT], max_new_tokens=min(8, limit), ignore_eos=True)[0]
        answer["tokens"] = list(response.token_ids) if response.error is None else response.error
    except splitfuse.InvalidRequestError as error:
        answer["tokens"] = str(error)
    answer["texts"] = [_said(lambda t=text: list(pipe.tokenizer.encode(t))) for text in TEXTS]
    answer["decoded"] = _said(lambda: pipe.tokenizer.decode(PROMPT))
    answer["chat"] = _said(lambda: list(pipe.prepare([TALK], chat=True, max_new_tokens=1)[0].token_ids))
    return answer


def _said(work: Callable[[], Any]) -> Any:
    """Return a result, or the words of our error."""
    try:
        return work()
    except splitfuse.SplitfuseError as error:
        return f"{type(error).__name__}: {error}"


def _theirs(folder: Path, ours: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    different = []
    failed = []
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        if isinstance(ours["tokens"], list):
            different += _worse_tokens(model, ours["tokens"])
    except BaseException as error:
        failed.append(f"model: {error!r:.200}")
    try:
        # AutoTokenizer would rebuild the tokenizer of some model types instead of reading its tokenizer.json.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        for text, ids in zip(TEXTS, ours["texts"], strict=True):
            if isinstance(ids, list) and ids != (expected := tokenizer.encode(text)):
                different.append(f"{text!r} is {ids}, not {expected}")
        if isinstance(ours["decoded"], str) and ours["decoded"] != (
            expected := tokenizer.decode(PROMPT, skip_special_tokens=True)
        ):
            different.append(f"{PROMPT} reads {ours['decoded']!r}, not {expected!r}")
        if isinstance(ours["chat"], list):
            text = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
            parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in TALK]
            in_parts = tokenizer.apply_chat_template(parts, tokenize=False, add_generation_prompt=True)
            expected = [tokenizer.encode(each, add_special_tokens=False) for each in (text, in_parts)]
            if ours["chat"] not in expected:
                different.append(f"the chat is {ours['chat']}, not {expected}")
    except BaseException as error:
        failed.append(f"tokenizer: {error!r:.200}")
    if different:
        return {"kind": "different", "words": "; ".join(different)}
    return {"kind": "failed" if failed else "equal", "words": "; ".join(failed)}


@torch.no_grad()
def _worse_tokens(model: transformers.PreTrainedModel, tokens: list[int]) -> list[str]:
    """Yield the tokens that are not the best that transformers finds, or as good."""
    text, worse = list(PROMPT), []
    for token in tokens:
        logits = model(torch.tensor([text])).logits[0, -1]
        if not logits.isfinite().all():
            break
        if logits.max() - logits[token] > TOLERANCE * logits.abs().max():
            worse.append(f"token {token} after {text}, not {int(logits.argmax())}")
            break
        text.append(token)
    return worse


@dataclass
class Ended:
    """How a forked process ended: its answer if it gave one, and what it took beyond this process."""

    answer: dict[str, Any] | None
    status: int
    seconds: float
    mebibytes: float


def in_child(work: Callable[[], Any], seconds: float, *, limited: bool = False) -> Ended:
    """Run `work` in a forked process, and stop it and what it started after `seconds`."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setsid()
            os.close(reader)
            os.write(writer, struct.pack("<Q", _resident_kib()))
            if limited:
                silent = os.open(os.devnull, os.O_RDWR)
                for number in (0, 1, 2):
                    os.dup2(silent, number)
                soft = _virtual_bytes() + BOMB_BYTES
                resource.setrlimit(resource.RLIMIT_AS, (soft, soft))
            try:
                answer = work()
            except BaseException:
                answer = {"kind": "broken", "words": traceback.format_exc()[-3000:]}
            with os.fdopen(writer, "wb") as file:
                file.write(json.dumps(answer).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    content, deadline = bytearray(), time.monotonic() + seconds
    while select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
        if not (piece := os.read(reader, 2**16)):
            break
        content += piece
    else:
        os.killpg(child, signal.SIGKILL)
    os.close(reader)
    _, status, usage = os.wait4(child, 0)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what it left behind
    (before,) = struct.unpack("<Q", content[:8])
    answer = json.loads(content[8:].decode()) if len(content) > 8 else None
    used = usage.ru_utime + usage.ru_stime
    return Ended(answer, os.waitstatus_to_exitcode(status), used, (usage.ru_maxrss - before) / 1024)


def _resident_kib() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 1024


def _virtual_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
