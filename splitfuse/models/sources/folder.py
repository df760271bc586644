"""Read a model from a folder in Hugging Face format: config.json, tokenizer.json, safetensors files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from splitfuse.models.sources.files import MAX_FILE_BYTES, read_file
from splitfuse.models.sources.source import ModelSource, WeightSource

OLD_GPTQ_FILE = "quantize_config.json"
"""Name of the file in which old checkpoints of GPTQ have their quantization_config."""
NUM_SAMPLES = 64
SAMPLE_BYTES = 4096
"""Number and size of the samples of a file of weights."""


class ModelFolder(ModelSource):
    """Reads a model from the files of one folder.

    source = ModelFolder(Path("~/models/llama").expanduser())
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        self.location = str(path)

    def read(self, file: str, most: int = MAX_FILE_BYTES) -> bytes | None:
        return read_file(self.path / file, most)

    def files(self) -> list[Path]:
        from splitfuse.models.sources.safetensors import weight_files  # only here: it imports torch

        return weight_files(self.path)

    def weight_samples(self) -> Iterator[bytes]:
        for path in self.files():
            yield from sample(path)

    def weights(self) -> WeightSource:
        # only here: they import torch
        from splitfuse.models.sources.quantized.config import read_quantization
        from splitfuse.models.sources.quantized.weights import QuantizedWeights
        from splitfuse.models.sources.safetensors import SafetensorsWeights

        quantization = read_quantization(self.config())
        stored = SafetensorsWeights(self.path)
        return stored if quantization is None else QuantizedWeights(stored, quantization)

    def config(self) -> dict[str, Any]:
        values = super().config()
        own = self.read_json(OLD_GPTQ_FILE)
        return values if own is None else {"quantization_config": {"quant_method": "gptq", **own}, **values}


def sample(path: Path) -> Iterator[bytes]:
    """Yield the size of a file, and bytes from all over it. Raises OSError."""
    with path.open("rb") as file:
        size = path.stat().st_size
        yield size.to_bytes(8, "little")
        for start in range(0, size, max(size // NUM_SAMPLES, SAMPLE_BYTES)):
            file.seek(start)
            yield file.read(SAMPLE_BYTES)
