"""Joins the scheduler and the model: token ids in, token ids out."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from hashlib import blake2b
from itertools import chain

from llguidance import LLMatcher

from splitfuse.config.engine import EngineConfig
from splitfuse.config.values import parse_adapter
from splitfuse.core.events import PhasesEntered, RequestFinished, StepRecord
from splitfuse.core.kv.fetch_queue import FetchQueue
from splitfuse.core.kv.fetching import FIRST_BANDWIDTH, WAITING_SHARE, Fetch, Fetching
from splitfuse.core.kv.loans import KvLoan
from splitfuse.core.limits import EngineLimits, blocks_needed
from splitfuse.core.plan import ChunkResult, StepPlan, StepResult
from splitfuse.core.policy import PlanningError, SchedulingPolicy
from splitfuse.core.pooling_params import PoolingParams
from splitfuse.core.request import Request
from splitfuse.core.request_output import FinishReason, RequestOutput
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.scheduling_options import DEFAULT_SCHEDULING, SchedulingOptions
from splitfuse.core.slo.attainable import Attainable, attainable
from splitfuse.core.slo.cost_model import CostModel, StepTimes
from splitfuse.core.slo.targets import NO_SLO, SLO_DISABLED, SloTargets
from splitfuse.engine.build import build_scheduler
from splitfuse.engine.calibrate import load_or_estimate
from splitfuse.engine.guard import Guard, check_process, guarded
from splitfuse.engine.loans import AwaitedLoan, Lender
from splitfuse.engine.memory import give_back_memory
from splitfuse.engine.messages import Add, Export, Finish, Loan, Prefetch
from splitfuse.engine.remote.peers import Peers
from splitfuse.engine.tier_files import TierFiles, open_tiers
from splitfuse.engine.tiers import Tiers, make_tiers
from splitfuse.errors import (
    AdapterError,
    EngineUnavailableError,
    InvalidRequestError,
    ModelNotFoundError,
    RankLostError,
    SloUnattainableError,
)
from splitfuse.kernels.lora import PackedAdapter
from splitfuse.kernels.sharing import WeightSharing
from splitfuse.models.encoder.spec import is_encoder
from splitfuse.models.sources.source import ModelSource
from splitfuse.runtime.encoding import LoadedEncoder, encoder_settings, load_encoder
from splitfuse.runtime.executor import Executor, StepHandle
from splitfuse.runtime.loading import LoadedModel, load_model, open_source
from splitfuse.runtime.memory_plan import MemoryPlan
from splitfuse.runtime.step_estimate import has_long_steps

MAX_BROKEN_STEPS = 3
"""Number of consecutive steps of which nothing could be computed, after which the engine is taken to be broken."""

ESTIMATED_STEPS = 100
"""Number of steps after which an estimated cost model has been corrected by as many that it is not called that."""
HOLD_SECONDS = 0.01
"""Longest time that a step waits for the grammar or the KV blocks of a request if there is nothing else to do."""
NOT_LENT = "the engine that was to lend to it did not"
"""Reason why a request with a loan cannot begin at its engine."""

MOVING_SHARE = 1 / 16
"""Fraction of the time of a step that copying blocks of requests which move may take: of all on their way out, and of
all on their way in. Reading and writing them takes threads of the same cores as long again, or longer.
"""
IDLE_SECONDS = 0.004
"""Seconds that it may take where no request runs: one may come meanwhile."""
TIME_TO_WRITE = 0.01
"""Longest wait for blocks that go ahead of a request which leaves, in seconds."""
WORTH_A_STEP = 1 / 2
"""Longest wait of a step for blocks of requests that have moved here, as a fraction of a step: without it they would
miss the step.
"""
FEWEST_MOVED = 4
"""Number of blocks that are copied at a time, whatever time they take."""

logger = logging.getLogger(__name__)


def rejection(request_id: str, error: Exception) -> RequestOutput:
    """Return the last output of a request that is not accepted, or that could not be added."""
    text, retry_after = str(error), math.inf
    if isinstance(error, SloUnattainableError):
        retry_after = error.retry_after
    elif not isinstance(error, InvalidRequestError):
        logger.error("a request could not be added: %s", request_id, exc_info=error)
        text = f"it could not be added: {error!r}"
    return RequestOutput(request_id, finish_reason=FinishReason.ERROR, error=text, retry_after=retry_after)


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
        self.tiers, self._tier_files, fetching = None, tier_files, None
        self._leader = model.leader if isinstance(model, LoadedModel) else None
        moves = isinstance(self.executor, Executor) and not plan.num_states and self._leader is None
        if tier_files is not None and isinstance(self.executor, Executor) and moves:
            made = make_tiers(
                tier_files,
                config.cache,
                block_bytes=self.executor.kv_cache.block_bytes,
                block_size=plan.block_size,
                fingerprint=blake2b(model.kv_fingerprint, key=name_key or b"", digest_size=32).digest(),
            )
            if made is not None:
                self.tiers, inbox = made
                fetching = Fetching(self.tiers, inbox)
                self.executor.sink, self.executor.inbox = self.tiers, inbox
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
        self._step_seconds = 0.0  # of the last step
        if self.tiers is not None:
            self.events.subscribe(StepRecord, self._note_step)
        if self.scheduler.drafting is not None and isinstance(self.executor, Executor):
            self.executor.num_forced = self.scheduler.drafting.most
        self._in_flight: deque[tuple[StepPlan, StepHandle | BaseException | None]] = deque()
        """Plans that are not back, the first of which runs: what was submitted, or failed to be; None: it must be."""
        self._num_broken_steps = 0
        self._held: dict[str, tuple[Add, Future[LLMatcher]]] = {}
        self._to_export: dict[str, int] = {}  # how many blocks others want of requests, in the order of asking
        self._exporting: dict[str, tuple[bytes, ...]] = {}  # names of blocks that are to be saved, by request
        self._exported: dict[str, int] = {}
        self.lender: Lender | None = None
        """What the engine has lent, if it lends and borrows."""
        self._awaited: dict[str, AwaitedLoan] = {}
        self._crowded: dict[str, tuple[Add, Future[LLMatcher] | None]] = {}  # too large beside what is lent
        if config.cache.kv_loans and isinstance(self.executor, Executor):
            executor = self.executor
            self.lender = Lender(executor.decoder, executor.kv_cache, self.allocator)
            self.events.subscribe(RequestFinished, self._end_loan)
        # Of the accepted requests: while they are referred to, no step has to wait until one is made again.
        matchers = self._matchers = dict[str, Future[LLMatcher]]()
        self.events.subscribe(RequestFinished, lambda event: matchers.pop(event.request.request_id, None))
        self.adapters: dict[str, str] = {}
        """Digests of the LoRA adapters that new requests can have, by name."""
        if is_restart:
            self.reset_adapters()
        else:
            for name, path in map(parse_adapter, config.model.lora):
                self.load_adapter(name, path)
        generates = isinstance(model, LoadedModel)
        vocab_size, num_blocks, size = model.spec.vocab_size, plan.num_blocks, plan.block_size
        self.limits = EngineLimits(plan.max_model_len, vocab_size, num_blocks, size, generates=generates)

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
        if self.tiers is not None and files is not None:
            self.executor.drain()
            self._save_rest()
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
        fetches = self.scheduler.fetches
        waits = bool(self._held or self._awaited or self._crowded)
        is_computing = waits or self.scheduler.has_unfinished or bool(self._in_flight)
        return is_computing or (fetches is not None and fetches.ahead.is_busy)

    def ids_in_flight(self, *more: StepPlan) -> list[str]:
        """Return the ids of the requests in the steps that have been planned and are not back, and in `more`."""
        plans = [*(plan for plan, _ in self._in_flight), *more]
        if len(plans) == 1:
            return plans[0].request_ids
        return list(dict.fromkeys(chain.from_iterable(plan.request_ids for plan in plans)))

    @property
    def num_held(self) -> int:
        """Return how many requests wait for their grammar, their creditor or the end of a loan: the scheduler does not
        know them.
        """
        return len(self._held) + len(self._awaited) + len(self._crowded)

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
        if request.loan is not None:
            self._awaited[request.request_id] = AwaitedLoan.of(request)
            return
        self._prepare(request)

    def _prepare(self, request: Add) -> None:
        """Accept a request, once its grammar is ready. Raises SloUnattainableError."""
        matcher = None
        if (form := request.params.structured_outputs) is not None:
            matcher = self.model.grammars.prepare(form)
            if not matcher.done() or matcher.exception() is not None:
                self._held[request.request_id] = request, matcher
                return
        self._accept(request, matcher)

    def _accept(self, request: Add, matcher: Future[LLMatcher] | None) -> None:
        """Hand a request to the scheduler, once what is lent leaves room for it. Raises SloUnattainableError."""
        if self.lender is not None and self._own_blocks(request) > self.allocator.capacity:
            self._crowded[request.request_id] = request, matcher
            return
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

    def load_adapter(self, name: str, path: str) -> str:
        """Load a LoRA adapter from a folder or the Hub, under a name that another one gives up, and return its digest:
        requests choose it by that. What runs with the other goes on with it.

        Raises AdapterError, ModelNotFoundError.
        """
        digest, adapter = self.model.load_adapter(path)
        self.install_adapter(name, digest, adapter)
        return digest

    @guarded
    def install_adapter(self, name: str, digest: str, adapter: PackedAdapter) -> None:
        """Give requests an adapter that `LoadedModel.load_adapter` has returned."""
        self.executor.adapters.setdefault(digest, adapter)
        self.adapters[name] = digest
        self._drop_adapters()

    @guarded
    def unload_adapter(self, name: str) -> None:
        """Take a LoRA adapter from new requests. It stays until the last request that has it has ended."""
        self.adapters.pop(name, None)
        self._drop_adapters()

    @guarded
    def release_adapter(self, digest: str) -> None:
        """Take a LoRA adapter from new requests, as `unload_adapter`, under all names that it has."""
        self.adapters = {name: each for name, each in self.adapters.items() if each != digest}
        self._drop_adapters()

    def reset_adapters(self) -> None:
        """Have the adapters of the settings again, and no others. One that can be read no more is lacking then, which
        the next server is told.
        """
        of_settings = dict(map(parse_adapter, self.config.model.lora))
        for name in self.adapters.keys() - of_settings.keys():
            self.unload_adapter(name)
        for name, path in of_settings.items():
            if name not in self.adapters:
                try:
                    self.load_adapter(name, path)
                except (AdapterError, ModelNotFoundError) as error:
                    logger.warning("the LoRA adapter %s is not loaded again: %s", name, error)

    def _drop_adapters(self) -> None:
        """Forget the adapters that have neither a name nor a request."""
        used = {request.adapter for request in self.scheduler.queue.unfinished}
        used |= {request.adapter for request, _ in (*self._held.values(), *self._crowded.values())}
        used |= {awaited.request.adapter for awaited in self._awaited.values()}
        used |= {request.adapter for name in self.ids_in_flight() if (request := self.scheduler.get(name)) is not None}
        for digest in self.executor.adapters.keys() - self.adapters.values() - used:
            del self.executor.adapters[digest]

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
        if len(self.executor.adapters) > len(set(self.adapters.values())):
            self._drop_adapters()
        ended = self._accept_held() if self._held else []
        if self._awaited or self._crowded:
            ended += self._accept_others()
        if not self._in_flight:
            plan = self._plan(ended) if isolate else self._schedule()
            if plan is None:
                if self.tiers is not None and self._land_ahead():
                    return ended
                if self.tiers is not None and self.tiers.is_asked:
                    if not ended:
                        self.tiers.wait(HOLD_SECONDS)
                    return ended
                if self._held and not ended:
                    wait((matcher for _, matcher in self._held.values()), HOLD_SECONDS, FIRST_COMPLETED)
                elif (self._awaited or self._crowded) and not ended:
                    time.sleep(HOLD_SECONDS)
                assert not self.scheduler.has_unfinished, "unfinished requests, and nothing can run"
                return ended
            self._submit(plan)
        try:
            if self._plans_ahead:
                self._plan_ahead(ended, isolate, before_planning)
            result = self._collect_isolated() if isolate else self._collect()
        except BaseException as error:  # Ctrl-C too: what the step left in the cache is unknown, so its requests end
            self.executor.drain()
            failed = ChunkResult(error=f"the forward step failed: {error!r}")
            while self._in_flight:
                plan, _ = self._in_flight.popleft()
                self.scheduler.requests.retire_again(plan)
                self._update(plan, {chunk.request_id: failed for chunk in plan.chunks})
            raise
        plan, _ = self._in_flight.popleft()
        ended += self._update(plan, result)
        if self.tiers is not None:
            if not self.has_unfinished:  # no plan would come with them
                self._save_rest()
            if self._exporting:
                self._note_exports(self.tiers)
        return ended

    @guarded
    def finish(self, command: Finish) -> RequestOutput | None:
        """End a request. Returns its last output, which accounts for its time until `command.ended`, or until now; None
        if it has ended already, or if it moves and a step gives that output.
        """
        request_id, reason, now = command.request_id, command.reason, time.monotonic()
        if (request := self._forget_waiting(request_id)) is not None:
            if request.loan is not None:
                self._close_channel(request.loan.number)
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
        self._save_departing()
        if self.tiers is not None and self._tier_files is not None and not self.has_unfinished:  # no plan would come
            self._save_rest()
        return RequestOutput(request_id, finish_reason=reason, latency_breakdown=self._latencies.pop(request_id))

    @guarded
    def export(self, command: Export) -> None:
        """Have blocks of a request laid ready for another engine: `take_exported` tells when they are there."""
        assert self.tiers is not None, "blocks go to tiers"
        self._to_export[command.request_id] = command.num_blocks

    @guarded
    def prefetch(self, command: Prefetch) -> bool:
        """Bring blocks into the prefix cache for a request that will come: `take_prefetched` tells when it is done.
        Returns False if blocks cannot come from elsewhere.
        """
        if (fetches := self.scheduler.fetches) is None:
            return False
        fetches.ahead.add(command.request_id, command.names, command.token_ids, command.block_sources)
        return True

    def take_exported(self) -> dict[str, int]:
        """Return for which requests leading blocks can be fetched now, and how many, since the last call."""
        taken, self._exported = self._exported, {}
        return taken

    def take_prefetched(self) -> list[tuple[str, int]]:
        """Return for which requests what was wanted ahead has come, as far as it will, and how many leading blocks of
        it there are, since the last call.
        """
        return [] if self.scheduler.fetches is None else self.scheduler.fetches.ahead.take_ended()

    def is_unfinished(self, request_id: str) -> bool:
        """Return whether a request of that id is waiting or running."""
        if request_id in self._held or request_id in self._awaited or request_id in self._crowded:
            return True
        request = self.scheduler.get(request_id)
        return request is not None and not request.is_finished

    def abort(self, request_id: str) -> bool:
        """End a request whose output is not wanted any more. Returns False if it has ended already."""
        return self.finish(Finish(request_id, FinishReason.ABORT)) is not None

    @guarded
    def abort_all(self) -> None:
        """End all requests, and what is in flight."""
        unfinished = [each.request_id for each in self.scheduler.queue.unfinished]
        for request_id in [*self._held, *self._awaited, *self._crowded, *unfinished]:
            self.abort(request_id)
        while self.has_unfinished:  # steps in flight come back
            self.step(isolate=True)

    def _accept_held(self) -> list[RequestOutput]:
        """Accept the requests whose grammar is ready. Returns the last output of each that is rejected."""
        outputs = []
        for request_id, (request, matcher) in list(self._held.items()):
            if matcher.done():
                del self._held[request_id]
                try:
                    matcher.result()
                    self._accept(request, matcher)
                except Exception as error:
                    outputs.append(self._reject(request, error))
        return outputs

    def _reject(self, request: Add, error: Exception) -> RequestOutput:
        """Return the last output of a request that was known here and is not accepted."""
        if request.loan is not None:
            self._close_channel(request.loan.number)
        return rejection(request.request_id, error)

    def _forget_waiting(self, request_id: str) -> Add | None:
        """Forget a request that the scheduler does not know, and return it; None if there is none."""
        if (awaited := self._awaited.pop(request_id, None)) is not None:
            if awaited.channel is not None:
                awaited.channel.close()
            return awaited.request
        waiting = self._held.pop(request_id, None) or self._crowded.pop(request_id, None)
        return None if waiting is None else waiting[0]

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
        self._save_rest()  # what is lent may be written to at once
        waiting = [each.request for each in self._awaited.values()] + [each for each, _ in self._held.values()]
        needs = [self._own_blocks(each) for each in waiting]
        for request in self.scheduler.queue.unfinished:
            need = blocks_needed(request.num_prompt_tokens, request.max_tokens, self.allocator.block_size)
            needs.append(need - (0 if request.kv.loan is None else request.kv.loan.num_blocks))
        if self._crowded:
            needs.append(self.allocator.num_blocks)
        return self.lender.lend(loan, needed=max(needs, default=0))

    @guarded
    def take_back(self, number: int) -> None:
        """Have the blocks of a loan again that has ended."""
        assert self.lender is not None
        self.lender.take_back(number)

    def _own_blocks(self, request: Add) -> int:
        """Return the blocks that a request may need of the cache here."""
        num_prompt = len(request.prompt_token_ids)
        most = self.limits.max_new_tokens(num_prompt, request.params)
        lent = 0 if request.loan is None else request.loan.num_blocks
        return blocks_needed(num_prompt, most, self.allocator.block_size) - lent

    def _accept_others(self) -> list[RequestOutput]:
        """Accept the requests whose creditor lends, and those for which there is room again. Returns the last output of
        each that cannot go on here.
        """
        outputs = []
        for request_id, awaited in list(self._awaited.items()):
            loan, is_granted = awaited.request.loan, awaited.is_granted
            if is_granted is None:
                continue
            assert loan is not None and isinstance(self.executor, Executor)
            del self._awaited[request_id]
            if awaited.channel is not None:
                self.executor.channels[loan.number] = awaited.channel
            if not is_granted:
                self._close_channel(loan.number)
                outputs.append(RequestOutput(request_id, finish_reason=FinishReason.MOVED, error=NOT_LENT))
                continue
            try:
                self._prepare(awaited.request)
            except Exception as error:
                outputs.append(self._reject(awaited.request, error))
        for request_id, (request, matcher) in list(self._crowded.items()):
            if self._own_blocks(request) > self.allocator.capacity:
                break
            del self._crowded[request_id]
            try:
                self._accept(request, matcher)
            except Exception as error:
                outputs.append(self._reject(request, error))
        return outputs

    def _end_loan(self, event: RequestFinished) -> None:
        if event.request.kv.loan is not None:
            self._close_channel(event.request.kv.loan.number)

    def _close_channel(self, number: int) -> None:
        assert isinstance(self.executor, Executor)
        if (channel := self.executor.channels.pop(number, None)) is not None:
            channel.close()

    def _schedule(self) -> StepPlan | None:
        """Return the next step, with the KV blocks that have arrived. Raises PlanningError."""
        if self.tiers is not None and (fetches := self.scheduler.fetches) is not None:
            self._take_answers(self.tiers, fetches)
            if self._to_export:
                self._export_more(self._movable_blocks(self.tiers))
            if fetches.ahead.is_busy:
                fetches.ahead.most_at_once = self._landable_blocks(self.tiers)
            if asked := fetches.take(time.monotonic()):
                self._ask(asked, self.tiers, fetches)
                if self.scheduler.queue.fetching:
                    self.tiers.wait(WAITING_SHARE * self._step_seconds)  # else they wait for the whole step
                self._take_answers(self.tiers, fetches)
        return self.scheduler.schedule(time.monotonic())

    def _ask(self, asked: Sequence[Fetch], tiers: Tiers, fetches: FetchQueue) -> None:
        """Ask for blocks, but read those at once that a request has left at another engine, so that it is in the next
        step: its client waits. Not from a disk, nor for longer than that is worth.
        """
        until = time.monotonic() + WORTH_A_STEP * self._step_seconds
        for fetch in asked:
            frames = None
            if fetch.has_moved and time.monotonic() + tiers.seconds_in_memory(fetch) <= until:
                frames = tiers.read_at_once(fetch, until)
            if frames is None:
                tiers.ask(fetch)
            else:
                fetches.arrived(fetch.number, frames, time.monotonic())

    def _save_rest(self) -> None:
        """Save the blocks of which no plan has said so, while nothing is in flight."""
        assert isinstance(self.executor, Executor)
        self.executor.save(self.allocator.take_saves())

    def _movable_blocks(self, tiers: Tiers) -> int:
        """Return how many blocks may be copied at a time for requests that move."""
        seconds = MOVING_SHARE * self._step_seconds if self.scheduler.queue.running else IDLE_SECONDS
        return max(int(seconds * FIRST_BANDWIDTH / tiers.block_bytes), FEWEST_MOVED)

    def _landable_blocks(self, tiers: Tiers) -> int:
        """Return how many blocks may be on their way here for requests that will come: only as far as there is memory
        for them, and for others, so that no step waits for it.
        """
        most, executor = self._movable_blocks(tiers), self.executor
        assert isinstance(executor, Executor), "it has tiers"
        if self.scheduler.queue.running:  # memory is asked for after each step
            return min(executor.num_ready(reserve=True), most)
        executor.have_memory()  # no step waits for it now
        return min(executor.num_ready(), most)

    def _export_more(self, most: int) -> None:
        """Save some more blocks of requests that will move, at most so many with the next plan."""
        for request_id, num_blocks in list(self._to_export.items()):
            request = self.scheduler.get(request_id)
            before = 0 if request is None else request.kv.num_saved_blocks
            names = self.scheduler.requests.save_blocks(request_id, num_blocks, most)
            if names:
                self._exporting[request_id] = tuple(names)
            else:
                self._exported[request_id] = 0
            most -= max(len(names) - before, 0)
            if most == 0:
                return
            del self._to_export[request_id]

    def _save_departing(self) -> None:
        """Save the blocks of requests that have left, before others write to them: the leading ones, for which there is
        room, since those behind them would take their places and are worth nothing without them.
        """
        saves = self.scheduler.requests.take_departing()
        if saves and self.tiers is not None and isinstance(self.executor, Executor):
            saves = saves[: self.tiers.num_export_slots]
            self.executor.save(saves, at_once=True)
            self.tiers.wait_until_written(TIME_TO_WRITE, {save.before for save in saves})

    def _save_ahead(self, outputs: Sequence[RequestOutput]) -> None:
        """Save what was computed for requests that will leave after their first token."""
        if not (saves := self.scheduler.requests.take_going_ahead()) or not isinstance(self.executor, Executor):
            return
        self.executor.save(saves)
        for output in outputs:
            request = self.scheduler.get(output.request_id)
            if request is not None and request.most_here > 0 and request.kv.num_saved_blocks:
                self._exporting[request.request_id] = tuple(request.kv.block_names[: request.kv.num_saved_blocks])

    def _land_ahead(self) -> bool:
        """Land the blocks that were fetched ahead while no step runs. Returns whether there were any."""
        fetches = self.scheduler.fetches
        if fetches is None or self._in_flight or not (lands := fetches.take_lands_ahead()):
            return False
        assert isinstance(self.executor, Executor) and self.tiers is not None
        self._save_rest()  # of a request that has ended between steps: blocks land where its were
        self.executor.land(lands)
        self.tiers.stats.num_fetched += len(lands)
        fetches.ahead.landed(lands, is_there=True)
        return True

    def _note_exports(self, tiers: Tiers) -> None:
        """Note which exports are written."""
        for request_id, names in list(self._exporting.items()):
            num_written = tiers.num_written(names)
            if num_written:
                self._exported[request_id] = num_written
            if num_written == len(names) or not self.is_unfinished(request_id):
                del self._exporting[request_id]

    def _note_step(self, step: StepRecord) -> None:
        assert self.tiers is not None
        self._step_seconds = step.measured_seconds
        self.tiers.stats.num_fetched += len(step.plan.lands)

    def _take_answers(self, tiers: Tiers, fetches: FetchQueue) -> None:
        for number, frames in tiers.answers():
            fetches.arrived(number, frames, time.monotonic())

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
        (_, handle), *_ = self._in_flight
        if handle is None or isinstance(handle, BaseException):
            return
        self.executor.wait_for_layers(handle)
        if not before_planning():
            return
        try:
            plan = self._plan(ended) if isolate else self._schedule()
        except PlanningError:  # which is raised, if it is still one, when nothing is in flight
            return
        if plan is not None:
            self._submit(plan)

    def _submit(self, plan: StepPlan) -> None:
        """Hand a plan to the executor. What that raises is the step's failure, when its turn comes."""
        try:
            self._in_flight.append((plan, self.executor.submit(plan)))
        except BaseException as error:
            self._in_flight.append((plan, error))

    def _collect(self) -> StepResult:
        """Return the result of the first plan in flight. If it fails, those behind it must be submitted again."""
        plan, handle = self._in_flight[0]
        try:
            if handle is None:
                return self._compute(plan)
            if isinstance(handle, BaseException):
                raise handle
            return self.executor.collect(handle)
        except Exception:
            self._in_flight = deque((each, None) for each, _ in self._in_flight)
            self.scheduler.requests.retire_again(plan)
            raise

    def _compute(self, plan: StepPlan) -> StepResult:
        """Return the result of a plan for those of its requests that have not ended since it was made."""
        results: StepResult = {chunk.request_id: ChunkResult() for chunk in plan.chunks}
        chunks = tuple(chunk for chunk in plan.chunks if self.is_unfinished(chunk.request_id))
        if chunks:
            results |= self.executor.collect(self.executor.submit(replace(plan, chunks=chunks)))
        else:
            self.scheduler.requests.retire_again(plan)
        return results

    def _collect_isolated(self) -> StepResult:
        """Return the result of the first plan in flight. If it fails, its halves are tried, and theirs, down to the
        requests that fail alone: a chunk gives the same alone as with others. Those which overwrite the recurrent state
        that they read cannot be tried again: their requests are computed again from a snapshot, by chunks which can.
        """
        errors: list[Exception] = []
        plan, _ = self._in_flight[0]
        result = self._compute_halves(plan, errors, self._collect)
        if errors or any(self.is_unfinished(chunk.request_id) for chunk in plan.chunks):  # else nothing was computed
            self._num_broken_steps = self._num_broken_steps + 1 if len(errors) == len(plan.chunks) else 0
        if self._num_broken_steps >= MAX_BROKEN_STEPS:
            raise errors[-1]
        return result

    def _compute_halves(
        self, plan: StepPlan, errors: list[Exception], collect: Callable[[], StepResult] | None = None
    ) -> StepResult:
        try:
            return self._compute(plan) if collect is None else collect()
        except RankLostError:  # no request can be computed any more, and none is to blame
            raise
        except Exception as error:
            if len(plan.chunks) == 1 and plan.chunks[0].is_repeatable:
                request_id = plan.chunks[0].request_id
                logger.error("request %s failed: %r", request_id, error, exc_info=not errors)  # one traceback a step
                errors.append(error)
                return {request_id: ChunkResult(error=f"the forward step failed: {error!r}")}
            logger.warning("a step of %d requests failed, and is tried in halves: %r", len(plan.chunks), error)
            lost = [chunk.request_id for chunk in plan.chunks if not chunk.is_repeatable]
            errors += [error] * len(lost)
        result: StepResult = {request_id: ChunkResult(state_lost=True) for request_id in lost}
        again = [chunk for chunk in plan.chunks if chunk.is_repeatable]
        middle = len(again) // 2
        for chunks in filter(None, (again[:middle], again[middle:])):
            ids = {chunk.request_id for chunk in chunks}
            new = tuple(request for request in plan.new_requests if request.request_id in ids)
            half = replace(plan, chunks=tuple(chunks), new_requests=new, retired_requests=(), saves=(), prefetched=())
            result |= self._compute_halves(half, errors)
        return result

    def _update(self, plan: StepPlan, result: StepResult) -> list[RequestOutput]:
        """Take in the result of a step, and add to the last output of each request where its time went."""
        outputs = self.scheduler.update(plan, result, time.monotonic())
        self._save_departing()
        self._save_ahead(outputs)
        for index, output in enumerate(outputs):
            if output.finish_reason is not None:
                outputs[index] = replace(output, latency_breakdown=self._latencies.pop(output.request_id))
        return outputs
