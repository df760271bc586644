"""Engine processes on this machine as one client: cores divided, weights in memory once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from splitfuse.engine.client import EngineClient
from splitfuse.engine.remote.supervisor import SubprocessEngine, WeightsFile
from splitfuse.engine.router import Router
from splitfuse.errors import ConfigError


def make_replicas(settings: Mapping[str, Any], *, replicas: int = 1, step_timeout: float = 60.0) -> EngineClient:
    """A client of `replicas` engines with `settings` of EngineConfig, not started yet.

    Raises ConfigError if there are fewer cores than replicas.
    """
    if replicas == 1:
        return SubprocessEngine(settings, step_timeout=step_timeout)
    weights = WeightsFile(replicas) if hasattr(os, "memfd_create") else None
    return Router(
        [
            SubprocessEngine(settings, step_timeout=step_timeout, cores=cores, weights=weights)
            for cores in divide(sorted(os.sched_getaffinity(0)), replicas)
        ]
    )


def divide(cores: list[int], parts: int) -> list[list[int]]:
    """The cores in `parts` runs of neighbours, as equal as can be. Raises ConfigError if there are too few."""
    if parts > len(cores):
        raise ConfigError(f"{parts} replicas need {parts} cores at least; this process may use {len(cores)}")
    return [cores[len(cores) * i // parts : len(cores) * (i + 1) // parts] for i in range(parts)]
