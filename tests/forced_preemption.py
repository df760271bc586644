"""An engine whose newest request loses its blocks again and again: nothing that it generates may change by it."""

import time

from splitfuse.core.request import RequestOutput
from splitfuse.engine.engine import Engine

EVERY = 3  # steps


def force_preemptions(engine: Engine) -> None:
    """Preempt between steps, as if an older request had needed the blocks."""
    step, scheduler = engine.step, engine.scheduler
    steps = 0

    def step_and_preempt() -> list[RequestOutput]:
        nonlocal steps
        steps += 1
        if steps % EVERY == 0 and len(scheduler.queue.running) > 1:
            queue = scheduler.queue
            victim = scheduler.policy.preemption_victim(queue.running, claimant=queue.running[0])
            assert victim is not None and not victim.num_plans_in_flight
            queue.preempt(victim, time.monotonic())
        return step()

    engine.step = step_and_preempt  # type: ignore[method-assign]
