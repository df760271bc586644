"""Defines the interfaces of a stored model, ModelSource and WeightSource. Code above does not know which it has."""

from __future__ import annotations

import hashlib
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import msgspec

from splitfuse.errors import ModelError, ModelNotFoundError, WeightsError, brief
from splitfuse.models.sources.files import (
    ADAPTER_CONFIG,
    MAX_FILE_BYTES,
    MAX_TOKENIZER_BYTES,
    OLD_GPTQ_FILE,
    check_json,
)

if TYPE_CHECKING:
    from torch import Tensor

    from splitfuse.kernels.quantized import QuantizedFormat, QuantizedWeight

Shape: TypeAlias = tuple[int, ...]

MOST_EXPERTS = 10_000
"""Number of experts that one tensor may hold: each has an entry."""

NUM_SAMPLES = 64
SAMPLE_BYTES = 4096
"""Number and size of the samples of a file of weights."""
SMALL_FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja", OLD_GPTQ_FILE),
    *("modules.json", "1_Pooling/config.json", "sentence_bert_config.json"),
)
"""Files that say what a model is, but for the weights."""


class Piece(NamedTuple):
    """Names a stored tensor that a weight is made of, by its name in the checkpoint, and the shape it must have.

        Piece("model.layers.0.self_attn.q_proj.weight", (896, 896))

    Where a family or a format needs part of a tensor, or another order of it (rows, transposed, permuted), that becomes
    a field here.
    """

    name: str
    shape: Shape


class WeightSource(ABC):
    """Gives the tensors of a model. Formats (safetensors, GGUF, quantized ones) differ in how they store them."""

    @abstractmethod
    def __contains__(self, name: str) -> bool:
        """Return whether a tensor of that name is stored."""

    @abstractmethod
    def names(self) -> Collection[str]:
        """Return the names of all tensors that are stored."""

    @abstractmethod
    def check(self, wanted: Collection[Piece], *, architecture: str, aside: Collection[str] = ()) -> None:
        """Raise WeightsError unless all of `wanted` is there, and no other tensor but those left `aside`.

        `architecture` is the network that wants them, for messages.
        """

    @abstractmethod
    def read(self, piece: Piece) -> AbstractContextManager[Tensor]:
        """Return a tensor that is not quantized for as long as the context lasts: copy what is to be kept. Call `check`
        first.
        """

    def quantization(self, name: str) -> QuantizedFormat | None:
        """Return how a tensor is quantized, or None if it is not."""
        del name
        return None

    def read_quantized(self, piece: Piece) -> AbstractContextManager[QuantizedWeight]:
        """Return a tensor that is quantized, as `read` does one that is not."""
        raise NotImplementedError(f"{piece.name} is not quantized")

    def is_in_order(self, name: str) -> bool:
        """Return whether the columns of a quantized tensor are stored in the order of the weight."""
        del name
        return True

    def in_one_order(self, names: Collection[str]) -> bool:
        """Return whether the columns of quantized tensors are stored in the same order."""
        del names
        return True

    def stored_as(self, name: str) -> str:
        """Return how a tensor is stored, as files call it: its dtype or its format."""
        stored = self.quantization(name)
        return "dense" if stored is None else stored.name

    def remarks(self) -> list[str]:
        """Return lines on what of the checkpoint is computed in another way than it says."""
        return []


