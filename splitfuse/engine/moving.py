"""Moves requests from an engine that goes on with them to another one, with what it has of KV blocks.

The old engine lays the blocks of a request ready where others can fetch them, a window at a time, and the new one
fetches them into its prefix cache, while the old one still gives tokens. Only when all but the newest are there the old
one lets go, with its last token, and lays the rest ready, and what the new one has forgotten meanwhile. So the client
waits for about a step, however long its request is; what does not come in time is computed again.

In a drain, the blocks of all requests that others have room for come before the first of them leaves, as far as that
takes AHEAD_SECONDS: until then the new engine may have no request, whose steps would be longer for what lands and for
the memory that this takes. The others follow when these have left.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from splitfuse.core.replicas.replica_view import ReplicaView
from splitfuse.engine.client import LocalClient
from splitfuse.engine.messages import Add
from splitfuse.engine.stream import Stream

MOVES_AT_ONCE = 2
"""Number of requests whose blocks are on their way from an engine at a time."""
STAGE_SECONDS = 10.0
"""Longest time that blocks may take to be laid ready, or to be fetched, in seconds: the request goes on meanwhile."""
AHEAD_SECONDS = 5.0
"""Longest time from the beginning of a drain for which requests whose blocks are there wait for those of others, in
seconds.
"""
HANDED_OVER_SECONDS = 1.0
"""Longest time for which others wait until a request that has left goes on, in seconds."""
NEWEST_BLOCKS = 1
"""Number of full blocks that are left for the end: at least one may fill up meanwhile."""
MOST_RECEIVERS = 3
"""Number of engines that a request's blocks are brought to, if one after the other is not ready any more."""

_logger = logging.getLogger(__name__)


@dataclass
class _Coming:
    """Says where a stream is to go on, and how many of its leading blocks were brought there."""

    receiver: LocalClient
    view: ReplicaView | None
    """View of the receiver to which the stream was added: after a restart it has another, and none of the blocks."""
    num_there: int = 0

    def can_have(self, stream: Stream) -> bool:
        """Return whether the stream can still go on there, with what was brought."""
        return self.view is self.receiver.view and self.receiver.can_go_on_with(stream)


