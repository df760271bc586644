"""Chooses the replica for a request: core/replicas/routing.py decides by what is known here of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import NamedTuple

import msgspec

from splitfuse.config.values import EngineRole
from splitfuse.core.kv.names import BlockNamer
from splitfuse.core.replicas.replica_view import ReplicaView
from splitfuse.core.replicas.routing import Candidate, choose_replica, expected_tokens
from splitfuse.core.replicas.shortlist import ALL_ARE_PICKED, Shortlist
from splitfuse.core.request import Request
from splitfuse.engine.client import EngineState, LocalClient
from splitfuse.engine.loan_book import LoanBook, PlannedLoan
from splitfuse.engine.machine_tiers import Held, MachineTiers
from splitfuse.engine.messages import Add, EngineInfo, Loan
from splitfuse.engine.stream import Stream

_NOTHING = Held()


class Choice(NamedTuple):
    """Holds the engine for a request, and a function to be called once that has taken it, with its loan if it needs one
    there.
    """

    engine: LocalClient
    taken: Callable[[], object]
    loan: Loan | None = None
    block_sources: tuple[str, ...] = ()
    """Addresses where it finds blocks of the request: see Add."""
    copy: Request | None = None
    """Request as the front will follow it; None where nothing is chosen."""


class ReplicaChooser:
    """Chooses among the replicas of a router, and follows what they hold. Belongs to the event loop's thread.

    >>> choice = chooser.choose(request, replicas)
    >>> stream = choice.engine.open(request)
    >>> choice.taken()
    """

    def __init__(
        self,
        replicas: Sequence[LocalClient],
        loans: LoanBook | None,
        *,
        is_lone: bool,
        name_key: bytes,
        info: Callable[[], EngineInfo],
    ) -> None:
        """`replicas` may grow in number, unless the first `is_lone`; `loans` says which may hold KV blocks of others'
        requests, if any, `name_key` is the key of the names of blocks, and `info` returns what is known of the largest.
        """
        self._replicas, self._loans, self._is_lone, self._name_key, self._info = (
            replicas,
            loans,
            is_lone,
            name_key,
            info,
        )
        self.has_roles = any(replica.role is not EngineRole.MIXED for replica in replicas)
        """Whether some replicas are for prompts and others for generation."""
        self._tiers = MachineTiers(replicas)
        self._shortlist = Shortlist()
        self._has_changed = True  # a replica, since the shortlist and the tiers followed it
        self._namer: BlockNamer | None = None  # made for the first request: replicas that are ready have a block size

    def note_change(self) -> None:
        """Note that a replica has come, or has changed."""
        self._has_changed = True

    def choose(self, request: Add, among: Collection[LocalClient]) -> Choice | None:
        """Choose the replica for a request among some; None if none of these accepts it."""
        if self._is_lone:  # which says why, if it does not
            return Choice(self._replicas[0], lambda: None)
        planned = None
        if self._loans is not None:
            if fitting := self.fitting(request, among):
                among = fitting
            elif (planned := self._loans.plan(request, [each for each in among if is_open(each)])) is not None:
                among, request = [planned.debtor], msgspec.structs.replace(request, loan=planned.loan)
            else:
                return None
        self._follow()
        names = self.name_blocks(request)
        held = self._tiers.held(names)
        copy, now = _copy_of(request, self._info()), time.monotonic()
        picked = self._pick(request, among, names, now)
        candidates = [
            Candidate(view, expected_tokens(cached, held.get(each.address, _NOTHING).num_tokens), each.silent)
            for each, view, cached in picked
        ]
        index = choose_replica(candidates, copy, now)
        if index is None:
            return None
        replica, view, cached = picked[index]
        there = held.get(replica.address, _NOTHING)
        sources = there.sources if there.elsewhere > max(there.own, cached) else ()
        taken = partial(self._sent, replica, view, copy, names, planned)
        return Choice(replica, taken, None if planned is None else planned.loan, sources, copy)

    def _follow(self) -> None:
        """Follow the replicas as they are, if one has changed: what is asked of all of them is not asked each time."""
        if self._has_changed:
            self._has_changed = False
            self._tiers.follow()
            if len(self._replicas) > ALL_ARE_PICKED:
                self._shortlist.sync([each.view for each in self._replicas])

    def _pick(
        self, request: Add, among: Collection[LocalClient], names: Sequence[bytes], now: float
    ) -> Sequence[tuple[LocalClient, ReplicaView, int]]:
        """Return the replicas among some that accept a request, with their views and the tokens that each has cached of
        it; of more than a few, those that are worth a test.
        """
        if len(among) > ALL_ARE_PICKED:
            allowed = None if among is self._replicas else set(among)

            def accepts(number: int) -> bool:
                each = self._replicas[number]
                is_allowed = allowed is None or each in allowed
                return is_allowed and not each.silent and _accepts(each, request)

            if found := self._shortlist.pick(names, accepts, now):
                picked = [(self._replicas[number], count) for number, count in found.items()]
                return [
                    (each, view, n * view.memory.block_size) for each, n in picked if (view := each.view) is not None
                ]
        return [
            (each, view, view.memory.cached_tokens(names))
            for each in among
            if (view := each.view) is not None and _accepts(each, request)
        ]

    def choose_receiver(self, stream: Stream, source: LocalClient) -> LocalClient | None:
        """Choose the engine that a stream is to go to from its present one, and count it there from now on, so that
        those which follow it choose others; None if none can have it now.
        """
        able = [each for each in self._replicas if each is not source and each.can_go_on_with(stream)]
        able = [*self.of_roles(able, has_begun=stream.has_output)]
        request = stream.resumption(0.0)
        if not able or (choice := self.choose(request, able)) is None:
            return None
        if choice.copy is not None and choice.loan is None and choice.engine.view is not None:
            choice.copy.num_expected_cached = choice.copy.num_tokens - 1  # its blocks come before it
            choice.engine.view.add(choice.copy, self.name_blocks(request))
        return choice.engine

    def fitting(self, request: Add, among: Collection[LocalClient]) -> list[LocalClient]:
        """Return the replicas among some whose cache can hold a request alone."""
        return [each for each in among if each.state is EngineState.READY and request.keeps_to(each.info.limits)]

    def of_roles(self, engines: Collection[LocalClient], *, has_begun: bool) -> Collection[LocalClient]:
        """Return the open ones of some engines that are for requests which have begun, or for new ones; all if there
        are none.
        """
        if not self.has_roles:
            return engines
        other = EngineRole.PROMPT if has_begun else EngineRole.GENERATION
        return [each for each in engines if each.role is not other and is_open(each)] or engines

    def choose_generation(self, request: Add, source: LocalClient) -> Choice | None:
        """Choose the engine that goes on with a new request after its first token; None if the one that computes its
        prompt is to do so.
        """
        hands_over = (
            source.role is EngineRole.PROMPT and request.pooling is None and request.params.prompt_logprobs is None
        )
        if not hands_over or request.params.max_tokens == 1:
            return None
        candidates = [
            Candidate(each.view, len(request.prompt_token_ids), each.silent)
            if each.view is not None and each.role is not EngineRole.PROMPT and each.goes_on_as(source, request)
            else None
            for each in self._replicas
        ]
        copy, now = _copy_of(request, self._info()), time.monotonic()
        copy.resume((0,) * (copy.max_tokens > 1), (now,) * (copy.max_tokens > 1), num_prompt_logprobs=0)
        index = choose_replica(candidates, copy, now)
        if index is None:
            return None
        view = self._replicas[index].view
        assert view is not None, "it is ready"
        return Choice(self._replicas[index], partial(view.add, copy, self.name_blocks(request)))

    def prefer(
        self, stream: Stream, able: Collection[LocalClient], receiver: LocalClient | None
    ) -> Collection[LocalClient]:
        """Return the engines to be chosen from for a stream that goes on elsewhere: the `receiver`, to which its blocks
        were brought; or, if it is handed over and there is no room, those which have some, its own among them.
        """
        if receiver is not None and receiver in able and (not self.has_roles or _has_room(receiver, stream)):
            return [receiver]
        if not self.has_roles:
            return able
        roomy = [each for each in able if _has_room(each, stream)]
        return self.of_roles(roomy or able, has_begun=stream.has_output)

    def _sent(
        self,
        replica: LocalClient,
        view: ReplicaView,
        request: Request,
        names: Sequence[bytes],
        planned: PlannedLoan | None,
    ) -> None:
        """Take note of a request that a replica was sent."""
        view.add(request, () if planned is not None else names)
        if planned is not None and self._loans is not None:
            self._loans.begin(request.request_id, planned)
            return
        self._tiers.add(replica, names)

    def name_blocks(self, request: Add) -> list[bytes]:
        """Return the names of the blocks that a prefix cache may hold of the tokens that are known of a request."""
        names: list[bytes] = []
        if request.params.prompt_logprobs is None:  # those need every position computed, so the cache is not read
            if self._namer is None:
                info = self._info()
                self._namer = BlockNamer(info.limits.block_size, key=self._name_key, fingerprint=info.kv_fingerprint)
            self._namer.extend(names, request.known_tokens, salt=request.cache_salt)
        return names


def is_open(replica: LocalClient) -> bool:
    """Return whether a replica takes requests."""
    return replica.state is EngineState.READY and not replica.is_drained


def _has_room(replica: LocalClient, stream: Stream) -> bool:
    """Return whether a replica has a sequence slot and blocks for a stream, as far as the front knows."""
    if (view := replica.view) is None:
        return False
    return view.free.fit([*view.waiting, _copy_of(stream.resumption(0.0), replica.info)], num_running=len(view.running))


def _accepts(replica: LocalClient, request: Add) -> bool:
    """Return whether a replica can be sent a request now."""
    if replica.view is None or not is_open(replica):
        return False
    if request.adapter and not replica.has_adapter(request.adapter):  # it is loaded again after a restart
        return False
    return request.keeps_to(replica.info.limits)  # machines differ in memory


def _copy_of(request: Add, info: EngineInfo) -> Request:
    """Return a request as an engine would have it, as far as it matters for the choice of a replica."""
    scheduling = request.scheduling.settled(info.targets, time.monotonic())
    most = info.limits.max_new_tokens(len(request.prompt_token_ids), request.params)
    copy = Request(request.request_id, request.prompt_token_ids, request.params, most, seed=0, scheduling=scheduling)
    if (point := request.resume_point) is not None:
        copy.resume(point.token_ids, point.token_times, num_prompt_logprobs=point.num_prompt_logprobs)
    return copy
