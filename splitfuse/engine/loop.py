"""Runs an engine that serves others: take commands, run a step, report. One thread."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

from splitfuse.core.events import StepRecord, StepScheduled
from splitfuse.core.plan import DraftKind, StepPlan
from splitfuse.core.request_output import FinishReason, RequestOutput
from splitfuse.engine.engine import Engine
from splitfuse.engine.messages import (
    AdapterLoaded,
    Add,
    Alive,
    Command,
    EngineInfo,
    EngineStats,
    Export,
    Finish,
    Lend,
    LoadAdapter,
    Prefetch,
    Prefetched,
    Report,
    SetTracing,
    StepReport,
    Stop,
    Traced,
    UnloadAdapter,
)
from splitfuse.engine.pending import rejection
from splitfuse.engine.trace import TraceLevel, in_parts
from splitfuse.engine.tracer import EngineTracer
from splitfuse.errors import RankLostError, SplitfuseError
from splitfuse.kernels.lora import PackedAdapter
from splitfuse.runtime.device import ranks_of_device

REFRESH_STEPS = 128
"""Number of steps after which it is said again what the machine can keep of the SLO."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Loaded:
    """Hands an adapter from the thread that has read it to the loop."""

    name: str
    digest: str
    adapter: PackedAdapter


@dataclass(frozen=True)
class _LoanEnded:
    """Says to the loop that a loan has ended."""

    number: int


@dataclass(frozen=True)
class _RankLost:
    """Says to the loop that another rank of its engine has ended."""

    reason: str


