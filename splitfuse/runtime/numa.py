"""Spreads the memory of an engine over the NUMA nodes of its cores.

The system puts a page on the node of the thread that writes it first. Threads of one team take their units of work as
they come, so that each reads weights and KV blocks of all nodes: where one thread has written them, all threads wait
for the memory of its node. In turns over the nodes, each node's memory gives an equal part.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Collection

from splitfuse.config.engine import EngineConfig
from splitfuse.runtime.machine import nodes_with_memory

_SYSTEM_CALLS = {"x86_64": (238, 239), "aarch64": (237, 236)}
"""Numbers of set_mempolicy and get_mempolicy, by machine."""
_DEFAULT, _INTERLEAVE = 0, 3
_WORDS, _BITS = 16, 64
"""Sizes of a mask of nodes: Linux knows 1,024 of them."""


def spread_engine(config: EngineConfig) -> bool:
    """Spread what an engine writes, whose process this is, over the nodes of the cores that it may run on. Returns
    whether it is spread. The ranks of a tensor-parallel group have parts of their own, which are left to the system.
    """
    if config.model.num_local_ranks > 1 or not hasattr(os, "sched_getaffinity"):
        return False
    return spread_memory(nodes_with_memory(os.sched_getaffinity(0)))


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


def memory_policy() -> tuple[int, list[int]] | None:
    """Return the mode and the nodes of this thread's policy; None if the system does not say."""
    mode, mask = ctypes.c_int(), (ctypes.c_uint64 * _WORDS)()
    if not _call(1, ctypes.byref(mode), mask, _WORDS * _BITS + 1, None, 0):
        return None
    return mode.value, [node for node in range(_WORDS * _BITS) if mask[node // _BITS] >> node % _BITS & 1]


def _call(which: int, *arguments: object) -> bool:
    if platform.system() != "Linux" or (numbers := _SYSTEM_CALLS.get(platform.machine())) is None:
        return False
    status: int = ctypes.CDLL(None).syscall(numbers[which], *arguments)
    return status == 0
