"""Composes steps in other ways, to compare Dynamic SplitFuse with on the same engine; nothing serves with them.

    splitfuse       core/policy.py: prompts are split, and fused with the decodes, to fill the budget
    prefill-first   vLLM of 2023: waiting prompts run first, whole and among themselves; decodes when none can start
                    (Kwon et al., SOSP 2023, and vLLM 0.2's scheduler)
    orca            whole prompts together with the decodes (Yu et al., Orca, OSDI 2022)
    static          a batch is admitted together, and no other request until its longest has ended (FasterTransformer)

They compose otherwise and nothing else: blocks, preemption and the progress of the oldest request are the same. Where
prompts are never split, the budget bounds how many are put together; one alone may exceed it.
"""

from __future__ import annotations

from collections.abc import Iterator

from splitfuse.config.engine import TAIL_SHARE, SchedulerConfig
from splitfuse.core.limits import blocks_needed
from splitfuse.core.policy import Fcfs, SchedulingPolicy
from splitfuse.core.request import Request, RequestStatus
from splitfuse.core.step_builder import StepBuilder
from splitfuse.errors import ConfigError, did_you_mean


class PrefillFirst(Fcfs):
    """Stalls decodes for prompts: whenever one can start, a step has prompts alone."""

    def compose(self, step: StepBuilder) -> None:
        """See SchedulingPolicy."""
        step.start_oldest()
        grant_prompts(step)
        if not step.granted:
            grant_decodes(step)


class Orca(Fcfs):
    """Gives every step all decodes, and the prompts that can start: it is as long as these make it."""

    def compose(self, step: StepBuilder) -> None:
        """See SchedulingPolicy."""
        step.start_oldest()
        grant_decodes(step)
        grant_prompts(step)


class Static(Fcfs):
    """Lets a request which arrives while a batch runs wait for the end of its longest.

    A batch is as many waiting requests as there are sequence slots, and blocks for all that they may generate; so none
    of it is ever preempted. Requests that have ended are not computed on, which real static batches do: this is their
    best case.
    """

    def __init__(self) -> None:
        super().__init__()
        self._batch: list[Request] = []  # chosen, and not started yet

    def compose(self, step: StepBuilder) -> None:
        """See SchedulingPolicy."""
        if not step.queue.running:
            self._batch = list(_next_batch(step))
        self._batch = [request for request in self._batch if request.status is RequestStatus.WAITING]
        for number, request in enumerate(self._batch):
            if not grant_whole(step, request, alone=number == 0):
                break
        if not step.granted:
            grant_decodes(step)


def grant_prompts(step: StepBuilder) -> None:
    """Grant as many whole prompts as the budget takes, oldest first, until one does not fit."""
    prefills = [request for request in step.queue.running if request.num_unscheduled > 1]
    alone = True
    for request in (*prefills, *step.queue.waiting):
        if request.status is RequestStatus.WAITING and not step.can_start():
            return
        if not grant_whole(step, request, alone=alone):
            return
        alone = False


def grant_decodes(step: StepBuilder) -> None:
    """Grant every decode its token."""
    for request in [request for request in step.queue.running if request.num_unscheduled == 1]:
        step.grant(request)


def grant_whole(step: StepBuilder, request: Request, *, alone: bool) -> bool:
    """Grant a request everything that it needs, starting it if it waits; or nothing, and return False. One which is
    `alone` may exceed what is left of the budget.
    """
    waited = request.status is RequestStatus.WAITING
    if waited:
        step.queue.start(request)
    needed = request.num_unscheduled
    if request is step.queue.running[0]:  # the oldest may take the blocks of any other
        while step.available_slots(request) < needed and step.preempt_for(request):
            pass
    if step.available_slots(request) >= needed and (needed <= step.tokens_left or alone):
        step.tokens_left = max(step.tokens_left, needed)
        return step.grant(request) == needed
    if waited:
        step.queue.requeue(request)
    return False


def _next_batch(step: StepBuilder) -> Iterator[Request]:
    free = step.queue.free
    blocks = free.blocks
    for request in step.queue.waiting[: free.sequence_slots]:
        blocks -= blocks_needed(request.num_prompt_tokens, request.max_tokens, free.block_size)
        if blocks < 0:
            return
        yield request


BASELINES: dict[str, type[PrefillFirst | Orca | Static]] = {
    "prefill-first": PrefillFirst,
    "orca": Orca,
    "static": Static,
}
POLICIES = ("splitfuse", *BASELINES)


def make_baseline(policy: str, config: SchedulerConfig) -> SchedulingPolicy | None:
    """Return a new policy by its name on the command line; None for splitfuse, whose order of claims depends on the
    engine's SLOs (`make_policy`).

    Raises ConfigError for an unknown name, and for settings that the policy would not heed.
    """
    if policy not in POLICIES:
        raise ConfigError(f"there is no policy {policy!r}{did_you_mean(policy, POLICIES)}")
    if policy == "splitfuse":
        return None
    if config.slo_enabled:
        raise ConfigError(f"the policy {policy} meets no SLOs: leave ttft, itl, tpot and enable_slo out")
    if config.tail_share != TAIL_SHARE:
        raise ConfigError(f"the policy {policy} reserves nothing for the oldest request: leave tail_share out")
    return BASELINES[policy]()
