"""Copies KV blocks between the cache of an engine and its tiers, around the steps that compute them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from splitfuse.core.events import StepRecord
from splitfuse.core.kv.block_allocator import BlockAllocator
from splitfuse.core.kv.fetching import FIRST_BANDWIDTH, WAITING_SHARE, Fetch
from splitfuse.core.request_output import RequestOutput
from splitfuse.core.scheduler import Scheduler
from splitfuse.engine.garbage import unowned
from splitfuse.engine.messages import Export, Prefetch
from splitfuse.engine.tiers import Tiers
from splitfuse.runtime.executor import Executor

MOVING_SHARE = 1 / 16
"""Fraction of the time of a step that copying blocks of requests which move may take: of all on their way out, and of
all on their way in. Reading and writing them takes threads of the same cores as long again, or longer.
"""
IDLE_SECONDS = 0.004
"""Seconds that it may take where no request runs: one may come meanwhile."""
TIME_TO_WRITE = 0.01
"""Longest wait for blocks that go ahead of a request which leaves, in seconds."""
WORTH_A_STEP = 1 / 2
"""Longest wait of a step for blocks of requests that have moved here, as a fraction of a step: without it they would
miss the step.
"""
FEWEST_MOVED = 4
"""Number of blocks that are copied at a time, whatever time they take."""


class BlockTransfers:
    """Saves blocks to tiers, and fetches those that prompts begin with from there.

    Fetched blocks go to an inbox first, and into the cache with the step of their request. An export lays blocks of a
    running request ready for another engine, some with each step; a prefetch brings them into the cache there, before
    the request comes.
    """

    def __init__(self, tiers: Tiers, executor: Executor, scheduler: Scheduler, allocator: BlockAllocator) -> None:
        assert scheduler.fetches is not None, "the scheduler knows of the tiers"
        self._tiers, self._executor, self._allocator = tiers, executor, allocator
        self._scheduler, self._fetches = scheduler, scheduler.fetches
        self._step_seconds = 0.0  # of the last step
        self._to_export: dict[str, int] = {}  # how many blocks others want of requests, in the order of asking
        self._exporting: dict[str, tuple[bytes, ...]] = {}  # names of blocks that are to be saved, by request
        self._exported: dict[str, int] = {}
        scheduler.events.subscribe(StepRecord, unowned(self._note_step))

    def export(self, command: Export) -> None:
        """Have blocks of a request laid ready for another engine: `take_exported` tells when they are there."""
        self._to_export[command.request_id] = command.num_blocks

    def take_exported(self) -> dict[str, int]:
        """Return for which requests leading blocks can be fetched now, and how many, since the last call."""
        taken, self._exported = self._exported, {}
        return taken

    def prefetch(self, command: Prefetch) -> None:
        """Bring blocks into the prefix cache for a request that will come: `take_prefetched` tells when it is done."""
        self._fetches.ahead.add(command.request_id, command.names, command.token_ids, command.block_sources)

    def take_prefetched(self) -> list[tuple[str, int]]:
        """Return for which requests what was wanted ahead has come, as far as it will, and how many leading blocks of
        it there are, since the last call.
        """
        return self._fetches.ahead.take_ended()

    @property
    def is_busy(self) -> bool:
        """Return whether blocks are fetched ahead of requests."""
        return self._fetches.ahead.is_busy

    def exchange(self) -> None:
        """Take in the blocks that have arrived and ask for more, before a step is planned."""
        self._take_answers()
        if self._to_export:
            self._export_more(self._movable_blocks())
        if self._fetches.ahead.is_busy:
            self._fetches.ahead.most_at_once = self._landable_blocks()
        if asked := self._fetches.take(time.monotonic()):
            self._ask(asked)
            if self._scheduler.queue.fetching:
                self._tiers.wait(WAITING_SHARE * self._step_seconds)  # else they wait for the whole step
            self._take_answers()

    def land_ahead(self) -> bool:
        """Land the blocks that were fetched ahead, while no step runs. Returns whether there were any."""
        if not (lands := self._fetches.take_lands_ahead()):
            return False
        self.save_rest()  # of a request that has ended between steps: blocks land where its were
        self._executor.land(lands)
        self._tiers.stats.num_fetched += len(lands)
        self._fetches.ahead.landed(lands, is_there=True)
        return True

    def wait(self, seconds: float) -> bool:
        """Wait for what tiers were asked for, at most so long. Returns False if there is nothing to wait for."""
        if not self._tiers.is_asked:
            return False
        self._tiers.wait(seconds)
        return True

    def save_rest(self) -> None:
        """Save the blocks of which no plan has said so, while nothing is in flight."""
        self._executor.save(self._allocator.take_saves())

    def save_departing(self) -> None:
        """Save the blocks of requests that have left, before others write to them: the leading ones, for which there is
        room, since those behind them would take their places and are worth nothing without them.
        """
        if saves := self._scheduler.requests.take_departing():
            saves = saves[: self._tiers.num_export_slots]
            self._executor.save(saves, at_once=True)
            self._tiers.wait_until_written(TIME_TO_WRITE, {save.before for save in saves})

    def save_ahead(self, outputs: Sequence[RequestOutput]) -> None:
        """Save what was computed for requests that will leave after their first token."""
        if not (saves := self._scheduler.requests.take_going_ahead()):
            return
        self._executor.save(saves)
        for output in outputs:
            request = self._scheduler.get(output.request_id)
            if request is not None and request.most_here > 0 and request.kv.num_saved_blocks:
                self._exporting[request.request_id] = tuple(request.kv.block_names[: request.kv.num_saved_blocks])

    def note_exports(self, is_unfinished: Callable[[str], bool]) -> None:
        """Note which exports are written."""
        for request_id, names in list(self._exporting.items()):
            num_written = self._tiers.num_written(names)
            if num_written:
                self._exported[request_id] = num_written
            if num_written == len(names) or not is_unfinished(request_id):
                del self._exporting[request_id]

    def _ask(self, asked: Sequence[Fetch]) -> None:
        """Ask for blocks, but read those at once that a request has left at another engine, so that it is in the next
        step: its client waits. Not from a disk, nor for longer than that is worth.
        """
        until = time.monotonic() + WORTH_A_STEP * self._step_seconds
        for fetch in asked:
            frames = None
            if fetch.has_moved and time.monotonic() + self._tiers.seconds_in_memory(fetch) <= until:
                frames = self._tiers.read_at_once(fetch, until)
            if frames is None:
                self._tiers.ask(fetch)
            else:
                self._fetches.arrived(fetch.number, frames, time.monotonic())

    def _take_answers(self) -> None:
        for number, frames in self._tiers.answers():
            self._fetches.arrived(number, frames, time.monotonic())

    def _movable_blocks(self) -> int:
        """Return how many blocks may be copied at a time for requests that move."""
        seconds = MOVING_SHARE * self._step_seconds if self._scheduler.queue.running else IDLE_SECONDS
        return max(int(seconds * FIRST_BANDWIDTH / self._tiers.block_bytes), FEWEST_MOVED)

    def _landable_blocks(self) -> int:
        """Return how many blocks may be on their way here for requests that will come: only as far as there is memory
        for them, and for others, so that no step waits for it.
        """
        most = self._movable_blocks()
        if self._scheduler.queue.running:  # memory is asked for after each step
            return min(self._executor.num_ready(reserve=True), most)
        self._executor.have_memory()  # no step waits for it now
        return min(self._executor.num_ready(), most)

    def _export_more(self, most: int) -> None:
        """Save some more blocks of requests that will move, at most so many with the next plan."""
        for request_id, num_blocks in list(self._to_export.items()):
            request = self._scheduler.get(request_id)
            before = 0 if request is None else request.kv.num_saved_blocks
            names = self._scheduler.requests.save_blocks(request_id, num_blocks, most)
            if names:
                self._exporting[request_id] = tuple(names)
            else:
                self._exported[request_id] = 0
            most -= max(len(names) - before, 0)
            if most == 0:
                return
            del self._to_export[request_id]

    def _note_step(self, step: StepRecord) -> None:
        self._step_seconds = step.measured_seconds
        self._tiers.stats.num_fetched += len(step.plan.lands)
