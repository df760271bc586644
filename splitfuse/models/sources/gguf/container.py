"""Reads the container of GGUF: metadata, and where each tensor lies. Files are untrusted: every length and offset is
checked against the size of the file before anything is made of it.

    magic "GGUF", version u32, number of tensors u64, number of metadata entries u64
    entries: key string, type u32, value; a string is its length u64 and bytes, an array type u32, length u64 and values
    tensors: name string, number of dimensions u32, sizes u64 (columns first), type u32, offset u64
    data, from the next multiple of general.alignment on; offsets count from there and are such multiples

Layout: the GGUF specification of ggml (docs/gguf.md). Standard library only.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import struct
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from splitfuse.errors import ModelError, UnsupportedModelError, WeightsError, brief
from splitfuse.models.sources.files import MIB, open_regular

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 32 * MIB
"""Size of the metadata and the list of tensors of a file: parsed they take some ten times that. Vocabularies of 256,000
tokens have 15 MB.
"""
MAX_NAME_BYTES = 4096
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 2**20
MAX_FILES = 1000
"""Number of files that a model may be split into."""

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
"""Type of a metadata value -> its code in `array` and `struct`."""
_BOOL, _STRING, _ARRAY = 7, 8, 9
_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True)
class TensorType:
    """Describes how a tensor is stored: in blocks of `block_size` columns, each of `block_bytes`."""

    name: str
    block_size: int
    block_bytes: int


TYPES = {
    0: TensorType("F32", 1, 4),
    1: TensorType("F16", 1, 2),
    2: TensorType("Q4_0", 32, 18),
    3: TensorType("Q4_1", 32, 20),
    6: TensorType("Q5_0", 32, 22),
    7: TensorType("Q5_1", 32, 24),
    8: TensorType("Q8_0", 32, 34),
    10: TensorType("Q2_K", 256, 84),
    11: TensorType("Q3_K", 256, 110),
    12: TensorType("Q4_K", 256, 144),
    13: TensorType("Q5_K", 256, 176),
    14: TensorType("Q6_K", 256, 210),
    20: TensorType("IQ4_NL", 32, 18),
    23: TensorType("IQ4_XS", 256, 136),
    30: TensorType("BF16", 1, 2),
    39: TensorType("MXFP4", 32, 17),
}
"""Number of a tensor's type in a file -> the type, of those that are read."""
OTHER_TYPES = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    40: "NVFP4",
}
"""Likewise the names of types that are not read."""


@dataclass(frozen=True)
class TensorInfo:
    """Says where a tensor lies: `shape` has the columns last, `begin` counts from the beginning of the file."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    begin: int
    num_bytes: int


class GgufFile:
    """Maps one GGUF file: its `metadata`, its `tensors` by name, the size of this header, and the bytes of tensors.

    Raises ModelError for a file that cannot be trusted, UnsupportedModelError for one that is not read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map = _map(path)
        try:
            reader = _Reader(path, self._map)
            num_tensors, num_entries = reader.begin()
            self.metadata = reader.metadata(num_entries)
            self.tensors = reader.tensors(num_tensors, _alignment(path, self.metadata))
            self.header_bytes = reader.at
        except BaseException:
            self._map.close()
            raise

    def view(self, begin: int, num_bytes: int) -> memoryview:
        """Return bytes of the file, mapped."""
        return memoryview(self._map)[begin : begin + num_bytes]

    def release(self, begin: int, num_bytes: int) -> None:
        """Give back the memory of mapped bytes: they can be read again."""
        first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (begin + num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)


def part_names(name: str) -> list[str]:
    """Return the names of the files that a model is split into, of which `name` is one; `name` alone for a whole one.

    >>> part_names("m-00002-of-00002.gguf")
    ['m-00001-of-00002.gguf', 'm-00002-of-00002.gguf']

    Raises ModelError for numbers that make no sense.
    """
    match = _PART.fullmatch(name)
    if match is None:
        return [name]
    number, count = int(match["number"]), int(match["count"])
    if not 1 <= number <= count <= MAX_FILES:
        raise ModelError(f"{name:.200} is part {number} of {count}: parts are numbered from 1, and at most {MAX_FILES}")
    return [f"{match['stem']}-{part:05}-of-{count:05}.gguf" for part in range(1, count + 1)]


