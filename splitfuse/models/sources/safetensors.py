"""Reads tensors by name, memory-mapped from the safetensors files of a folder. Pickles are never read."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Collection, Iterator, Set
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from splitfuse.errors import WeightsError, brief
from splitfuse.models.sources.files import INDEX_FILE, MIB, SINGLE_FILE, read_beginning, shard_names
from splitfuse.models.sources.source import Piece, WeightSource, check_names, listing

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
FLOAT_DTYPES = ("BF16", "F16", "F32", "F64")
MAX_HEADER_BYTES = 32 * MIB
"""Size of all headers of a checkpoint together: parsed they take ten times that. 140,000 tensors have 21 MB."""
COMPUTED_SUFFIXES = (
    *(".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached"),
    *(".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias"),  # causal masks
)
"""Endings of tensors that old checkpoints store although they follow from the config."""


class SafetensorsWeights(WeightSource):
    """Reads dense tensors of a folder from one file, or from shards named by an index.

    Raises WeightsError for files that cannot be trusted.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Any] = {}  # tensor name -> the opened file that holds it
        header_bytes = 0
        for path in weight_files(folder):
            header_bytes += (size := _header_bytes(path))
            if header_bytes > MAX_HEADER_BYTES:
                raise WeightsError(
                    f"{path} is not a whole safetensors file: with its header, which is said to have {size} bytes, the "
                    f"headers have more than the {MAX_HEADER_BYTES} that are read"
                )
            opened = _open(path)
            for name in opened.keys():  # noqa: SIM118 - the file is no mapping
                if name in self._files:
                    raise WeightsError(f"{path} repeats {name:.200}, which another file of the checkpoint holds too")
                self._files[name] = opened

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def names(self) -> Set[str]:
        return self._files.keys()

    def check(self, wanted: Collection[Piece], *, architecture: str, aside: Collection[str] = ()) -> None:
        check_names(self.names(), wanted, architecture=architecture, aside=aside, computed=COMPUTED_SUFFIXES)
        for piece in wanted:
            self.check_tensor(piece)

    def read(self, piece: Piece) -> AbstractContextManager[Tensor]:
        return self.tensor(piece.name)

    @contextmanager
    def tensor(self, name: str) -> Iterator[Tensor]:
        """Return a tensor of any dtype for as long as the context lasts."""
        tensor: Tensor = self._files[name].get_tensor(name)  # mapped from its file
        yield tensor
        _release(tensor)

    def header(self, name: str) -> tuple[tuple[int, ...], str]:
        """Return the shape of a tensor and the name of its dtype."""
        header = self._files[name].get_slice(name)
        return tuple(header.get_shape()), header.get_dtype()

    def stored_as(self, name: str) -> str:
        return self.header(name)[1]

    def check_tensor(self, piece: Piece) -> None:
        """Raise WeightsError unless a tensor has this shape, and is not quantized."""
        name, expected = piece
        shape, dtype = self.header(name)
        if shape != expected:
            raise WeightsError(
                f"weight {name} has shape {brief(list(shape))}, but config.json implies {list(expected)}"
            )
        if dtype not in FLOAT_DTYPES:
            raise WeightsError(
                f"weight {name} is stored as {dtype}, but must be one of {', '.join(FLOAT_DTYPES)}: no "
                "quantization_config says what else it means"
            )


def weight_files(folder: Path) -> list[Path]:
    """Return the files of a folder that hold its weights. Raises WeightsError if there are none that can be read."""
    if (folder / SINGLE_FILE).exists():
        return [folder / SINGLE_FILE]
    if (folder / INDEX_FILE).exists():
        names = shard_names(folder)
        if absent := [name for name in names if not (folder / name).exists()]:
            raise WeightsError(f"{folder} lacks shards that its index names: {listing(absent)}")
        return [folder / name for name in names]
    if pickles := [file.name for pattern in PICKLES for file in folder.glob(pattern)]:
        raise WeightsError(
            f"{folder} has only pickled weights ({listing(pickles)}), which can run code when opened and are not read. "
            "Convert them once: transformers' from_pretrained, then save_pretrained, writes safetensors"
        )
    raise WeightsError(f"{folder} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE}")


def _header_bytes(path: Path) -> int:
    """Return the size of the header that a file states. Raises WeightsError for a file that cannot be one."""
    try:
        size = int.from_bytes(read_beginning(path, 8), "little")
        if 8 + size > (there := path.stat().st_size):
            raise WeightsError(
                f"{path} is not a whole safetensors file, perhaps cut short: its header is said to have {size} bytes, "
                f"and the file has {there}"
            )
        return size
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError, MemoryError) as error:
        raise WeightsError(f"{path} is not a whole safetensors file, perhaps cut short: {error!s:.200}") from error


def _release(tensor: Tensor) -> None:
    """Give back the memory of a tensor mapped from a file: its pages can be read again."""
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > begin and hasattr(mmap, "MADV_DONTNEED"):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)
