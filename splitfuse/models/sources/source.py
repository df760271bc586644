"""Define the interfaces of a stored model, ModelSource and WeightSource: code above does not know which kind it has."""

from __future__ import annotations

import io
import json
from abc import ABC, abstractmethod
from collections.abc import Collection
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from splitfuse.errors import ModelError, ModelNotFoundError, brief
from splitfuse.models.sources.files import MAX_FILE_BYTES, check_json

if TYPE_CHECKING:
    from torch import Tensor

Shape: TypeAlias = tuple[int, ...]


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
    def check(self, wanted: Collection[Piece], *, architecture: str) -> None:
        """Raise WeightsError unless all of `wanted` is there, and no other tensor.

        `architecture` is the network that wants them, for messages.
        """

    @abstractmethod
    def read(self, piece: Piece) -> AbstractContextManager[Tensor]:
        """Return a tensor for as long as the context lasts: copy what is to be kept. Call `check` first."""


class ModelSource(ABC):
    """Gives access to a stored model: config, tokenizer files, chat template, end tokens and tensors.

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
            raise error(f"{self.location}/{file} cannot be read as JSON: {reason}") from reason
        if content is not None and not isinstance(values, dict):
            raise error(f"{self.location}/{file} must hold a JSON object, not {type(values).__name__}")
        return values

    def config(self) -> dict[str, Any]:
        """Return config.json. Raises ModelNotFoundError if there is none, ModelError if it is not a JSON object."""
        values = self.read_json("config.json")
        if values is None:
            raise ModelNotFoundError(
                f"{self.location} has no config.json: it is not a model folder in Hugging Face format"
            )
        return values

    def generation_config(self) -> dict[str, Any]:
        """Return generation_config.json, the model's defaults for sampling; empty if there is none."""
        return self.read_json("generation_config.json") or {}

    def eos_token_ids(self) -> tuple[int, ...]:
        """Return the tokens that end a text: those of generation_config.json, else of config.json; none is allowed.

        Raises ModelError if the entry is neither a token id nor a list of them.
        """
        for file, values in (("generation_config.json", self.generation_config()), ("config.json", self.config())):
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
