"""Loads the compiled library and calls its functions, and says which instruction sets this CPU has.

csrc/variant.h and csrc/cpu.cpp are the other side of every line here.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import threading
from array import array
from collections.abc import Callable
from ctypes import c_float, c_int32, c_int64, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch  # noqa: F401  # first: the library shares its OpenMP

from splitfuse.errors import ConfigError, KernelError, RankLostError
from splitfuse.kernels.cpu.nodes import NodePlan

_logger = logging.getLogger(__name__)

SOURCES = Path(__file__).with_name("csrc")
"""Folder of what the library is compiled from."""
LIBRARY = Path(__file__).with_name("libsplitfuse_cpu.so")
"""File of the library, if it was compiled."""
AMX = "avx512_amx"
VARIANTS = (AMX, "avx512_bf16", "avx512", "avx2")
"""Instruction sets that the kernels are compiled for, best first. AVX-512 includes VNNI here, AVX2 includes FMA."""
AMX_OBSTACLES = {
    2: "the system does not save its tile registers",
    3: "the system does not permit its use",
    4: "its instructions fail, as in a virtual machine that does not pass them on",
    5: "the compiler of the kernels did not know it",
}
"""Reasons of csrc/amx.cpp why AMX cannot be used on a CPU that announces it, by number."""

BROKEN_RULES = {
    1: "a position lies outside the rotary tables",
    2: "a slot lies outside the KV store",
    3: "query_start does not rise from 0 to the number of tokens",
    4: "a request has fewer positions than tokens, or more than its block table holds",
    5: "a block table names a block that does not exist",
    6: "a token id outside the vocabulary",
    7: "a logit row outside the step",
    8: "a state slot that does not exist",
    9: "a row with an adapter that is not there",
}
"""Rules of csrc/cpu.cpp that a step can break, by number."""


def check_rules(broken: int) -> None:
    """Raise IndexError if a check of a step has returned the number of a rule."""
    if broken:
        raise IndexError(f"a step that cannot be computed: {BROKEN_RULES[broken]}")


FUNCTIONS: dict[str, tuple[list[Any], Any]] = {
    "weight_bytes": ([c_void_p], c_int64),
    "store_bytes": ([c_void_p], c_int64),
    "delta_floats": ([c_void_p], c_int64),
    "conv_floats": ([c_void_p], c_int64),
    "mamba_floats": ([c_void_p], c_int64),
    "pack": ([c_void_p, c_void_p, c_void_p, c_int64, c_int64], None),
    "pack_stored": ([c_void_p, c_void_p, c_void_p, c_int64, c_int64], None),
    "linear": ([*[c_void_p] * 3, c_int64, *[c_void_p] * 3, c_int64, c_void_p], c_int32),
    "linear_heads": ([c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_void_p], c_int32),
    "activated": ([*[c_void_p] * 3, c_int64, c_void_p, c_int32, c_void_p, c_int64, c_void_p], c_int32),
    "norm": ([c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p], None),
    "embed": ([c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_void_p], None),
    "rope_store": ([c_void_p] * 6, None),
    "attend": ([c_void_p] * 6, c_int32),
    "delta": ([c_void_p] * 7, c_int32),
    "conv": ([c_void_p] * 6, None),
    "mamba": ([c_void_p] * 7, c_int32),
    "network": ([c_void_p] * 5, c_int32),
    "account_in": ([c_void_p, c_void_p], None),
    "head": ([*[c_void_p] * 5, c_int64, c_void_p, c_int64], c_int32),
    "lend": ([c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int64], c_int32),
    "deposit": ([c_void_p, c_int64, c_void_p, c_int64], c_int32),
    "route": ([c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_void_p], None),
    "experts": ([c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_void_p], c_int32),
    "take_units": ([c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p], None),
    "read_all": ([c_void_p, c_void_p, c_int64, c_int32], None),
    "dots_only": ([c_void_p, c_int32, c_int64], c_float),
    "topk": ([c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p], None),
    "draw": (
        [c_void_p, c_void_p, c_int32, c_int64, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_void_p],
        c_int32,
    ),
    "choose": ([c_void_p, c_void_p, c_void_p, c_int64], c_int32),
}


NEEDS_MEMORY = {
    *("linear", "linear_heads", "activated", "attend", "delta", "mamba", "network", "head", "lend"),
    *("experts", "draw", "choose"),
}
"""Functions that return 1 without it, and some 2 if a rank of their group did not come."""
PURE = {"weight_bytes", "store_bytes", "delta_floats", "conv_floats", "mamba_floats", "deposit"}
"""Functions that need no workspace."""


class Library:
    """Calls the functions of one variant, `library.linear(...)` and so on, as csrc/variant.h declares them, without the
    workspace that is their first argument: it belongs to this object, and serves one call at a time.
    """

    def __init__(self, variant: str, num_threads: int) -> None:
        shared = _load()
        self.lock = threading.RLock()
        self._workspace = None
        for name, (arguments, result) in FUNCTIONS.items():
            function = getattr(shared, f"sf_{name}_{variant}")
            function.argtypes, function.restype = arguments, result
            setattr(self, name, function if name in PURE else self._in_workspace(function, name in NEEDS_MEMORY))
        shared.sf_check_step.argtypes = [c_void_p, *(c_int64,) * 5]
        shared.sf_check_packed.argtypes = [c_void_p, c_void_p]
        shared.sf_check_ids.argtypes = [c_void_p, c_int64, c_int64]
        self.check_step, self.check_packed = shared.sf_check_step, shared.sf_check_packed
        self.check_ids = shared.sf_check_ids
        self._set_nodes = shared.sf_set_nodes
        self._set_nodes.argtypes, self._set_nodes.restype = [c_int32, c_void_p, c_void_p, c_int64], None
        create = getattr(shared, f"sf_create_{variant}")
        create.argtypes, create.restype = [c_int32], c_void_p
        self._destroy = getattr(shared, f"sf_destroy_{variant}")
        self._destroy.argtypes = [c_void_p]
        self._workspace = create(num_threads)
        if self._workspace is None:
            raise RuntimeError("no memory for the kernels' workspace")

    def __del__(self) -> None:
        if getattr(self, "_workspace", None) is not None:
            self._destroy(self._workspace)

    def __getattr__(self, name: str) -> Any:  # for type checkers: __init__ sets them all
        raise AttributeError(name)

    def set_nodes(self, plan: NodePlan | None) -> None:
        """Divide the teams of this process that have as many threads as a plan among its NUMA nodes, to which these are
        bound; None: divide none. No team may compute meanwhile.
        """
        if plan is None:
            plan = NodePlan((0,), ((),), (0, 0))
        words = max((max(cores, default=0) for cores in plan.cores), default=0) // 64 + 1
        first_thread, masks = array("i", plan.first_thread), array("Q", bytes(8 * words * len(plan.nodes)))
        for place, cores in enumerate(plan.cores):
            for core in cores:
                masks[place * words + core // 64] |= 1 << core % 64
        with self.lock:
            self._set_nodes(len(plan.nodes), first_thread.buffer_info()[0], masks.buffer_info()[0], words)

    def _in_workspace(self, function: Any, needs_memory: bool) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            with self.lock:
                result = function(self._workspace, *arguments)
            if needs_memory and result == 2:
                raise RankLostError("a rank of the tensor-parallel group has ended, or does not answer")
            if needs_memory and result:
                raise RuntimeError("no memory for the kernels' workspace: choose a smaller max_num_batched_tokens")
            return result

        return call


def supported_variants() -> tuple[str, ...]:
    """Return the variants this CPU can run, best first. Raises KernelError if there is no library to ask.

    With SPLITFUSE_EMULATE_AMX=1 any CPU with AVX-512 and bf16 can run avx512_amx, slowly: for tests.
    """
    shared = _load()
    supported = [variant for variant in VARIANTS if getattr(shared, f"sf_supports_{variant}")()]
    if {"avx512_bf16", "avx512"} <= set(supported) and not shared.sf_prefers_avx512_bf16():
        supported.remove("avx512_bf16")
        supported.insert(supported.index("avx512") + 1, "avx512_bf16")
    return tuple(supported)


def choose_variant(wanted: str | None = None) -> str:
    """Return the best variant, or the wanted one. Logs why AMX is not chosen if the CPU announces it in vain.

    Raises KernelError if this CPU can run none, ConfigError if it cannot run the wanted one.
    """
    if wanted is not None and wanted != AMX and getattr(_load(), f"sf_supports_{wanted}")():
        return wanted  # without trying AMX
    supported = supported_variants()
    if not supported:
        raise KernelError("this CPU has neither AVX-512 (with VNNI) nor AVX2 (with FMA)")
    obstacle = None if AMX in supported else AMX_OBSTACLES.get(_load().sf_amx_state())
    if wanted is not None and wanted not in supported:
        why = f" ({obstacle})" if wanted == AMX and obstacle else ""
        raise ConfigError(f"this CPU cannot run the {wanted} kernels{why}; it can run {' and '.join(supported)}")
    by_default = [variant for variant in supported if not is_emulated(variant)]
    if wanted is None and obstacle:
        _warn_once(f"this CPU announces AMX, but {obstacle}: the {by_default[0]} kernels run instead")
    return wanted or by_default[0]


@cache
def _warn_once(message: str) -> None:
    _logger.warning(message)


def is_emulated(variant: str) -> bool:
    """Return whether a variant's instructions are emulated: those of AMX, with SPLITFUSE_EMULATE_AMX=1."""
    return variant == AMX and bool(_load().sf_emulates_amx())


@cache
def _load() -> ctypes.CDLL:
    named = os.environ.get("SPLITFUSE_KERNEL_LIBRARY")  # another build of it, such as that of `make test-sanitize`
    path = Path(named) if named else LIBRARY
    if not path.is_file():
        raise KernelError(
            f"the C++ kernels were not compiled ({path.name} is missing): installing needs a C++ compiler"
        )
    try:
        shared = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelError(f"the C++ kernels cannot be loaded: {error}") from error
    if (compiled_from := getattr(shared, "sf_sources", None)) is not None:
        compiled_from.restype = c_uint64
    if compiled_from is None or compiled_from() != _hash_of_sources():
        raise KernelError(
            f"the C++ kernels ({path.name}) were compiled from other sources than those in {SOURCES}: "
            "compile them again with python setup.py build_ext --inplace --force"
        )
    return shared


def _hash_of_sources() -> int:
    """Return the number that setup.py compiles into a library of these sources."""
    files = [path for pattern in ("*.cpp", "*.h") for path in sorted(SOURCES.glob(pattern))]
    return int(hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16], 16)
