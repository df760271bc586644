"""Reads what Linux says of this machine and of processes: cores, memory, control groups that limit both, chips.

Elsewhere, or where a file of `proc` or `sys` is missing, the functions say so or fall back to what Python knows.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

GIB = 2**30
MOUNT = "sys/fs/cgroup"
NODES = "sys/devices/system/node"
CGROUP_FILES = {  # by version: the limit, and the bytes in use
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    2: ("memory.max", "memory.current"),
}


def processor() -> str:
    """Return the name of the CPU, with family and model on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    name, family, model = (fields.get(field) for field in ("model name", "cpu family", "model"))
    return f"{name or platform.machine()} (family {family}, model {model})" if family else name or platform.machine()


def gpu(device: torch.device) -> str | None:
    """Return the name of a GPU; None for the CPU."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


# --- control groups ---------------------------------------------------------------------------------------------------


def control_groups(controller: str, root: Path = Path("/")) -> Iterator[tuple[int, Path]]:
    """Yield version and folder of each group in which `controller` ("memory" or "cpu") may limit this process: its own
    group and all that contain it, of versions 1 and 2. A folder may be absent or set no limit.

    `root` is the folder of `proc` and `sys`.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:  # "0::/path" is version 2, "4:cpu,cpuacct:/path" version 1
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / MOUNT / (controller if controllers else "")  # a link where several controllers share a folder
        own = top / path.lstrip("/")  # inside a container this may not exist, and the top is our own group
        for group in (own, *own.parents):
            if group.is_relative_to(top):
                yield (1 if controllers else 2), group


def usable_cores(root: Path = Path("/")) -> int:
    """Return the number of cores this process may keep busy: those it may run on (PyTorch asks for them), and no more
    than the CPU quota of each of its control groups. A thread too many costs more than it brings: all wait for the one
    that is not running. `root` is where proc and sys are.
    """
    import torch

    return min([torch.get_num_threads(), *paid_cores(root)])


def paid_cores(root: Path = Path("/")) -> Iterator[int]:
    """Yield the CPU quota of each control group that has one, in whole cores, at least one."""
    for version, group in control_groups("cpu", root):
        try:
            if version == 2:
                quota, period = (group / "cpu.max").read_text().split()
            else:
                quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            cores = int(quota) // int(period)
        except (OSError, ValueError, ZeroDivisionError):  # no such group, or none that limits ("max")
            continue
        if int(quota) > 0:  # -1: no limit, in version 1
            yield max(1, cores)


# --- NUMA nodes -------------------------------------------------------------------------------------------------------


def cores_by_node(cores: Iterable[int], root: Path = Path("/")) -> list[int]:
    """Return cores in the order of their NUMA nodes, so that neighbours in the list have the same memory nearby; by
    number where there is one node. `root` is the folder of `sys`.
    """
    node_of = _nodes_of_cores(root)
    return sorted(cores, key=lambda core: (node_of.get(core, 0), core))


def nodes_with_memory(cores: Iterable[int], root: Path = Path("/")) -> dict[int, list[int]]:
    """Return the NUMA nodes of some cores that have memory, in order, each with those that it has of these cores.
    `root` is the folder of `sys`.
    """
    node_of = _nodes_of_cores(root)
    found: dict[int, list[int]] = {}
    for core in sorted(cores):
        if core in node_of:
            found.setdefault(node_of[core], []).append(core)
    with suppress(OSError, ValueError):  # else all have
        with_memory = set(_numbers((root / NODES / "has_memory").read_text()))
        found = {node: own for node, own in found.items() if node in with_memory}
    return dict(sorted(found.items()))


def _nodes_of_cores(root: Path) -> dict[int, int]:
    """Return the node of each core. One that no file tells of is in none."""
    node_of: dict[int, int] = {}
    for file in (root / NODES).glob("node*/cpulist"):
        with suppress(OSError, ValueError):
            number = int(file.parent.name.removeprefix("node"))
            node_of |= dict.fromkeys(_numbers(file.read_text()), number)
    return node_of


def _numbers(text: str) -> Iterator[int]:
    """Yield the numbers of a list of Linux.

    >>> [*_numbers("0-2,8")]
    [0, 1, 2, 8]
    """
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


# --- memory -----------------------------------------------------------------------------------------------------------


def anonymous_bytes(root: Path = Path("/")) -> int | None:
    """Return the bytes of memory that this process alone fills, mapped files not counted; None off Linux.

    `root` is the folder of `proc`.
    """
    return _proc_bytes(root / "proc/self/status", "RssAnon")


def available_memory(device: str, *, root: Path = Path("/")) -> int:
    """Return the bytes that can still be allocated: on a CPU, the least that machine and control groups leave.

    `root` is the folder of `proc` and `sys`.
    """
    import torch

    if torch.device(device).type != "cpu":
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    free = _proc_bytes(root / "proc/meminfo", "MemAvailable")
    return min([total_memory() if free is None else free, *_cgroup_headroom(root)])


def total_memory() -> int:
    """Return the bytes of memory that the machine has; 0 if the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 0


def _proc_bytes(path: Path, name: str) -> int | None:
    """Return a size that a file of proc states in kB; None where there is no such file or line."""
    try:
        fields = dict(line.split(":", 1) for line in path.read_text().splitlines())
        return int(fields[name].split()[0]) * 1024
    except (OSError, KeyError):
        return None


def _cgroup_headroom(root: Path) -> Iterator[int]:
    """Yield the bytes left by each control group of this process that sets a limit."""
    for version, group in control_groups("memory", root):
        if (headroom := _headroom(group, *CGROUP_FILES[version])) is not None:
            yield headroom


def _headroom(group: Path, limit_name: str, used_name: str) -> int | None:
    """Return the bytes that one group leaves, or None if it sets no limit. Cached files count as free."""
    try:
        limit, used = (group / limit_name).read_text().strip(), int((group / used_name).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    if limit == "max":
        return None
    reclaimable = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
    return max(int(limit) - used + reclaimable, 0)


def resident_bytes(pid: int | None = None) -> int | None:
    """Return the memory of a process, by default this one, and of all that it started; None where it cannot be read.

    Shared pages are counted once (PSS).
    """
    try:
        return sum(proportional_bytes(each) for each in _family(os.getpid() if pid is None else pid))
    except OSError:
        return None


def _family(pid: int) -> Iterator[int]:
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from _family(int(child))


def proportional_bytes(pid: int) -> int:
    """Return the PSS of one process. Raises OSError if it has ended, or where there is no /proc."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
