"""Brings KV blocks from elsewhere: which are asked for, how they are checked, and where they wait for a step.

A block that moves is a `Frame`: its bytes, with its name, its tokens and a checksum. What a request's prompt begins
with, and the cache lacks, is asked for with a `Fetch`, once; until the answer the request waits, holds nothing, and
others go on. What has arrived waits in the `Inbox`, outside the cache, until a chunk of the request copies it into
blocks that were allocated for it. So nothing that is late, short or false touches a block.
"""

from __future__ import annotations

import math
import zlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import Any, NamedTuple, Protocol, TypeAlias

from splitfuse.core.plan import Land

Data: TypeAlias = Any
"""Bytes of a block, in any object with the buffer protocol."""

INBOX_BYTES, STAGED_BYTES = 2**28, 2**27
"""Number of bytes of blocks that have arrived and wait for a step, and of those that are to be written, for which an
engine has room at least.
"""
MOVES_BYTES, MOVES_INBOX_BYTES = 2**26, 2**25
"""Most bytes of the blocks that an engine lays ready for others where no tier was asked for, and of those that then
have arrived and wait for a step, or are to be written.
"""
LONGEST_FETCH = 2.0
"""Longest time that a request waits for blocks, in seconds."""
FEWEST_BLOCKS = 2
"""Number of blocks that are worth asking for where no cost model says what computing them takes."""
FEWEST_PLACES = 8
"""Number of blocks that can be on their way, however large they are."""
FIRST_BANDWIDTH = 2**30
"""Number of bytes that a tier is expected to move in a second, until it is measured."""
LATENCY = 1e-3
"""Seconds from a request to the answer of a tier besides the reading of blocks, about."""
WAITING_SHARE = 1 / 32
"""Fraction of the time of a step that others wait for the KV blocks of new requests, which then can be in it too."""


class Frame(NamedTuple):
    """Holds a block outside of a cache."""

    name: bytes
    token_ids: tuple[int, ...]
    data: Data
    checksum: int

    @classmethod
    def of(cls, name: bytes, token_ids: Sequence[int], data: Data) -> Frame:
        """Return a block with its checksum."""
        return cls(name, tuple(token_ids), data, checksum(name, token_ids, data))

    @property
    def is_intact(self) -> bool:
        """Return whether name, tokens and bytes are those of which the checksum is."""
        return self.checksum == checksum(self.name, self.token_ids, self.data)


def checksum(name: bytes, token_ids: Sequence[int], data: Data) -> int:
    """Return the CRC-32 of a block, which no flip of a single bit leaves as it is."""
    return zlib.crc32(data, zlib.crc32(array("i", token_ids), zlib.crc32(name)))


class Fetch(NamedTuple):
    """Asks for blocks of one request. It is to be answered, once, with the leading ones that were found."""

    number: int
    request_id: str
    first: int  # index of the first block in the request
    names: tuple[bytes, ...]
    token_ids: tuple[tuple[int, ...], ...]  # of each block; the last one may have fewer than a whole one
    seconds: float  # after which it is to be given up
    sources: tuple[str, ...] = ()  # see Request.block_sources
    has_moved: bool = False  # whether its request has left another engine, with a client that waits

    def matching(self, frames: Iterable[Frame]) -> list[Frame]:
        """Return the leading frames that are, by name and tokens, the blocks that were asked for."""
        found: list[Frame] = []
        for frame, name, token_ids in zip(frames, self.names, self.token_ids, strict=False):
            if (frame.name, frame.token_ids) != (name, token_ids):
                break
            found.append(frame)
        return found


class Found(NamedTuple):
    """Says how many leading blocks a source has, and in how many seconds they would be there."""

    num_blocks: int
    seconds: float


class Part(NamedTuple):
    """Describes the beginning of a block that another request has left, and how long fetching it takes with others."""

    name: bytes
    token_ids: tuple[int, ...]
    seconds: float


class BlockSource(Protocol):
    """Provides blocks that other engines, or this one before, have computed."""

    def find(self, names: Sequence[bytes], sources: Sequence[str] = (), /) -> Found:
        """Return how many leading blocks of these names can be fetched, from `sources` too, and how long that is
        expected to take.
        """

    def find_one(self, names: Iterable[bytes], /) -> tuple[bytes, float] | None:
        """Return the first of these names of which there is a block here, and how long fetching it with others takes;
        None if there is none.
        """

    def forget(self, number: int) -> None:
        """Give a fetch up: its answer is dropped when it comes."""


