"""Serves several engines as one: each request goes to the replica that replica_choice.py chooses."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import replace

import msgspec

from splitfuse.config.values import EngineRole
from splitfuse.core.kv.fetching import LONGEST_FETCH
from splitfuse.core.kv.names import new_key
from splitfuse.core.limits import EngineLimits
from splitfuse.engine.client import EngineClient, EngineState, LocalClient
from splitfuse.engine.loan_book import LoanBook
from splitfuse.engine.messages import Add, EngineInfo, EngineStats, Loading, Stop
from splitfuse.engine.moving import Mover
from splitfuse.engine.recovery import Recovery
from splitfuse.engine.remote.connector import Agreement
from splitfuse.engine.replica_choice import ReplicaChooser, is_open
from splitfuse.engine.scaling import Scaler
from splitfuse.engine.stream import Stream
from splitfuse.errors import AdapterError, ConfigError, EngineUnavailableError, InvalidRequestError

FETCHED_POLL_SECONDS = 0.005
"""Seconds between two checks whether requests have gone on elsewhere."""
LEAVING_SECONDS = 0.3
"""Seconds between a signal to an engine and its drain: systemd signals all processes of a server, which then ends
itself.
"""

_logger = logging.getLogger(__name__)


class Router(EngineClient):
    """Spreads requests over replicas of one model.

    A replica that is dead or starting gets none, one that may be hanging none while another accepts; the others go on,
    also with the requests of one that dies (recovery.py).
    """

    def __init__(
        self,
        replicas: Sequence[LocalClient],
        *,
        name_key: bytes | None = None,
        agreement: Agreement | None = None,
        lends: bool = False,
        roles: Sequence[EngineRole] = (),
        num_scaled: int = 0,
        spare: Sequence[LocalClient] = (),
        why_no_more: str = "the number of its engines is fixed",
        on_close: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """`name_key` is the key by which the replicas name KV blocks; left out, the router's names are its own.
        `agreement` is that of engines which run elsewhere. If it `lends`, a replica may hold KV blocks of another's
        request: see loan_book.py. Without `roles` all replicas are mixed. `scale` changes how many there are of the
        first `num_scaled` and the `spare` ones; `why_no_more` says what limits them. `on_close`
        is called when all engines are closed.
        """
        self.replicas = list(replicas)
        for replica, role in zip(self.replicas, roles, strict=False):
            replica.role = role
        self.agreement = agreement
        self._on_close = on_close
        self._is_lone = len(self.replicas) + len(spare) == 1  # then there is no choice
        for replica in (*self.replicas, *spare):
            replica.keeps_view = not self._is_lone
        self._loans = LoanBook(self.replicas) if lends else None
        self.name_key = name_key or new_key()
        self._chooser = chooser = ReplicaChooser(
            self.replicas,
            self._loans,
            is_lone=self._is_lone,
            name_key=self.name_key,
            info=lambda: self.info,
        )
        self._mover = Mover(chooser.choose_receiver, chooser.name_blocks, can_leave=self._can_leave, fits=_fits)
        self._recovery = Recovery(self.replicas, chooser.choose, prefer=self._prefer)
        self._largest: EngineInfo | None = None
        self._restarting: set[int] = set()
        self._scaler = Scaler(
            *(self.replicas[:num_scaled], spare),
            why_no_more=why_no_more,
            adopt=self._adopt,
            empty=lambda replica: self._empty(self.replicas.index(replica)),
            check_open=self._check_open,
        )
        self._followers: list[Callable[[LocalClient], object]] = []
        self._is_ending = False
        self._leaving: set[asyncio.Task[None]] = set()  # tasks that restart engines which are asked to end
        for replica in self.replicas:
            replica.on_leaving, replica.on_change = self._begin_leaving, self._note_change

    @property
    def state(self) -> EngineState:
        states = [replica.state for replica in self.replicas if not replica.is_drained]
        return next((s for s in (EngineState.READY, EngineState.STARTING) if s in states), EngineState.DEAD)

    @property
    def stage(self) -> Loading:
        """Return the stage of the replica that has come farthest of those that are not ready; ready once all are. A
        replica that is dead has the last stage that it came to, one that is stopped has none.
        """
        stages = [replica.stage for replica in self.replicas if replica.state is not EngineState.STOPPED]
        return max([stage for stage in stages if stage.stage != "ready"] or stages, key=_progress)

    @property
    def info(self) -> EngineInfo:
        """Return what is known of the replica with the largest limits, dead or not: what it can hold is no error."""
        if self._largest is None:
            if not (infos := [info for each in self.replicas if (info := each.known_info) is not None]):
                raise EngineUnavailableError("no engine is ready yet")
            self._largest = max(infos, key=_room)
        info = self._largest
        return info if self._loans is None else msgspec.structs.replace(info, limits=self._loans.limits(info))

    @property
    def open_limits(self) -> EngineLimits:
        infos = [each.info for each in self.replicas if is_open(each)]
        return max(infos, key=_room).limits if infos else self.info.limits  # without loans, which answers seldom need

    @property
    def stats(self) -> list[EngineStats]:
        return [stats for replica in self.replicas for stats in replica.stats]

    @property
    def engines(self) -> list[LocalClient]:
        return self.replicas

    def follow_engines(self, listener: Callable[[LocalClient], object]) -> None:
        """Call a listener with each engine, and later with those that come, in the order of their numbers."""
        for each in self.replicas:
            listener(each)
        self._followers.append(listener)

    @property
    def num_replicas(self) -> int:
        return self._scaler.num_replicas

    @property
    def max_replicas(self) -> int:
        """Return the most that `scale` can have."""
        return self._scaler.most

    @property
    def engines_elsewhere(self) -> list[LocalClient]:
        """Return the engines whose number `scale` does not change."""
        return [each for each in self.replicas if not self._scaler.has(each)]

    async def scale(self, count: int) -> int:
        if self._loans is not None or self._chooser.has_roles:
            what = "kv_loans" if self._loans is not None else "roles"
            raise InvalidRequestError(
                f"with {what} the number of engines is fixed: restart with other replicas", parameter="replicas"
            )
        if self._is_ending:
            raise EngineUnavailableError("the server is ending: the number of its replicas does not change any more")
        if count < self.num_replicas:  # the one that is restarted would be the first to be ended
            for index in self._restarting:
                if self._scaler.has(self.replicas[index]):
                    self._check_not_changing(index)
        if loading := next(iter(self.loading_adapters), None):
            raise EngineUnavailableError(f"the adapter {loading!r:.200} is being loaded: scale once it is")
        return await self._scaler.scale(count)

    def _adopt(self, replica: LocalClient) -> None:
        """Prepare a replica that is to be started, which may be new."""
        others = (each for each in self.replicas if each is not replica and each.state is not EngineState.STOPPED)
        replica.adopt_adapters(next(others))
        if replica not in self.replicas:
            replica.state = EngineState.STOPPED  # its start is told of then, too
            self.replicas.append(replica)
            self._recovery.add(replica)
            replica.on_leaving, replica.on_change = self._begin_leaving, self._note_change
            self._note_change()
            for listener in self._followers:
                listener(replica)

    @property
    def num_resumed(self) -> Mapping[str, int]:
        return self._recovery.num_resumed

    @property
    def outstanding_tokens(self) -> int:
        return sum(replica.outstanding_tokens for replica in self.replicas if replica.state is EngineState.READY)

    @property
    def adapters(self) -> Mapping[str, str]:
        return {name: digest for replica in self.replicas for name, digest in replica.adapters.items()}

    @property
    def loading_adapters(self) -> Collection[str]:
        return {name for replica in self.replicas for name in replica.loading_adapters}

    async def load_adapter(self, name: str, path: str) -> None:
        """See EngineClient: in all replicas, or in none if one is not ready or cannot load it."""
        replicas = [replica for replica in self.replicas if replica.state is not EngineState.STOPPED]
        if not all(replica.state is EngineState.READY for replica in replicas):
            raise EngineUnavailableError("an engine is not ready: load the adapter again when all are")
        self.check_not_loading(name)
        loads = (replica.load_adapter(name, path) for replica in replicas)
        errors = await asyncio.gather(*loads, return_exceptions=True)
        failures = [error for error in errors if error is not None]
        if len({replica.adapters[name] for replica in replicas if name in replica.adapters}) > 1 and not failures:
            message = f"the adapter {path} is not the same for all engines, or has changed meanwhile: load it again"
            failures = [AdapterError(message)]
        if failures:
            for replica, error in zip(replicas, errors, strict=True):
                if error is None and name not in replica.loading_adapters:  # it is, if the replica died since
                    replica.unload_adapter(name)
            raise failures[0]

    def unload_adapter(self, name: str) -> None:
        self.check_not_loading(name)
        for replica in self.replicas:
            replica.unload_adapter(name)

    def has_adapter(self, digest: str) -> bool:
        return any(replica.has_adapter(digest) for replica in self.replicas)

    def hold_adapter(self, digest: str) -> None:
        for replica in self.replicas:
            replica.hold_adapter(digest)

    def let_go_adapter(self, digest: str) -> None:
        for replica in self.replicas:
            replica.let_go_adapter(digest)

    def open(self, request: Add) -> Stream:
        request = self._sized(request.settled)
        choice = self._chooser.choose(request, self._chooser.of_roles(self.replicas, has_begun=False))
        if choice is None and self._loans is not None and not self._chooser.fitting(request, self.replicas):
            raise EngineUnavailableError("no engine has room now to lend to the request: send it again")
        if choice is None:
            raise EngineUnavailableError(self._why_none(request))
        then = None if choice.loan is not None else self._chooser.choose_generation(request, choice.engine)
        changes = {"loan": choice.loan, "block_sources": choice.block_sources, "hands_over": then is not None}
        stream = choice.engine.open(msgspec.structs.replace(request, **changes))
        if then is not None:
            assert choice.copy is not None
            choice.copy.max_tokens = 1
            then.taken()
            self._mover.follow(stream, choice.engine, then.engine)
        choice.taken()
        return stream

    def _sized(self, request: Add) -> Add:
        """Return a request with a number of tokens to generate, which is that of the largest engine that is open:
        without one, it would be another one at each.
        """
        if self._is_lone or request.pooling is not None or request.params.max_tokens is not None:
            return request
        try:
            most = self.open_limits.max_new_tokens(len(request.prompt_token_ids), request.params)
        except EngineUnavailableError:  # no engine was ready yet
            return request
        return msgspec.structs.replace(request, params=replace(request.params, max_tokens=max(most, 1)))

    def _why_none(self, request: Add) -> str:
        """Return why no replica accepts a request."""
        open_ones = [each for each in self.replicas if is_open(each)]
        num_tokens = len(request.prompt_token_ids)
        if any(each.known_info is not None for each in self.replicas):
            fits = self.info.limits.fits(num_tokens, request.params)
            assert fits, "call EngineLimits.check() before submitting"
        if open_ones and not self._chooser.fitting(request, open_ones):
            num_tokens += request.params.max_tokens or 0
            return f"no engine that is ready can hold a request of {num_tokens} tokens: send it again, or a shorter one"
        which = " that has the adapter of the request: send it again" if request.adapter else ""
        return f"no engine is ready{which}"

    async def start(self) -> None:
        """Return when all replicas are ready; raise the error of the first that failed. One on another machine that
        cannot be reached now is not waited for if another is ready.

        The first replica is started alone: if it packs weights that all share, the others find them.
        """
        first, *others = self.replicas
        errors = [await _start(first), *await asyncio.gather(*map(_start, others))]
        if None not in errors:
            raise next(filter(None, errors))
        for replica in self.replicas if self._chooser.has_roles else ():
            if replica.state is EngineState.READY and not replica.info.block_sources:
                raise ConfigError(
                    "roles need KV blocks that move between engines, and these do not: the model has a recurrent "
                    "state, its blocks are too large, or prefix caching is off; leave roles out"
                )
        for error in filter(None, errors):
            _logger.warning("%s; it is used as soon as it can be", error)

    async def drain_engine(self, index: int) -> int:
        return len(await self._drain(index))

    async def _drain(self, index: int) -> list[Stream]:
        """Drain an engine, and return the streams that went on elsewhere. Raises as `drain_engine`."""
        replica = self._replica(index)
        if replica.state is EngineState.STOPPED:
            raise EngineUnavailableError(f"engine {index} is stopped: splitfuse scale starts it again")
        if not any(each is not replica and is_open(each) for each in self.replicas):
            raise EngineUnavailableError(f"engine {index} cannot be drained: no other engine is ready to go on")
        streams = replica.drain()
        if self._loans is not None:
            self._loans.end_lent(replica)
        moved = await self._mover.drain(replica, streams)
        if (num_staying := len(streams) - len(moved)) and replica.is_drained:
            _logger.warning(
                "requests that end at engine %d, since no other can go on with them: %d", index, num_staying
            )
        await replica.wait_until(lambda: not (replica.num_open and replica.is_drained))
        return moved

    async def _empty(self, index: int) -> int:
        """Drain an engine that is to end, and return how many streams went on elsewhere, once they need nothing of it.
        Raises as `drain_engine`, also if no other engine is ready at the end.
        """
        moved = await self._drain(index)
        if self.replicas[index].address:  # blocks that lie ready there end with it
            await _fetched(moved)
        self._check_open()
        return len(moved)

    def _check_open(self) -> None:
        """Raise EngineUnavailableError if no engine takes requests."""
        if not any(map(is_open, self.replicas)):
            raise EngineUnavailableError("no other engine is ready any more: none is ended")

    def undrain_engine(self, index: int) -> None:
        replica = self._replica(index)
        self._check_not_changing(index)
        replica.undrain()

    async def restart_engine(self, index: int) -> int:
        replica = self._replica(index)
        self._check_not_changing(index)
        self._restarting.add(index)
        was_drained = replica.is_drained
        try:
            try:
                moved = await self._empty(index)
            except BaseException:
                if not was_drained:
                    replica.undrain()
                raise
            try:
                await replica.restart()
            finally:  # it may come back later
                if not self._scaler.is_leaving(replica):
                    replica.undrain()
        finally:
            self._restarting.remove(index)
        return moved

    def end_soon(self) -> None:
        """Note that `close` will be called once requests have ended: no engine is to be drained meanwhile, and their
        number stays.
        """
        self._is_ending = True

    def _begin_leaving(self, replica: LocalClient) -> None:
        task = asyncio.get_running_loop().create_task(self._let_leave(replica))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _let_leave(self, replica: LocalClient) -> None:
        """Drain and restart an engine that a signal asks to end. If no other engine is ready, one of this machine goes
        on, and one elsewhere ends at once.
        """
        index = self.replicas.index(replica)
        await asyncio.sleep(LEAVING_SECONDS)
        if self._is_ending or index in self._restarting:
            return
        _logger.info("engine %d is asked to end: it is drained, and used again once it is back", index)
        try:
            await self.restart_engine(index)
        except EngineUnavailableError as error:
            _logger.warning("%s", error)
            if replica.address:
                replica.send(Stop())

    def _check_not_changing(self, index: int) -> None:
        """Raise EngineUnavailableError while an engine is being restarted or ended."""
        if index in self._restarting:
            raise EngineUnavailableError(f"engine {index} is being restarted: it takes requests again once it is ready")
        if self._scaler.is_leaving(self.replicas[index]):
            raise EngineUnavailableError(f"engine {index} is being ended, since there are to be fewer replicas")

    def _replica(self, index: int) -> LocalClient:
        if not 0 <= index < len(self.replicas):
            raise InvalidRequestError(
                f"there is no engine {index}: this server has {len(self.replicas)}, the first is 0", parameter="engine"
            )
        return self.replicas[index]

    async def close(self) -> None:
        self.end_soon()
        for task in self._leaving:
            task.cancel()
        self._recovery.close()
        await asyncio.gather(self._scaler.close(), *(replica.close() for replica in self.replicas))
        if self._on_close is not None:
            await self._on_close()

    def _note_change(self) -> None:
        self._chooser.note_change()
        self._largest = None

    def _prefer(self, stream: Stream, able: Collection[LocalClient]) -> Collection[LocalClient]:
        """Return the engines to be chosen from for a stream that goes on elsewhere."""
        return self._chooser.prefer(stream, able, self._mover.take_receiver(stream))

    def _can_leave(self, stream: Stream, source: LocalClient) -> bool:
        """Return whether another engine than its present one can go on with a stream, now or later."""
        return any(each is not source and each.will_go_on_with(stream) for each in self.replicas)


async def _start(replica: LocalClient) -> EngineUnavailableError | None:
    """Start a replica. Returns the error of one that may be ready later."""
    try:
        await replica.start()
    except EngineUnavailableError as error:
        if not replica.keeps_trying:
            raise
        return error
    return None


async def _fetched(streams: Collection[Stream]) -> None:
    """Return once none of some streams that have gone on elsewhere waits for KV blocks from where it was."""
    until = time.monotonic() + LONGEST_FETCH
    while time.monotonic() < until and not all(each.is_over or each.num_outputs_here for each in streams):
        await asyncio.sleep(FETCHED_POLL_SECONDS)


def _room(info: EngineInfo) -> int:
    return info.limits.room


def _fits(replica: LocalClient) -> bool:
    """Return whether a replica has sequence slots and blocks for all that it has, or will have."""
    view = replica.view
    return view is None or view.free.fit(view.waiting, num_running=len(view.running))


def _progress(stage: Loading) -> tuple[int, float]:
    order = ("starting", "importing", "loading", "ready")
    return order.index(stage.stage) if stage.stage in order else 0, stage.fraction