def open_parts(path: Path) -> list[GgufFile]:
    """Return the files of the model that `path` is a file of, the first with the metadata first. Raises ModelError."""
    files: list[GgufFile] = []
    names = part_names(path.name)
    for name in names:
        if not (path.parent / name).is_file():
            raise WeightsError(
                f"{path.parent / name} is missing: {path.name:.200} is part of a model of {len(names)} files"
            )
        files.append(GgufFile(path.parent / name))
    stated = files[0].metadata.get("split.count", 0)
    if (stated or 1) != len(files):
        raise WeightsError(
            f"{files[0].path} says that its model has {brief(stated)} files, but its name that it has {len(files)}: "
            "give the files the names under which they were published"
        )
    seen: set[str] = set()
    for file in files:
        if repeated := seen & file.tensors.keys():
            raise WeightsError(f"{file.path} repeats {min(repeated):.200}, which another file of the model holds too")
        seen |= file.tensors.keys()
    return files


def _map(path: Path) -> mmap.mmap:
    try:
        with open_regular(path) as file:
            if not os.fstat(file.fileno()).st_size:
                raise ModelError(f"{path} is empty: it is not a GGUF file")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as GGUF: {error!s:.200}") from error


def _alignment(path: Path, metadata: dict[str, Any]) -> int:
    value = metadata.get("general.alignment", 32)
    if not isinstance(value, int) or not 8 <= value <= MAX_ALIGNMENT or value & (value - 1):
        raise ModelError(
            f"{path}: general.alignment must be a power of two from 8 to {MAX_ALIGNMENT}, not {brief(value)}"
        )
    return value


