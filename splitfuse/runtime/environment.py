"""Describes what a measurement depends on: command, versions, commit, machine."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from splitfuse.runtime.machine import GIB, processor, total_memory
from splitfuse.version import __version__

VERSIONS = ("torch", "numpy", "msgspec")
_ROOT = Path(__file__).parents[2]


def environment_info() -> dict[str, Any]:
    """Return command, date, versions and machine, as recorded with every measurement."""
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
            "memory_gib": round(total_memory() / GIB, 1),
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        },
    }


def without_keys(arguments: Sequence[str]) -> list[str]:
    """Return a command line with the value of each `--api-key` replaced by dots.

    >>> without_keys(["serve", "--api-key", "secret"])
    ['serve', '--api-key', '...']
    """
    shown = [re.sub(r"^(--api-key)=.*", r"\1=...", argument, flags=re.DOTALL) for argument in arguments]
    return ["..." if i and shown[i - 1] == "--api-key" else argument for i, argument in enumerate(shown)]


def commit() -> str | None:
    """Return the commit of the working tree that splitfuse is imported from, with `+changes` if files were changed.

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
