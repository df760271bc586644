"""Runs the process of an engine and times its parts: step_account.py starts it in place of engine/remote/worker.py.

The account is written to the file that SPLITFUSE_ACCOUNT names, of the steps between the times at which FILE.begin and
FILE.end appear.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from splitfuse.engine.remote import worker


class Account:
    """Charges each moment of the engine's thread to the part that it is in."""

    def __init__(self) -> None:
        self._out = Path(os.environ["SPLITFUSE_ACCOUNT"])
        self._stack = ["loop"]
        self._last = self._began = 0.0
        self._thread: int | None = None
        self._steps = 0
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*arguments: Any, **keywords: Any) -> Any:
            if threading.get_ident() != self._thread:  # of kernels that run while this thread does something else
                began = time.perf_counter()
                try:
                    return function(*arguments, **keywords)
                finally:
                    self.seconds[name] += time.perf_counter() - began
            self._charge()
            self._stack.append(name)
            try:
                return function(*arguments, **keywords)
            finally:
                self._charge()
                self._stack.pop()

        return call

    def patch(self, owner: Any, attribute: str, name: str) -> None:
        setattr(owner, attribute, self.timed(name, getattr(owner, attribute)))

    def count_step(self) -> None:
        self._thread = threading.get_ident()
        self._steps += 1
        if self._steps % 16:
            return
        if not self._began and self._out.with_name(self._out.name + ".begin").exists():
            self._last = self._began = time.perf_counter()
            self._steps = 0
            self.seconds.clear()
        elif self._began and self._out.with_name(self._out.name + ".end").exists():
            self._charge()
            account = {"steps": self._steps, "wall": self._last - self._began, "seconds": self.seconds}
            part = self._out.with_name("part")
            part.write_text(json.dumps(account))
            part.replace(self._out)
            self._began = -1e9
            self._out.with_name(self._out.name + ".end").unlink()

    def _charge(self) -> None:
        now = time.perf_counter()
        self.seconds[self._stack[-1]] += now - self._last
        self._last = now


def main() -> None:
    """Time the functions that a step is made of, and serve."""
    from splitfuse.core import scheduler
    from splitfuse.engine import engine, loop
    from splitfuse.kernels.cpu import bindings
    from splitfuse.models import decoder
    from splitfuse.runtime import executor

    account = Account()
    in_workspace = bindings.Library._in_workspace

    def timed_call(self: Any, function: Any, needs_memory: bool) -> Any:
        name = "kernels: " + function.__name__.removeprefix("sf_").rsplit("_avx", 1)[0]
        return in_workspace(self, account.timed(name, function), needs_memory)

    bindings.Library._in_workspace = timed_call  # type: ignore[method-assign]
    take_commands = loop.EngineLoop._take_commands

    def take(self: Any) -> Any:
        account.count_step()
        return take_commands(self)

    loop.EngineLoop._take_commands = take  # type: ignore[method-assign]
    for owner, attribute, name in (
        (loop.EngineLoop, "_take_commands", "commands"),
        (engine.Engine, "step", "engine"),
        (scheduler.Scheduler, "schedule", "planning"),
        (scheduler.Scheduler, "update", "update"),
        (scheduler.Scheduler, "_take_result", "update: requests"),
        (scheduler.EngineEvents, "emit", "events"),
        (executor, "build_batch", "batch"),
        (executor, "sample", "sampling"),
        (executor.Executor, "_compute", "executor"),
        (executor.Executor, "wait_for_layers", "waiting"),
        (executor.Executor, "collect", "waiting"),
        (executor.Executor, "_execute", "executor: states"),
        (decoder.Decoder, "forward", "forward"),
        (decoder.Decoder, "logits", "head"),
        (loop.EngineLoop, "_stats_now", "report"),
        (loop, "StepReport", "report"),
    ):
        account.patch(owner, attribute, name)
    worker.main()


if __name__ == "__main__":
    main()
