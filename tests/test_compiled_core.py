"""What a compiled core relies on: no module that setup.py compiles has a class that crosses between processes."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from splitfuse.engine.messages import Command, Report
from splitfuse.runtime.calibration import Calibration

ROOT = Path(__file__).parents[1]


def compiled() -> set[str]:
    """Return the names of the modules of the core that can be compiled."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "COMPILED":
            return {f"splitfuse.core.{name.value.replace('/', '.')}" for name in ast.walk(node) if is_text(name)}
    raise AssertionError("setup.py has no COMPILED")


def is_text(node: Any) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def classes_in(info: Any) -> Iterator[type]:
    """Yield all classes whose objects msgspec makes for a type."""
    if isinstance(info, list | tuple):
        for each in info:
            yield from classes_in(each)
    elif isinstance(info, msgspec.inspect.Type | msgspec.inspect.Field):
        if (found := getattr(info, "cls", None)) is not None:
            yield found
        for name in info.__struct_fields__:
            yield from classes_in(getattr(info, name))


def test_modules_that_are_compiled_exist() -> None:
    for name in compiled():
        assert (ROOT / name.replace(".", "/")).with_suffix(".py").is_file(), name


def test_classes_that_cross_stay_python() -> None:
    crossing = set(classes_in(msgspec.inspect.multi_type_info((Command, Report, Calibration))))
    of_core = {each.__module__ for each in crossing if each.__module__.startswith("splitfuse.core.")}
    assert {"splitfuse.core.request_output", "splitfuse.core.slo.cost_model"} <= of_core, "classes are not found"
    assert not of_core & compiled()


def test_classes_with_subclasses_elsewhere_allow_them() -> None:
    """A class that is interpreted cannot inherit from a compiled one, unless that one is marked for it."""
    compiled_paths = {(ROOT / name.replace(".", "/")).with_suffix(".py") for name in compiled()}
    classes = {
        each.name: [ast.unparse(decorator) for decorator in each.decorator_list]
        for path in compiled_paths
        for each in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(each, ast.ClassDef)
    }
    bases = {
        base
        for folder in ("splitfuse", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if path not in compiled_paths
        for listed in re.findall(r"^ *class \w+\(([^)]*)\)", path.read_text(encoding="utf-8"), re.MULTILINE)
        for base in listed.split(", ")
    }
    inherited = bases & classes.keys()
    assert {"Fcfs", "RequestKv"} <= inherited, "subclasses are not found"
    for name in inherited:
        assert "mypyc_attr(allow_interpreted_subclasses=True)" in classes[name], name