class _Reader:
    """Reads a header from its beginning on; nothing is read beyond the file or MAX_HEADER_BYTES."""

    def __init__(self, path: Path, mapped: mmap.mmap) -> None:
        self._path = path
        self._map = mapped
        self._size = len(mapped)
        self._end = min(self._size, MAX_HEADER_BYTES)
        self.at = 0

    def begin(self) -> tuple[int, int]:
        """Return the number of tensors and that of metadata entries."""
        if self._map[:4] != MAGIC:
            self._fail(f"it begins with {bytes(self._map[:4])!r}, not with {MAGIC!r}")
        self.at = 4
        version = self._integer("I", "the version")
        if version not in VERSIONS and version.bit_length() > 16:
            raise UnsupportedModelError(f"{self._path} is a big-endian GGUF file: only little-endian ones are read")
        if version not in VERSIONS:
            raise UnsupportedModelError(
                f"{self._path} is a GGUF file of version {version}: only versions {' and '.join(map(str, VERSIONS))} "
                "are read; convert the model again with a current llama.cpp"
            )
        num_tensors = self._count("tensors", 8 + 4 + 8 + 4 + 8)
        return num_tensors, self._count("metadata entries", 8 + 4 + 1)

    def metadata(self, count: int) -> dict[str, Any]:
        """Return the entries."""
        values: dict[str, Any] = {}
        for _ in range(count):
            key = self._name("a key")
            if key in values:
                self._fail(f"it repeats the key {brief(key)}")
            values[key] = self._value(key)
        return values

    def tensors(self, count: int, alignment: int) -> dict[str, TensorInfo]:
        """Return the tensors by name."""
        listed = [self._tensor(alignment) for _ in range(count)]
        begin = -(-self.at // alignment) * alignment
        if (total := sum(each.num_bytes for each in listed)) > self._size - self.at:
            self._fail(f"its tensors have {total} bytes, and the file {self._size}: perhaps it is cut short")
        tensors: dict[str, TensorInfo] = {}
        for each in listed:
            placed = TensorInfo(each.name, each.shape, each.type, begin + each.begin, each.num_bytes)
            if placed.begin + placed.num_bytes > self._size:
                self._fail(
                    f"tensor {each.name:.200} ends at byte {placed.begin + placed.num_bytes}, and the file has "
                    f"{self._size}: perhaps it is cut short"
                )
            if each.name in tensors:
                self._fail(f"it repeats the tensor {each.name:.200}")
            tensors[each.name] = placed
        return tensors

    def _tensor(self, alignment: int) -> TensorInfo:
        name = self._name("a tensor's name")
        dimensions = self._integer("I", f"the dimensions of {name:.200}")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            self._fail(f"tensor {name:.200} has {dimensions} dimensions, not 1 to {MAX_DIMENSIONS}")
        shape = tuple(self._integer("Q", f"the shape of {name:.200}") for _ in range(dimensions))[::-1]
        number = self._integer("I", f"the type of {name:.200}")
        offset = self._integer("Q", f"the offset of {name:.200}")
        if number not in TYPES:
            kind = OTHER_TYPES.get(number, f"the unknown type {number}")
            raise UnsupportedModelError(
                f"{self._path}: tensor {name:.200} is stored as {kind}, which is not read; those that are: "
                f"{', '.join(each.name for each in TYPES.values())}"
            )
        stored = TYPES[number]
        if not all(shape) or shape[-1] % stored.block_size:
            self._fail(
                f"tensor {name:.200} has the shape {brief(list(shape))}: no size may be 0, and rows of {stored.name} "
                f"have a multiple of {stored.block_size} columns"
            )
        if offset % alignment:
            self._fail(f"tensor {name:.200} begins at {offset}, which is not a multiple of {alignment}")
        num_bytes = math.prod(shape) // stored.block_size * stored.block_bytes
        if num_bytes > self._size or offset > self._size:
            self._fail(
                f"tensor {name:.200} has {num_bytes} bytes at {offset}, and the file {self._size}: perhaps it is cut "
                "short"
            )
        return TensorInfo(name, shape, stored, offset, num_bytes)

    def _value(self, key: str) -> Any:
        kind = self._integer("I", f"the type of {key:.200}")
        if kind == _STRING:
            return self._text(f"the value of {key:.200}")
        if kind == _ARRAY:
            return self._array(key)
        value = self._numbers(kind, 1, key)[0]
        return bool(value) if kind == _BOOL else value

    def _array(self, key: str) -> Sequence[Any]:
        kind = self._integer("I", f"the type of {key:.200}")
        if kind == _STRING:
            count = self._count(f"texts of {key:.200}", 8)
            return [self._text(f"a text of {key:.200}") for _ in range(count)]
        if kind == _ARRAY:
            raise UnsupportedModelError(f"{self._path}: {key:.200} is an array of arrays, which is not read")
        width = struct.calcsize(_NUMBERS.get(kind, "B"))
        return self._numbers(kind, self._count(f"numbers of {key:.200}", width), key)

    def _numbers(self, kind: int, count: int, key: str) -> array[Any]:
        """Return numbers, in as many bytes as they have in the file."""
        if kind not in _NUMBERS:
            self._fail(f"{key:.200} has the unknown type {kind}")
        numbers = array(_NUMBERS[kind])
        numbers.frombytes(self._bytes(count * numbers.itemsize, f"the value of {key:.200}"))
        if sys.byteorder == "big":
            numbers.byteswap()
        return numbers

    def _name(self, what: str) -> str:
        text = self._text(what, MAX_NAME_BYTES)
        if not text:
            self._fail(f"{what} is empty")
        return text

    def _text(self, what: str, most: int | None = None) -> str:
        length = self._integer("Q", what)
        if most is not None and length > most:
            self._fail(f"{what} has {length} bytes; at most {most} are read")
        try:
            return self._bytes(length, what).decode()
        except UnicodeDecodeError as error:
            self._fail(f"{what} is not UTF-8: {error}")

    def _count(self, what: str, least_bytes: int) -> int:
        """Return a number of things of which each takes at least `least_bytes`."""
        count = self._integer("Q", f"the number of {what}")
        if count * least_bytes > self._end - self.at:
            self._fail(f"it is said to have {count} {what}, for which there are {self._end - self.at} bytes")
        return count

    def _integer(self, code: str, what: str) -> int:
        value: int = struct.unpack(f"<{code}", self._bytes(struct.calcsize(f"<{code}"), what))[0]
        return value

    def _bytes(self, count: int, what: str) -> bytes:
        if count > self._end - self.at:
            limit = f"the {MAX_HEADER_BYTES} bytes that a header may have" if self._end < self._size else "its end"
            self._fail(f"{what} has {count} bytes at {self.at}, beyond {limit}: perhaps it is cut short")
        self.at += count
        return self._map[self.at - count : self.at]

    def _fail(self, reason: str) -> NoReturn:
        raise ModelError(f"{self._path} is not a whole GGUF file: {reason}")
