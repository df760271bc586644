"""Throughput and memory of two replicas of one core each against one of one core, on the same requests, in turns.

    python -m benchmarks.server.two_replicas [--model FOLDER] [--streams N] [--prompt N] [--turns N] [FLAGS]

This process reads the streams and, like the front, shares the cores with the engines. Other flags are those of `serve`,
as --name=value. Memory is that of the engines at the end: anonymous, and including their part of shared pages (PSS).
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import httpx
from server_load import children
from server_process import server_process

from benchmarks.server.front_cost import describe, make_prompts, parsed, ratios, stream


def main() -> None:
    arguments, flags = parsed(__doc__, prompt=256, generate=32)
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    with (
        server_process(folder, f"one-{folder.name}", "--num-threads=1", *flags) as single,
        server_process(folder, f"two-{folder.name}", "--replicas=2", *flags) as double,
        single.client() as one,
        double.client() as two,
        httpx.Client(base_url=one.url, timeout=60, trust_env=False) as to_one,
        httpx.Client(base_url=two.url, timeout=60, trust_env=False) as to_two,
    ):
        pairs = []
        for turn in range(-1, arguments.turns):
            prompts = make_prompts(turn, arguments.streams, arguments.prompt)
            alone = stream(to_one, single.process.pid, prompts, arguments.generate)
            together = stream(to_two, double.process.pid, prompts, arguments.generate)
            if turn >= 0:  # the first warms up
                pairs.append((alone, together))
                print(f"turn {turn}: one {describe(alone)}; two {describe(together)}", flush=True)
        for name, server in (("one", single), ("two", double)):
            print(f"engines of {name}: " + "; ".join(memory(pid) for pid in children(server.process.pid)))
    print(f"throughput of two / one: {ratios([a.seconds / b.seconds for a, b in pairs])}")


def memory(pid: int) -> str:
    """Return the memory of a process."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    fields = {name: int(rest.split()[0]) / 1000 for name, rest in (line.split(":", 1) for line in lines)}
    return f"{fields['Anonymous']:.0f} MB anonymous, PSS {fields['Pss']:.0f} MB"


if __name__ == "__main__":
    main()
