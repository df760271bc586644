"""Measures what many open streams cost one front process: memory and processor time, and whether all of them go on.

    python -m benchmarks.server.open_streams [--streams 32 500 5000] [--prompt 16] [--generate 64] [SERVE FLAGS]

For each number of streams so many clients each open a connection, at once, and read an answer as it comes. The engine
may run all of them in one step, so that it is the front that has to keep up. This process reads, on the same cores.
Printed are the front's memory at rest and with all streams open, its processor time per token, and of the gaps between
the events of a stream the median, and the longest of any stream: one that starves would have a gap of many medians.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median

import httpx
from server_load import Measured, http_request, metrics, wait_until_idle
from server_process import server_process

from benchmarks.server.front_cost import processor_seconds

EVENT = b"data: {"
BLOCK_SIZE = 32
NUM_SPARE = 64
"""Number of connections and queued requests beyond the streams, for what measures them."""


@dataclass
class StreamTimes:
    """Holds when events of one stream came, in seconds of this machine's clock."""

    times: list[float] = field(default_factory=list)
    tail: bytes = b""

    def take(self, piece: bytes) -> None:
        """Count the events that begin in what has been read; they may be cut anywhere."""
        piece = self.tail + piece
        self.times += [time.monotonic()] * piece.count(EVENT)
        self.tail = piece[-(len(EVENT) - 1) :]

    def gaps(self) -> list[float]:
        """Return the seconds between events that came one after the other."""
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]


@dataclass(frozen=True)
class Run:
    """Holds what one number of streams took."""

    num_streams: int
    seconds: float
    front_seconds: float  # processor time
    step_seconds: float  # mean
    rest: int  # bytes of the front at rest, before
    peak: int
    streams: list[StreamTimes]

    def row(self, generate: int) -> str:
        """Return the line of a table."""
        gaps = [gap for stream in self.streams for gap in stream.gaps()]
        longest = [max(stream.gaps(), default=0.0) for stream in self.streams]
        ends = sorted(stream.times[-1] for stream in self.streams)
        kilobytes = (self.peak - self.rest) / self.num_streams / 1e3
        return (
            f"| {self.num_streams:,} | {self.seconds:.1f} | {1e3 * self.step_seconds:.1f} "
            f"| {self.rest / 1e6:.0f} | {self.peak / 1e6:.0f} | {kilobytes:.0f} "
            f"| {1e6 * self.front_seconds / (self.num_streams * generate):.0f} "
            f"| {1e3 * median(gaps):.0f} | {1e3 * max(longest):.0f} | {ends[-1] - ends[0]:.1f} |"
        )


COLUMNS = (
    *("streams", "seconds", "step, ms", "front at rest, MB", "its peak, MB", "kB a stream"),
    *("processor time, us a token", "gap P50, ms", "longest gap, ms", "first to last end, s"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[32, 500, 5000])
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--generate", type=int, default=64)
    arguments, flags = parser.parse_known_args()
    most = max(arguments.streams)
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    blocks_each = (
        -(-(arguments.prompt + arguments.generate) // BLOCK_SIZE) + 1
    )  # one that starts leaves others one each
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    room = [f"--max-num-seqs={most}", f"--max-num-batched-tokens={2 * most}", f"--block-size={BLOCK_SIZE}"]
    room += [f"--num-blocks={most * blocks_each + NUM_SPARE}", f"--max-queued-requests={most + NUM_SPARE}"]
    room += ["--no-enable-prefix-caching", *flags]
    with (
        server_process(folder, f"bench-{folder.name}", *room) as server,
        server.client() as client,
        httpx.Client(base_url=client.url, timeout=600, trust_env=False) as http,
    ):
        print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
        for count in arguments.streams:
            print(measure(http, server.process.pid, count, arguments).row(arguments.generate), flush=True)


def measure(http: httpx.Client, front: int, count: int, arguments: argparse.Namespace) -> Run:
    """Open so many streams, read them to their ends, and return what the front took for it."""
    before, rest = metrics(http), Measured.of(front).anonymous
    began, front_began = time.monotonic(), processor_seconds(front)
    streams, peak = asyncio.run(
        read_all((http.base_url.host, http.base_url.port or 0), front, count, arguments.prompt, arguments.generate)
    )
    seconds, front_seconds = time.monotonic() - began, processor_seconds(front) - front_began
    wait_until_idle(http)
    after = metrics(http)
    steps, step_seconds = (
        after[name] - before[name] for name in ("splitfuse:steps_total", "splitfuse:step_seconds_sum")
    )
    return Run(count, seconds, front_seconds, step_seconds / steps, rest, peak, streams)


async def read_all(
    address: tuple[str, int], front: int, count: int, prompt: int, generate: int
) -> tuple[list[StreamTimes], int]:
    """Read so many answers at once; return when their events came, and the most memory that the front had."""
    random = Random(count)
    peak = 0

    async def watch() -> None:
        nonlocal peak
        while True:
            peak = max(peak, Measured.of(front).anonymous)
            await asyncio.sleep(0.5)

    watching = asyncio.create_task(watch())
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(read_one(address, [random.randrange(100, 2000) for _ in range(prompt)], generate))
            for _ in range(count)
        ]
    watching.cancel()
    return [task.result() for task in tasks], peak


async def read_one(address: tuple[str, int], prompt: list[int], generate: int) -> StreamTimes:
    """Read one answer; raises RuntimeError if it is not whole."""
    body = {"prompt": prompt, "max_tokens": generate, "ignore_eos": True, "stream": True, "temperature": 0}
    reader, writer = await asyncio.open_connection(*address)
    writer.write(http_request("/v1/completions", body))
    times, last = StreamTimes(), b""
    while piece := await reader.read(65536):
        times.take(piece)
        last = (last + piece)[-400:]
    writer.close()
    if b"data: [DONE]" not in last:
        raise RuntimeError(f"incomplete answer, ending in {last!r}")
    return times


if __name__ == "__main__":
    main()
