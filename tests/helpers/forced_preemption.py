"""Engines that lose the blocks of requests, or the tokens of steps: nothing that they generate may change by it."""

import time
from typing import Any

import pytest

from splitfuse.core.request_output import RequestOutput
from splitfuse.engine.engine import Engine
from splitfuse.runtime.executor import Executor

EVERY = 3  # steps


def force_preemptions(engine: Engine) -> None:
    """Preempt between steps, as if an older request had needed the blocks."""
    step, scheduler = engine.step, engine.scheduler
    steps = 0

    def step_and_preempt(**how: Any) -> list[RequestOutput]:
        nonlocal steps
        steps += 1
        if steps % EVERY == 0 and len(scheduler.queue.running) > 1:
            queue = scheduler.queue
            victim = scheduler.policy.preemption_victim(queue.running, claimant=queue.running[0])
            assert victim is not None
            if victim.num_plans_in_flight:
                victim.kv.preempt_on_return = True
            else:
                queue.preempt(victim, time.monotonic())
        return step(**how)

    engine.step = step_and_preempt  # type: ignore[method-assign]


def break_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every third step of several requests fail after its tokens were chosen, and engines isolate that."""
    compute, step, calls = Executor._compute, Engine.step, 0

    def failing(self: Executor, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        results = compute(self, *arguments)
        if len(results) > 1 and calls % EVERY == 0:
            raise RuntimeError("broken after its tokens were chosen")
        return results

    monkeypatch.setattr(Executor, "_compute", failing)
    monkeypatch.setattr(Engine, "step", lambda self, **_: step(self, isolate=True))
