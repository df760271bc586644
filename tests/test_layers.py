"""The architecture as a test: what each layer may import, which modules may not, and what importing costs."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import splitfuse

PACKAGE = Path(splitfuse.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# Each layer, lowest first, with the layers that it may import. Nothing is implied: what is not listed is forbidden.
LAYERS: dict[str, tuple[str, ...]] = {
    "version": (),
    "errors": (),
    "interrupts": (),
    "config": ("errors",),
    "core": ("config", "errors"),
    "kernels": ("errors",),
    "models": ("kernels", "errors"),
    "runtime": ("models", "kernels", "core", "config", "interrupts", "errors", "version"),
    "engine": ("runtime", "models", "kernels", "core", "config", "interrupts", "errors", "version"),
    "recording": ("engine", "runtime", "models", "core", "config", "errors"),
    "text": ("engine", "models", "core", "interrupts", "errors"),
    "deploy": ("config", "errors"),
    "server": (
        *("deploy", "text", "recording", "engine", "models", "core", "config", "interrupts", "errors", "version"),
    ),
    "clients": ("deploy", "text", "core", "errors"),
    "gateway": ("clients", "server", "core", "config", "errors", "version"),
    "api": ("text", "engine", "runtime", "models", "core", "config", "errors"),
    "bench": ("clients", "recording", "engine", "runtime", "core", "config", "errors"),
    "simulator": ("bench", "runtime", "core", "config", "errors"),
    "cli": (
        *(
            "simulator",
            "bench",
            "api",
            "gateway",
            "clients",
            "server",
            "deploy",
            "text",
            "recording",
            "engine",
            "runtime",
        ),
        *("models", "core", "config", "interrupts", "errors", "version"),
    ),
}
STANDARD_LIBRARY_ONLY = ("version", "errors", "interrupts", "config", "core")

# Above the kernels, only the choices of a backend and of a device know them.
BACKENDS = tuple(f"splitfuse.kernels.{name}" for name in ("cpu", "onednn", "reference", "triton"))
MAY_IMPORT_BACKENDS = {"splitfuse.runtime.backend_choice", "splitfuse.runtime.device"}


def name_of(path: Path) -> str:
    """`.../core/plan.py` -> `splitfuse.core.plan`, and a package by the name of its folder."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path): path for path in MODULES}


def layer_of(module: str) -> str:
    """`splitfuse.core.plan` -> `core`."""
    return module.split(".")[1] if "." in module else "__init__"


@functools.cache
def read(path: Path) -> tuple[frozenset[str], str | None]:
    """Every name that a module imports, at its top, within functions and under TYPE_CHECKING, and its docstring."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names), ast.get_docstring(tree)


@functools.cache
def imported_modules(module: str) -> set[str]:
    """The modules of this package that a module imports."""
    found = set()
    for name in read(NAMES[module])[0]:
        while name and name not in NAMES:
            name = name.rpartition(".")[0]
        if name and name != module:
            found.add(name)
    return found


def cycles() -> set[frozenset[str]]:
    """Sets of modules that import each other: the strongly connected components of more than one module (Tarjan)."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    path: list[str] = []
    found: set[frozenset[str]] = set()

    def visit(module: str) -> None:
        number[module] = lowest[module] = len(number)
        path.append(module)
        for other in imported_modules(module):
            if other not in number:
                visit(other)
                lowest[module] = min(lowest[module], lowest[other])
            elif other in path:
                lowest[module] = min(lowest[module], number[other])
        if lowest[module] == number[module]:
            at = path.index(module)
            if len(path) - at > 1:
                found.add(frozenset(path[at:]))
            del path[at:]

    for module in NAMES:
        if module not in number:
            visit(module)
    return found


def test_imports_go_strictly_downward() -> None:
    upward = {
        (module, other)
        for module in NAMES
        for other in imported_modules(module)
        if layer_of(module) != "__init__" and layer_of(other) not in (layer_of(module), *LAYERS[layer_of(module)])
    }
    assert upward == set(), "a module imports what its layer may not"


def test_lowest_layers_need_the_standard_library_alone() -> None:
    known = {*sys.stdlib_module_names, "splitfuse", "mypy_extensions"}  # the last is there for type checkers alone
    foreign = {
        (module, name)
        for module, path in NAMES.items()
        if layer_of(module) in STANDARD_LIBRARY_ONLY
        for name in read(path)[0]
        if name.split(".")[0] not in known
    }
    assert foreign == set()


def test_layers_are_listed_lowest_first() -> None:
    seen: list[str] = []
    for layer, below in LAYERS.items():
        assert set(below) <= set(seen), f"{layer} may import a layer that is not below it"
        seen.append(layer)
    assert {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in MODULES} == {"__init__", *LAYERS}


def test_layers_list_no_import_that_nothing_needs() -> None:
    used: dict[str, set[str]] = {layer: set() for layer in ("__init__", *LAYERS)}
    for module in NAMES:
        used[layer_of(module)] |= {layer_of(other) for other in imported_modules(module)}
    assert {layer: set(below) - used[layer] for layer, below in LAYERS.items() if set(below) - used[layer]} == {}


def test_no_cycle_of_modules() -> None:
    assert cycles() == set()


def test_only_choices_import_backends() -> None:
    users = {
        module
        for module in NAMES
        if not module.startswith("splitfuse.kernels.")
        and any(other.startswith(BACKENDS) for other in imported_modules(module))
    }
    assert users == MAY_IMPORT_BACKENDS


def test_modules_say_what_they_are_for() -> None:
    assert [module for module, path in NAMES.items() if not read(path)[1]] == []


def test_public_names_are_sorted_and_exist() -> None:
    assert splitfuse.__all__ == sorted(splitfuse.__all__)
    assert all(getattr(splitfuse, name) is not None for name in splitfuse.__all__)
    assert set(splitfuse.__all__) <= set(dir(splitfuse))


def test_importing_is_instant_and_transformers_is_never_needed() -> None:
    code = (
        "import sys, splitfuse\n"
        "assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)\n"
        "import splitfuse.api, splitfuse.cli.commands\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
