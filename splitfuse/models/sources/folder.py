"""Read a model from a folder in Hugging Face format: config.json, tokenizer.json, safetensors files."""

from __future__ import annotations

from pathlib import Path

from splitfuse.models.sources.files import MAX_FILE_BYTES, read_file
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

    def weights(self) -> WeightSource:
        from splitfuse.models.sources.safetensors import SafetensorsWeights  # only here: it imports torch

        return SafetensorsWeights(self.path)
