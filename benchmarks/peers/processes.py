"""A process with all that it has started, as one: stopped while others have their turn, continued, ended. Linux."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from splitfuse.runtime.environment import proportional_bytes


def end_in_order_when_told() -> None:
    """Have SIGTERM unwind this process as Ctrl-C does: what it has started would otherwise stay, stopped or at work."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


class ProcessGroup:
    """Of a process that was started with `start_new_session`: Linux keeps what it starts together under its number."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def pause(self) -> None:
        """Have it stand still: an engine that waits may still spin, or wake up, on the others' time."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it run."""
        self._signal(signal.SIGCONT)

    def end(self, *, patience: float) -> None:
        """Give it so many seconds to end by itself, as it was told to, then end all its processes."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)
        self._signal(signal.SIGKILL)
        self._process.wait()

    def resident_bytes(self) -> int:
        """Memory of all its processes, shared pages counted once (PSS); what has just ended is left out."""
        total = 0
        for process in self._processes():
            with suppress(OSError):
                total += proportional_bytes(process)
        return total

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes():
            with suppress(ProcessLookupError):
                os.kill(process, number)

    def _processes(self) -> Iterator[int]:
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if os.getsid(int(entry.name)) == self._process.pid:
                        yield int(entry.name)
                except ProcessLookupError:
                    continue
