"""The control groups this process is in: where Linux keeps what it may take of memory and of cores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

MOUNT = "sys/fs/cgroup"


def control_groups(controller: str, root: Path = Path("/")) -> Iterator[tuple[int, Path]]:
    """The folder of each group that `controller` ("memory" or "cpu") may limit us in: ours and all that it lies in, of
    version 2 and of version 1, with the version. Which of them exist, and set a limit, is the reader's to find out.
    `root` is where proc and sys are.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # no Linux
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
