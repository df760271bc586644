"""Keeps the frames of the last minutes for consoles, and tells them of new ones.

    store = ConsoleStore(traces)
    viewer = store.open()
    viewer.take()                 # an event that begins, then frames
    await store.wait(viewer)      # until there are more
    store.close(viewer)

Every console reads the same encoded frames from one ring, each at its own place: one that reads slowly, or not at all,
costs no memory but what its connection holds. Belongs to the event loop's thread.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from splitfuse.engine.client import EngineState
from splitfuse.engine.trace import TraceLevel
from splitfuse.server.console.frames import (
    PHASES,
    Frame,
    FrameBuilder,
    OpenRequest,
    OpenRequests,
    ShownEngine,
    describe_engine,
)
from splitfuse.server.dialect import sse_event
from splitfuse.server.traces import TraceEvent, TraceHub
from splitfuse.version import __version__

FRAME_SECONDS = 0.1
"""Time that a frame spans; up to twice as much if nothing comes to end it."""
KEPT_SECONDS = 300.0
"""Time for which frames are kept."""
MAX_BYTES = 8 * 2**20
"""Bytes of frames that are kept, at most."""
MAX_BEHIND = 150
"""Number of frames by which a console may be late until those are dropped for it."""
SENDS_PER_SECOND = 100
"""Number of times a second that something is sent to any console: with many open ones, each gets more at a time."""
PIECE_BYTES = 2**18
"""Bytes that are sent to a console at once, about."""

_decode_frame = msgspec.json.Decoder(Frame).decode


class Start(msgspec.Struct):
    """Begins what a console is sent, or begins it anew when frames were dropped: everything that holds by then."""

    version: str
    model: str
    has_chat: bool
    """False for a model without a chat template, which completes prompts only."""
    generates: bool
    """False for a model that gives embeddings only."""
    unix_origin: float
    """Unix time at which the times of frames are 0."""
    kept_seconds: float
    phases: list[tuple[str, str]]
    """Name and meaning of each latency phase."""
    engines: list[ShownEngine]
    requests: list[OpenRequest]
    next_frame: int
    num_dropped: int
    """Number of frames that were dropped for this console."""
    now: float
    start: bool = True


class Viewer:
    """Reads frames for one console."""

    def __init__(self, store: ConsoleStore) -> None:
        self._store = store
        self._next: int | None = None
        self._has_caught_up = False
        self._num_dropped = 0

    @property
    def is_late(self) -> bool:
        """Return whether there is something to take."""
        return self._next is None or self._next < self._store.end

    def take(self) -> bytes:
        """Return the events since the last call, some PIECE_BYTES of them. Frames are dropped if there are too many."""
        store, events = self._store, bytearray()
        if self._next is None:
            self._next = store.begin
            events += sse_event(store.start(at_end=False, num_dropped=0))
        elif self._next < store.begin or (self._has_caught_up and store.end - self._next > MAX_BEHIND):
            dropped = store.end - self._next
            self._next, self._num_dropped = store.end, self._num_dropped + dropped
            store.num_dropped += dropped
            events += sse_event(store.start(at_end=True, num_dropped=self._num_dropped))
        while self._next < store.end and len(events) < PIECE_BYTES:
            events += store.frame(self._next)
            self._next += 1
        self._has_caught_up |= self._next == store.end
        return bytes(events)


class ConsoleStore:
    """Subscribes to all traces, and makes frames of them. `about` returns what Start says of the model."""

    def __init__(
        self, traces: TraceHub, about: Callable[[], Mapping[str, Any]], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.num_dropped = 0
        """Number of frames that were dropped for consoles which did not read them in time."""
        self.begin = 0
        """Number of the oldest frame that is kept."""
        self._about, self._clock = about, clock
        self._origin, self._unix_origin = clock(), time.time()
        self._traces = traces
        self._builder = FrameBuilder(origin=self._origin)
        self._ring: deque[tuple[float, bytes]] = deque()
        self._num_bytes = 0
        self._at_begin, self._at_end = OpenRequests(), OpenRequests()
        self._stages: dict[int, tuple[str, float]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        self._viewers: set[Viewer] = set()
        self._news = asyncio.Event()
        self.unsubscribe = traces.subscribe(self._take, TraceLevel.STEPS)
        """Function that ends it: no more frames are made."""

    @property
    def num_viewers(self) -> int:
        """Return the number of open consoles."""
        return len(self._viewers)

    @property
    def end(self) -> int:
        """Return the number of the next frame."""
        return self.begin + len(self._ring)

    @property
    def pause(self) -> float:
        """Return the seconds between two times that something is sent to a console."""
        return max(FRAME_SECONDS, len(self._viewers) / SENDS_PER_SECOND)

    @property
    def has_ended(self) -> bool:
        """Return whether no engine lives."""
        return all(engine.state is EngineState.DEAD for engine in self._traces.engines)

    def open(self) -> Viewer:
        """Return a viewer for a new console; it must be closed."""
        viewer = Viewer(self)
        self._viewers.add(viewer)
        return viewer

    def close(self, viewer: Viewer) -> None:
        """Note that a console is closed."""
        self._viewers.discard(viewer)

    async def wait(self, viewer: Viewer, timeout: float) -> bool:
        """Wait until there is something to take; return False if there is nothing after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                while not viewer.is_late:
                    await self._news.wait()
        except TimeoutError:
            return False
        return True

    def frame(self, number: int) -> bytes:
        """Return the event of a frame that is kept."""
        return self._ring[number - self.begin][1]

    def start(self, *, at_end: bool, num_dropped: int) -> Start:
        """Return what holds before the oldest frame that is kept, or after the newest."""
        now = self._builder.milliseconds(self._clock())
        return Start(
            version=__version__,
            **self._about(),
            unix_origin=self._unix_origin,
            kept_seconds=KEPT_SECONDS,
            phases=[(phase.value, phase.meaning) for phase in PHASES],
            engines=[
                describe_engine(index, engine, now, engine.death if engine.state is EngineState.DEAD else "")
                for index, engine in enumerate(self._traces.engines)
            ],
            requests=(self._at_end if at_end else self._at_begin).all,
            next_frame=self.end if at_end else self.begin,
            num_dropped=num_dropped,
            now=now,
        )

    def look(self) -> None:
        """Note the stages that starting engines have reached: nothing tells of them."""
        for index, engine in enumerate(self._traces.engines):
            stage = engine.stage.stage, engine.stage.fraction
            if self._stages.get(index) != stage:
                self._stages[index] = stage
                if engine.state is EngineState.STARTING:
                    self._builder.add_engine(index, engine, self._clock())
                    self._flush_soon()

    def _take(self, event: TraceEvent) -> None:
        self._builder.add(event, self._traces.engines)
        self._flush_soon()

    def _flush_soon(self) -> None:
        """Make a frame when it is due: at the next event, which saves the event loop a turn, or else a little later."""
        now = self._clock()
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(2 * FRAME_SECONDS, self._flush)
            self._due = now + FRAME_SECONDS
        elif now >= self._due:
            self._flush()

    def _flush(self) -> None:
        """Make a frame of what has come, keep it, and forget those that are too old or too many."""
        if self._timer is not None:
            self._timer.cancel()
        now, self._timer = self._clock(), None
        frame = self._builder.take(self.end, now)
        event = sse_event(frame)
        self._at_end.apply(frame)
        self._ring.append((now, event))
        self._num_bytes += len(event)
        while self._ring and (self._ring[0][0] < now - KEPT_SECONDS or self._num_bytes > MAX_BYTES):
            _, oldest = self._ring.popleft()
            self.begin += 1
            self._num_bytes -= len(oldest)
            self._at_begin.apply(_decode_frame(oldest.removeprefix(b"data: ")))
        news, self._news = self._news, asyncio.Event()
        news.set()
