"""Holds results of a load, measured or simulated, as plain data that is stored as JSON.

Times are seconds since the point began, by one monotonic clock. metrics.py interprets them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from splitfuse.config.files import LARGE_BYTES, read_bytes
from splitfuse.errors import ConfigError, unreadable


@dataclass(frozen=True)
class MeasuredRequest:
    """Holds one request, as its client measured it."""

    client: int
    """Number of the client that sent it (closed loop), or position in the order of arrival (open loop)."""
    sent: float
    """Time at which it was sent, or at which it was due (open loop)."""
    num_prompt_tokens: int
    token_times: tuple[float, ...]
    """Arrival time of each generated token; tokens of one event have equal times."""
    error: str | None = None

    @property
    def done(self) -> float:
        """Return the time of its last token; the time it was sent if no token arrived."""
        return self.token_times[-1] if self.token_times else self.sent


@dataclass(frozen=True)
class Point:
    """Holds one load on one system. Requests sent in `window` count; others warm up, or keep it on."""

    clients: int | None
    """Number of clients of a closed loop; None for an open loop."""
    rate: float | None
    """Arrival rate of an open loop in requests/s; None for a closed loop."""
    window: tuple[float, float]
    records: tuple[MeasuredRequest, ...]
    repetition: int = 0


@dataclass(frozen=True)
class Results:
    """Holds all points of one system under one workload."""

    system: str
    """Name of the system, for legends: `splitfuse int8`, `vLLM 0.32 W8A8, budget 256`."""
    workload: dict[str, Any]
    """Settings of the workload, by name."""
    points: tuple[Point, ...]
    simulated: bool = False
    replicas: int = 1
    """Number of engines that share the load, each with a whole model."""
    tensor_parallel_size: int = 1
    """Number of devices that share each engine's model."""
    prompt_speed: float = 512.0
    """Prompt speed in tokens/s, from which the TTFT target of the SLO follows."""
    about: dict[str, Any] = field(default_factory=dict)
    """Command, versions, commit, machine, date, start-up seconds, resident bytes: what it takes to repeat the run."""


def load_order(clients: int | None, rate: float | None) -> tuple[float, float]:
    """Return the key that sorts loads: closed loops by their clients, open loops by their rate."""
    return (clients or 0, rate or 0.0)


def by_load(points: Iterable[Point]) -> list[list[Point]]:
    """Return the repetitions of each load together, sorted by load."""
    loads: dict[tuple[float, float], list[Point]] = {}
    for point in points:
        loads.setdefault(load_order(point.clients, point.rate), []).append(point)
    return [same for _, same in sorted(loads.items())]


def save(results: Results, path: Path) -> None:
    """Write results as JSON, atomically: an interruption leaves the old file or the new one. A pipe or a device is
    written to. Raises ConfigError.
    """
    is_stream = path.exists() and not path.is_file()
    part = path if is_stream else path.with_name(f"{path.name}.part")
    try:
        part.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1))
        if not is_stream:
            part.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}") from error


def load(path: Path) -> Results:
    """Read results. Raises ConfigError for a file that cannot be read or does not hold results."""
    try:
        return msgspec.json.decode(read_bytes(path, LARGE_BYTES), type=Results)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {unreadable(error)}") from error
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{path} is not a file of benchmark results: {error}") from error
