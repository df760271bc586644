"""Compare starts of an engine with an SLO, for which it estimates its steps, with starts without one.

    python -m benchmarks.start_up --model DIR [--quantization int8] [--turns 3]

In turns, in one process, after a start that does not count: the files are in the system's cache by then, and nothing is
imported any more. No cost model is stored. Prints seconds of the wall and of the processor, and medians of the
differences.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
from statistics import median

from splitfuse.config.engine import EngineConfig
from splitfuse.engine.engine import Engine

SLO = {"ttft": "12ms/token", "itl": "500ms"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a model")
    parser.add_argument("--quantization")
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    settings = {"model": arguments.model, "quantization": arguments.quantization}
    with tempfile.TemporaryDirectory() as empty:
        os.environ["XDG_CACHE_HOME"] = empty
        start(settings)
        print("| without an SLO: wall, processor s | with one | differences |\n|---|---|---|")
        differences = []
        for _ in range(arguments.turns):
            without, with_slo = start(settings), start(settings | SLO)
            both = with_slo[0] - without[0], with_slo[1] - without[1]
            differences.append(both)
            cells = (f"{wall:.2f}, {processor:.2f}" for wall, processor in (without, with_slo, both))
            print("| " + " | ".join(cells) + " |", flush=True)
    wall, processor = (median(each) for each in zip(*differences, strict=True))
    print(f"with an SLO a start takes {wall:+.2f} s of the wall, {processor:+.2f} s of the processor")


def start(settings: dict[str, str | None]) -> tuple[float, float]:
    """Return the seconds in which an engine was ready, of the wall and of the processor."""
    gc.collect()
    began = time.perf_counter(), time.process_time()
    engine = Engine.load(EngineConfig.from_settings(settings))
    taken = time.perf_counter() - began[0], time.process_time() - began[1]
    engine.close()
    return taken


if __name__ == "__main__":
    main()
