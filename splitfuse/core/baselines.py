"""Other ways to compose a step, for comparison with Dynamic SplitFuse on the same engine; nothing serves with them.

    splitfuse       core/scheduler.py: prompts are split, and fused with the generations, to fill the budget
    prefill-first   vLLM of 2023: waiting prompts run first, whole and among themselves; generations when none can
                    start (Kwon et al., SOSP 2023, and vLLM 0.2's scheduler)
    orca            whole prompts beside the generations (Yu et al., Orca, OSDI 2022)
    static          a batch is admitted together, and nobody else until its longest has ended (FasterTransformer)

They override what a step is composed of and nothing else: blocks, preemption, results and the progress of the oldest
request stay those of the `Scheduler`. Where prompts are never split, the budget bounds how many are put together; one
alone may exceed it.
"""

from __future__ import annotations

from collections.abc import Iterator

from splitfuse.config import TAIL_SHARE, SchedulerConfig
from splitfuse.core.kv.block_allocator import BlockAllocator
from splitfuse.core.request import Request, RequestStatus
from splitfuse.core.scheduler import Scheduler
from splitfuse.core.slo.deadline_policy import SchedulingPolicy
from splitfuse.core.step_builder import StepBuilder
from splitfuse.errors import ConfigError, did_you_mean


class _WholePrompts(Scheduler):
    """What the others have in common: a prompt runs in one step or not at all."""

    def _compose_prompts(self, draft: StepBuilder) -> None:
        """As many prompts as the budget takes, oldest first, until one finds no place."""
        running = [request for request in self._running if request.num_wanted > 1]
        alone = True
        for request in (*running, *self._waiting):
            if request.status is RequestStatus.WAITING and not self._can_admit(draft):
                return
            if not self._grant_whole(draft, request, alone=alone):
                return
            alone = False

    def _compose_generations(self, draft: StepBuilder) -> None:
        for request in [request for request in self._running if request.num_wanted == 1]:
            self._grant(draft, request)

    def _grant_whole(self, draft: StepBuilder, request: Request, *, alone: bool) -> bool:
        """Give a request everything that it wants, starting it if it waits; or nothing, and False. One that is `alone`
        may exceed what the budget leaves.
        """
        waited = request.status is RequestStatus.WAITING
        if waited:
            self._start(request)
        wanted = request.num_wanted
        if request is self._running[0]:  # the oldest may take everybody's blocks
            while self._room(request) < wanted and self._preempt(than=request, draft=draft):
                pass
        if self._room(request) >= wanted and (wanted <= draft.left or alone):
            draft.left = max(draft.left, wanted)
            return self._grant(draft, request) == wanted
        if waited:
            self._stop(request)
        return False


class PrefillFirst(_WholePrompts):
    """Prompts stall the generations: whenever one can start, a step has prompts alone."""

    def _compose(self, draft: StepBuilder, now: float) -> None:  # noqa: ARG002 - they know no time
        self._admit_oldest()
        self._compose_prompts(draft)
        if not draft.granted:
            self._compose_generations(draft)


class Orca(_WholePrompts):
    """Every step has all generations, and the prompts that can start: it is as long as these make it."""

    def _compose(self, draft: StepBuilder, now: float) -> None:  # noqa: ARG002 - they know no time
        self._admit_oldest()
        self._compose_generations(draft)
        self._compose_prompts(draft)


class Static(_WholePrompts):
    """Who comes while a batch runs waits for the end of its longest.

    A batch is as many waiting requests as there are seats, and blocks for all that they may generate; so nobody in it
    is ever preempted. Those that have ended are not computed on, which real static batches do: this is their best case.
    """

    def __init__(
        self, config: SchedulerConfig, allocator: BlockAllocator, rule: SchedulingPolicy | None = None
    ) -> None:
        super().__init__(config, allocator, rule)
        self._batch: list[Request] = []  # chosen, and not started yet

    def _compose(self, draft: StepBuilder, now: float) -> None:  # noqa: ARG002 - they know no time
        if not self._running:
            self._batch = list(self._next_batch())
        self._batch = [request for request in self._batch if request.status is RequestStatus.WAITING]
        for number, request in enumerate(self._batch):
            if not self._grant_whole(draft, request, alone=number == 0):
                break
        if not draft.granted:
            self._compose_generations(draft)

    def _next_batch(self) -> Iterator[Request]:
        left = self._allocator.num_available
        for request in self._waiting[: self._max_num_seqs]:
            left -= self._allocator.blocks_for(request.num_prompt + request.max_tokens - 1)
            if left < 0:
                return
            yield request


POLICIES: dict[str, type[Scheduler]] = {
    "splitfuse": Scheduler,
    "prefill-first": PrefillFirst,
    "orca": Orca,
    "static": Static,
}


def scheduler_class(policy: str, config: SchedulerConfig) -> type[Scheduler]:
    """The scheduler of a policy, by its name on the command line, for such a config. Raises ConfigError."""
    if policy not in POLICIES:
        raise ConfigError(f"there is no policy {policy!r}{did_you_mean(policy, POLICIES)}")
    if config.slo_enabled and policy != "splitfuse":
        raise ConfigError(f"the policy {policy} keeps no promises: leave ttft, itl and enable_slo out")
    if config.tail_share != TAIL_SHARE and policy != "splitfuse":
        raise ConfigError(f"the policy {policy} keeps no share for the oldest: leave tail_share out")
    return POLICIES[policy]
