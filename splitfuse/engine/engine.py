"""Joins the scheduler and the model: token ids in, token ids out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from hashlib import blake2b

from llguidance import LLMatcher

from splitfuse.config.engine import EngineConfig
from splitfuse.core.events import PhasesEntered, RequestFinished
from splitfuse.core.kv.fetching import Fetching
from splitfuse.core.kv.loans import KvLoan
from splitfuse.core.limits import EngineLimits, blocks_needed
from splitfuse.core.plan import StepPlan, StepResult
from splitfuse.core.policy import PlanningError, SchedulingPolicy
from splitfuse.core.pooling_params import PoolingParams
from splitfuse.core.request import Request
from splitfuse.core.request_output import FinishReason, RequestOutput
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.scheduling_options import DEFAULT_SCHEDULING, SchedulingOptions
from splitfuse.core.slo.attainable import Attainable, attainable
from splitfuse.core.slo.cost_model import CostModel, StepTimes
from splitfuse.core.slo.targets import NO_SLO, SLO_DISABLED, SloTargets
from splitfuse.engine.adapters import Adapters
from splitfuse.engine.block_transfers import BlockTransfers
from splitfuse.engine.build import build_scheduler
from splitfuse.engine.calibrate import load_or_estimate
from splitfuse.engine.garbage import unowned
from splitfuse.engine.guard import Guard, check_process, guarded
from splitfuse.engine.loans import Lender, close_channel
from splitfuse.engine.memory import give_back_memory
from splitfuse.engine.messages import Add, Export, Finish, Loan, Prefetch
from splitfuse.engine.pending import PendingRequests
from splitfuse.engine.remote.peers import Peers
from splitfuse.engine.step_runner import StepRunner
from splitfuse.engine.tier_files import TierFiles, open_tiers
from splitfuse.engine.tiers import Tiers, make_tiers
from splitfuse.errors import EngineUnavailableError, InvalidRequestError
from splitfuse.kernels.sharing import WeightSharing
from splitfuse.models.encoder.spec import is_encoder
from splitfuse.models.sources.source import ModelSource
from splitfuse.runtime.encoding import LoadedEncoder, encoder_settings, load_encoder
from splitfuse.runtime.executor import Executor
from splitfuse.runtime.loading import LoadedModel, load_model, open_source
from splitfuse.runtime.memory_plan import MemoryPlan
from splitfuse.runtime.step_estimate import has_long_steps

ESTIMATED_STEPS = 100
"""Number of steps after which an estimated cost model has been corrected by as many that it is not called that."""
HOLD_SECONDS = 0.01
"""Longest time that a step waits for the grammar or the KV blocks of a request if there is nothing else to do."""

logger = logging.getLogger(__name__)


class Engine:
    """Generates for many requests together with one model. Threads that share it take turns.

        engine = Engine.load(EngineConfig.from_settings({"model": "path/to/model"}))
        engine.add_request("a", [1, 2, 3], SamplingParams(max_tokens=8))
        while engine.has_unfinished:
            for output in engine.step():
                print(output.token_ids)

    With a cost model it schedules by SLO. `events` tells listeners of every step and request. `policy` is given only
    where policies are compared (bench/baselines.py). Engines with the same `name_key` give KV blocks the same names.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: LoadedModel | LoadedEncoder,
        *,
        policy: SchedulingPolicy | None = None,
        cost: CostModel | None = None,
        name_key: bytes | None = None,
        tier_files: TierFiles | None = None,
        is_restart: bool = False,
    ) -> None:
        """`tier_files` are the KV tiers that the settings ask for; they are closed with the engine. After a restart,
        an adapter of the settings that can be read no more is lacking: the others are served.
        """
        self._guard = Guard()
        self.config = config
        self.model = model
        self.executor = model.make_executor()
        plan = model.plan
        self.slo_enabled = cost is not None
        self.targets = SloTargets.parse(**config.scheduler.targets)
        """SLO of the requests that bring none."""
        self._estimate: CostModel | None = None  # without SLOs
        self._leader = model.leader if isinstance(model, LoadedModel) else None
        self.tiers: Tiers | None = None
        self._tier_files = tier_files
        fetching = self._use_tiers(tier_files, name_key or b"")
        draft_model = None
        if isinstance(model, LoadedModel) and isinstance(self.executor, Executor):
            draft_model = model.make_draft_runner(self.executor)
        self.scheduler, self.allocator, self._latencies = build_scheduler(
            *(config, plan),
            policy=policy,
            cost=cost,
            name_key=name_key,
            kv_fingerprint=model.kv_fingerprint,
            fetching=fetching,
            saves_blocks=tier_files is not None and not tier_files.for_moves,
            draft_model=draft_model,
        )
        self.events = self.scheduler.events
        self._transfers: BlockTransfers | None = None
        if self.tiers is not None and isinstance(self.executor, Executor):
            self._transfers = BlockTransfers(self.tiers, self.executor, self.scheduler, self.allocator)
        if self.scheduler.drafting is not None and isinstance(self.executor, Executor):
            self.executor.num_forced = self.scheduler.drafting.most
        self._steps = StepRunner(self.executor, self.scheduler.requests)
        generates = isinstance(model, LoadedModel)
        vocab_size, num_blocks, size = model.spec.vocab_size, plan.num_blocks, plan.block_size
        self.limits = EngineLimits(plan.max_model_len, vocab_size, num_blocks, size, generates=generates)
        self._channels = self.executor.channels if isinstance(self.executor, Executor) else {}
        self._pending = PendingRequests(
            unowned(self._schedule_request),
            grammars=model.grammars,
            limits=self.limits,
            allocator=self.allocator,
            channels=self._channels,
        )
        self.lender: Lender | None = None
        """What the engine has lent, if it lends and borrows."""
        if config.cache.kv_loans and isinstance(self.executor, Executor):
            executor = self.executor
            self.lender = Lender(executor.decoder, executor.kv_cache, self.allocator)
            self.events.subscribe(RequestFinished, unowned(self._end_loan))
        # Of the accepted requests: while they are referred to, no step has to wait until one is made again.
        matchers = self._matchers = dict[str, Future[LLMatcher]]()
        self.events.subscribe(RequestFinished, lambda event: matchers.pop(event.request.request_id, None))
        self.adapters = Adapters(
            config.model.lora,
            self.executor.adapters,
            read=model.load_adapter,
            in_use=unowned(self._adapters_in_use),
            guard=self._guard,
        )
        if is_restart:
            self.adapters.reset()
        else:
            self.adapters.load_all()

    def _use_tiers(self, files: TierFiles | None, name_key: bytes) -> Fetching | None:
        """Make the KV tiers that there are files for, if the blocks of the model can be kept, and return how they are
        fetched from.
        """
        model, executor = self.model, self.executor
        if files is None or not isinstance(executor, Executor) or model.plan.num_states or self._leader is not None:
            return None
        made = make_tiers(
            files,
            self.config.cache,
            block_bytes=executor.kv_cache.block_bytes,
            block_size=model.plan.block_size,
            fingerprint=blake2b(model.kv_fingerprint, key=name_key, digest_size=32).digest(),
        )
        if made is None:
            return None
        self.tiers, inbox = made
        executor.sink, executor.inbox = self.tiers, inbox
        return Fetching(self.tiers, inbox)

    @property
    def phases(self) -> PhasesEntered:
        """Return the phase that each unfinished request is in."""
        return self._latencies.phases

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
        policy: SchedulingPolicy | None = None,
        name_key: bytes | None = None,
        tier_files: TierFiles | None = None,
        nodes: Mapping[int, Sequence[int]] | None = None,
        is_restart: bool = False,
    ) -> Engine:
        """Load the model that `config` names, from `source` if it is open already. With SLOs, a cost model is estimated
        unless one is stored for it. KV tiers that the settings ask for are opened unless they are given. `nodes` are
        those of a process that belongs to the engine; `is_restart` says that it takes the place of one that has ended.

        Raises as `runtime.loading.load_model` does.
        """
        check_process()
        source = source or open_source(config)
        if is_encoder(source):
            encoder = load_encoder(config, source, announce=announce)  # first: it refuses settings
            return cls(encoder_settings(config), encoder, is_restart=is_restart)
        opened = None
        if tier_files is None and config.cache.has_tiers:
            assert name_key is None, "tiers that are opened here have a key"
            opened, name_key = open_tiers(config.cache)
            tier_files = opened
        try:
            model = load_model(
                *(config, source),
                progress=progress,
                announce=announce,
                on_progress=on_progress,
                weight_sharing=weight_sharing,
                tiers_filled=0 if tier_files is None else tier_files.filled,
                tiers_for_moves=tier_files is not None and tier_files.for_moves,
                nodes=nodes,
            )
            give_back_memory()  # what weights took while they were unpacked
            cost = load_or_estimate(config, model) if config.scheduler.slo_enabled else None
            return cls(
                *(config, model),
                policy=policy,
                cost=cost,
                name_key=name_key,
                tier_files=tier_files,
                is_restart=is_restart,
            )
        except BaseException:
            if opened is not None:
                opened.close()  # else no later start could have the folder
            raise

    def close(self) -> None:
        """End what is lent and the other ranks, let KV tiers have what was computed last, and refuse requests from then
        on. Without any of these there is nothing to do.
        """
        files, self._tier_files = self._tier_files, None
        if self.lender is not None:
            self.lender.close()
        if self._leader is not None:
            self.executor.drain()
            self._leader.close()
        if self.tiers is not None and self._transfers is not None and files is not None:
            self.executor.drain()
            self._transfers.save_rest()
            if not self.tiers.close():
                return
        if files is not None:
            files.close()

    def follow_ranks(self, on_lost: Callable[[str], object]) -> None:
        """Let a thread call `on_lost`, with the reason, once another rank has ended: the engine cannot go on."""
        if self._leader is not None:
            self._leader.on_lost = on_lost

    def use_peers(self, key: bytes) -> None:
        """Let tiers fetch what they lack from engines on other machines, which have the deployment's key."""
        if self.tiers is not None:
            block_size = self.allocator.block_size
            self.tiers.peers = Peers(key, block_bytes=self.tiers.block_bytes, block_size=block_size)

    def estimate_budget(self) -> None:
        """Choose a token budget that the settings leave open, without SLOs, by a stored calibration or some hundredths
        of a second of timing. Steps that run correct it. A small model or a GPU keeps the first one.
        """
        budget, model = self.scheduler.budget, self.model
        if not budget.is_open or self.slo_enabled or self._estimate is not None:
            return
        if isinstance(model, LoadedModel) and has_long_steps(model):
            self._estimate = load_or_estimate(self.config, model)
            budget.choose(self._estimate)
            if (fetches := self.scheduler.fetches) is not None:
                fetches.seconds_of = budget.seconds

    @property
    def step_times(self) -> StepTimes | None:
        """Return by what steps are predicted now; None if nothing is known of them."""
        if (predictor := self.scheduler.policy.predictor) is not None:
            return predictor.times
        return None if self._estimate is None else StepTimes(self._estimate)

    def attainable(self) -> Attainable | None:
        """Return what this machine can keep of the SLO of the settings, as far as it is known now; None without one."""
        predictor, plan = self.scheduler.policy.predictor, self.model.plan
        if predictor is None or not self.config.scheduler.has_targets:
            return None
        return attainable(
            predictor.corrected,
            self.targets,
            max_num_seqs=plan.max_num_seqs,
            max_model_len=plan.max_model_len,
            kv_tokens=plan.num_blocks * plan.block_size,
            max_num_batched_tokens=self.scheduler.budget.most,
            estimated=predictor.cost.error is None and predictor.num_observed < ESTIMATED_STEPS,
        )

    @property
    def max_model_len(self) -> int:
        """Return how many tokens prompt and output may have together."""
        return self.model.plan.max_model_len

    @property
    def has_unfinished(self) -> bool:
        """Return whether any request is waiting or running, or a step is, though all its requests have ended."""
        is_computing = bool(self._pending) or self.scheduler.has_unfinished or self._steps.is_busy
        return is_computing or (self._transfers is not None and self._transfers.is_busy)

    def ids_in_flight(self, *more: StepPlan) -> list[str]:
        """Return the ids of the requests in the steps that have been planned and are not back, and in `more`."""
        return self._steps.request_ids(*more)

    @property
    def num_pending(self) -> int:
        """Return how many requests wait for their grammar, their creditor or the end of a loan: the scheduler does not
        know them.
        """
        return len(self._pending)

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        scheduling: SchedulingOptions = DEFAULT_SCHEDULING,
        pooling: PoolingParams | None = None,
        adapter: str = "",
    ) -> None:
        """Check a request against `limits` and accept it: see `add`. `adapter` is the digest of a LoRA adapter.

        Raises InvalidRequestError, and changes nothing, if the model or the cache cannot serve it.
        """
        self.limits.check(prompt_token_ids, params, pooling)
        prompt = tuple(prompt_token_ids)
        self.add(Add(request_id, prompt, params, scheduling=scheduling, pooling=pooling, adapter=adapter))

    @guarded
    def add(self, request: Add) -> None:
        """Accept a request that was checked against `limits`; its output comes out of `step`. `params.n` is ignored:
        each choice is a request.

        Raises InvalidRequestError if it has SLO targets and SLO scheduling is disabled, or if its adapter is not
        loaded, SloUnattainableError if it has `on_time_only` and cannot meet its SLO now. Then nothing is changed. A
        request whose grammar is not ready is held until it is, and may be rejected by a step.
        """
        scheduling = request.scheduling
        assert request.keeps_to(self.limits), "call EngineLimits.check() before submitting"
        if self.tiers is not None and self._tier_files is None:
            raise EngineUnavailableError("the engine is closed")
        if (scheduling.targets not in (None, NO_SLO) or scheduling.on_time_only) and not self.slo_enabled:
            raise InvalidRequestError(SLO_DISABLED, parameter="targets")
        if request.adapter and request.adapter not in self.executor.adapters:
            raise InvalidRequestError("the adapter of the request is not loaded any more", parameter="model")
        self._pending.add(request)

    def _schedule_request(self, request: Add, matcher: Future[LLMatcher] | None) -> None:
        """Hand a request to the scheduler. Raises SloUnattainableError."""
        request = request.settled
        assert request.seed is not None
        num_prompt, params, now = len(request.prompt_token_ids), request.params, time.monotonic()
        scheduling = replace(request.scheduling.settled(self.targets, now), cache_salt=request.cache_salt)
        added = Request(
            request.request_id,
            request.prompt_token_ids,
            params,
            max_tokens=self.limits.max_new_tokens(num_prompt, params),
            seed=request.seed,
            eos_token_ids=() if params.ignore_eos else self.model.eos_token_ids,
            choice=request.choice,
            scheduling=scheduling,
            pooling=request.pooling,
            adapter=request.adapter,
            block_sources=request.block_sources,
            most_here=1 if request.hands_over else -1,
        )
        if (point := request.resume_point) is not None:
            added.resume(point.token_ids, point.token_times, num_prompt_logprobs=point.num_prompt_logprobs)
        if (loan := request.loan) is not None:
            added.kv.loan = KvLoan(loan.number, loan.num_blocks, self.allocator.block_size)
        self.scheduler.add(added, now, sent_time=request.sent)
        if matcher is not None:
            self._matchers[request.request_id] = matcher

    def _adapters_in_use(self) -> set[str]:
        """Return the digests of the adapters that unfinished requests have."""
        unfinished = {request.adapter for request in self.scheduler.queue.unfinished}
        in_flight = map(self.scheduler.get, self.ids_in_flight())
        return (
            unfinished
            | {request.adapter for request in self._pending}
            | {request.adapter for request in in_flight if request is not None}
        )

    @guarded
    def step(self, *, isolate: bool = False, before_planning: Callable[[], bool] = lambda: True) -> list[RequestOutput]:
        """Run one forward step. Returns what is new of each request in it; an empty list if there is nothing to do.

        If the executor keeps plans, the next step is planned when little of this one is left, unless `before_planning`
        returns False, and runs from the end of this one on, while results are used and requests accepted. One that has
        ended has a row in it if that was not foreseen, whose result is dropped.

        An exception ends the requests of the step and is raised. With `isolate`, for requests of several callers, it
        ends only the requests that it belongs to, with a reason; it is raised after MAX_BROKEN_STEPS steps in a row of
        which nothing could be computed.
        """
        self.adapters.drop_released()
        ended = self._pending.schedule_ready() if self._pending else []
        if not self._steps.is_busy:
            plan = self._plan(ended) if isolate else self._schedule()
            if plan is None:
                self._wait(0.0 if ended else HOLD_SECONDS)
                return ended
            self._steps.submit(plan)
        try:
            if self._plans_ahead:
                self._plan_ahead(ended, isolate, before_planning)
            result = self._steps.collect_isolated() if isolate else self._steps.collect()
        except BaseException as error:  # Ctrl-C too: what the step left in the cache is unknown, so its requests end
            for plan, failed in self._steps.give_up(error):
                self._update(plan, failed)
            raise
        ended += self._update(self._steps.retire(), result)
        if self._transfers is not None:
            if not self.has_unfinished:  # no plan would come with them
                self._transfers.save_rest()
            self._transfers.note_exports(self.is_unfinished)
        return ended

    @guarded
    def finish(self, command: Finish) -> RequestOutput | None:
        """End a request. Returns its last output, which accounts for its time until `command.ended`, or until now; None
        if it has ended already, or if it moves and a step gives that output.
        """
        request_id, reason, now = command.request_id, command.reason, time.monotonic()
        if self._pending.forget(request_id) is not None:
            return RequestOutput(request_id, finish_reason=reason)
        is_over = self.scheduler.finish(
            *(request_id, reason),
            num_tokens=command.num_tokens,
            num_there=command.num_there,
            now=now,
            wanted_until=command.ended,
        )
        if not is_over:
            return None
        if self._transfers is not None:
            self._transfers.save_departing()
            if self._tier_files is not None and not self.has_unfinished:  # no plan would come with them
                self._transfers.save_rest()
        return RequestOutput(request_id, finish_reason=reason, latency_breakdown=self._latencies.pop(request_id))

    @guarded
    def export(self, command: Export) -> None:
        """Have blocks of a request laid ready for another engine: `take_exported` tells when they are there."""
        assert self._transfers is not None, "blocks go to tiers"
        self._transfers.export(command)

    @guarded
    def prefetch(self, command: Prefetch) -> bool:
        """Bring blocks into the prefix cache for a request that will come: `take_prefetched` tells when it is done.
        Returns False if blocks cannot come from elsewhere.
        """
        if self._transfers is None:
            return False
        self._transfers.prefetch(command)
        return True

    def take_exported(self) -> dict[str, int]:
        """Return for which requests leading blocks can be fetched now, and how many, since the last call."""
        return {} if self._transfers is None else self._transfers.take_exported()

    def take_prefetched(self) -> list[tuple[str, int]]:
        """Return for which requests what was wanted ahead has come, as far as it will, and how many leading blocks of
        it there are, since the last call.
        """
        return [] if self._transfers is None else self._transfers.take_prefetched()

    def is_unfinished(self, request_id: str) -> bool:
        """Return whether a request of that id is waiting or running."""
        return request_id in self._pending or self.scheduler.requests.is_unfinished(request_id)

    def abort(self, request_id: str) -> bool:
        """End a request whose output is not wanted any more. Returns False if it has ended already."""
        return self.finish(Finish(request_id, FinishReason.ABORT)) is not None

    @guarded
    def abort_all(self) -> None:
        """End all requests, and what is in flight."""
        unfinished = [each.request_id for each in self.scheduler.queue.unfinished]
        for request_id in [*(each.request_id for each in self._pending), *unfinished]:
            self.abort(request_id)
        while self.has_unfinished:  # steps in flight come back
            self.step(isolate=True)

    # Loans ------------------------------------------------------------------------------------------------------------

    @property
    def channel_bytes(self) -> int:
        """Return the bytes of the data of a loan's channel; 0: there are no loans."""
        if self.lender is None or not isinstance(self.executor, Executor):
            return 0
        return self.executor.decoder.channel_bytes(self.executor.kv_cache, self.scheduler.budget.most)

    @guarded
    def lend(self, loan: Loan) -> bool:
        """Hold the leading blocks of a request of another engine, or refuse: whatever is lent, each request that was
        accepted here has room alone. Returns whether it lends.
        """
        assert self.lender is not None, "kv_loans is not set"
        if self._transfers is not None:
            self._transfers.save_rest()  # what is lent may be written to at once
        needed = self._pending.num_needed_blocks
        for request in self.scheduler.queue.unfinished:
            lent = 0 if request.kv.loan is None else request.kv.loan.num_blocks
            blocks = blocks_needed(request.num_prompt_tokens, request.max_tokens, self.allocator.block_size)
            needed = max(needed, blocks - lent)
        return self.lender.lend(loan, needed=needed)

    @guarded
    def take_back(self, number: int) -> None:
        """Have the blocks of a loan again that has ended."""
        assert self.lender is not None
        self.lender.take_back(number)

    def _end_loan(self, event: RequestFinished) -> None:
        if event.request.kv.loan is not None:
            close_channel(self._channels, event.request.kv.loan.number)

    # Steps ------------------------------------------------------------------------------------------------------------

    def _schedule(self) -> StepPlan | None:
        """Return the next step, with the KV blocks that have arrived. Raises PlanningError."""
        if self._transfers is not None:
            self._transfers.exchange()
        return self.scheduler.schedule(time.monotonic())

    def _wait(self, seconds: float) -> None:
        """Wait at most so long for what keeps requests from a step. No step runs."""
        if self._transfers is not None and (self._transfers.land_ahead() or self._transfers.wait(seconds)):
            return
        self._pending.wait(seconds)
        assert not self.scheduler.has_unfinished, "unfinished requests, and nothing can run"

    def _plan(self, ended: list[RequestOutput]) -> StepPlan | None:
        """Return the next step. Requests that it cannot be planned with are ended, and added to `ended`."""
        while True:
            try:
                return self._schedule()
            except PlanningError as error:
                if not error.blamed:
                    raise
                logger.exception("requests end since a step could not be planned: %d", len(error.blamed))
                for request in error.blamed:
                    output = self.finish(Finish(request.request_id, FinishReason.ERROR))
                    assert output is not None, "it was unfinished"
                    reason = f"the step with it could not be planned: {error.__cause__!r}"
                    ended.append(replace(output, error=reason))

    @property
    def _plans_ahead(self) -> bool:
        """Return whether a step may be planned while the one before runs. Not with recurrent states, of which a request
        would need twice as many slots. Where drafts are likely, which follow the newest token, the scheduler waits.
        """
        return self.executor.keeps_plans and self.allocator.states is None

    def _plan_ahead(self, ended: list[RequestOutput], isolate: bool, before_planning: Callable[[], bool]) -> None:
        """Plan the step after the one that runs, when that has little left to do."""
        if not self._steps.wait_for_layers() or not before_planning():
            return
        try:
            plan = self._plan(ended) if isolate else self._schedule()
        except PlanningError:  # which is raised, if it is still one, when nothing is in flight
            return
        if plan is not None:
            self._steps.submit(plan)

    def _update(self, plan: StepPlan, result: StepResult) -> list[RequestOutput]:
        """Take in the result of a step, and add to the last output of each request where its time went."""
        outputs = self.scheduler.update(plan, result, time.monotonic())
        if self._transfers is not None:
            self._transfers.save_departing()
            self._transfers.save_ahead(outputs)
        for index, output in enumerate(outputs):
            if output.finish_reason is not None:
                outputs[index] = replace(output, latency_breakdown=self._latencies.pop(output.request_id))
        return outputs
