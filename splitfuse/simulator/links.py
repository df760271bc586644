"""Moves bytes between machines on the virtual clock: each machine's connection is shared fairly by its transfers."""

from __future__ import annotations

import asyncio
from collections import Counter

from splitfuse.simulator.deployment import Link


class Transfer:
    """Takes bytes from one machine to another as they come to be: `send` them, then wait for `received`."""

    def __init__(self, network: Network, source: int, destination: int) -> None:
        self.source, self.destination = source, destination
        self.remaining = 0.0
        self._network = network
        self._drained = asyncio.Event()
        self._drained.set()

    def send(self, count: float) -> None:
        """Send `count` more bytes after those that are under way."""
        if count > 0:
            self._drained.clear()
            self._network.send(self, count)

    async def received(self) -> None:
        """Wait until all bytes that were sent have come."""
        await self._drained.wait()
        await asyncio.sleep(self._network.link.latency)

    def drained(self) -> None:
        """Note that nothing is under way any more."""
        self.remaining = 0.0
        self._drained.set()


class Network:
    """Shares the connections of machines, each of which sends and receives `bytes_per_second` at once.

    A transfer gets its share of the source's connection or of the destination's, whichever is less. What it leaves of
    the other is not given to others, so a share is never overstated.
    """

    def __init__(self, link: Link) -> None:
        self.link = link
        self._active: dict[Transfer, None] = {}
        self._sending: Counter[int] = Counter()
        self._receiving: Counter[int] = Counter()
        self._updated = 0.0
        self._due: asyncio.TimerHandle | None = None

    def transfer(self, source: int, destination: int) -> Transfer:
        """Return a transfer between machines, with nothing to send yet."""
        return Transfer(self, source, destination)

    def send(self, transfer: Transfer, count: float) -> None:
        """Put bytes of a transfer under way."""
        self._advance()
        if transfer not in self._active:
            self._active[transfer] = None
            self._sending[transfer.source] += 1
            self._receiving[transfer.destination] += 1
        transfer.remaining += count
        self._wait()

    def _speed(self, transfer: Transfer) -> float:
        sharers = max(self._sending[transfer.source], self._receiving[transfer.destination])
        return self.link.bytes_per_second / sharers

    def _advance(self) -> None:
        """Count what has been moved since the last change."""
        now = asyncio.get_running_loop().time()
        elapsed, self._updated = now - self._updated, now
        if elapsed > 0:
            for transfer in self._active:
                transfer.remaining -= elapsed * self._speed(transfer)

    def _wait(self) -> None:
        """Wait for the transfer that is done next, if the shares stay as they are."""
        if self._due is not None:
            self._due.cancel()
        self._due = None
        if self._active:
            pause = min(transfer.remaining / self._speed(transfer) for transfer in self._active)
            self._due = asyncio.get_running_loop().call_later(max(pause, 0.0), self._settle)

    def _settle(self) -> None:
        self._advance()
        least = 1e-9 * self.link.bytes_per_second  # what a nanosecond moves: the clock's rounding
        for transfer in [each for each in self._active if each.remaining <= least]:
            del self._active[transfer]
            self._sending[transfer.source] -= 1
            self._receiving[transfer.destination] -= 1
            transfer.drained()
        self._wait()
