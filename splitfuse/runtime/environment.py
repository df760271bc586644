"""Describe what a measurement depends on: command, versions, commit, machine; and measure memory as Linux counts it."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitfuse.version import __version__

if TYPE_CHECKING:
    import torch

VERSIONS = ("torch", "numpy", "msgspec")
_ROOT = Path(__file__).parents[2]


def environment_info() -> dict[str, Any]:
    """Returns command, date, versions and machine, as recorded with every measurement."""
    return {
        "command": shlex.join(["splitfuse", *without_keys(sys.argv[1:])]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "splitfuse": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in VERSIONS},
        "machine": {
            "cpu": processor(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_gib": round(_memory_bytes() / 2**30, 1),
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        },
    }


def without_keys(arguments: Sequence[str]) -> list[str]:
    """Returns a command line with the value of each `--api-key` replaced by dots.

    >>> without_keys(["serve", "--api-key", "secret"])
    ['serve', '--api-key', '...']
    """
    shown = [re.sub(r"^(--api-key)=.*", r"\1=...", argument, flags=re.DOTALL) for argument in arguments]
    return ["..." if i and shown[i - 1] == "--api-key" else argument for i, argument in enumerate(shown)]


def commit() -> str | None:
    """Returns the commit of the working tree that splitfuse is imported from, with `+changes` if files were changed.

    None if splitfuse is installed.
    """
    if not (_ROOT / ".git").exists():
        return None
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    ran = subprocess.run(["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, check=True, timeout=10)
    return ran.stdout.strip()


def processor() -> str:
    """Returns the name of the CPU, with family and model on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    name, family, model = (fields.get(field) for field in ("model name", "cpu family", "model"))
    return f"{name or platform.machine()} (family {family}, model {model})" if family else name or platform.machine()


def gpu(device: torch.device) -> str | None:
    """Returns the name of a GPU; None for the CPU."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0


def resident_bytes(pid: int | None = None) -> int | None:
    """Returns the memory of a process, by default this one, and of all that it started; None where it cannot be read.

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
    """Returns the PSS of one process. Raises OSError if it has ended, or where there is no /proc."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
