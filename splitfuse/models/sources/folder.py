"""Read a model from a folder in Hugging Face format: config.json, tokenizer.json, safetensors files."""

from __future__ import annotations

from pathlib import Path

from splitfuse.models.sources.source import ModelSource, WeightSource


class ModelFolder(ModelSource):
    """Reads a model from the files of one folder.

    source = ModelFolder(Path("~/models/llama").expanduser())
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        self.location = str(path)

    def read(self, file: str) -> bytes | None:
        path = self.path / file
        return path.read_bytes() if path.is_file() else None

    def weights(self) -> WeightSource:
        from splitfuse.models.sources.safetensors import SafetensorsWeights  # only here: it imports torch

        return SafetensorsWeights(self.path)
