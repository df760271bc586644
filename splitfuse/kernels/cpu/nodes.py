"""Divides the threads of a team, and with them the panels of weights, among NUMA nodes.

Memory lies on one node, and the cores of the others read it more slowly, all through one link. So the threads of a node
take a run of the panels of each weight, in every step the same, whose pages are kept on that node; what is left when
they are done they take of the others (csrc/team.h). Which thread computes a panel changes no bit.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

MOST_NODES = 16
"""Largest number of nodes. It is in csrc/interface.h too."""
MOST_PARTS = 2**14
"""Number of parts of weights that are kept on nodes at most: to Linux each is a mapping of its own, and it gives a
process 65,530."""
_MBIND = 237
"""Number of the system call, on x86-64."""
_PREFERRED, _MOVE = 1, 2
_WORDS, _BITS = 16, 64
"""Sizes of a mask of nodes: Linux knows 1,024 of them."""

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class NodePlan:
    """Says which threads run on which node: those of `nodes[i]`, whose `cores` they may use, are `first_thread[i]` to
    `first_thread[i + 1]` - 1.

    >>> plan = NodePlan((0, 1), ((0, 1, 2, 3), (4, 5)), (0, 4, 6))
    >>> plan.parts(10)
    [range(0, 6), range(6, 10)]
    >>> print(plan)
    NUMA nodes 0 and 1: 4 and 2 threads, each with its part of the weights
    """

    nodes: tuple[int, ...]
    cores: tuple[tuple[int, ...], ...]
    first_thread: tuple[int, ...]

    @property
    def num_threads(self) -> int:
        """Return the number of threads on all nodes."""
        return self.first_thread[-1]

    def parts(self, num_panels: int) -> list[range]:
        """Return which of the panels of a weight each node has, as csrc/team.h divides them."""
        bounds = [num_panels * first // self.num_threads for first in self.first_thread]
        return [range(begin, end) for begin, end in pairwise(bounds)]

    def __str__(self) -> str:
        counts = [end - begin for begin, end in pairwise(self.first_thread)]
        return f"NUMA nodes {_listed(self.nodes)}: {_listed(counts)} threads, each with its part of the weights"


def _listed(numbers: Sequence[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}"


def plan_nodes(cores_of: Mapping[int, Sequence[int]], num_threads: int) -> NodePlan | None:
    """Return how threads are divided among nodes, by the number of cores that each has for them; None if there are not
    two that get one, or more than csrc knows.

    >>> plan_nodes({0: [0, 1], 1: [2, 3]}, 4).first_thread
    (0, 2, 4)
    """
    total, before, first_thread = sum(map(len, cores_of.values())), 0, [0]
    chosen: list[int] = []
    for node, cores in cores_of.items():
        before += len(cores)
        end = (2 * num_threads * before + total) // (2 * total) if total else 0  # rounded
        if end > first_thread[-1]:
            chosen.append(node)
            first_thread.append(end)
    if not 2 <= len(chosen) <= MOST_NODES:
        return None
    return NodePlan(tuple(chosen), tuple(tuple(cores_of[node]) for node in chosen), tuple(first_thread))


class NodeMemory:
    """Keeps the parts of weights on the nodes of a plan. What cannot be kept there stays where the system puts it:
    slower, not wrong.
    """

    def __init__(self, plan: NodePlan) -> None:
        self._plan = plan
        self._num_parts = 0
        self._refusal = 0

    def keep(self, memory: Tensor, num_panels: int) -> None:
        """Let the pages of the panels of a weight, which fill this memory, lie on the nodes whose threads read them:
        those that are written later, and those that have been written. A page with panels of two nodes, or of two
        weights, is left as it is.
        """
        begin, panel_bytes = memory.data_ptr(), memory.nbytes // num_panels
        for node, part in zip(self._plan.nodes, self._plan.parts(num_panels), strict=True):
            first = -(-(begin + part.start * panel_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE
            end = (begin + part.stop * panel_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
            if first >= end:
                continue
            if self._num_parts == MOST_PARTS:
                self._refusal = self._refusal or errno.ENOSPC
                return
            self._num_parts += 1
            if not bind_memory(first, end - first, node):
                self._refusal = self._refusal or ctypes.get_errno()

    @property
    def remark(self) -> str | None:
        """Return why weights, or some, are not kept on their nodes; None: all are."""
        if not self._refusal:
            return None
        if self._refusal == errno.ENOSPC:
            return f"weights of more than {MOST_PARTS} parts: the others lie where the system has put them"
        why = os.strerror(self._refusal)
        return f"weights lie where the system has put them, as it does not keep them on NUMA nodes: {why}"


def bind_memory(address: int, num_bytes: int, node: int) -> bool:
    """Let whole pages lie on a node as long as it has room, by mbind of Linux; return whether that is done."""
    mask = (ctypes.c_uint64 * _WORDS)()
    mask[node // _BITS] |= 1 << node % _BITS
    place, size = ctypes.c_void_p(address), ctypes.c_size_t(num_bytes)
    status: int = _libc.syscall(_MBIND, place, size, _PREFERRED, mask, ctypes.c_ulong(_WORDS * _BITS + 1), _MOVE)
    return status == 0
