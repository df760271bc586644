"""Read tensors by name, memory-mapped from the safetensors files of a folder. Pickles are never read."""

from __future__ import annotations

import ctypes
import json
import mmap
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from splitfuse.errors import WeightsError
from splitfuse.models.sources.source import Piece, WeightSource

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
FLOAT_DTYPES = ("BF16", "F16", "F32", "F64")
COMPUTED_SUFFIXES = (".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached")
"""Endings of tensors that old checkpoints store although they follow from the config."""


class SafetensorsWeights(WeightSource):
    """Reads dense tensors of a folder from one file, or from shards named by an index.

    Raises WeightsError for files that cannot be trusted.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Any] = {}  # tensor name -> the opened file that holds it
        for path in _weight_files(folder):
            opened = _open(path)
            for name in opened.keys():  # noqa: SIM118 - the file is no mapping
                if name in self._files:
                    raise WeightsError(f"{path} repeats {name}, which another file of the checkpoint holds too")
                self._files[name] = opened

    def check(self, wanted: Collection[Piece], *, architecture: str, unused: Collection[str] = ()) -> None:
        names = {piece.name for piece in wanted}
        if missing := names - self._files.keys():
            raise WeightsError(f"weights missing from the checkpoint ({len(missing)}): {listing(missing)}")
        surplus = self._files.keys() - names - set(unused)
        if surplus := {name for name in surplus if not name.endswith(COMPUTED_SUFFIXES)}:
            raise WeightsError(
                f"weights that {architecture} with this config.json does not use ({len(surplus)}): {listing(surplus)}"
            )
        for piece in wanted:
            self._check_tensor(piece)

    @contextmanager
    def read(self, piece: Piece) -> Iterator[Tensor]:
        tensor: Tensor = self._files[piece.name].get_tensor(piece.name)  # mapped from its file
        yield tensor
        _release(tensor)

    def _check_tensor(self, piece: Piece) -> None:
        name, shape = piece
        header = self._files[name].get_slice(name)
        if tuple(header.get_shape()) != shape:
            raise WeightsError(
                f"weight {name} has shape {list(header.get_shape())}, but config.json implies {list(shape)}"
            )
        if header.get_dtype() not in FLOAT_DTYPES:
            raise WeightsError(
                f"weight {name} is stored as {header.get_dtype()}, but must be one of {', '.join(FLOAT_DTYPES)}: "
                "quantized checkpoints are not supported"
            )


def listing(names: Iterable[str], most: int = 5) -> str:
    """Return the first names in order, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more


def _weight_files(folder: Path) -> list[Path]:
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if (folder / INDEX_FILE).is_file():
        return _shards(folder)
    if pickles := [file.name for pattern in PICKLES for file in folder.glob(pattern)]:
        raise WeightsError(
            f"{folder} has only pickled weights ({listing(pickles)}), which can run code when opened and are not read. "
            "Convert them once: transformers' from_pretrained, then save_pretrained, writes safetensors"
        )
    raise WeightsError(f"{folder} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE}")


def _shards(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    try:
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{index} is not a weight index: it needs a weight_map of names to files") from error
    for file in files:
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\]+\.safetensors", file):
            raise WeightsError(f"{index} names the file {file!r}, which is not a safetensors file of its own folder")
    if absent := [file for file in files if not (folder / file).is_file()]:
        raise WeightsError(f"{folder} lacks shards that its index names: {listing(absent)}")
    return [folder / file for file in sorted(files)]


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path} is not a whole safetensors file, perhaps cut short: {error}") from error


def _release(tensor: Tensor) -> None:
    """Give back the memory of a tensor mapped from a file: its pages can be read again."""
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > begin and hasattr(mmap, "MADV_DONTNEED"):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)
