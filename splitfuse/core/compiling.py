"""Marks classes of the core for the compiler that setup.py can run on it (docs/decisions/0046-compiled-core.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mypy_extensions import mypyc_attr
else:

    def mypyc_attr(**_):
        """Return a decorator that does nothing: what it says is read by the compiler."""
        return lambda cls: cls


__all__ = ["mypyc_attr"]
