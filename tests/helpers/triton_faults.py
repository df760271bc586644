"""Changes modules of kernels on purpose, for tests that must find it, and how Triton's interpreter adds up."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest


def changed_copy(module: ModuleType, old: str, new: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return a copy of a module whose source has `new` in place of `old`. Triton wants to read the source of a kernel,
    so that the copy is a file.
    """
    source = Path(str(module.__file__)).read_text(encoding="utf-8")
    assert source.count(old) >= 1, "the fault must be somewhere in the source"
    path = folder / f"{module.__name__.rpartition('.')[2]}_with_fault.py"
    path.write_text(source.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, copy)
    spec.loader.exec_module(copy)
    return copy


def sum_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `tl.dot` add in one order for all rows of a tile, as a GPU does: BLAS adds by the place of a row."""

    def matmul(a: Any, b: Any, dtype: Any = None) -> Any:
        return (a.astype(dtype)[:, :, None] * b.astype(dtype)[None]).sum(1)

    monkeypatch.setattr(np, "matmul", matmul)
