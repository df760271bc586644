"""Keeps the requests that an engine has accepted and that its scheduler does not know yet."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import partial

from llguidance import LLMatcher

from splitfuse.core.kv.block_allocator import BlockAllocator
from splitfuse.core.limits import EngineLimits, blocks_needed
from splitfuse.core.request_output import FinishReason, RequestOutput
from splitfuse.engine.loans import AwaitedLoan, close_channel
from splitfuse.engine.messages import Add
from splitfuse.errors import InvalidRequestError, SloUnattainableError
from splitfuse.kernels.loans import Channel
from splitfuse.runtime.sampling.grammar import Grammars

NOT_LENT = "the engine that was to lend to it did not"
"""Reason why a request with a loan cannot begin at its engine."""

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


class PendingRequests:
    """Holds requests whose loan is not granted, whose grammar is not compiled, or for which the cache has no room
    beside what it lends. `schedule` is called with each, and its matcher, once there is nothing to wait for.
    """

    def __init__(
        self,
        schedule: Callable[[Add, Future[LLMatcher] | None], None],
        *,
        grammars: Grammars,
        limits: EngineLimits,
        allocator: BlockAllocator,
        channels: dict[int, Channel],
    ) -> None:
        """`channels` are those of the loans whose requests are scheduled, by the numbers of the loans."""
        self._schedule, self._grammars, self._limits = schedule, grammars, limits
        self._allocator, self._channels = allocator, channels
        self._held: dict[str, tuple[Add, Future[LLMatcher]]] = {}
        self._awaited: dict[str, AwaitedLoan] = {}
        self._crowded: dict[str, tuple[Add, Future[LLMatcher] | None]] = {}

    def __len__(self) -> int:
        return len(self._held) + len(self._awaited) + len(self._crowded)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._held or request_id in self._awaited or request_id in self._crowded

    def __iter__(self) -> Iterator[Add]:
        yield from (request for request, _ in self._held.values())
        yield from (awaited.request for awaited in self._awaited.values())
        yield from (request for request, _ in self._crowded.values())

    def add(self, request: Add) -> None:
        """Schedule a request at once if it has nothing to wait for. Raises as `schedule` does."""
        if request.loan is not None:
            self._awaited[request.request_id] = AwaitedLoan.of(request)
        else:
            self._prepare(request)

    def schedule_ready(self) -> list[RequestOutput]:
        """Schedule what has nothing to wait for any more. Returns the last outputs of the requests that cannot be."""
        outputs: list[RequestOutput] = []
        for request_id, (request, matcher) in list(self._held.items()):
            if matcher.done():
                del self._held[request_id]
                outputs += self._try(request, partial(self._begin, request, matcher))
        for request_id, awaited in list(self._awaited.items()):
            if (is_granted := awaited.is_granted) is not None:
                del self._awaited[request_id]
                outputs += self._begin_loan(awaited) if is_granted else self._refuse_loan(awaited)
        for request_id, (request, prepared) in list(self._crowded.items()):
            if self._own_blocks(request) > self._allocator.capacity:
                break
            del self._crowded[request_id]
            outputs += self._try(request, partial(self._accept, request, prepared))
        return outputs

    def forget(self, request_id: str) -> Add | None:
        """Forget a request and end its loan. Returns it; None if there is none of that id."""
        if (awaited := self._awaited.pop(request_id, None)) is not None:
            if awaited.channel is not None:
                awaited.channel.close()
            return awaited.request
        waiting = self._held.pop(request_id, None) or self._crowded.pop(request_id, None)
        if waiting is None:
            return None
        self._end_loan(waiting[0])
        return waiting[0]

    def wait(self, seconds: float) -> None:
        """Wait for the grammar of a request, at most so long; if others are pending, so long."""
        if self._held:
            wait((matcher for _, matcher in self._held.values()), seconds, FIRST_COMPLETED)
        elif self._awaited or self._crowded:
            time.sleep(seconds)

    @property
    def num_needed_blocks(self) -> int:
        """Return how many blocks of the cache must not be lent, so that each request has room alone."""
        if self._crowded:
            return self._allocator.num_blocks
        waiting = [each.request for each in self._awaited.values()] + [each for each, _ in self._held.values()]
        return max(map(self._own_blocks, waiting), default=0)

    def _begin_loan(self, awaited: AwaitedLoan) -> list[RequestOutput]:
        """Go on with a request whose creditor lends."""
        request = awaited.request
        assert request.loan is not None and awaited.channel is not None
        self._channels[request.loan.number] = awaited.channel
        return self._try(request, partial(self._prepare, request))

    def _refuse_loan(self, awaited: AwaitedLoan) -> list[RequestOutput]:
        """Return the last output of a request whose creditor does not lend."""
        if awaited.channel is not None:
            awaited.channel.close()
        return [RequestOutput(awaited.request.request_id, finish_reason=FinishReason.MOVED, error=NOT_LENT)]

    def _try(self, request: Add, step: Callable[[], None]) -> list[RequestOutput]:
        """Take the next step of a request. Returns its last output if that fails."""
        try:
            step()
        except Exception as error:
            self._end_loan(request)
            return [rejection(request.request_id, error)]
        return []

    def _end_loan(self, request: Add) -> None:
        if request.loan is not None:
            close_channel(self._channels, request.loan.number)

    def _prepare(self, request: Add) -> None:
        """Accept a request, once its grammar is ready."""
        matcher = None
        if (form := request.params.structured_outputs) is not None:
            matcher = self._grammars.prepare(form)
            if not matcher.done() or matcher.exception() is not None:
                self._held[request.request_id] = request, matcher
                return
        self._accept(request, matcher)

    def _begin(self, request: Add, matcher: Future[LLMatcher]) -> None:
        """Accept a request whose grammar is ready. Raises what compiling it has raised."""
        matcher.result()
        self._accept(request, matcher)

    def _accept(self, request: Add, matcher: Future[LLMatcher] | None) -> None:
        """Schedule a request, once what is lent leaves room for it."""
        if self._allocator.num_lent and self._own_blocks(request) > self._allocator.capacity:
            self._crowded[request.request_id] = request, matcher
        else:
            self._schedule(request, matcher)

    def _own_blocks(self, request: Add) -> int:
        """Return the blocks that a request may need of the cache here."""
        num_prompt = len(request.prompt_token_ids)
        most = self._limits.max_new_tokens(num_prompt, request.params)
        lent = 0 if request.loan is None else request.loan.num_blocks
        return blocks_needed(num_prompt, most, self._allocator.block_size) - lent
