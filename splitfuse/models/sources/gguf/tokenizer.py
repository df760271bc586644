"""Makes the tokenizer files of transformers of a GGUF file's metadata, so that it is read like any other tokenizer.

Two kinds are read: "gpt2" (byte-level BPE with merges, cut into words first) and "llama" (the BPE of SentencePiece with
scores). How texts are cut is named by tokenizer.ggml.pre; the expressions are those of the models' own tokenizers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from splitfuse.errors import TokenizerError, brief
from splitfuse.models.sources.gguf.metadata import Metadata

Json: TypeAlias = dict[str, Any]

LONGEST_TOKEN = 256
"""Number of characters of a token that merges are found for: each is cut at all places."""
MOST_MERGED = 2**23
"""Number of characters of the tokens that all merges make: those of Gemma 3 have 3.1 million."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
"""Types of tokens."""
SPACE = "\u2581"
ROLES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
"""Role of a token in tokenizer_config.json -> its key in the metadata."""
END_IDS = ("eos_token_id", "eot_token_id", "eom_token_id")
END_TEXTS = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|return|>", "<|call|>"),
    *("<|eom_id|>", "<|user|>", "<|END_OF_TURN_TOKEN|>", "[|endofturn|]", "<|end_of_text|>", "<|end_of_role|>"),
)
"""Control tokens that end a turn of models whose files do not say so."""

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_CAPITAL, _SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _words(digits: str) -> str:
    return _CONTRACTIONS + rf"|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*" + _REST


def _cased_words(contraction: str, digits: str) -> str:
    """Return an expression of words that end where a small letter is followed by a capital one."""
    start = r"[^\r\n\p{L}\p{N}]?"
    words = f"{start}{_CAPITAL}*{_SMALL}+{contraction}|{start}{_CAPITAL}+{_SMALL}*{contraction}"
    return words + rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*" + _REST


@dataclass(frozen=True)
class Cut:
    """Says how texts are cut into words: by an expression, or as GPT-2 does (None), with single digits or not.

    With `nfc` texts are composed first; with `whole_words` a word that is a token is not merged from its letters.
    """

    expression: str | None = None
    digits: bool = False
    nfc: bool = False
    whole_words: bool = False
    bos: bool = False


