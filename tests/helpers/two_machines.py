"""Two machines, as far as one machine has two: network namespaces with a cable between them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

FIRST, SECOND = (f"splitfuse-{os.getpid()}-{name}" for name in ("server", "engine"))
FIRST_ADDRESS, SECOND_ADDRESS = "10.77.0.1", "10.77.0.2"


def within(space: str) -> tuple[str, ...]:
    """Return what runs a command on a machine."""
    return "ip", "netns", "exec", space


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextmanager
def two_machines() -> Iterator[None]:
    """Skip the test where there can be none."""
    try:
        ip("netns", "add", FIRST)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this process may create no network namespaces: {getattr(error, 'stderr', error)!r}")
    try:
        ip("netns", "add", SECOND)
        ip("link", "add", "sf0", "netns", FIRST, "type", "veth", "peer", "name", "sf0", "netns", SECOND)
        for space, address in ((FIRST, FIRST_ADDRESS), (SECOND, SECOND_ADDRESS)):
            ip("-n", space, "address", "add", f"{address}/24", "dev", "sf0")
            for device in ("lo", "sf0"):
                ip("-n", space, "link", "set", device, "up")
        yield
    finally:
        for space in (FIRST, SECOND):
            with suppress(subprocess.CalledProcessError):
                ip("netns", "del", space)
