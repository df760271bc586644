"""The loop around the scheduler and the model: token ids in, token ids out. Knows no text."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from splitfuse.config import EngineConfig
from splitfuse.core.kv.block_allocator import BlockAllocator
from splitfuse.core.kv.names import BlockNamer
from splitfuse.core.latency.phases import LatencyBreakdown
from splitfuse.core.limits import EngineLimits
from splitfuse.core.plan import ChunkResult, StepPlan, StepResult
from splitfuse.core.request import DEFAULT_SCHEDULING, FinishReason, Request, RequestOutput, SchedulingOptions
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.scheduler import Scheduler
from splitfuse.core.slo.cost_model import CostModel
from splitfuse.core.slo.deadline_policy import make_policy
from splitfuse.core.slo.targets import NO_SLO, SloTargets
from splitfuse.engine.profile import load_or_profile
from splitfuse.errors import InvalidRequestError
from splitfuse.kernels.interface import WeightSharing
from splitfuse.models.sources.source import ModelSource
from splitfuse.runtime.loading import LoadedModel, load_model
from splitfuse.runtime.memory_plan import MemoryPlan

Observer = Callable[[StepPlan, StepResult], None]
"""Sees every step when it is done: for metrics, traces and pictures."""


class Engine:
    """Many requests answered together by one model. One thread.

    With a cost model it keeps promises. `scheduler` is another class only where policies are compared
    (core/baselines.py).
    """

    def __init__(
        self,
        config: EngineConfig,
        model: LoadedModel,
        *,
        observer: Observer | None = None,
        scheduler: type[Scheduler] = Scheduler,
        cost: CostModel | None = None,
    ) -> None:
        self.config = config
        self.model = model
        self.executor = model.make_executor()
        self.observer = observer
        plan = model.plan
        caching = config.cache.enable_prefix_caching
        namer = BlockNamer(plan.block_size, key=secrets.token_bytes(32)) if caching else None
        self.allocator = BlockAllocator(plan.num_blocks, plan.block_size, namer=namer)
        self.slo_enabled = cost is not None
        self._targets = SloTargets.parse(config.scheduler.ttft, config.scheduler.itl)
        self.scheduler = scheduler(config.scheduler, self.allocator, make_policy(config.scheduler, cost))
        self.limits = EngineLimits(plan.max_model_len, model.spec.vocab_size, plan.num_blocks, plan.block_size)

    @classmethod
    def load(
        cls,
        config: EngineConfig,
        source: ModelSource | None = None,
        *,
        progress: bool = False,
        announce: Callable[[MemoryPlan], None] = lambda _: None,
        on_progress: Callable[[float], None] = lambda _: None,
        weight_sharing: WeightSharing | None = None,
        on_stage: Callable[[str], None] = lambda _: None,
        scheduler: type[Scheduler] = Scheduler,
    ) -> Engine:
        """An engine for the model that `config` names. If it promises anything, and no cost model is kept for it, its
        steps are timed first. `on_stage` hears of what comes after loading.

        Raises as `runtime.loading.load_model` does, and CostModelError.
        """
        model = load_model(
            config, source, progress=progress, announce=announce, on_progress=on_progress, weight_sharing=weight_sharing
        )
        if not config.scheduler.slo_enabled:
            return cls(config, model, scheduler=scheduler)
        on_stage("calibrating")
        cost = load_or_profile(cls, config, model, progress=progress).cost
        return cls(config, model, scheduler=scheduler, cost=cost)

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and output together."""
        return self.model.plan.max_model_len

    @property
    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        choice: int = 0,
        scheduling: SchedulingOptions = DEFAULT_SCHEDULING,
        sent: float | None = None,
    ) -> None:
        """Accept one request; what it generates comes out of `step`. `params.n` is the caller's business: a choice a
        call. `sent` is when it was, on the monotonic clock, if that is longer ago than now.

        Raises InvalidRequestError if the request cannot be honoured, LateError if it wants to be on time or not at all,
        and cannot be now. Then nothing is changed.
        """
        self.check_request(prompt_token_ids, params)
        if (scheduling.targets not in (None, NO_SLO) or scheduling.on_time_only) and not self.slo_enabled:
            raise InvalidRequestError(
                "this engine keeps no promises: give it ttft, itl or enable_slo", parameter="targets"
            )
        now = time.monotonic()
        scheduling = replace(
            scheduling,
            targets=self._targets if scheduling.targets is None else scheduling.targets,
            arrival_time=now if scheduling.arrival_time is None else scheduling.arrival_time,
        )
        self.scheduler.add(
            Request(
                request_id,
                tuple(prompt_token_ids),
                params,
                max_tokens=self.limits.room(len(prompt_token_ids), params),
                seed=secrets.randbits(64) if params.seed is None else params.seed,
                eos_token_ids=() if params.ignore_eos else self.model.eos_token_ids,
                choice=choice,
                scheduling=scheduling,
                sent=sent,
            ),
            now,
        )

    def check_request(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        """Raise InvalidRequestError if the model cannot honour the request."""
        self.limits.check(prompt_token_ids, params)

    def step(self) -> list[RequestOutput]:
        """One forward step for everybody who can use it: the new tokens, and who has ended. Empty if there is nothing
        to do.
        """
        plan = self.scheduler.schedule(time.monotonic())
        if plan is None:
            assert not self.scheduler.has_unfinished, "unfinished requests, and nothing can run"
            return []
        try:
            result = self.executor.collect(self.executor.submit(plan))
            if self.observer is not None:
                self.observer(plan, result)
        except BaseException as error:  # Ctrl-C too: what the step left in the cache is unknown, so its requests end
            failed = ChunkResult(error=f"the forward step was broken off: {error!r}")
            self.scheduler.update(
                plan, StepResult({chunk.request_id: failed for chunk in plan.chunks}), time.monotonic()
            )
            raise
        return self.scheduler.update(plan, result, time.monotonic())

    def finish(
        self, request_id: str, reason: FinishReason, *, num_tokens: int | None = None, ended: float | None = None
    ) -> LatencyBreakdown | None:
        """End a request, keeping its first `num_tokens` generated tokens; where its time went until `ended`, on the
        monotonic clock, or until now. None if it has ended already.
        """
        return self.scheduler.finish(request_id, reason, num_tokens=num_tokens, now=time.monotonic(), ended=ended)

    def is_unfinished(self, request_id: str) -> bool:
        """Whether a request of that id is waiting or running."""
        request = self.scheduler.get(request_id)
        return request is not None and not request.is_finished

    def abort(self, request_id: str) -> bool:
        """End a request that nobody waits for any more."""
        return self.finish(request_id, FinishReason.ABORT) is not None
