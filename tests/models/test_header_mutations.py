"""Broken and hostile headers of weight files: read whole, or refused by a ModelError, in little memory."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import gguf_files
import pytest
import tiny_models

from splitfuse.errors import ModelError, UnsupportedModelError, WeightsError
from splitfuse.models.sources.gguf.container import GgufFile, open_parts
from tests.soak.header_mutations import check, make_bases, mutate

ROOT = Path(__file__).parents[2]


def test_some_headers_are_read_or_refused(tmp_path: Path) -> None:
    bases = make_bases(tmp_path / "bases")
    for base in bases:
        assert check(str(base if base.suffix == ".gguf" else base.parent)) == ("read", "")
    for seed in range(100_000, 100_150):
        folder = tmp_path / str(seed)
        folder.mkdir()
        path, what = mutate(bases, folder, seed)
        verdict, words = check(path)
        assert verdict in ("read", "refused"), (what, words)
        shutil.rmtree(folder)


@pytest.mark.slow
def test_10000_headers_are_read_or_refused_in_little_memory() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.soak.header_mutations"], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 0 and "0 broken" in ended.stdout, ended.stdout + ended.stderr[-2000:]


def text(content: str) -> bytes:
    return struct.pack("<Q", len(content)) + content.encode()


def header(*, version: int = 3, tensors: int = 0, entries: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries) + rest


def tensor(
    name: str = "a", shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0, dimensions: int | None = None
) -> bytes:
    sizes = struct.pack(f"<{len(shape)}Q", *shape)
    count = len(shape) if dimensions is None else dimensions
    return text(name) + struct.pack("<I", count) + sizes + struct.pack("<IQ", kind, offset)


ARRAY = text("a") + struct.pack("<IIQ", 9, 8, 10**9)
ALIGNED = text("general.alignment") + struct.pack("<II", 4, 12)
REFUSED = {
    b"": "is empty: it is not a GGUF file",
    b"GGML" + bytes(60): "it begins with b'GGML', not with b'GGUF'",
    b"GGUF": "the version has 4 bytes at 4, beyond its end: perhaps it is cut short",
    header(version=1) + bytes(99): "is a GGUF file of version 1: only versions 2 and 3 are read",
    header(version=0x03000000): "is a big-endian GGUF file: only little-endian ones are read",
    header(tensors=10**9) + bytes(99): "it is said to have 1000000000 tensors, for which there are 107 bytes",
    header(entries=2**64 - 1) + bytes(99): "it is said to have 18446744073709551615 metadata entries",
    header(entries=1, rest=text("a") + struct.pack("<IQ", 8, 2**63)): "the value of a has 9223372036854775808 bytes",
    header(entries=1, rest=ARRAY): "it is said to have 1000000000 texts of a, for which there are 0 bytes",
    header(entries=1, rest=text("a") + struct.pack("<IIQ", 9, 9, 1)): "a is an array of arrays",
    header(entries=1, rest=text("a") + struct.pack("<I", 99)): "a has the unknown type 99",
    header(entries=1, rest=text("") + bytes(8)): "a key is empty",
    header(entries=1, rest=text("a" * 5000) + bytes(8)): "a key has 5000 bytes; at most 4096 are read",
    header(entries=2, rest=(text("a") + struct.pack("<II", 4, 1)) * 2): "it repeats the key 'a'",
    header(entries=1, rest=struct.pack("<Q", 2) + b"\xff\xfe" + bytes(8)): "a key is not UTF-8",
    header(entries=1, rest=ALIGNED): "general.alignment must be a power of two from 8 to",
    header(tensors=1, rest=tensor(dimensions=9)): "tensor a has 9 dimensions, not 1 to 4",
    header(tensors=1, rest=tensor(shape=(0,))) + bytes(99): "no size may be 0",
    header(tensors=1, rest=tensor(shape=(33,), kind=2)) + bytes(99): "rows of Q4_0 have a multiple of 32 columns",
    header(tensors=1, rest=tensor(shape=(2**40, 2**40)))
    + bytes(99): "tensor a has 4835703278458516698824704 bytes at 0",
    header(
        tensors=1, rest=tensor(kind=16)
    ): "tensor a is stored as IQ2_XXS, which is not read; those that are: F32, F16",
    header(tensors=1, rest=tensor(kind=77)): "tensor a is stored as the unknown type 77",
    header(tensors=1, rest=tensor(offset=4)) + bytes(99): "tensor a begins at 4, which is not a multiple of 32",
    header(tensors=1, rest=tensor(offset=96)) + bytes(99): "tensor a ends at byte 176, and the file",
    header(tensors=2, rest=tensor() * 2) + bytes(99): "it repeats the tensor a",
    header(tensors=2, rest=tensor(shape=(20,)) + tensor("b", (20,))) + bytes(99): "its tensors have 160 bytes",
}


@pytest.mark.parametrize("content", REFUSED, ids=REFUSED.values())
def test_a_broken_header_is_refused_before_memory_is_taken(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ModelError) as error:
            GgufFile(tmp_path / "m.gguf")
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
    assert REFUSED[content] in str(error.value) and str(error.value).startswith(str(tmp_path))


def test_a_header_beyond_its_bound_is_refused(tmp_path: Path) -> None:
    """A text of 40 MB, in a file that has it."""
    content = header(entries=1, rest=text("a") + struct.pack("<IQ", 8, 40 * 10**6))
    with (tmp_path / "m.gguf").open("wb") as file:
        file.write(content)
        file.truncate(50 * 10**6)
    with pytest.raises(ModelError, match="beyond the 33554432 bytes that a header may have"):
        GgufFile(tmp_path / "m.gguf")


# --- files that a model is split into ---------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """A model in two files, the second without metadata of the model."""
    return gguf_files.write_parts(tiny_models.make("llama-gqa"), tmp_path / "m")


def test_parts_of_a_model_are_joined(parts: list[Path]) -> None:
    for path in parts:
        first, second = open_parts(path)
        assert (first.path, second.path) == tuple(parts)
        assert first.tensors and second.tensors and "llama.block_count" in first.metadata


def test_parts_that_do_not_belong_together_are_refused(parts: list[Path], tmp_path: Path) -> None:
    shutil.copy(parts[0], tmp_path / "n-00001-of-00003.gguf")
    with pytest.raises(
        WeightsError, match=r"n-00002-of-00003\.gguf is missing: n-00001-of-00003\.gguf is part of a model"
    ):
        open_parts(tmp_path / "n-00001-of-00003.gguf")
    shutil.copy(parts[0], parts[1])
    with pytest.raises(WeightsError, match=r"repeats .*, which another file of the model holds too"):
        open_parts(parts[0])
    shutil.copy(parts[0], tmp_path / "whole.gguf")
    with pytest.raises(WeightsError, match="says that its model has 2 files, but its name that it has 1"):
        open_parts(tmp_path / "whole.gguf")
    with pytest.raises(ModelError, match="is part 3 of 2: parts are numbered from 1"):
        open_parts(tmp_path / "m-00003-of-00002.gguf")
    parts[1].write_bytes(header(version=1) + bytes(99))
    with pytest.raises(UnsupportedModelError, match="version 1"):
        open_parts(parts[0])
