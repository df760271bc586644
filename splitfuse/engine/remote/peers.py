"""Fetches KV blocks from the tiers of engines on other machines, and lets others fetch them here.

A connection is for blocks from its handshake on (handshake.py). Its client names blocks; the other end sends the
leading ones that it has, each with its tokens and its checksum, until one is missing. Names are keyed by the secret of
the deployment and by the fingerprint of model, formats and kernels, so what another one has is not found.

Both ends work in threads of their own: no step waits for a peer. A fetch ends at its deadline with what has come by
then, and a peer that was late, closed, stopped or wrong, or could not be reached, is asked again only after a pause.
Whatever it does, the blocks that are missing are computed.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import msgspec
import numpy as np

from splitfuse.core.kv.fetching import Fetch, Found, Frame
from splitfuse.core.kv.names import NAME_BYTES
from splitfuse.engine.block_seconds import BlockSeconds
from splitfuse.engine.remote.dial import connect, read_welcome
from splitfuse.engine.remote.handshake import Purpose, client_context
from splitfuse.engine.remote.transport import frame, read_message
from splitfuse.errors import SplitfuseError

SCHEMES = {"tcp": False, "tls": True}
"""Beginnings of the addresses of peers, and whether they speak TLS: `tcp://10.0.0.2:9000`."""
MOST_NAMES = 2**16
"""Most blocks that can be asked for at once."""
MOST_WANTED = 2**22
"""Most bytes of the message that asks for them."""
MOST_CONNECTIONS = 4
"""Most connections to one peer."""
IDLE_SECONDS = 60.0
"""Seconds after which a connection that nothing is asked of is closed."""
FIRST_BANDWIDTH = 100e6
"""Bytes of a second that come from a peer, until it is measured: less than one gigabit."""
ROUND_TRIP = 2e-3
"""Seconds from a question to the first block, about."""
SLACK = 8.0
"""Number of times that blocks may take as long as was measured before they are given up."""
LEAST_SECONDS, CONNECTED_SHARE = 0.5, 0.5
"""Time that any fetch has, if computing takes as long: to connect, too; and the part of it if a connection stands."""
ANSWER_SHARE = 0.9
"""Fraction of the time that a request waits, at which what has come by then is given to it."""
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds for which a peer is not asked that has failed, doubled each time that it is asked again and fails."""

_logger = logging.getLogger(__name__)


class Wanted(msgspec.Struct, frozen=True, array_like=True):
    """Asks for blocks."""

    names: tuple[bytes, ...]


class BlockHead(msgspec.Struct, frozen=True, array_like=True):
    """Comes before the bytes of a block; without bytes, no block follows."""

    num_bytes: int = 0
    token_ids: bytes = b""
    checksum: int = 0


_encode = msgspec.msgpack.Encoder().encode
_decode_wanted = msgspec.msgpack.Decoder(Wanted).decode
_decode_head = msgspec.msgpack.Decoder(BlockHead).decode
_END = frame(_encode(BlockHead()))


async def serve_blocks(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, read: Callable[[bytes], Frame | None]
) -> None:
    """Send the blocks that the other end asks for, as far as `read` has them, until it leaves or asks for nothing for
    long. `read` is called in threads.
    """
    with suppress(asyncio.IncompleteReadError, OSError, ValueError, msgspec.DecodeError):  # TimeoutError is an OSError
        while True:
            async with asyncio.timeout(2 * IDLE_SECONDS):
                wanted = _decode_wanted(await read_message(reader, most=MOST_WANTED))
            for name in wanted.names[:MOST_NAMES]:
                block = await asyncio.to_thread(read, name) if len(name) == NAME_BYTES else None
                if block is None:
                    break
                data = memoryview(block.data)
                head = BlockHead(data.nbytes, array("i", block.token_ids).tobytes(), block.checksum)
                writer.write(frame(_encode(head)))
                writer.write(data)
                async with asyncio.timeout(IDLE_SECONDS):
                    await writer.drain()
            writer.write(_END)
            await writer.drain()


