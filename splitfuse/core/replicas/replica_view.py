"""Follows one replica as its front knows it: the requests that it was sent, how far they have come, and the time of its
steps.

A front counts the tokens of its streams anyway; a replica says besides how much of a prompt is computed, with each of
its chunks, and by what it predicts its steps (StepTimes). So what is asked here needs no message, and counts requests
that the replica has not even received.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from splitfuse.core.limits import ceil_div
from splitfuse.core.replicas.prefix_index import PrefixMemory
from splitfuse.core.request import Request, RequestStatus
from splitfuse.core.request_output import RequestOutput
from splitfuse.core.slo.admission import check_on_time
from splitfuse.core.slo.cost_model import CostModel, StepTimes
from splitfuse.core.slo.feasibility import Feasibility
from splitfuse.core.step_builder import FreeResources
from splitfuse.errors import SloUnattainableError

IN_TOKENS = StepTimes(CostModel(floor=0.0, per_token=1.0))
"""Times by which a token counts as a second, where no others are known."""


class ReplicaView:
    """Holds the unfinished requests of a replica, and predicts what a new one would find there.

    The requests are copies for this purpose: how many of their tokens are computed is known, not in which blocks.
    """

    def __init__(self, *, num_blocks: int, block_size: int, max_num_seqs: int, token_budget: int) -> None:
        self.times: StepTimes | None = None
        """Times of its steps, as the replica predicts them; None: it has not said any."""
        self.memory = PrefixMemory(num_blocks, block_size)
        self._max_num_seqs, self._token_budget, self._block_size = max_num_seqs, token_budget, block_size
        self._available_blocks = num_blocks
        self._num_added = 0
        self._prefills: dict[str, Request] = {}
        self._decodes: dict[str, Request] = {}
        self._work: dict[str, float] = {}  # of the prefills
        self._token_seconds: dict[str, float] = {}  # of the decodes
        self._num_positions = 0  # of all decodes that are computed
        self._itl_targets: Counter[float] = Counter()  # of the decodes
        self._sums: tuple[float, float, int] | None = None  # of both, and the tokens of the prefills
        self._alone_of: tuple[StepTimes | None, Feasibility] | None = None

    # What happens -----------------------------------------------------------------------------------------------------

    def add(self, request: Request, names: Sequence[bytes]) -> None:
        """Take note of a request that is sent, with its `num_expected_cached`; its blocks have these names."""
        self.memory.add(names)
        request.sequence_number = self._num_added
        self._num_added += 1
        self._begin_prefill(request)

    def take(
        self, outputs: Iterable[RequestOutput], times: StepTimes | None, *, available_blocks: int, now: float
    ) -> None:
        """Take note of what a step has changed."""
        self.times, self._available_blocks = times, available_blocks
        for output in outputs:
            name = output.request_id
            request = self._decodes.get(name) or self._prefills.get(name)
            if request is None:
                continue
            if output.finish_reason is not None:
                self.forget(name)
                continue
            if output.token_ids:
                request.output_token_ids += output.token_ids
                request.slo.observe_tokens(now, len(output.token_ids))
            if name in self._decodes:
                self._num_positions += output.num_computed - request.num_scheduled
            request.num_scheduled, request.num_expected_cached = output.num_computed, 0
            request.status = RequestStatus.RUNNING
            if request.num_unscheduled > 1:  # also one that was preempted
                self._begin_prefill(request)
            elif name not in self._decodes:
                self._begin_decode(request)

    def forget(self, request_id: str) -> None:
        """Forget a request that was expected, and does not come."""
        self._end_decode(request_id)
        for part in (self._prefills, self._work):
            part.pop(request_id, None)
        self._sums = None

    def _begin_prefill(self, request: Request) -> None:
        name = request.request_id
        self._end_decode(name)
        self._prefills[name] = request
        self._work[name] = self._alone.seconds(request)
        self._sums = None

    def _begin_decode(self, request: Request) -> None:
        name = request.request_id
        self._prefills.pop(name, None)
        self._work.pop(name, None)
        self._decodes[name] = request
        self._token_seconds[name] = self._alone.seconds_of_token(request)
        self._num_positions += request.num_scheduled
        if (itl_target := request.slo.itl_target) is not None:
            self._itl_targets[itl_target] += 1
        self._sums = None

    def _end_decode(self, name: str) -> None:
        if (request := self._decodes.pop(name, None)) is not None:
            del self._token_seconds[name]
            self._num_positions -= request.num_scheduled
            if (itl_target := request.slo.itl_target) is not None:
                self._itl_targets[itl_target] -= 1
                if not self._itl_targets[itl_target]:
                    del self._itl_targets[itl_target]

    # What there is, as admission.py asks ------------------------------------------------------------------------------

    @property
    def running(self) -> list[Request]:
        """Return the requests of which something is computed."""
        return [*self._decodes.values(), *(each for each in self._prefills.values() if each.num_scheduled)]

    @property
    def waiting(self) -> list[Request]:
        """Return the requests of which nothing is computed."""
        return [each for each in self._prefills.values() if not each.num_scheduled]

    @property
    def fetching(self) -> tuple[Request, ...]:
        """Return nothing: what fetches blocks is taken to wait, as a front does not know."""
        return ()

    @property
    def free(self) -> FreeResources:
        """Return what was free for further requests after its last step."""
        running = self.running
        for request in running:  # blocks without numbers
            request.kv.blocks = [0] * ceil_div(request.num_scheduled, self._block_size)
        return FreeResources(self._max_num_seqs - len(running), self._available_blocks, self._block_size)

    # What another request would find ----------------------------------------------------------------------------------

    def load(self, now: float) -> float:
        """Return the seconds before it would begin with a new prompt, if that needs no more than a sequence slot."""
        del now  # it hears of each step
        work, decodes, _ = self._totals
        step = self._alone.overhead + decodes
        seconds = work + step
        if len(self._prefills) + len(self._decodes) >= self._max_num_seqs:
            left = (each.max_tokens - len(each.output_token_ids) for each in self._decodes.values())
            seconds += step * min(left, default=0)
        return seconds

    def first_token(self, request: Request, cached: int) -> float:
        """Return the seconds until the first token of a new request whose first `cached` tokens are in the prefix
        cache: after all prompts that came before it, in steps that have a token of every decode.
        """
        request.num_expected_cached = cached
        alone, (work, decodes, _) = self._alone, self._totals
        step = alone.overhead + decodes
        return self._seconds_until_room(request, step) + work + alone.seconds(request) + step

    def num_broken(self, request: Request, cached: int, now: float) -> int:
        """Return how many requests would miss their SLO if a new one were sent here, itself included, and would not
        otherwise.
        """
        request.num_expected_cached, request.sequence_number = cached, self._num_added
        is_late = request.slo.deadline <= now or request.slo.missed
        if not is_late and self._alone.surely_fit(
            [*self._prefills.values(), request],
            num_decodes=len(self._decodes),
            num_positions=self._num_positions,
            itl_target=min(self._itl_targets, default=math.inf),
            now=now,
        ):
            return 0
        decodes, prefills = list(self._decodes.values()), list(self._prefills.values())
        feasibility = self._feasibility(decodes, now=now, priority=min(each.priority for each in (request, *prefills)))
        kept = {each.request for each in feasibility.feasible(prefills)}
        if request.slo.deadline < math.inf:
            kept.add(request)
        late = kept.difference(each.request for each in feasibility.feasible([*prefills, request]))
        together = self._feasibility(decodes, soon=[*prefills, request], now=now)
        return len(late) + (not together.is_sustainable)

    def wait(self, request: Request, cached: int, now: float) -> float:
        """Return the seconds until a new request with `on_time_only` could be admitted; 0 if it can be now."""
        request.num_expected_cached, request.sequence_number = cached, self._num_added
        try:
            check_on_time(request, self, self._feasibility, now=now)
        except SloUnattainableError as error:
            return error.retry_after
        return 0.0

    @property
    def _totals(self) -> tuple[float, float, int]:
        """Return the seconds of all prefills, those of a token of every decode, and the tokens of the prefills."""
        if self._sums is None:
            num_tokens = sum([each.num_tokens for each in self._prefills.values()])
            self._sums = sum(self._work.values()), sum(self._token_seconds.values()), num_tokens
        return self._sums

    def _seconds_until_room(self, request: Request, step: float) -> float:
        """Return the seconds until there are a sequence slot and blocks for a request after those that wait, if running
        ones end with `max_tokens`.
        """
        num_open = len(self._prefills) + len(self._decodes) + 1
        tokens = self._totals[2] + request.num_tokens
        most_blocks = tokens // self._block_size + len(self._prefills) + 1 + num_open
        if num_open <= self._max_num_seqs and most_blocks <= self._available_blocks:
            return 0.0
        new, num_running = [*self.waiting, request], len(self.running)
        slots = len(new) + num_running - self._max_num_seqs
        blocks = sum(ceil_div(each.num_tokens, self._block_size) for each in new) + num_running - self._available_blocks
        if slots <= 0 and blocks <= 0:
            return 0.0
        left = sorted((each.max_tokens - len(each.output_token_ids), each.num_scheduled) for each in self.running)
        for num_left, held in left:
            slots -= 1
            blocks -= ceil_div(held, self._block_size)
            if slots <= 0 and blocks <= 0:
                return num_left * step
        return left[-1][0] * step if left else 0.0

    def _feasibility(self, decodes: Iterable[Request], **how: Any) -> Feasibility:
        return Feasibility(self.times or IN_TOKENS, decodes, token_budget=self._token_budget, **how)

    @property
    def _alone(self) -> Feasibility:
        """Return the `Feasibility` without decodes, for the seconds of requests."""
        if self._alone_of is None or self._alone_of[0] is not self.times:
            self._alone_of = self.times, self._feasibility((), now=0.0)
        return self._alone_of[1]
