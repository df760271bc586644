"""Moves KV blocks between an engine and its tiers: files of blocks in memory and on a disk (block_file.py).

What a step computes is copied out of the cache by the next one, and written by a thread; what requests ask for is read
by another, checked, and waits for the engine's own thread. So no step waits for a file, and a file that hangs, is full
or lies costs what would have been saved, no more.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from splitfuse.config.engine import CacheConfig
from splitfuse.config.values import parse_disk_tier
from splitfuse.core.kv.fetching import (
    FEWEST_PLACES,
    FIRST_BANDWIDTH,
    LATENCY,
    LONGEST_FETCH,
    MOVES_BYTES,
    MOVES_INBOX_BYTES,
    STAGED_BYTES,
    Fetch,
    Found,
    Frame,
    Inbox,
    places,
    waiting_bytes,
)
from splitfuse.core.plan import Save
from splitfuse.engine.block_file import BlockFile
from splitfuse.engine.block_seconds import BlockSeconds
from splitfuse.engine.remote.peers import Peers
from splitfuse.engine.tier_files import TierFiles
from splitfuse.errors import ConfigError

MEMORY_TIER = "kv_memory_tier"
"""Name of the tier in memory."""
TIME_TO_FLUSH = 3.0
"""Longest time that the end of an engine waits for what is to be written, in seconds."""
TIME_TO_END = 0.5
"""Longest time that it then waits for each of the threads, in seconds."""

logger = logging.getLogger(__name__)


class Answer(NamedTuple):
    """Holds the leading blocks of a fetch that were found, all intact."""

    fetch: Fetch
    frames: list[Frame]


@dataclass
class TierStats:
    """Counts what tiers have done since the engine began."""

    num_saved: int = 0  # blocks that were written
    num_fetched: int = 0  # blocks that were read for requests
    num_unsaved: int = 0  # blocks that were not written: too many at once, or a file was full
    num_dropped: int = 0  # blocks whose checksum was not theirs, or of another model


@dataclass(eq=False)
class _Tier:
    name: str
    file: BlockFile
    block_seconds: BlockSeconds
    failures: set[object] = field(default_factory=set)  # kinds that were said

    def warn(self, what: str, error: Exception) -> None:
        """Say what fails, once: a disk that is full fails again and again."""
        kind = what, type(error), getattr(error, "errno", None)
        if kind not in self.failures:
            self.failures.add(kind)
            why = error.strerror or str(error) if isinstance(error, OSError) else repr(error)
            logger.warning("%s %s now: %s", what, self.name, why)


class _Staged(NamedTuple):
    save: Save
    data: npt.NDArray[np.uint8]


class Tiers:
    """Holds the tiers of an engine, the fastest first, by name. `buffer` and `save` are called by the executor's
    thread, and by the engine's while no step runs; the others by the engine's. What they lack may come from `peers`.
    """

    def __init__(
        self, files: dict[str, BlockFile], block_bytes: int, *, staged_bytes: int = STAGED_BYTES, memory_id: str = ""
    ) -> None:
        """`memory_id` names the memory tier."""
        self.block_bytes = block_bytes
        self.block_sources = (f"memory:{memory_id}",) if memory_id else ()
        """Addresses at which others can fetch what it has."""
        self.peers: Peers | None = None
        """Engines on other machines, which are asked for what these tiers lack."""
        first = block_bytes / FIRST_BANDWIDTH
        self._tiers = [_Tier(name, file, BlockSeconds(first)) for name, file in files.items()]
        self.stats = TierStats(num_dropped=sum(file.num_foreign for file in files.values()))
        self._lock = threading.Condition()  # of what follows, which tells when something was written
        self._staging: set[bytes] = set()
        self._most_staged = places(staged_bytes, block_bytes)
        self._buffers: list[npt.NDArray[np.uint8]] = []
        self._fetches: dict[int, float] = {}  # when each is to be given up, by number
        self._reading_until = 0.0  # after which the reader is taken to hang; 0: it is idle
        self._to_write: queue.SimpleQueue[_Staged | None] = queue.SimpleQueue()
        self._to_read: queue.SimpleQueue[Fetch | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self._arrived = threading.Event()
        self._threads = [
            threading.Thread(target=work, name=f"kv-tiers{work.__name__}", daemon=True)
            for work in (self._write_all, self._read_all)
        ]
        for thread in self._threads:
            thread.start()

    def reset_stats(self) -> None:
        """Count from now on."""
        self.stats = TierStats()
        if self.peers is not None:
            self.peers.num_fetched = self.peers.num_dropped = 0

    # What is saved ----------------------------------------------------------------------------------------------------

    def buffer(self, name: bytes) -> npt.NDArray[np.uint8] | None:
        """Return where a block of that name is to be copied, for `save`; None if it is there already, or if too many
        blocks are to be written.
        """
        with self._lock:
            if name in self._staging or all(name in tier.file for tier in self._tiers):
                return None
            if len(self._staging) >= self._most_staged:
                self.stats.num_unsaved += 1
                return None
            return self._buffers.pop() if self._buffers else np.empty(self.block_bytes, np.uint8)

    def save(self, save: Save, data: npt.NDArray[np.uint8], *, at_once: bool = False) -> None:
        """Write a block that was copied into a `buffer`: some time, or with `at_once` now, to the first tier alone."""
        if at_once:
            self._write(self._tiers[0], _Staged(save, data))
            with self._lock:
                self._buffers.append(data)
            return
        with self._lock:
            self._staging.add(save.name)
        self._to_write.put(_Staged(save, data))

    def wait_until_written(self, seconds: float, names: Collection[bytes] | None = None) -> bool:
        """Wait for blocks of these names that are to be written, or for all, at most for so long. Returns whether none
        of them is still to be.
        """

        def is_done() -> bool:
            return not self._staging if names is None else self._staging.isdisjoint(names)

        with self._lock:
            return self._lock.wait_for(is_done, seconds)

    def num_written(self, names: Sequence[bytes]) -> int:
        """Return how many leading blocks of these names have been written, in their order; the first of them may have
        been overwritten since.
        """
        return next((count for count in range(len(names), 0, -1) if self._tier_of(names[count - 1]) is not None), 0)

    def _write_all(self) -> None:
        while (staged := self._to_write.get()) is not None:
            save = staged.save
            for tier in self._tiers:
                self._write(tier, staged)
            with self._lock:
                self._staging.discard(save.name)
                self._buffers.append(staged.data)
                self._lock.notify_all()

    def _write(self, tier: _Tier, staged: _Staged) -> None:
        save = staged.save
        try:
            if tier.file.write(Frame.of(save.name, save.token_ids, staged.data), save.before):
                self.stats.num_saved += 1
        except Exception as error:
            with self._lock:
                self.stats.num_unsaved += 1
            tier.warn("KV blocks are not saved to", error)

    # What is fetched --------------------------------------------------------------------------------------------------

    def find(self, names: Sequence[bytes], sources: Sequence[str] = ()) -> Found:
        """See BlockSource; engines of this machine lay blocks ready in the tiers. While a read takes longer than
        requests wait for it, there is nothing. A peer is taken to have all that can come in time.
        """
        now = time.monotonic()
        if 0.0 < self._reading_until < now:
            return Found(0, 0.0)
        count, seconds = 0, LATENCY
        for each in self._tiers:
            with suppress(OSError):  # it was cut, and there is no room for it: it has nothing then
                each.file.refresh()
        for name in names:
            if (tier := self._tier_of(name)) is None:
                break
            count, seconds = count + 1, seconds + tier.block_seconds.at(now)
        if count < len(names) and not set(sources) & set(self.block_sources):  # else it is all in the same memory
            _, more = self._find_at_peer(sources, len(names) - count, LONGEST_FETCH - seconds)
            return Found(count + more.num_blocks, seconds + more.seconds)
        return Found(count, seconds)

    def find_one(self, names: Iterable[bytes]) -> tuple[bytes, float] | None:
        """See BlockSource: peers are not asked."""
        now = time.monotonic()
        if 0.0 < self._reading_until < now:
            return None
        found = ((name, tier.block_seconds.at(now)) for name in names if (tier := self._tier_of(name)) is not None)
        return next(found, None)

    def _find_at_peer(self, sources: Sequence[str], num_blocks: int, longest: float) -> tuple[str, Found]:
        """Return the first peer among some sources from which blocks are expected in time, and what is expected."""
        if self.peers is not None:
            for source in sources:
                if (found := self.peers.find(source, num_blocks, longest)).num_blocks:
                    return source, found
        return "", Found(0, 0.0)

    def _tier_of(self, name: bytes) -> _Tier | None:
        return next((tier for tier in self._tiers if name in tier.file), None)

    def ask(self, fetch: Fetch) -> None:
        """Answer a fetch some time, within its seconds."""
        self._fetches[fetch.number] = time.monotonic() + fetch.seconds
        self._to_read.put(fetch)

    def seconds_in_memory(self, fetch: Fetch) -> float:
        """Return how long it takes to read the blocks of a fetch from memory; infinity if they are not all there."""
        first = self._tiers[0]
        if first.name != MEMORY_TIER or not all(name in first.file for name in fetch.names):
            return math.inf
        return len(fetch.names) * first.block_seconds.at(time.monotonic())

    def read_at_once(self, fetch: Fetch, until: float) -> list[Frame] | None:
        """Return the blocks of a fetch that was not asked for, from memory. None if one is not there any more, or if
        it is later than `until` before all are read: the fetch is to be asked for, then.
        """
        frames: list[Frame] = []
        for name in fetch.names:
            if time.monotonic() > until or (frame := self._read_from(self._tiers[0], name)) is None:
                return None
            frames.append(frame)
        self._touch(frames)
        return frames

    def answers(self) -> list[tuple[int, list[Frame]]]:
        """Return the answers that have come, by the number of the fetch, and empty ones to those whose time is over."""
        self._arrived.clear()
        found: list[tuple[int, list[Frame]]] = []
        while not self._answers.empty():
            fetch, frames = self._answers.get()
            if self._fetches.pop(fetch.number, None) is not None:
                found.append((fetch.number, frames))
        now = time.monotonic()
        overdue = [number for number, until in self._fetches.items() if until < now]
        for number in overdue:
            del self._fetches[number]
        return found + [(number, []) for number in overdue]

    def forget(self, number: int) -> None:
        """See BlockSource: no more of it is read."""
        if self._fetches.pop(number, None) is not None and self.peers is not None:
            self.peers.forget(number)

    @property
    def is_asked(self) -> bool:
        """Return whether an answer is to come."""
        return bool(self._fetches)

    def wait(self, seconds: float) -> None:
        """Wait for an answer."""
        self._arrived.wait(seconds)

    def _read_all(self) -> None:
        while (fetch := self._to_read.get()) is not None:
            until = self._fetches.get(fetch.number)
            if until is None:
                continue
            self._reading_until = until
            frames = self._read(fetch.names, partial(self._fetches.__contains__, fetch.number))
            self._reading_until = 0.0
            if len(frames) == len(fetch.names) or not self._ask_peer(fetch, frames, until):
                self._answer(fetch, frames)

    def _answer(self, fetch: Fetch, frames: list[Frame]) -> None:
        if fetch.number in self._fetches:
            self._answers.put(Answer(fetch, frames))
        self._arrived.set()

    def _ask_peer(self, fetch: Fetch, frames: list[Frame], until: float) -> bool:
        """Ask a peer for the blocks of a fetch behind those that are there. Returns False if none can come in time."""
        if self.peers is None or fetch.number not in self._fetches:
            return False
        source, found = self._find_at_peer(fetch.sources, len(fetch.names) - len(frames), until - time.monotonic())
        if found.num_blocks:
            self.peers.ask(source, fetch, len(frames), until, lambda more: self._answer(fetch, frames + more))
        return bool(found.num_blocks)

    def _read(self, names: Sequence[bytes], is_wanted: Callable[[], bool]) -> list[Frame]:
        """Return the leading blocks that are there and intact, as long as they are wanted."""
        frames: list[Frame] = []
        for name in names:
            if not is_wanted() or (frame := self.read(name)) is None:
                break
            frames.append(frame)
        self._touch(frames)
        return frames

    def _touch(self, frames: Sequence[Frame]) -> None:
        """Note that leading blocks of a request are used."""
        for tier in self._tiers:
            if (last := next((frame for frame in reversed(frames) if frame.name in tier.file), None)) is not None:
                tier.file.touch(last.name)

    def read(self, name: bytes) -> Frame | None:
        """Return a block from the first tier that has it intact; None if none has. Any thread may call this."""
        found = (self._read_from(tier, name) for tier in self._tiers)
        return next((frame for frame in found if frame is not None), None)

    def _read_from(self, tier: _Tier, name: bytes) -> Frame | None:
        """Return a block from a tier; None if it is not there, or not intact."""
        began = time.monotonic()
        try:
            frame = tier.file.read(name)
        except Exception as error:
            tier.warn("KV blocks cannot be read from", error)
            tier.file.drop(name)
            return None
        if frame is None:
            return None
        if frame.is_intact:
            now = time.monotonic()
            tier.block_seconds.update(now - began, now)
            return frame
        logger.warning("a KV block in %s is not what was written there: it is dropped", tier.name)
        tier.file.drop(name)
        self.stats.num_dropped += 1
        return None

    def give(self, name: bytes) -> Frame | None:
        """Return a block as `read` does, for another machine: it is used by that. Any thread may call this."""
        if (frame := self.read(name)) is not None:
            for tier in self._tiers:
                tier.file.touch(name)
        return frame

    @property
    def num_slots(self) -> int:
        """Return how many blocks the largest tier can have."""
        return max(tier.file.num_slots for tier in self._tiers)

    @property
    def num_export_slots(self) -> int:
        """Return how many blocks this engine can lay ready at a time."""
        return self._tiers[0].file.num_own_slots

    @property
    def num_blocks(self) -> int:
        """Return how many blocks the tiers have, as far as this engine knows."""
        return sum(len(tier.file) for tier in self._tiers)

    def close(self) -> bool:
        """Write what was to be saved, as far as there is time, and end. Returns False if a file hangs, which must stay
        open: its descriptor is still used.
        """
        self.wait_until_written(TIME_TO_FLUSH)
        self._fetches.clear()
        self._to_write.put(None)
        self._to_read.put(None)
        for thread in self._threads:
            thread.join(TIME_TO_END)
        if self.peers is not None:  # behind the thread that asks them
            self.peers.close()
        if any(thread.is_alive() for thread in self._threads):
            return False
        for tier in self._tiers:
            tier.file.close()
        return True


def make_tiers(
    files: TierFiles, cache: CacheConfig, *, block_bytes: int, block_size: int, fingerprint: bytes
) -> tuple[Tiers, Inbox] | None:
    """Return the tiers of an engine whose blocks have these sizes, and the inbox for what comes from there; None if
    they are for moves alone, and blocks are too large for that.

    Raises ConfigError for a tier that is too small, or cannot be used.
    """
    if files.for_moves:
        most = files.num_parts * MOVES_BYTES
        if FEWEST_PLACES * block_bytes > MOVES_BYTES // 2:
            logger.warning(
                "KV does not move with requests: a block has %d bytes, and there is memory for few", block_bytes
            )
            return None
    kinds = {MEMORY_TIER: (files.memory, most if files.for_moves else cache.memory_tier_bytes)}
    if cache.kv_disk_tier is not None:
        kinds["kv_disk_tier"] = files.disk, parse_disk_tier(cache.kv_disk_tier)[1]
    sizes = {"block_bytes": block_bytes, "block_size": block_size, "part": files.part, "num_parts": files.num_parts}
    tiers: dict[str, BlockFile] = {}
    for name, (fd, num_bytes) in kinds.items():
        if fd is not None:
            try:
                tiers[name] = BlockFile(fd, num_bytes=num_bytes, fingerprint=fingerprint, **sizes)
            except OSError as error:
                raise ConfigError(f"{name} cannot be used: {error.strerror}; choose a smaller size") from error
            if num_foreign := tiers[name].num_foreign:
                logger.warning(
                    "%s had %d blocks of another model, block or tier size: they are dropped", name, num_foreign
                )
    inbox_bytes = staged_bytes = MOVES_INBOX_BYTES
    if not files.for_moves:
        inbox_bytes, staged_bytes = waiting_bytes(cache.memory_tier_bytes // files.num_parts)
    made = Tiers(tiers, block_bytes, staged_bytes=staged_bytes, memory_id=files.memory_id)
    return made, Inbox(places(inbox_bytes, block_bytes), block_bytes)