class Mover:
    """Moves requests. Belongs to the event loop's thread."""

    def __init__(
        self,
        choose: Callable[[Stream, LocalClient], LocalClient | None],
        name_blocks: Callable[[Add], list[bytes]],
        *,
        can_leave: Callable[[Stream, LocalClient], bool],
        fits: Callable[[LocalClient], bool],
    ) -> None:
        """`choose` gives the engine that a stream should go to from its present one, and lets that one's view have it;
        None if none can have it now. `can_leave` says whether one may have it at some time, `fits` whether an engine
        has room for all that its view has.
        """
        self._choose, self._name_blocks, self._can_leave, self._fits = choose, name_blocks, can_leave, fits
        self._coming: MutableMapping[Stream, _Coming] = WeakKeyDictionary()
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_moving: dict[LocalClient, int] = {}

    async def drain(self, source: LocalClient, streams: Sequence[Stream]) -> list[Stream]:
        """Let streams go on elsewhere, as long as their engine is drained. Returns them without those that stay, to end
        where they are, since no other engine can ever have them.
        """
        moved: list[Stream] = []
        left = deque(streams)
        while left and source.is_drained:
            together: list[Stream] = []
            while left and (len(together) < MOVES_AT_ONCE or self._fit_where_they_go(together)):
                together.append(left.popleft())
                with contextlib.suppress(Exception):  # which is met again, and logged, where its blocks are brought
                    self._find_receiver(source, together[-1])
            moved += await self._move(source, together)
        return moved

    async def _move(self, source: LocalClient, streams: Sequence[Stream]) -> list[Stream]:
        """Bring the blocks of streams that others have room for, then let one after the other go. Returns those that do
        not stay.
        """
        bringing, leaving = asyncio.Semaphore(MOVES_AT_ONCE), asyncio.Semaphore(MOVES_AT_ONCE)
        all_there, num_there = asyncio.Event(), 0
        timer = asyncio.get_running_loop().call_later(AHEAD_SECONDS, all_there.set)

        async def bring(stream: Stream, *, once: bool = False) -> None:
            try:
                await self._bring(source, stream, once=once)
            except Exception:  # it is computed again, then
                _logger.exception("the blocks of request %s do not go with it", stream.request.request_id)

        async def move(stream: Stream) -> bool:
            nonlocal num_there
            async with bringing:
                if is_brought := source.is_drained and not all_there.is_set():
                    await bring(stream)
            num_there += 1
            if num_there == len(streams):
                all_there.set()
            await all_there.wait()
            async with leaving:
                if source.is_drained:  # with few requests left, it is faster than what it has to bring
                    await bring(stream, once=is_brought)
                    await self._count_again(source, stream)
                stays = source.has(stream) and not (source.is_drained and self._can_leave(stream, source))
                if stays:
                    self.take_receiver(stream)
                else:
                    await self._hand_over(source, stream)
                return stays

        try:
            stay = await asyncio.gather(*(move(stream) for stream in streams))
        finally:
            timer.cancel()
        return [stream for stream, stays in zip(streams, stay, strict=True) if not stays]

    def follow(self, stream: Stream, source: LocalClient, receiver: LocalClient) -> None:
        """Bring the blocks of a stream that will leave its engine after the first token to another one, behind the
        chunks of its prompt. That one's view has the stream already, and loses it if the stream ends before it comes.
        """
        self._expect(stream, receiver)
        task = asyncio.get_running_loop().create_task(self._follow(stream, source, receiver))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def take_receiver(self, stream: Stream) -> LocalClient | None:
        """Return the engine to which the blocks of a stream were brought, whose view has the stream no longer; None if
        there is none, or it was taken before.
        """
        if (coming := self._coming.pop(stream, None)) is None:
            return None
        if coming.receiver.view is not None:
            coming.receiver.view.forget(stream.request.request_id)
        return coming.receiver

    def _expect(self, stream: Stream, receiver: LocalClient) -> _Coming:
        """Note that a stream is to go on at an engine, unless it ends before."""
        coming = self._coming[stream] = _Coming(receiver, receiver.view)
        stream.breakdown.add_done_callback(lambda _: self.take_receiver(stream))
        return coming

    async def _follow(self, stream: Stream, source: LocalClient, receiver: LocalClient) -> None:
        request, names, num_there = stream.request, self._name_blocks(stream.request), 0
        while (end := min(await source.wait_exported(stream, num_there), len(names))) > num_there:
            try:
                num_come = await _prefetch(receiver, source, request, names[num_there:end], first=num_there)
            except TimeoutError:
                return
            if num_come < end - num_there or end == len(names):
                return
            num_there = end

    def _fit_where_they_go(self, streams: Sequence[Stream]) -> bool:
        """Return whether the engines of streams have room for all that come."""
        receivers = {coming.receiver for stream in streams if (coming := self._coming.get(stream)) is not None}
        return all(map(self._fits, receivers))

    def _find_receiver(self, source: LocalClient, stream: Stream) -> _Coming | None:
        """Return where a stream is to go on, which is chosen if it was not before, or cannot have it any more; None if
        none can have it now.
        """
        coming = self._coming.get(stream)
        if coming is None or not coming.can_have(stream):
            self.take_receiver(stream)
            receiver = self._choose(stream, source) if source.has(stream) else None
            coming = None if receiver is None else self._expect(stream, receiver)
        return coming

    async def _bring(self, source: LocalClient, stream: Stream, *, once: bool = False) -> None:
        """Bring the blocks of a stream to the engine where it is to go on, `once` with what it has now: what it has
        then goes with it.
        """
        self._num_moving[source] = self._num_moving.get(source, 0) + 1
        try:
            for _ in range(MOST_RECEIVERS):
                if (coming := self._find_receiver(source, stream)) is None:
                    return
                await self._bring_to(coming, source, stream, once=once)
                if coming.can_have(stream):
                    return
        finally:
            self._num_moving[source] -= 1

    async def _count_again(self, source: LocalClient, stream: Stream) -> None:
        """Note how many leading blocks the engine to which a stream goes still has of those that it was brought: for
        other requests it may have forgotten some.
        """
        if (coming := self._coming.get(stream)) is not None and coming.num_there and coming.can_have(stream):
            request, num_there = stream.resumption(0.0), coming.num_there
            names = self._name_blocks(request)[:num_there]
            coming.num_there = 0  # if it does not say
            with contextlib.suppress(TimeoutError):
                coming.num_there = await _prefetch(coming.receiver, source, request, names)

    async def _hand_over(self, source: LocalClient, stream: Stream) -> None:
        """Let a stream go, and wait until it goes on, unless the engine to which its blocks were brought is full."""
        coming = self._coming.get(stream)
        is_awaited = coming is not None and self._fits(coming.receiver)
        source.move(stream, num_there=None if coming is None else coming.num_there)
        if coming is None or not is_awaited:
            return
        receiver = coming.receiver

        def goes_on() -> bool:
            return stream.is_over or (receiver.has(stream) and stream.num_outputs_here > 0)

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HANDED_OVER_SECONDS):
                await receiver.wait_until(goes_on)

    async def _bring_to(self, coming: _Coming, source: LocalClient, stream: Stream, *, once: bool) -> None:
        """Bring the full blocks of a stream to an engine, all but the newest, as far as they come in time."""
        info, receiver, num_there = source.info, coming.receiver, coming.num_there
        while receiver.fetches_from(source) and coming.can_have(stream) and source.has(stream):
            request = stream.resumption(0.0)
            names = self._name_blocks(request)
            end = min(len(names), stream.num_computed // info.limits.block_size)
            if end - num_there <= NEWEST_BLOCKS:
                return
            end = min(end, num_there + max(info.num_export_slots // 2 // self._num_moving[source], 1))
            try:
                async with asyncio.timeout(STAGE_SECONDS):
                    end = min(end, await source.export(stream, end, more_than=num_there))
                if end <= num_there:
                    return
                num_come = await _prefetch(receiver, source, request, names[num_there:end], first=num_there)
            except TimeoutError:
                return
            if num_come < end - num_there:
                return
            coming.num_there = num_there = end
            if once:
                return


async def _prefetch(
    receiver: LocalClient, source: LocalClient, request: Add, names: Sequence[bytes], *, first: int = 0
) -> int:
    """Let an engine fetch blocks of these names, from block `first` of a request on, as far as it lacks them. Returns
    how many of them it has then; raises TimeoutError.
    """
    size, tokens = source.info.limits.block_size, request.known_tokens
    starts = range(first * size, (first + len(names)) * size, size)
    blocks = [tokens[start : start + size] for start in starts]
    async with asyncio.timeout(STAGE_SECONDS):
        return await receiver.prefetch(request.request_id, names, blocks, source.info.block_sources)
