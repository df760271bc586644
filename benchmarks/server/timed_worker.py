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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from splitfuse.engine import garbage
from splitfuse.engine.remote import worker


class Account:
    """Charges each moment of the engine's thread to the part that it is in.

    By processor time (SPLITFUSE_ACCOUNT_CLOCK=processor) kernels are charged that of all threads over their number.
    """

    def __init__(self) -> None:
        self._out = Path(os.environ["SPLITFUSE_ACCOUNT"])
        self._by_processor = os.environ.get("SPLITFUSE_ACCOUNT_CLOCK") == "processor"
        self._clock = time.thread_time if self._by_processor else time.perf_counter
        self._stack = ["loop"]
        self._last = 0.0
        self._is_counting = False
        self._thread: int | None = None
        self._steps = 0
        self.num_threads = 1
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*arguments: Any, **keywords: Any) -> Any:
            if threading.get_ident() != self._thread:  # of kernels that run while this thread does something else
                began = self._clock()
                try:
                    return function(*arguments, **keywords)
                finally:
                    self.seconds[name] += self._clock() - began
            self._charge()
            self._stack.append(name)
            try:
                return function(*arguments, **keywords)
            finally:
                self._charge()
                self._stack.pop()

        return call

    def timed_kernel(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of the library that is timed."""
        in_turn = self.timed(name, function)
        if not self._by_processor:
            return in_turn

        @wraps(function)
        def call(*arguments: Any) -> Any:
            if threading.get_ident() != self._thread:
                return in_turn(*arguments)
            self._charge()
            began = time.process_time()
            try:
                return function(*arguments)
            finally:
                self.seconds[name] += (time.process_time() - began) / self.num_threads
                self._last = self._clock()

        return call

    def patch(self, owner: Any, attribute: str, name: str) -> None:
        setattr(owner, attribute, self.timed(name, getattr(owner, attribute)))

    def count_step(self) -> None:
        self._thread = threading.get_ident()
        self._steps += 1
        if self._steps % 16:
            return
        begin, end = (self._out.with_name(self._out.name + suffix) for suffix in (".begin", ".end"))
        if not self._is_counting and begin.exists():
            begin.unlink()
            self._is_counting = True
            self._last = self._clock()
            self._steps = 0
            self.seconds.clear()
        elif self._is_counting and end.exists():
            end.unlink()
            self._is_counting = False
            self._charge()
            part = self._out.with_name("part")
            part.write_text(json.dumps({"steps": self._steps, "seconds": self.seconds}))
            part.replace(self._out)

    def _charge(self) -> None:
        now = self._clock()
        self.seconds[self._stack[-1]] += now - self._last
        self._last = now


def time_parts(account: Account) -> None:
    """Time the functions that a step is made of."""
    from splitfuse.core import scheduler
    from splitfuse.engine import engine, loop
    from splitfuse.kernels.cpu.library import Library
    from splitfuse.models import decoder
    from splitfuse.runtime import executor

    in_workspace = Library._in_workspace

    def timed_call(self: Any, function: Any, needs_memory: bool) -> Any:
        name = "kernels: " + function.__name__.removeprefix("sf_").rsplit("_avx", 1)[0]
        return in_workspace(self, account.timed_kernel(name, function), needs_memory)

    Library._in_workspace = timed_call  # type: ignore[method-assign]
    make = Library.__init__

    def make_library(self: Any, variant: str, num_threads: int) -> None:
        account.num_threads = num_threads
        make(self, variant, num_threads)

    Library.__init__ = make_library  # type: ignore[method-assign]
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
        (executor.BatchBuilder, "build", "batch"),
        (executor, "results_of", "results"),
        (executor, "plain_rows", "results"),
        (executor, "plain_results", "results"),
        (executor.Executor, "_compute", "executor"),
        (executor.Executor, "wait_for_layers", "waiting"),
        (executor.Executor, "collect", "waiting"),
        (executor.Executor, "_execute", "executor: states"),
        (decoder.Decoder, "forward", "forward"),
        (decoder.Decoder, "forward_and_choose", "forward"),
        (decoder.Decoder, "logits", "head"),
        (loop.EngineLoop, "_stats_now", "report"),
        (loop, "StepReport", "report"),
    ):
        account.patch(owner, attribute, name)


def main() -> None:
    """Serve, with a clock at each part from the time at which all modules are imported: the engine beats by then."""
    account, paused = Account(), garbage.paused

    @contextmanager
    def importing() -> Iterator[None]:
        with paused():
            yield
            time_parts(account)

    garbage.paused = importing
    worker.main()


if __name__ == "__main__":
    main()
