"""Puts something else in the place of a regular file."""

import os
from pathlib import Path

KINDS = ("nothing", "pipe", "device", "folder", "endless", "sparse", "log", "loop")


def put_odd_file(path: Path, kind: str) -> None:
    """Put it where nothing is."""
    match kind:
        case "nothing":
            pass
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
        case "endless":
            path.symlink_to("/proc/self/pagemap")
        case "sparse":
            with path.open("wb") as file:
                file.truncate(2**40)
        case "log":
            path.symlink_to("/proc/kmsg")
        case "loop":
            path.symlink_to(path)
        case _:
            raise ValueError(kind)
