"""Reads the small files of a model's folder within bounds: a folder is untrusted, and may hold pipes, devices, endless
files, or JSON that takes a hundred times its size in memory.
"""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import BinaryIO

from splitfuse.errors import WeightsError, brief

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
OLD_GPTQ_FILE = "quantize_config.json"
"""Name of the file in which old checkpoints of GPTQ have their quantization_config."""
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MIB = 2**20
MAX_FILE_BYTES = 16 * MIB
"""Size of the largest file that is read but for tokenizer.json: indexes of 100,000 tensors have 10 MB."""
MAX_TOKENIZER_BYTES = 64 * MIB
"""Size of the largest tokenizer.json that is read: vocabularies of 256,000 tokens have 35 MB."""
MAX_JSON_VALUES = 2_200_000
"""Number of values, about, that a JSON file may have: such a vocabulary has 1.8 million with its merges."""


def read_file(path: Path, most: int = MAX_FILE_BYTES) -> bytes | None:
    """Return the content of a regular file, or None if there is none. Raises OSError for anything else, and for a file
    of more than `most` bytes.
    """
    try:
        content = read_beginning(path, most + 1)  # its stated size means nothing: files of /proc have none
    except (FileNotFoundError, NotADirectoryError):
        return None
    if len(content) > most:
        raise OSError(f"it has more than the {most // MIB} MiB that such a file may have")
    return content


def read_beginning(path: Path, size: int) -> bytes:
    """Return the first `size` bytes of a regular file, or all that it has at once. Raises OSError."""
    with open_regular(path) as file:
        return file.read(size) or b""  # None where reading would wait


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file to read it. Raises OSError for anything else."""
    if not stat.S_ISREG(path.stat().st_mode):  # before it is opened: that alone can change a device
        raise OSError("it is not a regular file")
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")


def check_json(content: bytes) -> None:
    """Raise ValueError for a JSON text that would take much more memory than its size: of very many small values.

    An empty list counts as one value, an object as eight, which is what they take.
    """
    values = 1 + content.count(b",") + content.count(b"[") + 8 * content.count(b"{")
    if values > MAX_JSON_VALUES:
        raise ValueError(f"it holds about {values} values; at most {MAX_JSON_VALUES} are read")


def shard_names(folder: Path) -> list[str]:
    """Return the files that the index of a checkpoint names. Raises WeightsError for a broken index, and for a file
    that is not in the folder itself.
    """
    index = folder / INDEX_FILE
    try:
        content = read_file(index) or b""
        check_json(content)
        files = set(json.loads(content.decode())["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(
            f"{index} is not a weight index, which has a weight_map of names to files: {error!r:.200}"
        ) from error
    for file in files:
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\]{1,200}\.safetensors", file):
            raise WeightsError(
                f"{index} names the file {brief(file)}, which is not a safetensors file of its own folder"
            )
    return sorted(files)
