"""Runs planned steps on an executor, the next one before the last has ended perhaps, and isolates failures."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain

from splitfuse.core.plan import ChunkResult, StepPlan, StepResult
from splitfuse.core.request_table import RequestTable
from splitfuse.errors import RankLostError
from splitfuse.runtime.encoding import EncoderExecutor
from splitfuse.runtime.executor import Executor, StepHandle

MAX_BROKEN_STEPS = 3
"""Number of consecutive steps of which nothing could be computed, after which the engine is taken to be broken."""

logger = logging.getLogger(__name__)


class StepRunner:
    """Keeps the plans that are not back, the first of which runs.

    runner.submit(plan)
    result = runner.collect()
    plan = runner.retire()
    """

    def __init__(self, executor: Executor | EncoderExecutor, requests: RequestTable) -> None:
        self._executor, self._requests = executor, requests
        self._plans: deque[tuple[StepPlan, StepHandle | BaseException | None]] = deque()
        """Plans with what was submitted, or why that failed; None: it must be submitted again."""
        self._num_broken_steps = 0

    @property
    def is_busy(self) -> bool:
        """Return whether a plan is not back."""
        return bool(self._plans)

    def request_ids(self, *more: StepPlan) -> list[str]:
        """Return the ids of the requests in the plans that are not back, and in `more`."""
        plans = [*(plan for plan, _ in self._plans), *more]
        if len(plans) == 1:
            return plans[0].request_ids
        return list(dict.fromkeys(chain.from_iterable(plan.request_ids for plan in plans)))

    def submit(self, plan: StepPlan) -> None:
        """Hand a plan to the executor. What that raises is the step's failure, when its turn comes."""
        try:
            self._plans.append((plan, self._executor.submit(plan)))
        except BaseException as error:
            self._plans.append((plan, error))

    def wait_for_layers(self) -> bool:
        """Wait until the step that runs has little left to do. Returns False if none runs."""
        (_, handle), *_ = self._plans
        if handle is None or isinstance(handle, BaseException):
            return False
        self._executor.wait_for_layers(handle)
        return True

    def retire(self) -> StepPlan:
        """Return the first plan, whose result is back, and forget it."""
        plan, _ = self._plans.popleft()
        return plan

    def give_up(self, error: BaseException) -> Iterator[tuple[StepPlan, StepResult]]:
        """Yield all plans, each with the result that its requests have failed, once nothing runs."""
        self._executor.drain()
        failed = ChunkResult(error=f"the forward step failed: {error!r}")
        while self._plans:
            plan = self.retire()
            self._requests.retire_again(plan)
            yield plan, {chunk.request_id: failed for chunk in plan.chunks}

    def collect(self) -> StepResult:
        """Return the result of the first plan. If it fails, those behind it must be submitted again."""
        plan, handle = self._plans[0]
        try:
            if handle is None:
                return self._compute(plan)
            if isinstance(handle, BaseException):
                raise handle
            return self._executor.collect(handle)
        except Exception:
            self._plans = deque((each, None) for each, _ in self._plans)
            self._requests.retire_again(plan)
            raise

    def collect_isolated(self) -> StepResult:
        """Return the result of the first plan. If it fails, its halves are tried, and theirs, down to the requests that
        fail alone: a chunk gives the same alone as with others. Those which overwrite the recurrent state that they
        read cannot be tried again: their requests are computed again from a snapshot, by chunks which can.
        """
        errors: list[Exception] = []
        plan, _ = self._plans[0]
        result = self._compute_halves(plan, errors, self.collect)
        if len(errors) == len(plan.chunks):
            self._num_broken_steps += 1
            if self._num_broken_steps >= MAX_BROKEN_STEPS:
                raise errors[-1]
        elif errors or (self._num_broken_steps and any(map(self._requests.is_unfinished, plan.request_ids))):
            self._num_broken_steps = 0
        return result

    def _compute(self, plan: StepPlan) -> StepResult:
        """Return the result of a plan for those of its requests that have not ended since it was made."""
        results: StepResult = {chunk.request_id: ChunkResult() for chunk in plan.chunks}
        chunks = tuple(chunk for chunk in plan.chunks if self._requests.is_unfinished(chunk.request_id))
        if chunks:
            results |= self._executor.collect(self._executor.submit(replace(plan, chunks=chunks)))
        else:
            self._requests.retire_again(plan)
        return results

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
