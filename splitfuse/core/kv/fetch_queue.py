"""Lets requests wait for KV blocks from elsewhere, before they run.

A request is made to wait for at most one answer, once, and holds nothing meanwhile. Answers come in bounded time, or
`FetchQueue.arrived` is called without.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from splitfuse.core.events import EngineEvents, FetchBegun, FetchEnded
from splitfuse.core.kv.block_allocator import BlockAllocator
from splitfuse.core.kv.fetching import Arrived, Fetch, Fetching, Frame, Part
from splitfuse.core.kv.prefetching import Prefetching
from splitfuse.core.plan import Land, StepPlan
from splitfuse.core.request import Request, RequestStatus
from splitfuse.core.slo.cost_model import StepFeatures
from splitfuse.core.slo.latency_predictor import LatencyPredictor
from splitfuse.core.step_builder import RequestQueue

logger = logging.getLogger(__name__)


class FetchQueue:
    """Follows the blocks of requests from the question to the step that brings them into the cache."""

    def __init__(
        self,
        fetching: Fetching,
        queue: RequestQueue,
        allocator: BlockAllocator,
        events: EngineEvents,
        predictor: LatencyPredictor | None,
    ) -> None:
        """`predictor` says how long computing blocks would take; without it, `seconds_of` may be set later."""
        assert allocator.states is None, "a recurrent state is not fetched with its blocks"
        self.fetching = fetching
        self.ahead = Prefetching(allocator, fetching)
        """What is fetched for requests that will come."""
        self._queue = queue
        self._allocator = allocator
        self._events = events
        self.seconds_of: Callable[[StepFeatures], float] | None = None if predictor is None else predictor.seconds
        """Function that predicts how long a step takes, None: nothing is known of that."""
        self._to_ask: deque[Request] = deque()  # that have not run, and for which nothing was asked
        self._awaited: dict[int, Request] = {}  # number of a fetch -> its request

    def add(self, request: Request) -> None:
        """Ask for the blocks of a waiting request as soon as there is room for them, and fetch no more ahead for it."""
        self.ahead.drop(request.request_id)
        if request.params.prompt_logprobs is None and request.kv.loan is None:  # those need all positions computed
            self._to_ask.append(request)

    def take(self, now: float = 0.0) -> list[Fetch]:
        """Return what is to be asked for now, of the requests that have not run, in their order and as long as the
        inbox has room, and then what is fetched ahead. Each is to be answered by `arrived`, within its seconds; a
        request waits until then.
        """
        fetches: list[Fetch] = []
        while self._to_ask:
            request = self._to_ask[0]
            if request.status is RequestStatus.WAITING and not request.sent_to_executor:
                if not self.fetching.has_room(request.num_tokens // self._allocator.block_size):
                    break
                try:
                    fetch = self._ask_for(request, now)
                except Exception:  # of this request: others have no part in it
                    logger.exception("no KV blocks are asked for: %s", request.request_id)
                    fetch = None
                if fetch is not None:
                    fetches.append(fetch)
                    self._events.emit(FetchBegun(request, now))
            self._to_ask.popleft()
        return fetches + self.ahead.take_fetches() if self.ahead.is_busy else fetches

    def arrived(self, number: int, frames: Sequence[Frame] = (), now: float = 0.0) -> bool:
        """Take in the answer to a fetch: the leading blocks that were found, which are intact; without any, it has
        failed. Returns False, and changes nothing, if it was answered before or its request has ended.
        """
        request = self._awaited.pop(number, None)
        if request is None:
            return self.ahead.arrived(number, frames)
        fetch = request.kv.fetch
        assert fetch is not None
        numbers = self.fetching.inbox.put(fetch.matching(frames), reserved=len(fetch.names))
        sizes = [len(tokens) for tokens in fetch.token_ids[: len(numbers)]]
        places = range(fetch.first, fetch.first + len(numbers))
        request.kv.arrived = tuple(map(Arrived, places, numbers, sizes))
        if numbers:
            covered = fetch.first * self._allocator.block_size + sum(sizes)
            request.num_expected_cached = max(request.num_expected_cached, covered)
        self._queue.end_fetch(request)
        self._events.emit(FetchEnded(request, now))
        return True

    def begin(self, requests: Iterable[Request], lands: Sequence[Land]) -> None:
        """Let a step have what has arrived for its requests: `lands` bring it into the cache, the rest is forgotten."""
        kept = {land.number for land in lands}
        for request in requests:
            if request.kv.arrived:
                self.fetching.inbox.discard(each.number for each in request.kv.arrived if each.number not in kept)
                request.kv.arrived = ()

    def take_lands_ahead(self) -> tuple[Land, ...]:
        """Return what lands for requests that will come, in blocks which no running request will soon need: with a
        plan, or between two if nothing is in flight, and `ahead.landed` is called.
        """
        if not self.ahead.is_busy:
            return ()
        return self.ahead.take_lands(self._allocator.num_available - len(self._queue.running))

    def end(self, plan: StepPlan, *, is_done: bool) -> None:
        """Forget the bytes that a step has brought into the cache. If all of it `is_done`, what came with it for
        requests that will come is there.
        """
        self.fetching.inbox.discard(land.number for chunk in plan.chunks for land in chunk.lands)
        if plan.prefetched:
            self.ahead.landed(plan.prefetched, is_there=is_done)

    def forget(self, request: Request) -> None:
        """Forget what a request that is about to end waits for, and what has arrived for it."""
        kv, inbox = request.kv, self.fetching.inbox
        if kv.fetch is not None:
            del self._awaited[kv.fetch.number]
            self.fetching.source.forget(kv.fetch.number)
            inbox.num_free += len(kv.fetch.names)
            self._queue.end_fetch(request)
        inbox.discard(each.number for each in kv.arrived)
        kv.arrived = kv.landing = ()

    def _ask_for(self, request: Request, now: float) -> Fetch | None:
        """Return what to ask for of a request, which waits for it from here on; None if it need not wait."""
        tokens, kv, size = request.tokens(0, request.num_tokens), request.kv, self._allocator.block_size
        salt, sources = request.scheduling.cache_salt, request.block_sources
        first = self._allocator.count_cached(tokens, kv.block_names, salt=salt) // size
        limit = (len(tokens) - 1) // size  # a token is left to compute
        has_moved = bool(sources and request.output_token_ids)
        part = tokens[limit * size : -1] if has_moved else ()  # all of it was computed
        if first >= limit and not part and (has_moved or self.seconds_of is None):
            return None
        self._allocator.name_blocks(tokens, kv.block_names, limit, salt=salt)
        seconds, patience = None, math.inf
        if self.seconds_of is not None:
            seconds = partial(_seconds_to_compute, self.seconds_of, first * size)
            if request.on_time_only:  # it was admitted as one that computes all
                patience = request.slo.deadline - now - seconds((limit - first + 1) * size)
        blocks = [tokens[start : start + size] for start in range(first * size, limit * size, size)]
        names, part_behind = kv.block_names[first:limit], None
        if part and self._allocator.reuses_content:
            names = [*names, self._allocator.name_part(kv.block_names[:limit], part, salt=salt)]
            blocks = [*blocks, part]
        elif not has_moved:
            part_behind = partial(self._part_behind, tokens, kv.block_names, first, salt)
        fetch = self.fetching.ask(
            *(request.request_id, first, names, blocks, seconds),
            part_behind=part_behind,
            patience=patience,
            sources=sources,
            has_moved=has_moved,
        )
        if fetch is not None:
            self._queue.begin_fetch(request, fetch)
            self._awaited[fetch.number] = request
        return fetch

    def _part_behind(
        self, tokens: tuple[int, ...], names: Sequence[bytes], first: int, salt: str, num_blocks: int
    ) -> Part | None:
        """Return the longest beginning of block `first + num_blocks` that a request has left there at its end, all of
        whose tokens but one may be used; None for the first block.
        """
        count, size = first + num_blocks, self._allocator.block_size
        rest = tokens[count * size : min((count + 1) * size, len(tokens)) - 1]
        if not count or not rest:
            return None
        parts = self._allocator.name_parts(names[:count], rest, salt=salt)
        if (found := self.fetching.source.find_one(reversed(parts))) is None:
            return None
        name, seconds = found
        return Part(name, rest[: parts.index(name) + 1], seconds)


def _seconds_to_compute(seconds_of: Callable[[StepFeatures], float], start: int, num_tokens: int) -> float:
    """Return by how much longer steps take in all that compute so many tokens from position `start`."""
    computed = StepFeatures().plus(start=start, count=num_tokens, rows=0)
    return seconds_of(computed) - seconds_of(StepFeatures())
