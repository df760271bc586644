"""A measurement: start the target, drive each load with its repetitions, collect the results.

All loads are driven once before any is driven again, so that what changes in the machine meanwhile shows in the spread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from tqdm import tqdm

from splitfuse.bench.load import OnProgress, closed_loop, open_loop
from splitfuse.bench.metrics import PROMPT_TOKENS_PER_SECOND
from splitfuse.bench.results import Point, Results
from splitfuse.bench.target import Target
from splitfuse.bench.workload import Trace, Workload, poisson
from splitfuse.errors import ConfigError

OPEN_REQUESTS = 100
"""Number of requests that count in an open loop by default."""

MakeWorkload = Callable[[Target], Workload]
"""Makes the workload once the target has started and its limits are known."""


@dataclass(frozen=True, kw_only=True)
class Loads:
    """Loads and repetitions. Without clients and rates: a trace at its recorded times."""

    clients: tuple[int, ...] = ()
    rates: tuple[float, ...] = ()
    requests: int | None = None
    """Number that counts at each load; by default 4 per client and 32 more, as in the original, or 100 at a rate."""
    repeat: int = 2
    spacing: float | None = None
    """Seconds between the starts of two clients; by default, a quarter of the latency of a lone request."""

    prompt_speed: float = PROMPT_TOKENS_PER_SECOND
    """Prompt speed in tokens/s, from which the TTFT target of the SLO follows."""

    def __post_init__(self) -> None:
        if not 0 < self.prompt_speed < float("inf"):
            raise ConfigError(f"--prompt-speed {self.prompt_speed} must be a positive number of tokens/s, such as 512")
        if self.clients and self.rates:
            raise ConfigError("--clients (closed loop) and --rate (open loop) are mutually exclusive")
        if any(count < 1 for count in self.clients) or any(not 0 < rate < float("inf") for rate in self.rates):
            raise ConfigError(
                "--clients takes positive integers and --rate positive numbers, such as --clients 1,8 or --rate 0.5"
            )
        if self.spacing is not None and not self.clients:
            raise ConfigError("--spacing applies to --clients only: leave it out, or give --clients")
        if self.repeat < 1 or (self.requests is not None and self.requests < 1):
            raise ConfigError(f"--repeat and --requests must be at least 1, not {self.repeat} and {self.requests}")
        if self.spacing is not None and not 0 <= self.spacing < float("inf"):
            raise ConfigError(f"--spacing {self.spacing} must be a number of seconds, at least 0")


async def measure(
    target: Target,
    make_workload: MakeWorkload,
    loads: Loads,
    *,
    system: str,
    replicas: int = 1,
    about: Mapping[str, Any],
    on_start: Callable[[Target], None] = lambda _: None,
    on_point: Callable[[Results], None] = lambda _: None,
    progress: bool = False,
) -> Results:
    """Drive all loads and return their results.

    `on_start` is called with the started target, `on_point` with all results so far after each point: if target,
    workload or load raises, the points before are in the last call of `on_point`.
    """
    try:
        await target.start()
        on_start(target)
        workload = make_workload(target)
        about = {**target.about, **about}
        _note_memory(about, "idle_resident_bytes", target)
        results = Results(
            system, workload.settings, (), replicas=replicas, prompt_speed=loads.prompt_speed, about=about
        )
        points: list[tuple[int | None, float | None]] = [(clients, None) for clients in loads.clients]
        points = points or [(None, rate) for rate in loads.rates or (None,)]
        for repetition, (clients, rate) in product(range(loads.repeat), points):
            point = await _drive(target, workload, loads, clients, rate, repetition, progress=progress)
            about = dict(results.about)
            _note_memory(about, "resident_bytes", target)
            results = replace(results, points=(*results.points, point), about=about)
            on_point(results)
        return results
    finally:
        await target.close()


async def _drive(
    target: Target,
    workload: Workload,
    loads: Loads,
    clients: int | None,
    rate: float | None,
    repetition: int,
    *,
    progress: bool,
) -> Point:
    """Drive one load: of these clients, at this rate, or at the recorded times of a trace."""
    requests = loads.requests
    if clients is not None:
        requests = 4 * clients + 32 if requests is None else requests
        with _bar(f"{clients} clients", repetition, loads.repeat, requests, shown=progress) as on_progress:
            return await closed_loop(
                target,
                workload,
                clients=clients,
                requests=requests,
                spacing=loads.spacing,
                repetition=repetition,
                on_progress=on_progress,
            )
    if rate is not None:
        requests = OPEN_REQUESTS if requests is None else requests
        seed = int(workload.settings["seed"])
        arrivals = poisson(rate, seed=seed, stream=f"rate {rate:g} repetition {repetition}")
    elif isinstance(workload, Trace):
        arrivals = workload.arrivals()
    else:
        raise ConfigError("no arrival times: give --clients, --rate, or a --trace with times (at)")
    name = "as recorded" if rate is None else f"{rate:g} requests/s"
    with _bar(name, repetition, loads.repeat, requests, shown=progress) as on_progress:
        return await open_loop(
            target,
            workload,
            rate=rate,
            arrivals=arrivals,
            requests=requests,
            repetition=repetition,
            on_progress=on_progress,
        )


def _note_memory(about: dict[str, Any], name: str, target: Target) -> None:
    if (size := target.resident_bytes()) is not None:
        about[name] = size


@contextmanager
def _bar(name: str, repetition: int, repeat: int, requests: int | None, *, shown: bool) -> Iterator[OnProgress]:
    which = f", {repetition + 1} of {repeat}" if repeat > 1 else ""
    with tqdm(total=requests, desc=name + which, unit="request", disable=not shown) as bar:

        def on_progress(doing: str, num_done: int) -> None:
            bar.set_postfix_str(doing, refresh=not num_done)
            bar.update(num_done - bar.n)

        yield on_progress
