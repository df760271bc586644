"""What a load gave, measured or simulated: plain data, kept as JSON. Knows neither how it came about nor what it means.

Times are seconds since the point began, by one monotonic clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from splitfuse.errors import ConfigError


@dataclass(frozen=True)
class RequestRecord:
    """One request as its client saw it."""

    client: int
    """Which client of a closed loop sent it; in an open loop, its place in the order of arrival."""
    sent: float
    """When it was sent; in an open loop, when it was due."""
    num_prompt_tokens: int
    token_times: tuple[float, ...]
    """When each generated token came. Those that came in one event have equal times."""
    error: str | None = None

    @property
    def done(self) -> float:
        """When its last token came; when it was sent, if none did."""
        return self.token_times[-1] if self.token_times else self.sent


@dataclass(frozen=True)
class Point:
    """One load on one system. Counted are the requests sent in `window`; those outside warmed it up or ran it out."""

    clients: int | None
    """Of a closed loop; None for an open one."""
    rate: float | None
    """Requests a second that were due in an open loop; None for a closed one."""
    window: tuple[float, float]
    records: tuple[RequestRecord, ...]
    repetition: int = 0


@dataclass(frozen=True)
class Results:
    """Every point of one system under one kind of load."""

    system: str
    """What was measured, in words for a legend: `splitfuse int8`, `vLLM 0.32 W8A8, budget 256`."""
    workload: dict[str, Any]
    """The settings of the load, by name."""
    points: tuple[Point, ...]
    simulated: bool = False
    replicas: int = 1
    """Engines that shared the load, each with a whole model."""
    tensor_parallel_size: int = 1
    """Devices that shared each engine's model."""
    prompt_speed: float = 512.0
    """Prompt tokens a second, by which a first token counts as promised."""
    about: dict[str, Any] = field(default_factory=dict)
    """The command, versions, commit, machine, date, start-up seconds, resident bytes: what it takes to repeat it."""


def load_order(clients: int | None, rate: float | None) -> tuple[float, float]:
    """By which loads are sorted: closed ones by their clients, open ones by their rate."""
    return (clients or 0, rate or 0.0)


def by_load(points: Iterable[Point]) -> list[list[Point]]:
    """The repetitions of each load together, loads in their order."""
    loads: dict[tuple[float, float], list[Point]] = {}
    for point in points:
        loads.setdefault(load_order(point.clients, point.rate), []).append(point)
    return [same for _, same in sorted(loads.items())]


def save(results: Results, path: Path) -> None:
    """As JSON. Whoever is interrupted leaves the old file or the new one, whole."""
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1))
    part.replace(path)


def load(path: Path) -> Results:
    """Raises ConfigError for a file that cannot be read or holds something else."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Results)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{path} does not hold results of a benchmark: {error}") from error
