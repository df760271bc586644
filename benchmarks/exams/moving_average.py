"""Our moving average against pandas' `ewm(span=16).mean()`, on random traces; pandas is not one of our dependencies.

python -m benchmarks.exams.moving_average [--traces 1000]
"""

from __future__ import annotations

import argparse
import math
from random import Random

import pandas

from splitfuse.bench.results import RequestRecord
from splitfuse.bench.sla import SLAS, gaps, moving_averages, slo_enabled
from splitfuse.core.slo.targets import SPAN


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=int, default=1000)
    random, worst, kept = Random(0), 0.0, dict.fromkeys(SLAS, 0)
    count = parser.parse_args().traces
    for _ in range(count):
        record = random_trace(random)
        values = gaps(record)
        theirs = pandas.Series(values, dtype=float).ewm(span=SPAN).mean()
        worst = max([worst, *(abs(a - b) for a, b in zip(moving_averages(values), theirs, strict=True))])
        for sla in SLAS:
            ours = slo_enabled(record, sla)
            in_time = record.token_times[0] <= record.num_prompt_tokens / 512
            assert ours == (in_time and bool((theirs < 1 / sla).all())), record
            kept[sla] += ours
    print(f"pandas {pandas.__version__}: {count} traces, largest difference of an average {worst:.2g} s")
    print("kept " + ", ".join(f"{number} at {sla:g}" for sla, number in kept.items()) + ": the same by both")


def random_trace(random: Random) -> RequestRecord:
    """Lengths from 1, bursts of several tokens in one event, pauses."""
    times = [random.expovariate(1.0)]
    scale = math.exp(random.uniform(-4, 0))
    for _ in range(random.randint(0, 200)):
        pause = random.expovariate(1 / scale) + (random.random() < 0.03) * random.expovariate(1.0)
        times.append(times[-1] + pause * (random.random() < 0.8))
    return RequestRecord(0, 0.0, random.randint(1, 3000), tuple(times))


if __name__ == "__main__":
    main()