class EngineLoop:
    """Owns an engine. Commands come in through `commands`, from any thread; reports go out through `report`, which runs
    on the loop's thread and must not block.
    """

    def __init__(
        self, engine: Engine, report: Callable[[Report], None], *, commands: queue.SimpleQueue[Any] | None = None
    ) -> None:
        """`commands` are those that have come already; left out, a queue of its own is made."""
        self.commands: queue.SimpleQueue[Command | _Loaded | _LoanEnded | _RankLost] = commands or queue.SimpleQueue()
        self._engine = engine
        self._report = report
        self._stopped = False
        self._step_began = 0.0  # 0: none runs
        self._stats = EngineStats(attainable=engine.attainable())
        self._ahead: list[RequestOutput] = []  # of commands that were taken during a step
        self._prompts: dict[str, tuple[int, int | None]] = {}  # lengths of prompts in work, and how much was cached
        self._tracer = EngineTracer(engine)
        if engine.lender is not None:
            engine.lender.on_ended = lambda number: self.commands.put(_LoanEnded(number))
        engine.follow_ranks(lambda reason: self.commands.put(_RankLost(reason)))
        self._num_preemptions = engine.scheduler.queue.num_preemptions  # of loops before
        self._drafts = engine.scheduler.drafting is not None
        self._unsubscribe = engine.events.subscribe(StepRecord, self._count)

    @property
    def info(self) -> EngineInfo:
        """Return what does not change while the engine lives."""
        engine = self._engine
        return EngineInfo(
            model=engine.model.source.name,
            limits=engine.limits,
            max_num_batched_tokens=engine.scheduler.budget.most,
            token_budget=engine.scheduler.budget.tokens,
            channel_bytes=engine.channel_bytes,
            num_tier_slots=engine.tiers.num_slots if engine.tiers is not None and engine.config.cache.has_tiers else 0,
            block_sources=() if engine.tiers is None else engine.tiers.block_sources,
            num_export_slots=0 if engine.tiers is None else engine.tiers.num_export_slots,
            num_speculative_tokens=0 if (drafting := engine.scheduler.drafting) is None else drafting.most,
            memory_plan=str(engine.model.plan),
            planned_bytes=engine.model.plan.available * ranks_of_device(engine.config),
            embedding_size=engine.model.spec.hidden_size,
            is_embedder=engine.model.pooling is not None,
            slo_enabled=engine.slo_enabled,
            targets=engine.targets,
            max_num_seqs=engine.scheduler.queue.max_num_seqs,
            adapters=dict(engine.adapters),
            fingerprint=engine.model.fingerprint,
            identity=dict(engine.model.identity),
            model_files=engine.model.source.digest(weights=False),
            kv_fingerprint=engine.model.kv_fingerprint,
            step_times=engine.step_times,
            attainable=self._stats.attainable,
        )

    def run(self) -> None:
        """Run until Stop comes. An exception that belongs to a request ends that request. One that is raised belongs to
        the engine, and the loop must not go on.
        """
        try:
            self._engine.estimate_budget()  # only now that it is ready: the start takes no longer for it
            while not self._stopped:
                outputs = self._take_commands()
                if any(output.finish_reason is FinishReason.MOVED for output in outputs):
                    # Another engine is to go on with them, and not only after the next step of this one.
                    self._report(StepReport(tuple(outputs), self._stats_now()))
                    outputs = []
                if self._engine.has_unfinished and not self._stopped:
                    self._step_began = time.monotonic()
                    outputs += self._engine.step(isolate=True, before_planning=self._take_commands_ahead)
                    self._step_began = 0.0
                    outputs += self._ahead
                    self._ahead.clear()
                *parts, last = in_parts(self._tracer.take()) if self._tracer.is_due else [()]
                for part in parts:
                    self._report(Traced(part))
                for request_id, num_blocks in self._engine.take_prefetched():
                    self._report(Prefetched(request_id, num_blocks))
                if outputs:
                    self._report(StepReport(tuple(outputs), self._stats_now(), last, self._engine.take_exported()))
                elif last:
                    self._report(Traced(last))
        finally:  # the step that an engine dies of is the one to see
            for part in in_parts(self._tracer.take()):
                self._report(Traced(part))

    def close(self) -> None:
        """End what is unfinished, and leave the engine as another loop may have it: nothing of this one's requests,
        adapters and traces is left but the blocks that the engine's cache and tiers keep.
        """
        self._tracer.level = TraceLevel.OFF
        self._unsubscribe()
        self._step_began = time.monotonic()  # what follows can hang as a step can
        try:
            self._engine.abort_all()
            self._engine.adapters.reset()
        finally:
            self._step_began = 0.0
        if self._engine.tiers is not None:
            self._engine.tiers.reset_stats()

    def alive(self) -> Alive:
        """Return a heartbeat. May be called from another thread."""
        began = self._step_began
        return Alive(time.monotonic() - began if began else 0.0)

    def _take_commands_ahead(self) -> bool:
        """Take commands during a step. Returns whether another one may follow."""
        self._ahead += self._take_commands()
        return not self._stopped

    def _take_commands(self) -> list[RequestOutput]:
        """Execute the commands since the last step; wait for one if there is nothing to compute. Returns the last
        outputs of the requests which they ended, and of those which the engine rejects.
        """
        outputs: list[RequestOutput] = []
        while not self._stopped:
            if self.commands.empty() and (self._engine.has_unfinished or outputs or self._tracer.has_records):
                break
            command = self.commands.get()
            match command:
                case Add():
                    try:
                        self._engine.add(command)
                    except Exception as error:
                        outputs.append(rejection(command.request_id, error))
                case Finish():
                    if (output := self._engine.finish(command)) is not None:
                        outputs.append(output)
                case Export():
                    self._engine.export(command)
                case Prefetch():
                    if not self._engine.prefetch(command):
                        self._report(Prefetched(command.request_id, 0))
                case Lend():
                    self._engine.lend(command.loan)
                    self._report(StepReport((), self._stats_now()))
                case _LoanEnded():
                    self._engine.take_back(command.number)
                    self._report(StepReport((), self._stats_now()))
                case _RankLost():
                    raise RankLostError(f"the tensor-parallel group has ended: {command.reason}")
                case LoadAdapter():  # files are read on a thread, and steps go on meanwhile
                    threading.Thread(target=self._load_adapter, args=(command,), daemon=True).start()
                case _Loaded():  # named by its digest: the front knows which names have it, and when none does
                    self._engine.adapters.install(command.digest, command.digest, command.adapter)
                    self._report(AdapterLoaded(command.name, command.digest))
                case UnloadAdapter():
                    self._engine.adapters.release(command.digest)
                case SetTracing():
                    self._tracer.level = command.level
                case Stop():
                    self._stopped = True
        return outputs

    def _load_adapter(self, command: LoadAdapter) -> None:
        try:
            digest, adapter = self._engine.model.load_adapter(command.path)
        except SplitfuseError as error:
            self._report(AdapterLoaded(command.name, error=str(error)))
        except Exception as error:
            logger.exception("an adapter could not be loaded: %s", command.name)
            self._report(AdapterLoaded(command.name, error=f"it could not be loaded: {error!r}"))
        else:
            self.commands.put(_Loaded(command.name, digest, adapter))

    def _count(self, step: StepRecord) -> None:
        plan, counts = step.plan, self._stats
        self._count_prompts(plan)
        counts.num_steps += 1
        counts.num_generated_tokens += sum([len(chunk.token_ids) for chunk in step.result.values()])
        counts.num_computed_tokens += plan.num_tokens
        for chunk in plan.chunks if self._drafts else ():
            if chunk.num_drafts:
                drafted, accepted = chunk.num_drafts, max(len(step.result[chunk.request_id].token_ids) - 1, 0)
                counts.num_draft_tokens += drafted
                counts.num_accepted_tokens += accepted
                if chunk.draft_kind is DraftKind.MODEL:
                    counts.num_model_drafts += drafted
                    counts.num_model_accepted += accepted
                elif chunk.draft_kind is DraftKind.FORM:
                    counts.num_form_drafts += drafted
                    counts.num_form_accepted += accepted
        counts.step_tokens = plan.num_tokens
        counts.step_seconds = step.measured_seconds
        counts.predicted_step_seconds = step.predicted_seconds
        counts.step_token_budget = plan.token_budget
        if counts.num_steps % REFRESH_STEPS == 1:
            counts.attainable = self._engine.attainable()

    def _count_prompts(self, plan: StepPlan) -> None:
        """Count each prompt with its first token, so that one of a request that goes on elsewhere counts once."""
        for request_id in plan.retired_requests:
            self._prompts.pop(request_id, None)
        for new in plan.new_requests:
            if not new.output_token_ids:  # else it was counted elsewhere
                self._prompts[new.request_id] = len(new.prompt_token_ids), None
        for chunk in plan.chunks if self._prompts else ():
            if (prompt := self._prompts.get(chunk.request_id)) is not None:
                num_tokens, num_cached = prompt
                num_cached = chunk.start if num_cached is None else num_cached
                self._prompts[chunk.request_id] = num_tokens, num_cached
                if chunk.samples:
                    del self._prompts[chunk.request_id]
                    self._stats.num_prompt_tokens += num_tokens
                    self._stats.num_cached_tokens += num_cached

    def _stats_now(self) -> EngineStats:
        stats, engine = self._stats, self._engine
        queue, drafting = engine.scheduler.queue, engine.scheduler.drafting
        if (tiers := engine.tiers) is not None:
            done = tiers.stats
            stats.num_tier_blocks, stats.num_saved_blocks = tiers.num_blocks, done.num_saved
            stats.num_fetched_blocks, stats.num_unsaved_blocks = done.num_fetched, done.num_unsaved
            stats.num_moved_bytes = (done.num_saved + done.num_fetched) * tiers.block_bytes
            stats.num_dropped_blocks = done.num_dropped
            if (peers := tiers.peers) is not None:
                stats.num_peer_blocks = peers.num_fetched
                stats.num_dropped_blocks += peers.num_dropped
        if drafting is not None and drafting.model is not None:
            stats.draft_model_seconds = drafting.model.seconds
        stats.num_running = len(queue.running)
        stats.num_waiting = len(queue.waiting) + len(queue.fetching) + engine.num_pending
        stats.num_available_blocks = engine.allocator.num_available
        stats.num_lent_blocks = engine.allocator.num_lent
        stats.num_preemptions = queue.num_preemptions - self._num_preemptions
        stats.token_budget = engine.scheduler.budget.tokens
        stats.step_times = engine.step_times
        return copy(stats)


def follow_steps(engine: Engine, write: Callable[[Sequence[str]], None]) -> Callable[[], None]:
    """Let `write` have the ids of the requests in each step before it runs, and between two steps those of the last
    one. Returns a function that ends this.
    """

    def write_rest(_: StepRecord) -> None:
        if ids := engine.ids_in_flight():  # else they stay those of the step that is back
            write(ids)

    ends = [
        engine.events.subscribe(StepScheduled, lambda step: write(engine.ids_in_flight(step.plan))),
        engine.events.subscribe(StepRecord, write_rest),
    ]

    def end() -> None:
        for each in ends:
            each()

    return end