@dataclass(eq=False)
class _Peer:
    """Holds what is known of a peer."""

    address: str
    tls: ssl.SSLContext | None
    block_seconds: BlockSeconds
    num_awaited: int = 0  # blocks that it is asked for, or will be, and that have not come
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter, float]] = field(default_factory=list)
    slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MOST_CONNECTIONS))
    pause: float = FIRST_PAUSE
    asked_from: float = 0.0  # time before which it is not asked
    failure: str = ""  # that was said last

    def is_connected(self, now: float) -> bool:
        """Return whether a connection stands that nothing is asked of."""
        return any(now - since < IDLE_SECONDS and not reader.at_eof() for reader, _, since in self.idle)


class Peers:
    """Fetches blocks from peers, by their addresses, in a thread of its own. Any thread may call it."""

    def __init__(self, key: bytes, *, block_bytes: int, block_size: int) -> None:
        """`key` is the deployment's for connections."""
        self.num_dropped = 0
        """Number of blocks that were not what their checksum says."""
        self.num_fetched = 0
        """Number of blocks that have come."""
        self._key, self._block_bytes, self._block_size = key, block_bytes, block_size
        self._peers: dict[str, _Peer] = {}
        self._lock = threading.Lock()  # of the peers, and of what they are asked for
        self._loop = asyncio.new_event_loop()
        self._tasks: dict[int, asyncio.Task[None]] = {}  # by the number of the fetch
        self._thread = threading.Thread(target=self._loop.run_forever, name="kv-peers", daemon=True)
        self._thread.start()

    def find(self, source: str, num_blocks: int, longest: float) -> Found:
        """Return how many of some blocks are expected from a peer within `longest` seconds, and in how many, behind
        those that it is asked for already: none if it is not asked now, or is no peer. It is taken to have them all.
        """
        now = time.monotonic()
        if (peer := self._peer(source)) is None or now < peer.asked_from:
            return Found(0, 0.0)
        most = (longest - self._seconds_before(peer, now)) / peer.block_seconds.at(now)
        count = min(num_blocks, max(int(most), 0))
        return Found(count, self._seconds_before(peer, now) + count * peer.block_seconds.at(now))

    def ask(
        self, source: str, fetch: Fetch, num_there: int, until: float, answer: Callable[[list[Frame]], None]
    ) -> None:
        """Fetch the blocks of a fetch behind the first `num_there`, and call `answer`, once and by the time `until`,
        from another thread, with the leading ones of them that have come; not if it is forgotten.
        """
        peer, names = self._peer(source), fetch.names[num_there:]
        assert peer is not None, "it was found there"
        with self._lock:
            peer.num_awaited += len(names)

        def begin() -> None:
            task = self._tasks[fetch.number] = self._loop.create_task(self._answer(peer, names, until, answer))
            task.add_done_callback(end)

        def end(_: asyncio.Task[None]) -> None:
            del self._tasks[fetch.number]
            with self._lock:
                peer.num_awaited -= len(names)

        self._loop.call_soon_threadsafe(begin)

    def forget(self, number: int) -> None:
        """Give a fetch up: blocks that come of it are dropped."""

        def end() -> None:
            if (task := self._tasks.get(number)) is not None:
                task.cancel()

        self._loop.call_soon_threadsafe(end)

    def close(self) -> None:
        """End all fetches, and close the connections."""

        async def stop() -> None:
            tasks = [*self._tasks.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for peer in self._peers.values():
                for _, writer, _ in peer.idle:
                    writer.close()
            self._loop.call_soon(self._loop.stop)

        asyncio.run_coroutine_threadsafe(stop(), self._loop)
        self._thread.join()
        self._loop.close()

    def _peer(self, source: str) -> _Peer | None:
        with self._lock:
            if (peer := self._peers.get(source)) is not None:
                return peer
            scheme, found, address = source.partition("://")
            if not found or scheme not in SCHEMES:
                return None
            tls = client_context() if SCHEMES[scheme] else None
            peer = self._peers[source] = _Peer(address, tls, BlockSeconds(self._block_bytes / FIRST_BANDWIDTH))
            return peer

    def _seconds_before(self, peer: _Peer, now: float) -> float:
        """Return the seconds until the first block comes, behind those that a peer is asked for already."""
        return ROUND_TRIP + peer.num_awaited / MOST_CONNECTIONS * peer.block_seconds.at(now)

    async def _answer(
        self, peer: _Peer, names: Sequence[bytes], until: float, answer: Callable[[list[Frame]], None]
    ) -> None:
        frames: list[Frame] = []
        asked_from = peer.asked_from
        if await self._take_slot(peer, until):
            try:
                if peer.asked_from == asked_from:  # else it has failed since
                    await self._fetch_in_time(peer, names, frames, until)
            finally:
                peer.slots.release()
        answer(frames)

    async def _take_slot(self, peer: _Peer, until: float) -> bool:
        """Wait for one of the connections to a peer. Returns False if none is free in time, which is not its fault."""
        now = time.monotonic()
        usual = max(SLACK * self._seconds_before(peer, now), LEAST_SECONDS)
        try:
            async with asyncio.timeout(min(ANSWER_SHARE * (until - now), usual)):
                return await peer.slots.acquire()
        except TimeoutError:
            return False

    async def _fetch_in_time(self, peer: _Peer, names: Sequence[bytes], frames: list[Frame], until: float) -> None:
        """Add the leading blocks that a peer has to `frames`, as they come, until it is late or has failed."""
        asked_from, now = peer.asked_from, time.monotonic()
        least = LEAST_SECONDS * (CONNECTED_SHARE if peer.is_connected(now) else 1.0)
        usual = max(SLACK * (ROUND_TRIP + len(names) * peer.block_seconds.at(now)), least)
        patience = min(ANSWER_SHARE * (until - now), usual)
        why = ""
        try:
            async with asyncio.timeout(patience):
                await self._fetch(peer, names, frames)
            peer.pause, peer.failure = FIRST_PAUSE, ""
        except TimeoutError:
            if not frames or patience == usual:  # else the request could not wait for more
                why = f"{len(frames)} of {len(names)} blocks have come within {patience:.3g} s"
        except asyncio.IncompleteReadError:
            why = "it has closed the connection"
        except SplitfuseError as error:
            why = str(error)
        except OSError as error:
            why = error.strerror or str(error)
        except Exception as error:
            why = repr(error)
        if why and peer.asked_from == asked_from:  # else another fetch of the same time has failed, too
            self._fail(peer, why)

    async def _fetch(self, peer: _Peer, names: Sequence[bytes], frames: list[Frame]) -> None:
        """Add the leading blocks that a peer has to `frames`, as they come."""
        reader, writer = await self._connect(peer)
        try:
            began = time.monotonic()
            writer.write(frame(_encode(Wanted(tuple(names)))))
            await writer.drain()
            for name in names:
                head = _decode_head(await read_message(reader, most=16 + 8 * self._block_size))
                if not head.num_bytes:
                    break
                if head.num_bytes != self._block_bytes or len(head.token_ids) > 4 * self._block_size:
                    raise ValueError(f"it sends blocks of {head.num_bytes} bytes, not {self._block_bytes}")
                data = np.frombuffer(bytearray(await reader.readexactly(head.num_bytes)), np.uint8)  # writable
                block = Frame(name, tuple(array("i", head.token_ids)), data, head.checksum)
                if not block.is_intact:
                    self.num_dropped += 1
                    raise ValueError("a block that it sends is not what its checksum says")
                frames.append(block)
                self.num_fetched += 1
            else:
                if _decode_head(await read_message(reader, most=64)).num_bytes:
                    raise ValueError("it sends more than it was asked for")
            now = time.monotonic()
            if frames:
                peer.block_seconds.update((now - began - ROUND_TRIP) / len(frames), now)
            peer.idle.append((reader, writer, now))
        except BaseException as error:
            if frames and isinstance(error, asyncio.CancelledError):  # a slow one is known to be slow
                now = time.monotonic()
                peer.block_seconds.raise_to((now - began - ROUND_TRIP) / len(frames), now)
            writer.close()
            raise

    async def _connect(self, peer: _Peer) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while peer.idle:
            reader, writer, since = peer.idle.pop()
            if time.monotonic() - since < IDLE_SECONDS and not reader.at_eof():
                return reader, writer
            writer.close()
        reader, writer = await connect(peer.address, self._key, Purpose.BLOCKS, tls=peer.tls)
        try:
            await read_welcome(reader)
        except BaseException:
            writer.close()
            raise
        return reader, writer

    def _fail(self, peer: _Peer, why: str) -> None:
        peer.asked_from = time.monotonic() + peer.pause
        if why != peer.failure:  # else it was said
            _logger.warning(
                "KV blocks do not come from %s now: %s; it is asked again in %g s", peer.address, why, peer.pause
            )
        peer.pause, peer.failure = min(2 * peer.pause, LONGEST_PAUSE), why
