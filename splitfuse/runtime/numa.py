"""Spreads the memory of an engine over the NUMA nodes of its cores.

The system puts a page on the node of the thread that writes it first. Threads of one team take what attention and norms
have to do as it comes, so that each reads KV blocks and activations of all nodes: where one thread has written them,
all threads wait for the memory of its node. In turns over the nodes, each node's memory gives an equal part. The panels
of weights are divided by nodes, each part on the node whose threads read it (kernels/cpu/nodes.py).
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
from collections.abc import Collection

from splitfuse.config.engine import EngineConfig
from splitfuse.runtime.machine import nodes_with_memory

_SYSTEM_CALLS = {"x86_64": (238, 239), "aarch64": (237, 236)}
"""Numbers of set_mempolicy and get_mempolicy, by machine."""
_DEFAULT, _INTERLEAVE = 0, 3
_OF_ADDRESS = 2
_WORDS, _BITS = 16, 64
"""Sizes of a mask of nodes: Linux knows 1,024 of them."""
_BINDINGS = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY")
"""Variables by which a user places the threads of an engine."""

_logger = logging.getLogger(__name__)


def spread_engine(config: EngineConfig) -> dict[int, list[int]]:
    """Spread what an engine writes, whose process this is, over the nodes of the cores that it may run on. The ranks of
    a tensor-parallel group have parts of their own, which are left to the system.

    Returns the nodes, each with its cores, among which its threads and weights may be divided then: none where its
    memory is not spread, where cores have no memory nearby, or where variables of OpenMP say where threads run.
    """
    if config.model.num_local_ranks > 1 or not hasattr(os, "sched_getaffinity"):
        return {}
    cores = os.sched_getaffinity(0)
    nodes = nodes_with_memory(cores)
    if not spread_memory(nodes):
        if len(nodes) > 1 and memory_policy() in (None, (_DEFAULT, [])):
            _logger.warning("memory of NUMA nodes %s: the system does not let it be spread", ", ".join(map(str, nodes)))
        return {}
    placed = [name for name in _BINDINGS if name in os.environ]
    return {} if placed or sum(map(len, nodes.values())) < len(cores) else nodes


def spread_memory(nodes: Collection[int]) -> bool:
    """Let what this thread, and those that it starts, write first lie on these nodes in turns, page by page. Returns
    whether it does: not on one node, not where a policy was set before, as by numactl, and not where the system has no
    policies or forbids to set one.
    """
    if len(nodes) < 2 or memory_policy() != (_DEFAULT, []):
        return False
    return set_memory_policy(_INTERLEAVE, nodes)


def set_memory_policy(mode: int, nodes: Collection[int]) -> bool:
    """Set where memory lies that this thread writes first, by set_mempolicy of Linux; return whether that is done."""
    mask = (ctypes.c_uint64 * _WORDS)()
    for node in nodes:
        mask[node // _BITS] |= 1 << node % _BITS
    return _call(0, mode, mask, _WORDS * _BITS + 1)


def memory_policy(address: int | None = None) -> tuple[int, list[int]] | None:
    """Return the mode and the nodes of this thread's policy, or of that of memory at an address; None if the system
    does not say.
    """
    mode, mask = ctypes.c_int(), (ctypes.c_uint64 * _WORDS)()
    of_address = 0 if address is None else _OF_ADDRESS
    if not _call(1, ctypes.byref(mode), mask, _WORDS * _BITS + 1, ctypes.c_void_p(address), of_address):
        return None
    return mode.value, [node for node in range(_WORDS * _BITS) if mask[node // _BITS] >> node % _BITS & 1]


def _call(which: int, *arguments: object) -> bool:
    if platform.system() != "Linux" or (numbers := _SYSTEM_CALLS.get(platform.machine())) is None:
        return False
    status: int = ctypes.CDLL(None).syscall(numbers[which], *arguments)
    return status == 0
