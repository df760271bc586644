"""Reads a model from GGUF files: what a folder has in files is made of the metadata."""

from __future__ import annotations

import functools
import hashlib
import json
import struct
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitfuse.errors import WeightsError, brief
from splitfuse.models.sources.files import MAX_FILE_BYTES, MIB
from splitfuse.models.sources.gguf.architectures import Config, Located, locate, read_config
from splitfuse.models.sources.gguf.container import GgufFile, TensorInfo, open_parts
from splitfuse.models.sources.gguf.metadata import Metadata
from splitfuse.models.sources.gguf.tokenizer import GgufTokenizer
from splitfuse.models.sources.source import ModelSource, Piece, WeightSource, check_names

if TYPE_CHECKING:
    from torch import Tensor

    from splitfuse.kernels.quantized import QuantizedFormat, QuantizedWeight

LARGEST_TABLE = 2**20
"""Number of elements of the longest tensor that is part of the config."""


class GgufModel(ModelSource):
    """Reads a model from a GGUF file, or from all files that it is split into.

        source = GgufModel(Path("SmolLM2-135M-Instruct.Q4_1.gguf"))

    Raises ModelError for a file that cannot be trusted or is not supported.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path = path
        self.name = name or path.stem
        self.location = str(path)
        self._files = open_parts(path)
        self._places: dict[str, tuple[GgufFile, TensorInfo]] = {
            name: (file, info) for file in self._files for name, info in file.tensors.items()
        }

    def read(self, file: str, most: int = MAX_FILE_BYTES) -> bytes | None:
        content = self._made(file)
        if content is not None and len(content) > most:
            raise OSError(f"it has more than the {most // MIB} MiB that such a file may have")
        return content

    def eos_token_ids(self) -> tuple[int, ...]:
        return tuple(self._tokenizer.end_ids())

    def digest(self, *, weights: bool = True) -> str:
        digest = hashlib.sha256()
        for file in self._files:
            digest.update(file.view(0, file.header_bytes))  # all that files are made of
        for sampled in self.weight_samples() if weights else ():
            digest.update(sampled)
        return digest.hexdigest()

    def files(self) -> list[Path]:
        return [file.path for file in self._files]

    def weights(self) -> WeightSource:
        located = locate(self._metadata, self._infos, self._config)
        tensors = {name: (self._places[each.info.name][0], each) for name, each in located.items()}
        return GgufWeights(self.location, tensors)

    @property
    def _infos(self) -> dict[str, TensorInfo]:
        return {name: info for name, (_, info) in self._places.items()}

    @property
    def _metadata(self) -> Metadata:
        return Metadata(self.location, self._files[0].metadata)

    @functools.cached_property
    def _config(self) -> Config:
        return read_config(self._metadata, self._infos, self._floats)

    @functools.cached_property
    def _tokenizer(self) -> GgufTokenizer:
        return GgufTokenizer(self._metadata)

    @functools.cached_property
    def _tokenizer_json(self) -> bytes:
        return json.dumps(self._tokenizer.tokenizer_json(), ensure_ascii=False).encode()

    def _made(self, file: str) -> bytes | None:
        """Return what a file of a folder would hold."""
        made: dict[str, Any]
        match file:
            case "config.json":
                made = self._config
            case "generation_config.json":
                made = {"eos_token_id": self._tokenizer.end_ids()}
            case "tokenizer_config.json":
                made = self._tokenizer.tokenizer_config()
            case "tokenizer.json":
                return self._tokenizer_json
            case _:
                return None
        return json.dumps(made).encode()

    def _floats(self, name: str) -> list[float]:
        """Return a short tensor of fp32."""
        file, info = self._places[name]
        if info.type.name != "F32" or len(info.shape) != 1 or info.shape[0] > LARGEST_TABLE:
            raise WeightsError(
                f"{self.location}: tensor {name} must be a short list in F32, not {info.type.name} of shape "
                f"{brief(list(info.shape))}"
            )
        return list(struct.unpack(f"<{info.shape[0]}f", file.view(info.begin, info.num_bytes)))


class GgufWeights(WeightSource):
    """Reads tensors from mapped files, by the names and in the order of transformers."""

    def __init__(self, location: str, tensors: dict[str, tuple[GgufFile, Located]]) -> None:
        self._location = location
        self._tensors = tensors

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def check(self, wanted: Collection[Piece], *, architecture: str, aside: Collection[str] = ()) -> None:
        check_names(self.names(), wanted, architecture=architecture, aside=aside)
        for name, shape in wanted:
            stored = self._tensors[name][1]
            if self.quantization(name) is not None and len(shape) != 2:
                raise WeightsError(
                    f"{self._location}: tensor {stored.info.name} is stored as {stored.info.type.name}, but only "
                    "matrices are read quantized"
                )
            if stored.shape != shape:
                raise WeightsError(
                    f"{self._location}: tensor {stored.info.name} has shape {brief(list(stored.info.shape))}, but its "
                    f"metadata implies {list(shape)} for {name}"
                )

    def quantization(self, name: str) -> QuantizedFormat | None:
        from splitfuse.models.sources.gguf.blocks import FORMATS

        return FORMATS.get(self._tensors[name][1].info.type.name)

    def stored_as(self, name: str) -> str:
        return self._tensors[name][1].info.type.name

    @contextmanager
    def read(self, piece: Piece) -> Iterator[Tensor]:
        import torch

        stored = self._tensors[piece.name][1]
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[stored.info.type.name]
        with self._bytes(piece.name) as content:
            tensor = torch.frombuffer(content, dtype=dtype).view(stored.shape)
            if (order := _order(stored)) is not None:
                tensor = tensor[order]
            yield tensor.float() - 1 if stored.plus_one else tensor

    @contextmanager
    def read_quantized(self, piece: Piece) -> Iterator[QuantizedWeight]:
        import torch

        from splitfuse.models.sources.gguf.blocks import unpack

        stored = self._tensors[piece.name][1]
        with self._bytes(piece.name) as content:
            blocks = torch.frombuffer(content, dtype=torch.uint8)
            kind, num_rows = stored.info.type, stored.shape[0]
            weight = unpack(kind.name, blocks.view(num_rows, -1, kind.block_bytes))
        yield weight if (order := _order(stored)) is None else weight.rows(order)

    @contextmanager
    def _bytes(self, name: str) -> Iterator[memoryview]:
        """Give the bytes of a tensor, or of its expert's part, for as long as the context lasts."""
        file, stored = self._tensors[name]
        begin, size = stored.info.begin, stored.info.num_bytes
        if stored.expert is not None:
            size //= stored.info.shape[0]
            begin += stored.expert * size
        yield file.view(begin, size)
        file.release(begin, size)


def _order(stored: Located) -> Tensor | None:
    """Return the stored row for each row of heads: those of ggml's rope alternate between the halves of a head."""
    import torch

    if stored.heads is None:
        return None
    return torch.arange(stored.shape[0]).view(stored.heads, -1, 2).transpose(1, 2).flatten()
