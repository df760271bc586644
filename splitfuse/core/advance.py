"""Moves a request on by what a step has computed of it: its tokens, KV blocks, recurrent state and SLO."""

from __future__ import annotations

from splitfuse.core.kv.block_allocator import BlockAllocator
from splitfuse.core.plan import Chunk, ChunkResult, Logprobs
from splitfuse.core.request import Request
from splitfuse.core.request_output import FinishReason, RequestOutput


def advance(
    request: Request, chunk: Chunk, result: ChunkResult, allocator: BlockAllocator, *, now: float
) -> FinishReason | None:
    """Move a request on by one computed chunk and the tokens it chose. Returns why it ends with them; None if it goes
    on. A chunk whose recurrent state is lost counts for nothing: the request is to be preempted, and computed again.
    """
    kv, state = request.kv, request.kv.state
    if state is not None and (result.state_lost or state.is_lost):
        state.is_lost = kv.repeatable = kv.preempt_on_return = True
        return None
    if chunk.loan is not None:
        kv.settle_deposits(allocator, chunk.loan)
    tokens, end = result.token_ids, chunk.start + len(chunk.token_ids)
    samples = chunk.samples and request.pooling is None
    assert samples <= len(tokens) <= samples * (1 + chunk.num_drafts)
    if chunk.num_drafts:
        num_accepted = len(tokens) - 1
        end += num_accepted - chunk.num_drafts
        request.drafts.count(chunk.num_drafts, num_accepted, chunk.draft_kind)
        request.num_scheduled = end
        kv.truncate(allocator, end)
    kv.num_computed = end
    request.drafts.forced = result.forced
    request.num_prompt_logprobs += len(result.prompt_logprobs)
    request.output_token_ids += tokens
    if chunk.samples and request.slo.exists:
        request.slo.observe_tokens(now, max(len(tokens), 1))
    has_full_blocks_more = bool(chunk.lands) or end // allocator.block_size > chunk.start // allocator.block_size
    if has_full_blocks_more and allocator.reuses_content and kv.loan is None:  # to look at all tokens takes time
        kv.publish(allocator, request.tokens(0, end), salt=request.scheduling.cache_salt)
    if state is not None:
        state.computed(chunk, kv.block_names)
    if result.is_complete:
        return FinishReason.STOP
    return request.reason_to_finish if tokens else None


def output_of(request: Request, chunk: Chunk, result: ChunkResult) -> RequestOutput:
    """Return what is new of a request after `advance`; nothing if its recurrent state was lost."""
    if request.kv.state is not None and request.kv.state.is_lost:
        return RequestOutput(request.request_id)
    return RequestOutput(
        request.request_id,
        result.token_ids,
        Logprobs.of(result.logprobs) if result.logprobs else None,
        Logprobs.of(result.prompt_logprobs) if result.prompt_logprobs else None,
        result.values,
        request.finish_reason,
        request.kv.num_cached_tokens,  # no keywords: a class that is called with them takes three times as long
        request.kv.num_computed,
        chunk.num_drafts,
        chunk.draft_kind,
        request.slo.met,
    )
