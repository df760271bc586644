"""A process and its children as one: stopped during the turns of others, continued, ended. Linux only."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from splitfuse.runtime.machine import proportional_bytes


def end_in_order_when_told() -> None:
    """Make SIGTERM unwind this process as Ctrl-C does: otherwise its children would survive, stopped or running."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


class ProcessGroup:
    """The session of a process started with `start_new_session`, with all its children."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def pause(self) -> None:
        """Stop it with SIGSTOP: a waiting engine may still spin, or wake up, during the turns of others."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Continue it."""
        self._signal(signal.SIGCONT)

    def end(self, *, patience: float) -> None:
        """Wait so many seconds for it to end, then kill all its processes."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)
        self._signal(signal.SIGKILL)
        self._process.wait()

    def resident_bytes(self) -> int:
        """Return the memory of all its processes that still run, shared pages counted once (PSS)."""
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
