"""Reads a model from a folder in Hugging Face format: config.json, tokenizer.json, safetensors files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from splitfuse.models.sources.files import MAX_FILE_BYTES, OLD_GPTQ_FILE, read_file
from splitfuse.models.sources.source import ModelSource, WeightSource


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
