"""Measures what many open streams cost what speaks HTTP: memory and processor time, and whether all of them go on.

    python -m benchmarks.server.open_streams [--streams 32 500] [--fronts 1 2] [--prompt 16] [--generate 64] [FLAGS]

For each number of fronts a server is started; for each number of streams so many clients each open a connection, at
once, and read an answer as it comes. The engine may run all of them in one step, so that HTTP has to keep up. This
process reads, on the same cores. Printed are the memory of the server's process and of its fronts with all streams
open, beyond that at rest; the processor time per token of the server's process and of its fronts together; the tokens a
second at which the busiest of these fills a core; and of the gaps between the events of a stream the median, and the
longest of any stream: one that starves would have a gap of many medians.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median

import httpx
from server_load import FRONT, Measured, children, http_request, metrics, wait_until_idle
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
class Cost:
    """Holds what a process has taken."""

    seconds: float  # of a processor
    rest: int  # bytes before
    peak: int


@dataclass(frozen=True)
class Run:
    """Holds what one number of streams took."""

    num_streams: int
    seconds: float
    step_seconds: float  # mean
    server: Cost
    fronts: list[Cost]  # none: the server's process speaks HTTP itself
    streams: list[StreamTimes]

    def row(self, generate: int) -> str:
        """Return the line of a table."""
        gaps = [gap for stream in self.streams for gap in stream.gaps()]
        longest = [max(stream.gaps(), default=0.0) for stream in self.streams]
        ends = sorted(stream.times[-1] for stream in self.streams)
        num_tokens = self.num_streams * generate
        front_seconds = [each.seconds for each in self.fronts]
        busiest = max(self.server.seconds, *front_seconds, 0.0)
        kilobytes = [
            sum(each.peak - each.rest for each in costs) / self.num_streams / 1e3
            for costs in ([self.server], self.fronts)
        ]
        return (
            f"| {max(len(self.fronts), 1)} | {self.num_streams:,} | {self.seconds:.1f} | {1e3 * self.step_seconds:.1f} "
            f"| {sum(each.peak for each in (self.server, *self.fronts)) / 1e6:.0f} "
            f"| {kilobytes[0]:.0f} + {kilobytes[1]:.0f} "
            f"| {1e6 * self.server.seconds / num_tokens:.0f} | {1e6 * sum(front_seconds) / num_tokens:.0f} "
            f"| {num_tokens / busiest:,.0f} "
            f"| {1e3 * median(gaps):.0f} | {1e3 * max(longest):.0f} | {ends[-1] - ends[0]:.1f} |"
        )


COLUMNS = (
    *("fronts", "streams", "seconds", "step, ms", "peak of all, MB", "kB a stream: server + fronts"),
    *("server, us a token", "fronts, us a token", "tokens/s that fill a core"),
    *("gap P50, ms", "longest gap, ms", "first to last end, s"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[32, 500, 5000])
    parser.add_argument("--fronts", type=int, nargs="+", default=[1])
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
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for num_fronts in arguments.fronts:
        with (
            server_process(folder, f"{folder.name}-{num_fronts}", f"--fronts={num_fronts}", *room) as server,
            server.client() as client,
            httpx.Client(base_url=client.url, timeout=600, trust_env=False) as http,
        ):
            processes = [server.process.pid, *children(server.process.pid, FRONT)]
            for count in arguments.streams:
                print(measure(http, processes, count, arguments).row(arguments.generate), flush=True)


def measure(http: httpx.Client, processes: Sequence[int], count: int, arguments: argparse.Namespace) -> Run:
    """Open so many streams, read them to their ends, and return what the server's process and its fronts took."""
    before, rest = metrics(http), [Measured.of(each).anonymous for each in processes]
    began, processors = time.monotonic(), [processor_seconds(each) for each in processes]
    streams, peaks = asyncio.run(
        read_all((http.base_url.host, http.base_url.port or 0), processes, count, arguments.prompt, arguments.generate)
    )
    seconds = time.monotonic() - began
    taken = [processor_seconds(each) - earlier for each, earlier in zip(processes, processors, strict=True)]
    wait_until_idle(http)
    after = metrics(http)
    steps, step_seconds = (
        after[name] - before[name] for name in ("splitfuse:steps_total", "splitfuse:step_seconds_sum")
    )
    server, *fronts = map(Cost, taken, rest, peaks)
    return Run(count, seconds, step_seconds / steps, server, fronts, streams)


async def read_all(
    address: tuple[str, int], processes: Sequence[int], count: int, prompt: int, generate: int
) -> tuple[list[StreamTimes], list[int]]:
    """Read so many answers at once; return when their events came, and the most memory that each process had."""
    random = Random(count)
    peaks = [0] * len(processes)

    async def watch() -> None:
        while True:
            peaks[:] = map(max, peaks, (Measured.of(each).anonymous for each in processes))
            await asyncio.sleep(0.5)

    watching = asyncio.create_task(watch())
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(read_one(address, [random.randrange(100, 2000) for _ in range(prompt)], generate))
            for _ in range(count)
        ]
    watching.cancel()
    return [task.result() for task in tasks], peaks


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
