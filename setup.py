"""Builds the C++ kernels with the package, and compiles the core. Everything else about it is in pyproject.toml.

The library has a plain C interface and is loaded with ctypes, so that it belongs to no version of Python or PyTorch.
Without a C++ compiler, or on another CPU, the package installs without it and computes with PyTorch.

SPLITFUSE_KERNELS=required makes a missing compiler an error, SPLITFUSE_KERNELS=none leaves the library out: for wheels.
SPLITFUSE_CORE=compiled compiles the modules that plan steps with mypyc, for the running version of Python alone: for
wheels (docs/decisions/0046-compiled-core.md). Without it the core stays Python, and is the same.
"""

import hashlib
import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

LIBRARY = "splitfuse.kernels.cpu.libsplitfuse_cpu"
SOURCES = Path("splitfuse/kernels/cpu/csrc")
FLAGS = ["-std=c++17", "-O3", "-fopenmp", "-fvisibility=hidden", "-g0", "-Wall", "-Wextra", "-Wno-psabi"]
# Equal bits: only what is written as one multiplication and addition is one, wherever the compiler inlines it.
FLAGS += ["-ffp-contract=off"]
# GCC 12 warns about its own intrinsics, which start from an uninitialized vector on purpose.
FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1"]


COMPILED = (
    *("advance", "policy", "request", "request_table", "scheduler", "step_builder"),
    *("kv/block_allocator", "kv/fetch_queue", "kv/request_kv", "kv/request_state", "kv/state_allocator"),
    *("latency/reasons", "slo/admission", "slo/answers", "slo/deadline_policy", "slo/fair_share", "slo/feasibility"),
    *("slo/fewest_late", "slo/gaps", "slo/latency_predictor", "slo/request_slo", "slo/turns", "slo/usual_step"),
    *("slo/work_times", "speculation/acceptance", "speculation/prompt_lookup", "speculation/request_drafts"),
    "speculation/token_cost",
)
"""Modules of the core that can be compiled. None has a class whose objects msgspec makes: it does not call the class,
which a compiled one does not survive.
"""


class BuildLibrary(build_ext):
    """Compiles the variants of the kernels at once, and gives the library its plain name: it is not a Python module."""

    def build_extensions(self) -> None:
        compile_all = self.compiler.compile

        def compile_at_once(sources: list[str], **settings: Any) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return [*chain.from_iterable(pool.map(lambda source: compile_all([source], **settings), sources))]

        self.compiler.compile = compile_at_once
        super().build_extensions()

    def get_ext_filename(self, fullname: str) -> str:
        *folders, name = fullname.split(".")
        if name != LIBRARY.rpartition(".")[2]:  # setuptools asks with and without the package
            return super().get_ext_filename(fullname)
        return os.path.join(*folders, f"{name}.so")  # noqa: PTH118 - setuptools wants a string

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return ext.export_symbols if ext.name == LIBRARY else super().get_export_symbols(ext)


class BuildWheel(bdist_wheel):
    """One wheel for every Python of a platform, unless the core is compiled for one."""

    def get_tag(self) -> tuple[str, str, str]:
        return super().get_tag() if compiles_core else ("py3", "none", super().get_tag()[2])


def compiled_core() -> list[Extension]:
    """Return the extensions of the compiled core. Needs mypy."""
    if {"editable_wheel", "develop", "--inplace"} & set(sys.argv):
        sys.exit(
            "SPLITFUSE_CORE=compiled is not for editable installs: edited modules would be shadowed by compiled ones"
        )
    from mypyc.build import mypycify

    options = ["--strict", "--follow-imports=skip", "--cache-dir=build/mypyc/cache"]
    packages = (Path("splitfuse/core"), Path("splitfuse/config"))
    known = [*(str(path) for package in packages for path in sorted(package.rglob("*.py"))), "splitfuse/errors.py"]
    return mypycify(
        [*options, *known],
        only_compile_paths=[f"splitfuse/core/{name}.py" for name in COMPILED],
        opt_level="2",
        debug_level="0",
        target_dir="build/mypyc",
        group_name="splitfuse_core",
    )


compiles_core = os.environ.get("SPLITFUSE_CORE") == "compiled"
wanted = os.environ.get("SPLITFUSE_KERNELS", "optional")
extra = SANITIZE if os.environ.get("SPLITFUSE_SANITIZE") else []
sources, headers = (sorted(SOURCES.glob(pattern)) for pattern in ("*.cpp", "*.h"))
# The library tells library.py from which sources it was compiled: others' structs and functions may be different.
digest = hashlib.sha256(b"".join(path.read_bytes() for path in (*sources, *headers))).hexdigest()
library = Extension(
    LIBRARY,
    sources=[str(path) for path in sources],
    depends=[str(path) for path in headers],
    define_macros=[("SF_SOURCES", f"0x{digest[:16]}")],
    extra_compile_args=FLAGS + extra,
    extra_link_args=["-fopenmp", *extra],
    language="c++",
    optional=wanted != "required",
)
on_x86 = platform.machine().lower() in ("x86_64", "amd64")
setup(
    ext_modules=([library] if on_x86 and wanted != "none" else []) + (compiled_core() if compiles_core else []),
    setup_requires=["mypy>=1.15"] if compiles_core else [],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": BuildWheel},
)
