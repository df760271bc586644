"""Builds the scheduler of an engine, with its blocks and its latency accounting, from the configuration."""

from __future__ import annotations

import logging
from dataclasses import replace

from splitfuse.config.engine import EngineConfig
from splitfuse.core.events import StepRecord
from splitfuse.core.kv.block_allocator import BlockAllocator
from splitfuse.core.kv.fetching import Fetching
from splitfuse.core.kv.names import BlockNamer, new_key
from splitfuse.core.kv.state_allocator import StateAllocator
from splitfuse.core.latency.ledger import LatencyLedger
from splitfuse.core.policy import SchedulingPolicy
from splitfuse.core.scheduler import Scheduler
from splitfuse.core.slo.cost_model import CostModel
from splitfuse.core.slo.deadline_policy import make_policy
from splitfuse.core.speculation.drafting import Drafting
from splitfuse.core.speculation.model_drafts import ModelDrafts
from splitfuse.core.step_budget import StepBudget
from splitfuse.runtime.draft_model import DraftRunner
from splitfuse.runtime.memory_plan import MemoryPlan

logger = logging.getLogger(__name__)


def build_scheduler(
    config: EngineConfig,
    plan: MemoryPlan,
    *,
    policy: SchedulingPolicy | None = None,
    cost: CostModel | None = None,
    name_key: bytes | None = None,
    kv_fingerprint: bytes = b"",
    fetching: Fetching | None = None,
    saves_blocks: bool = False,
    draft_model: DraftRunner | None = None,
) -> tuple[Scheduler, BlockAllocator, LatencyLedger]:
    """Return the scheduler for a model with that memory plan, its allocator, and the listener that accounts for
    latencies. With a cost model, and no other policy, it schedules by SLO. Blocks are named with `name_key`, or one of
    their own that no other engine has, and `kv_fingerprint`; with `fetching` they come from tiers, and go there, all
    of them if it `saves_blocks`, or those of requests that move. `draft_model` drafts tokens too.
    """
    caching = config.cache.enable_prefix_caching
    key = name_key or new_key()
    namer = BlockNamer(plan.block_size, key=key, fingerprint=kv_fingerprint) if caching else None
    states = None
    if plan.num_states:
        interval = plan.snapshot_interval if caching else None
        states = StateAllocator(plan.num_states, interval=interval, num_reserved=plan.max_num_seqs)
    saves_blocks = saves_blocks and fetching is not None
    allocator = BlockAllocator(plan.num_blocks, plan.block_size, namer=namer, states=states, saves_blocks=saves_blocks)
    settings = replace(config.scheduler, max_num_seqs=plan.max_num_seqs)
    budget = StepBudget.of(settings, cost, most=plan.max_num_batched_tokens)
    settings = replace(settings, max_num_batched_tokens=budget.most)
    most, drafting = config.scheduler.num_speculative_tokens, None
    if most and states is not None:
        logger.warning("no tokens are drafted: the model has a recurrent state, which cannot be taken back")
    elif most:
        drafting = Drafting(most, None if draft_model is None else _model_drafts(draft_model, plan, caching=caching))
    scheduler = Scheduler(settings, allocator, policy or make_policy(settings, cost), budget, drafting, fetching)
    scheduler.events.subscribe(StepRecord, budget.observe)
    if drafting is not None:
        scheduler.events.subscribe(StepRecord, drafting.observe)
    predictor = scheduler.policy.predictor
    latencies = LatencyLedger(scheduler.events, cost=None if predictor is None else predictor.cost)
    return scheduler, allocator, latencies


def _model_drafts(model: DraftRunner, plan: MemoryPlan, *, caching: bool) -> ModelDrafts:
    assert plan.draft is not None, "a draft model has its place in the memory plan"
    namer = BlockNamer(plan.block_size, key=new_key()) if caching else None
    return ModelDrafts(
        model,
        BlockAllocator(plan.num_blocks, plan.block_size, namer=namer),
        vocab_size=min(model.vocab_size, model.decoder.spec.vocab_size),
        max_positions=model.decoder.spec.max_position,
        relative_cost=plan.draft.weights / plan.weights,
    )
