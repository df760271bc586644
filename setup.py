"""Builds the C++ kernels with the package. Everything else about it is in pyproject.toml.

The library has a plain C interface and is loaded with ctypes, so that it belongs to no version of Python or PyTorch.
Without a C++ compiler, or on another CPU, the package installs without it and computes with PyTorch.

SPLITFUSE_KERNELS=required makes a missing compiler an error, SPLITFUSE_KERNELS=none leaves the library out: for wheels.
"""

import hashlib
import os
import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = Path("splitfuse/kernels/cpu/csrc")
FLAGS = ["-std=c++17", "-O3", "-fopenmp", "-fvisibility=hidden", "-g0", "-Wall", "-Wextra", "-Wno-psabi"]
# Equal bits: only what is written as one multiplication and addition is one, wherever the compiler inlines it.
FLAGS += ["-ffp-contract=off"]
# GCC 12 warns about its own intrinsics, which start from an uninitialized vector on purpose.
FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1"]


class BuildLibrary(build_ext):
    """Gives the library its plain name: it is not a Python module."""

    def get_ext_filename(self, fullname: str) -> str:
        *folders, name = fullname.split(".")
        return os.path.join(*folders, f"{name}.so")  # noqa: PTH118 - setuptools wants a string

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return ext.export_symbols


class BuildWheel(bdist_wheel):
    """One wheel for every Python of a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


wanted = os.environ.get("SPLITFUSE_KERNELS", "optional")
extra = SANITIZE if os.environ.get("SPLITFUSE_SANITIZE") else []
sources, headers = (sorted(SOURCES.glob(pattern)) for pattern in ("*.cpp", "*.h"))
# The library tells bindings.py from which sources it was compiled: others' structs and functions may be different.
digest = hashlib.sha256(b"".join(path.read_bytes() for path in (*sources, *headers))).hexdigest()
library = Extension(
    "splitfuse.kernels.cpu.libsplitfuse_cpu",
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
    ext_modules=[library] if on_x86 and wanted != "none" else [],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": BuildWheel},
)