_GPT2, _DIGITS = Cut(), Cut(digits=True)
_LLAMA3 = Cut(_words(r"\p{N}{1,3}"), whole_words=True, bos=True)
_QWEN2 = Cut(_words(r"\p{N}"), nfc=True)
CUTS = {
    "gpt-2": _GPT2,
    "olmo": _GPT2,
    "phi-2": _GPT2,
    "exaone4": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "command-r": Cut(digits=True, nfc=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "smaug-bpe": Cut(_LLAMA3.expression),
    "dbrx": Cut(_LLAMA3.expression),
    "chatglm-bpe": Cut(_LLAMA3.expression),
    "glm4": Cut(_LLAMA3.expression),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "gpt-4o": Cut(_cased_words(f"{_CONTRACTIONS}?", r"\p{N}{1,3}")),
    "tekken": Cut(_cased_words("", r"\p{N}"), whole_words=True, bos=True),
}
"""Name of a pre-tokenizer (tokenizer.ggml.pre) -> how it cuts."""


class GgufTokenizer:
    """Reads the vocabulary of a file, and writes it as the files of transformers. Raises TokenizerError."""

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata
        self._kind = metadata.text("tokenizer.ggml.model", "none")
        if self._kind not in ("gpt2", "llama"):
            raise TokenizerError(
                f"{metadata.location} has a tokenizer of kind {brief(self._kind)}: gpt2 and llama are read; set "
                "tokenizer to the folder or Hub name of the model that it was made of"
            )
        self._tokens = metadata.texts("tokenizer.ggml.tokens")
        if len(set(self._tokens)) != len(self._tokens):
            raise TokenizerError(f"{metadata.location} has two tokens with one text")
        types = metadata.numbers("tokenizer.ggml.token_type", len(self._tokens))
        self._types = types or [NORMAL] * len(self._tokens)

    def tokenizer_json(self) -> Json:
        """Return a tokenizer.json."""
        parts = self._sentencepiece() if self._kind == "llama" else self._byte_level()
        return {"version": "1.0", "added_tokens": self._added(), "post_processor": self._post_processor(), **parts}

    def tokenizer_config(self) -> Json:
        """Return a tokenizer_config.json: tokens by role, and the chat template."""
        config: Json = {role: self._tokens[token] for role in ROLES if (token := self._id(ROLES[role])) is not None}
        if "tokenizer.chat_template" in self._metadata:
            config["chat_template"] = self._metadata.text("tokenizer.chat_template")
        return {"added_tokens_decoder": {}, **config}

    def end_ids(self) -> list[int]:
        """Return the tokens that end a text: those that are said to, and control tokens that are known to."""
        texts = set(END_TEXTS)
        if "<|return|>" in self._tokens:
            texts.discard("<|end|>")  # of gpt-oss: it ends a message, another may follow
        named = [token for key in END_IDS if (token := self._id(key)) is not None]
        known = [i for i, text in enumerate(self._tokens) if text in texts and self._types[i] == CONTROL]
        return list(dict.fromkeys(named + known))

    def _id(self, key: str) -> int | None:
        """Return the id of a token, or None if there is none."""
        return self._metadata.optional_token(f"tokenizer.ggml.{key}", len(self._tokens))

    def _flag(self, key: str, default: bool) -> bool:
        return self._metadata.flag(f"tokenizer.ggml.{key}", default)

    def _added(self) -> list[Json]:
        """Return the tokens that are found in texts before these are cut."""
        flags = {"single_word": False, "lstrip": False, "normalized": False}
        # What files do not say: the tokens of Phi-3 take the white space behind them.
        strips = self._metadata.architecture == "phi3" and self._kind == "llama"
        return [
            {
                "id": i,
                "content": text,
                **flags,
                "special": kind in (CONTROL, UNKNOWN),
                "rstrip": strips and text not in ("<unk>", "<s>", "<|endoftext|>"),
            }
            for i, (text, kind) in enumerate(zip(self._tokens, self._types, strict=True))
            if kind in (CONTROL, UNKNOWN, USER_DEFINED) and text
        ]

    def _post_processor(self) -> Json | None:
        """Return what puts the BOS and EOS tokens around a text."""
        begins = self._kind == "llama" or self._cut().bos
        before = self._id("bos_token_id") if self._flag("add_bos_token", begins) else None
        after = self._id("eos_token_id") if self._flag("add_eos_token", False) else None
        if before is None and after is None:
            return None
        used = {i: self._tokens[i] for i in (before, after) if i is not None}

        def special(token: int | None, part: int) -> list[Json]:
            return [] if token is None else [{"SpecialToken": {"id": used[token], "type_id": part}}]

        def text(name: str, part: int) -> list[Json]:
            return [*special(before, part), {"Sequence": {"id": name, "type_id": part}}, *special(after, part)]

        return {
            "type": "TemplateProcessing",
            "single": text("A", 0),
            "pair": [*text("A", 0), *text("B", 1)],
            "special_tokens": {text: {"id": text, "ids": [i], "tokens": [text]} for i, text in used.items()},
        }

    def _cut(self) -> Cut:
        name = self._metadata.text("tokenizer.ggml.pre", "none")
        if name not in CUTS:
            raise TokenizerError(
                f"{self._metadata.location} cuts texts by the pre-tokenizer {brief(name)}: {', '.join(CUTS)} are read; "
                "set tokenizer to the folder or Hub name of the model that it was made of"
            )
        return CUTS[name]

    def _byte_level(self) -> Json:
        cut = self._cut()
        merges = [merge.split(" ") for merge in self._metadata.texts("tokenizer.ggml.merges")]
        if broken := next((merge for merge in merges if len(merge) != 2), None):
            merge = " ".join(broken)
            raise TokenizerError(
                f"{self._metadata.location}: tokenizer.ggml.merges must be pairs of tokens, not {brief(merge)}"
            )
        by_bytes: Json = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
        steps: list[Json] = [{"type": "Digits", "individual_digits": True}] if cut.digits else []
        if cut.expression is not None:
            split = {"type": "Split", "pattern": {"Regex": cut.expression}, "behavior": "Isolated", "invert": False}
            steps.append(split)
        steps.append({**by_bytes, "use_regex": cut.expression is None})
        return {
            "normalizer": {"type": "NFC"} if cut.nfc else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
            "decoder": {**by_bytes, "use_regex": True},
            "model": self._bpe(merges, ignore_merges=cut.whole_words),
        }

    def _sentencepiece(self) -> Json:
        scores = self._metadata.numbers("tokenizer.ggml.scores", len(self._tokens))
        if not scores:
            raise TokenizerError(f"{self._metadata.location} has no tokenizer.ggml.scores, which merges follow from")
        replaced: Json = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        spaces: Json = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
        prefixed = self._flag("add_space_prefix", True)
        before: list[Json] = [{"type": "Prepend", "prepend": SPACE}] if prefixed else []
        after: list[Json] = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefixed else []
        unknown = self._id("unknown_token_id")
        return {
            "normalizer": {"type": "Sequence", "normalizers": [*before, replaced]},
            "pre_tokenizer": None,
            "decoder": {"type": "Sequence", "decoders": [spaces, {"type": "ByteFallback"}, {"type": "Fuse"}, *after]},
            "model": self._bpe(
                _merges(self._metadata.location, self._tokens, scores, self._types),
                unk_token=None if unknown is None else self._tokens[unknown],
                fuse_unk=True,
                byte_fallback=True,
            ),
        }

    def _bpe(self, merges: Sequence[Sequence[str]], **fields: Any) -> Json:
        vocab = {text: i for i, text in enumerate(self._tokens)}
        return {"type": "BPE", "vocab": vocab, "merges": merges, **fields}


def _merges(
    location: str, tokens: Sequence[str], scores: Sequence[float], types: Sequence[float]
) -> list[tuple[str, str]]:
    """Return the merges that SentencePiece makes, of all pairs of tokens that make a token: first those of the best
    score; of equal scores as transformers orders them. Raises TokenizerError beyond bounds: a small file can have
    tokens that all are made of each other, and merges by the square of their number.
    """
    ids = {text: i for i, (text, kind) in enumerate(zip(tokens, types, strict=True)) if kind == NORMAL}

    def pairs() -> Iterator[tuple[float, int, int, int, int, int]]:
        merged = 0
        for text, i in ids.items():
            if len(text) > LONGEST_TOKEN:
                raise TokenizerError(
                    f"{location}: token {i} has {len(text)} characters; at most {LONGEST_TOKEN} are read where merges "
                    "follow from scores"
                )
            for cut in range(1, len(text)):
                left, right = ids.get(text[:cut]), ids.get(text[cut:])
                if left is None or right is None:
                    continue
                merged += len(text)
                if merged > MOST_MERGED:
                    raise TokenizerError(
                        f"{location}: its tokens have too many merges: more than {MOST_MERGED} characters, and at "
                        "most that are read"
                    )
                yield -scores[i], -cut, cut - len(text), i, left, right

    return [(tokens[left], tokens[right]) for *_, left, right in sorted(pairs())]