def waiting_bytes(tier_bytes: int) -> tuple[int, int]:
    """Return the most bytes of blocks that have arrived and wait for a step, and of those that are to be written, in an
    engine whose share of a memory tier has so many: parts of that beyond 4 GiB, or a prompt of a large model would not
    fit.

    >>> waiting_bytes(2**32) == (INBOX_BYTES, STAGED_BYTES), waiting_bytes(2**36) == (2**32, 2**31)
    (True, True)
    """
    return max(INBOX_BYTES, tier_bytes // 16), max(STAGED_BYTES, tier_bytes // 32)


def places(num_bytes: int, block_bytes: float) -> int:
    """Return for how many blocks on their way there is room in so many bytes.

    >>> places(INBOX_BYTES, 2**20), places(INBOX_BYTES, 2**26)
    (256, 8)
    """
    return max(int(num_bytes // block_bytes), FEWEST_PLACES)


class Inbox:
    """Holds the bytes of blocks that have arrived, under numbers. It has places for `capacity` blocks, which fetches
    take before they are sent, and which come back when a block is discarded or has not come.
    """

    def __init__(self, capacity: int, block_bytes: int) -> None:
        self.capacity = capacity
        self.block_bytes = block_bytes
        self.num_free = capacity
        self._held: dict[int, Data] = {}
        self._numbers = count()

    def __getitem__(self, number: int) -> Data:
        """Return the bytes of a block."""
        return self._held[number]

    def __len__(self) -> int:
        return len(self._held)

    def put(self, frames: Iterable[Frame], *, reserved: int) -> list[int]:
        """Take blocks in, up to the first whose size is wrong, into places that were `reserved`. Returns their numbers;
        places that are left come back.
        """
        numbers: list[int] = []
        for frame in frames:
            if len(numbers) == reserved or len(frame.data) != self.block_bytes:
                break
            number = next(self._numbers)
            self._held[number] = frame.data
            numbers.append(number)
        self.num_free += reserved - len(numbers)
        return numbers

    def discard(self, numbers: Iterable[int]) -> None:
        """Forget blocks."""
        for number in numbers:
            del self._held[number]
            self.num_free += 1

    def check(self, numbers: Iterable[int], *, num_awaited: int) -> None:
        """Assert that it holds the blocks of these numbers, and none that is lost. For tests."""
        assert sorted(numbers) == sorted(self._held), "a block in the inbox is lost, or was discarded too early"
        assert self.num_free + len(self._held) + num_awaited == self.capacity, "places of the inbox are lost"


class Fetching:
    """Decides which blocks are fetched rather than computed: those that are there sooner."""

    def __init__(self, source: BlockSource, inbox: Inbox) -> None:
        self.source = source
        self.inbox = inbox
        self._numbers = count(1)

    def has_room(self, num_blocks: int) -> bool:
        """Return whether so many blocks can be asked for, or half of what the inbox holds."""
        return self.inbox.num_free >= min(num_blocks, max(self.inbox.capacity // 2, 1))

    def ask(
        self,
        request_id: str,
        first: int,
        names: Sequence[bytes],
        token_ids: Sequence[tuple[int, ...]],
        compute_seconds: Callable[[int], float] | None,
        *,
        part_behind: Callable[[int], Part | None] | None = None,
        patience: float = math.inf,
        sources: tuple[str, ...] = (),
        has_moved: bool = False,
    ) -> Fetch | None:
        """Return what to ask for of blocks with these names, from block `first` of a request on, which it would compute
        otherwise; None if nothing is to be gained. `compute_seconds` says how long computing so many tokens of them
        would take; None: there is no cost model. `part_behind` gives the block that is not full behind so many of them,
        if there is one: it is asked for too if fetching it takes less time than computing it. The request waits for no
        more than `patience` seconds. Of one that has moved, what the engine before has laid ready at `sources` is
        always asked for.
        """
        wanted = names[: self.inbox.num_free]
        found = self.source.find(wanted, sources)
        num_blocks, longest = min(found.num_blocks, len(wanted)), min(LONGEST_FETCH, patience)
        if longest <= 0.0 or (num_blocks < FEWEST_BLOCKS and compute_seconds is None and not has_moved):
            return None
        names, blocks, seconds = [*names[:num_blocks]], [*token_ids[:num_blocks]], found.seconds
        if part_behind is not None and num_blocks < self.inbox.num_free and (part := part_behind(num_blocks)):
            saved = math.inf
            if compute_seconds is not None:
                num_tokens = sum(map(len, blocks))
                saved = compute_seconds(num_tokens + len(part.token_ids)) - compute_seconds(num_tokens)
            if part.seconds < saved:
                names.append(part.name)
                blocks.append(part.token_ids)
                seconds += part.seconds
        if not names:
            return None
        if compute_seconds is not None and not has_moved:
            longest = min(longest, compute_seconds(sum(map(len, blocks))))
            if seconds >= longest:
                return None
        return self.reserve(request_id, first, names, blocks, longest, sources)._replace(has_moved=has_moved)

    def reserve(
        self,
        request_id: str,
        first: int,
        names: Sequence[bytes],
        token_ids: Sequence[tuple[int, ...]],
        seconds: float,
        sources: tuple[str, ...],
    ) -> Fetch:
        """Return a fetch of these blocks, for which there are places in the inbox from here on."""
        self.inbox.num_free -= len(names)
        return Fetch(next(self._numbers), request_id, first, tuple(names), tuple(token_ids), seconds, sources)


class Arrived(NamedTuple):
    """Says where the bytes of a request's block are."""

    place: int  # of the block in the request
    number: int  # in the inbox
    num_tokens: int

    def into(self, block: int) -> Land:
        """Return the copy of these bytes into a block."""
        return Land(self.number, block)
