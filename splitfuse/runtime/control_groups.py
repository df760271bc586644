"""Find the control groups of this process, in which Linux limits its memory and cores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

MOUNT = "sys/fs/cgroup"


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