class ModelSource(ABC):
    """Gives access to a stored model: config, tokenizer files, chat template, EOS tokens and tensors.

    source = open_model("Qwen/Qwen2.5-0.5B-Instruct")
    spec = spec_from_config(source.config())
    """

    name: str
    """Name of the model, as a server shows it."""
    location: str
    """Place of the model, for messages and as its identity on this machine."""

    @abstractmethod
    def read(self, file: str, most: int = MAX_FILE_BYTES) -> bytes | None:
        """Return the content of a file such as `tokenizer.json`, or None if the model has none. Raises OSError, also
        for a file of more than `most` bytes.
        """

    @abstractmethod
    def weights(self) -> WeightSource:
        """Open the tensors. Raises WeightsError."""

    def digest(self, *, weights: bool = True) -> str:
        """Return a digest of what the model's files say, with `weights` also of samples of its tensors."""
        digest = hashlib.sha256()
        for file in SMALL_FILES:
            content: bytes | None = b""
            with suppress(OSError):  # whatever reads it for good says so
                content = self.read(file, MAX_TOKENIZER_BYTES)
            digest.update(hashlib.sha256(content or b"").digest())
        for sample in self.weight_samples() if weights else ():
            digest.update(sample)
        return digest.hexdigest()

    @abstractmethod
    def files(self) -> list[Path]:
        """Return the files that hold the tensors. Raises WeightsError."""

    def weight_samples(self) -> Iterator[bytes]:
        """Yield sizes of the files that hold the tensors, and bytes from all over them, which tell checkpoints apart.
        Raises WeightsError, OSError.
        """
        for path in self.files():
            with path.open("rb") as file:
                size = path.stat().st_size
                yield size.to_bytes(8, "little")
                for start in range(0, size, max(size // NUM_SAMPLES, SAMPLE_BYTES)):
                    file.seek(start)
                    yield file.read(SAMPLE_BYTES)

    def read_text(self, file: str, most: int = MAX_FILE_BYTES) -> str | None:
        """Return the text of a file, or None if the model has no such file. Raises OSError and ValueError."""
        content = self.read(file, most)
        return None if content is None else io.TextIOWrapper(io.BytesIO(content), encoding="utf-8").read()

    def read_json(self, file: str, error: type[ModelError] = ModelError) -> dict[str, Any] | None:
        """Return the object in a JSON file, or None if the model has no such file.

        Raises `error` if the file cannot be read or holds something else.
        """
        try:
            content = self.read(file)
            check_json(content or b"")
            values = None if content is None else json.loads(content.decode())
        except (OSError, ValueError, RecursionError) as reason:
            raise error(f"{self.location}/{file} cannot be read as JSON: {reason!s:.200}") from reason
        if content is not None and not isinstance(values, dict):
            raise error(f"{self.location}/{file} must hold a JSON object, not {type(values).__name__}")
        return values

    def config(self) -> dict[str, Any]:
        """Return config.json. Raises ModelNotFoundError if there is none, ModelError if it is not a JSON object."""
        values = self.read_json("config.json")
        if values is None and (adapter := self.adapter()) is not None:
            raise ModelNotFoundError(
                f"{self.location} has no config.json: it holds an adapter of {adapter}, not a model; merge the two, "
                "by merge_and_unload of PEFT, and name the merged model"
            )
        if values is None:
            raise ModelNotFoundError(
                f"{self.location} has no config.json: it is neither a model folder in Hugging Face format nor one of "
                "GGUF files"
            )
        return values

    def adapter(self) -> str | None:
        """Return the name of the model that an adapter in the folder belongs to, or None if there is no adapter."""
        values = self.read_json(ADAPTER_CONFIG)
        return None if values is None else brief(values.get("base_model_name_or_path", "a model without a name"))

    def tokenizer_config(self, error: type[ModelError] = ModelError) -> dict[str, Any]:
        """Return tokenizer_config.json, empty if there is none. One without added_tokens_decoder, which old versions of
        transformers wrote, has the special tokens of special_tokens_map.json too. Raises `error` as `read_json`.
        """
        config = self.read_json("tokenizer_config.json", error) or {}
        if config.get("added_tokens_decoder") is not None:
            return config
        named = self.read_json("special_tokens_map.json", error) or {}
        return {**config, **named, "added_tokens_decoder": None}

    def generation_config(self) -> dict[str, Any]:
        """Return generation_config.json, the model's defaults for sampling; empty if there is none."""
        return self.read_json("generation_config.json") or {}

    def eos_token_ids(self) -> tuple[int, ...]:
        """Return the tokens that end a text: those of generation_config.json, else of config.json, and the EOS token
        that the tokenizer names; none is allowed.

        Raises ModelError if the entry is neither a token id nor a list of them.
        """
        ids = self._stated_eos_token_ids()
        ending = self._tokenizer_eos_token_id()
        return ids if ending is None or ending in ids else (*ids, ending)

    def _tokenizer_eos_token_id(self) -> int | None:
        """Return the id of the tokenizer's EOS token if its files name one and have an id for it. A file that cannot be
        read is left to the tokenizer, which says so.
        """
        try:
            config = self.tokenizer_config()
            token = config.get("eos_token")
            text = token.get("content") if isinstance(token, dict) else token
            content = self.read("tokenizer.json", MAX_TOKENIZER_BYTES)
            if content is None or not isinstance(text, str):
                return None
            check_json(content)
            file = msgspec.json.decode(content, type=_TokenizerFile)
            added = {each.content: each.id for each in file.added_tokens}
            if text in added:
                return added[text]
            vocab = msgspec.json.decode(file.model.vocab, type=dict[str, int] | list[tuple[str, float]])
            ids = vocab if isinstance(vocab, dict) else {piece: number for number, (piece, _) in enumerate(vocab)}
            if text in ids:
                return ids[text]
            own = config.get("added_tokens_decoder") or {}
            return next((int(number) for number, each in own.items() if each["content"] == text), None)
        except (OSError, ModelError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return None

    def _stated_eos_token_ids(self) -> tuple[int, ...]:
        config = self.config()
        text = config.get("text_config")
        places = (
            ("generation_config.json", self.generation_config()),
            ("config.json", config),
            ("config.json", text if isinstance(text, dict) else {}),
        )
        for file, values in places:
            value = values.get("eos_token_id")
            if value is None:
                continue
            ids = value if isinstance(value, list) else [value]
            if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
                raise ModelError(
                    f"eos_token_id in {self.location}/{file} must be a token id or a list of them, not {brief(value)}"
                )
            return tuple(ids)
        return ()


def check_names(
    stored: Collection[str],
    wanted: Collection[Piece],
    *,
    architecture: str,
    aside: Collection[str] = (),
    computed: tuple[str, ...] = (),
) -> None:
    """Raise WeightsError unless all of `wanted` is stored, and nothing else but what is left `aside` and names that end
    in one of `computed`.
    """
    names, there = {piece.name for piece in wanted}, set(stored)
    if missing := names - there:
        raise WeightsError(f"weights missing from the checkpoint ({len(missing)}): {listing(missing)}")
    if surplus := {name for name in there - names - set(aside) if not name.endswith(computed)}:
        raise WeightsError(
            f"weights that {architecture} with this config.json does not use ({len(surplus)}): {listing(surplus)}"
        )


def listing(names: Iterable[str], most: int = 5) -> str:
    """Return the first names in order, and how many more there are."""
    ordered = [f"{name:.100}" for name in sorted(names)]
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more


class _AddedToken(msgspec.Struct):
    id: int
    content: str


class _Vocabulary(msgspec.Struct):
    vocab: msgspec.Raw


class _TokenizerFile(msgspec.Struct):
    """Holds what of a tokenizer.json says the ids of tokens."""

    model: _Vocabulary
    added_tokens: list[_AddedToken] = []
