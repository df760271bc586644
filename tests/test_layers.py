"""The architecture as a test: who may import whom, and what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import splitfuse

PACKAGE = Path(splitfuse.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# Lowest first. A module imports from its own layer and those below it, but `kernels` and `models` may not use `core`.
LAYERS = (
    *("errors", "config", "core", "kernels", "models", "runtime", "engine", "text"),
    *("deploy", "server", "clients", "api", "bench", "simulator", "cli"),
)
FORBIDDEN = {("kernels", "core"), ("kernels", "config"), ("models", "core")}


def layer(module: str) -> str | None:
    """`splitfuse.core.plan` -> `core`; None for what is not ours."""
    parts = module.split(".")
    return parts[1] if parts[0] == "splitfuse" and len(parts) > 1 else None


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_strictly_downward(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own == "__init__":
        return
    for name in imports(path):
        other = layer(name)
        if other is not None:
            assert LAYERS.index(other) <= LAYERS.index(own), f"{own} imports {name}"
            assert (own, other) not in FORBIDDEN, f"{own} imports {name}"
    if own in ("core", "config", "errors"):
        foreign = {name.split(".")[0] for name in imports(path)} - {"splitfuse"}
        assert foreign <= sys.stdlib_module_names, f"{own} imports more than the standard library: {foreign}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_say_what_they_are_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_public_names_are_sorted_and_exist() -> None:
    assert splitfuse.__all__ == sorted(splitfuse.__all__)
    assert all(getattr(splitfuse, name) is not None for name in splitfuse.__all__)
    assert set(splitfuse.__all__) <= set(dir(splitfuse))


def test_importing_is_instant_and_transformers_is_never_needed() -> None:
    code = (
        "import sys, splitfuse\n"
        "assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)\n"
        "import splitfuse.api, splitfuse.cli\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
