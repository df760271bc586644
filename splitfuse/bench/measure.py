"""Measures a target: starts it, drives each load with its repetitions, and collects the results.

All loads are driven once before any is driven again, so that what changes in the machine meanwhile shows in the spread.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

from tqdm import tqdm

from splitfuse.bench.load import closed_loop, open_loop
from splitfuse.bench.results import Point, Results
from splitfuse.bench.target import Target
from splitfuse.bench.workload import Chat, Independent, Lengths, Loads, SharedPrefix, Trace, Workload, poisson
from splitfuse.errors import ConfigError

PROMPT, GENERATE = 512.0, 64.0
"""Mean lengths of prompts and answers by default."""
OPEN_REQUESTS = 100
"""Number of requests that count in an open loop by default."""

MakeWorkload = Callable[[Target], Workload]
"""Makes the workload once the target has started and its limits are known."""


def workload_maker(settings: Mapping[str, Any]) -> MakeWorkload:
    """Return a maker of the workload with these settings, which are flags or those in results.

    Raises ConfigError for settings that exclude each other.
    """
    kinds = [name for name in ("turns", "prefix", "trace") if name in settings]
    if len(kinds) > 1:
        raise ConfigError(f"--{kinds[0]} and --{kinds[1]} are mutually exclusive workloads")
    if "prefixes" in settings and "prefix" not in settings:
        raise ConfigError("--prefixes requires --prefix, the length of each prefix")
    if "think" in settings and "turns" not in settings:
        raise ConfigError("--think requires --turns: it is the time between the turns of a conversation")
    given = {name: settings[name] for name in ("prompt", "generate", "deviation") if name in settings}
    if "trace" in settings and given:
        raise ConfigError(f"--{next(iter(given))} and --trace are mutually exclusive: a trace has lengths")
    unlimited, seed = Lengths(**{"prompt": PROMPT, "generate": GENERATE, **given}), settings["seed"]

    def make(target: Target) -> Workload:
        lengths = replace(unlimited, room=target.room)
        if "trace" in settings:
            return Trace.read(settings["trace"], target.vocabulary, seed=seed, room=target.room)
        if "turns" in settings:
            return Chat(lengths, target.answer_vocabulary, settings["turns"], seed, settings.get("think", 0.0))
        if "prefix" in settings:
            return SharedPrefix(lengths, target.vocabulary, settings["prefix"], settings.get("prefixes", 1), seed)
        return Independent(lengths, target.vocabulary, seed)

    return make


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
        points = points or [(None, rate) for rate in loads.rate or (None,)]
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
    drive: Callable[..., Coroutine[Any, Any, Point]]
    requests = loads.requests
    if clients is not None:
        name, requests = f"{clients} clients", 4 * clients + 32 if requests is None else requests
        drive = partial(closed_loop, clients=clients, spacing=loads.spacing)
    elif rate is not None:
        name, requests = f"{rate:g} requests/s", OPEN_REQUESTS if requests is None else requests
        stream = f"rate {rate:g} repetition {repetition}"
        drive = partial(
            open_loop, rate=rate, arrivals=poisson(rate, seed=int(workload.settings["seed"]), stream=stream)
        )
    elif isinstance(workload, Trace):
        name, drive = "as recorded", partial(open_loop, rate=None, arrivals=workload.arrivals())
    else:
        raise ConfigError("no arrival times: give --clients, --rate, or a --trace with times (at)")
    which = f", {repetition + 1} of {loads.repeat}" if loads.repeat > 1 else ""
    with tqdm(total=requests, desc=name + which, unit="request", disable=not progress) as bar:

        def on_progress(doing: str, num_done: int) -> None:
            bar.set_postfix_str(doing, refresh=not num_done)
            bar.update(num_done - bar.n)

        return await drive(target, workload, requests=requests, repetition=repetition, on_progress=on_progress)


def _note_memory(about: dict[str, Any], name: str, target: Target) -> None:
    if (size := target.resident_bytes()) is not None:
        about[name] = size
