"""Tokenizers of GGUF files: the same tokens and texts as those of the tokenizers that they are written of."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from gguf_files import tokenizer_metadata, write_tokenizer
from tiny_tokenizers import BOS, CORPUS, EOS, UNK, byte_fallback, byte_level, random_text

from splitfuse.errors import ModelError, TokenizerError
from splitfuse.models.sources.gguf.model import GgufModel
from splitfuse.text.tokenizer import Tokenizer

TEMPLATE = "{% for m in messages %}{{ bos_token }}{{ m.content }}{% endfor %}"


def read(path: Path, values: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_source(GgufModel(write_tokenizer(path / "model.gguf", values)))


@pytest.mark.parametrize("make", [byte_level, byte_fallback], ids=["gpt2", "llama"])
def test_both_kinds_have_the_tokens_of_their_origin(make: Any, tmp_path: Path) -> None:
    origin = make()
    origin.add_tokens([tokenizers.AddedToken("<tool_call>", normalized=False)])
    oracle = Tokenizer(tokenizers.Tokenizer.from_str(origin.to_str()))
    ours = read(tmp_path, tokenizer_metadata(origin))
    rng = random.Random(20)
    for text in (*CORPUS, *(random_text(rng) for _ in range(300)), f"a{EOS} b <tool_call>{BOS}  c", UNK, ""):
        assert ours.encode(text) == oracle.encode(text), text
        assert ours.encode(text, add_special_tokens=False) == oracle.encode(text, add_special_tokens=False)
    for _ in range(300):
        tokens = [rng.randrange(ours.vocab_size) for _ in range(rng.randrange(12))]
        for skip in (True, False):
            assert ours.decode(tokens, skip_special_tokens=skip) == oracle.decode(tokens, skip_special_tokens=skip)


def test_flags_say_what_is_put_around_a_text(tmp_path: Path) -> None:
    plain = tokenizer_metadata(byte_level(), ggml__add_bos_token=False)
    ended = tokenizer_metadata(byte_fallback(), ggml__add_eos_token=True, ggml__add_space_prefix=False)
    assert BOS not in (text := read(tmp_path, plain)).decode(text.encode("the cat"), skip_special_tokens=False)
    tokenizer = read(tmp_path, ended)
    assert tokenizer.decode(tokenizer.encode("the cat"), skip_special_tokens=False) == f"{BOS}the cat{EOS}"
    del ended["ggml.add_bos_token"]  # llama kinds have it by default
    assert read(tmp_path, ended).encode("a")[0] == tokenizer.bos_token_id


def test_roles_template_and_eos_tokens(tmp_path: Path) -> None:
    origin = byte_level()
    origin.add_special_tokens(["<|im_end|>", "<|eot|>", "<|end|>"])
    turn = origin.token_to_id("<|eot|>")
    values = tokenizer_metadata(origin, chat_template=TEMPLATE, ggml__eot_token_id=turn)
    values["ggml.padding_token_id"] = 2**32 - 1  # none
    source = GgufModel(write_tokenizer(tmp_path / "model.gguf", values))
    tokenizer = Tokenizer.from_source(source)
    assert tokenizer.special_tokens == {"bos_token": BOS, "eos_token": EOS} and tokenizer.chat_template == TEMPLATE
    ends = [origin.token_to_id(token) for token in (EOS, "<|eot|>", "<|im_end|>", "<|end|>")]
    assert source.eos_token_ids() == tuple(ends)
    assert source.generation_config() == {"eos_token_id": ends}


def test_a_message_of_gpt_oss_ends_no_answer(tmp_path: Path) -> None:
    origin = byte_level()
    origin.add_special_tokens(["<|end|>", "<|return|>", "<|call|>"])
    values = tokenizer_metadata(origin, ggml__eos_token_id=origin.token_to_id("<|return|>"))
    ids = GgufModel(write_tokenizer(tmp_path / "model.gguf", values)).eos_token_ids()
    assert [origin.id_to_token(i) for i in ids] == ["<|return|>", "<|call|>"]


def test_tokens_of_phi3_take_white_space_behind_them(tmp_path: Path) -> None:
    origin = byte_fallback()
    origin.add_special_tokens([tokenizers.AddedToken("<|end|>", rstrip=True)])
    values = tokenizer_metadata(origin)
    path = write_tokenizer(tmp_path / "model.gguf", values, architecture="phi3")
    text = "the <|end|>\n cat"
    assert Tokenizer.from_source(GgufModel(path)).encode(text) == Tokenizer(origin).encode(text)


TEXT = "It's 12345 HTTPServer naïve\n\n  x//y"
CUTS = {
    "gpt-2": ["It", "'s", " 12345", " HTTPServer", " naïve", "\n\n ", " x", "//", "y"],
    "smollm": ["It", "'s", " ", *"12345", " HTTPServer", " naïve", "\n\n ", " x", "//", "y"],
    "qwen2": ["It", "'s", " ", *"12345", " HTTPServer", " naïve", "\n\n", " ", " x", "//", "y"],
    "llama-bpe": ["It", "'s", " ", "123", "45", " HTTPServer", " naïve", "\n\n", " ", " x", "//", "y"],
    "gpt-4o": ["It's", " ", "123", "45", " HTTPServer", " naïve", "\n\n", " ", " x", "//", "y"],
    "tekken": ["It", "'s", " ", *"12345", " HTTPServer", " naïve", "\n\n", " ", " x", "//", "y"],
}


@pytest.mark.parametrize("name", CUTS)
def test_texts_are_cut_as_the_pre_tokenizer_says(name: str, tmp_path: Path) -> None:
    values = tokenizer_metadata(byte_level(), ggml__pre=name)
    source = GgufModel(write_tokenizer(tmp_path / "model.gguf", values))
    made = tokenizers.Tokenizer.from_buffer(source.read("tokenizer.json") or b"")
    assert made.pre_tokenizer is not None
    letters = tokenizers.decoders.ByteLevel()
    assert [letters.decode([word]) for word, _ in made.pre_tokenizer.pre_tokenize_str(TEXT)] == CUTS[name]


def test_composed_letters_and_whole_words(tmp_path: Path) -> None:
    """Qwen composes letters; words of Llama 3 that are tokens are taken whole."""
    values = tokenizer_metadata(byte_level(), ggml__pre="qwen2")
    assert json.loads(tokenizer_json(tmp_path, values))["normalizer"] == {"type": "NFC"}
    model = json.loads(tokenizer_json(tmp_path, {**values, "ggml.pre": "llama-bpe"}))["model"]
    assert model["ignore_merges"]


def tokenizer_json(path: Path, values: dict[str, Any]) -> bytes:
    content = GgufModel(write_tokenizer(path / "model.gguf", values)).read("tokenizer.json")
    assert content is not None
    return content


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ggml__model": "bert"}, "has a tokenizer of kind 'bert': gpt2 and llama are read; set tokenizer to"),
        ({"ggml__model": None}, "has a tokenizer of kind 'none'"),
        ({"ggml__pre": "viking"}, "cuts texts by the pre-tokenizer 'viking': gpt-2, olmo"),
        ({"ggml__pre": None}, "cuts texts by the pre-tokenizer 'none'"),
        ({"ggml__tokens": ["a", "b", "a"]}, "has two tokens with one text"),
        ({"ggml__tokens": ["a"]}, "tokenizer.ggml.token_type must be 1 numbers, not "),
        ({"ggml__merges": ["a b c"]}, "tokenizer.ggml.merges must be pairs of tokens, not 'a b c'"),
        ({"ggml__merges": ["zz qq"]}, "Token `zz` out of vocabulary"),
        ({"ggml__eos_token_id": 10**6}, "tokenizer.ggml.eos_token_id must be a whole number from 0 to 39"),
        ({"chat_template": "{% if %}"}, "the chat template is broken"),
    ],
)
def test_a_broken_tokenizer_is_refused_in_a_sentence(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as error:
        read(tmp_path, tokenizer_metadata(byte_level(), **changes))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("letters", "longest", "message"),
    [("a", 257, "token 256 has 257 characters; at most 256 are read"), ("abc", 256, "its tokens have too many merges")],
)
def test_tokens_made_of_each_other_are_refused(letters: str, longest: int, message: str, tmp_path: Path) -> None:
    """Their merges are as many as the square of their number, and long."""
    tokens = [letter * size for letter in letters for size in range(1, longest + 1)]
    numbers = {"ggml__scores": [0.0] * len(tokens), "ggml__token_type": [1] * len(tokens)}
    with pytest.raises(TokenizerError, match=message):
        read(tmp_path, tokenizer_metadata(byte_fallback(), ggml__tokens=tokens, **numbers))


def test_scores_are_needed_for_merges(tmp_path: Path) -> None:
    with pytest.raises(
        TokenizerError, match=r"^[^:]*/model.gguf has no tokenizer.ggml.scores, which merges follow from"
    ):
        read(tmp_path, tokenizer_metadata(byte_fallback(), ggml__scores=None))
