"""Engine processes on this machine as one client: the cores are divided, a decoder's weights are in memory once."""

from __future__ import annotations

import os

from splitfuse.config import EngineConfig, ServerConfig
from splitfuse.engine.quarantine import Quarantine
from splitfuse.engine.remote.launcher import SubprocessLauncher
from splitfuse.engine.remote.supervisor import SupervisedEngine
from splitfuse.engine.router import Router
from splitfuse.engine.tier_files import open_tiers
from splitfuse.errors import ConfigError
from splitfuse.kernels.sharing import WeightSharing
from splitfuse.runtime.machine import paid_cores


def make_replicas(
    config: EngineConfig, *, replicas: int = 1, step_timeout: float = ServerConfig.step_timeout
) -> Router:
    """Return a client of `replicas` engines, each in a process of its own, which are not started yet. Requests of one
    that dies go on at the others, or once it is restarted.

    Where a control group's CPU quota is below the number of cores, each engine gets its part of the quota.

    Raises ConfigError if there are fewer cores than replicas, or if a KV tier cannot be used.
    """
    if replicas == 1:
        tiers, name_key = open_tiers(config.cache)
        launcher = SubprocessLauncher(config, name_key=name_key, tiers=tiers)
        return Router([SupervisedEngine(launcher, step_timeout=step_timeout)], name_key=name_key)
    all_cores = divide(sorted(os.sched_getaffinity(0)), replicas, paid=min(paid_cores(), default=None))
    tiers, name_key = open_tiers(config.cache)
    weights = WeightSharing(os.memfd_create("splitfuse-weights"), replicas) if hasattr(os, "memfd_create") else None
    quarantine = Quarantine()
    return Router(
        [
            SupervisedEngine(
                SubprocessLauncher(config, cores=cores, weights=weights, name_key=name_key, tiers=part),
                step_timeout=step_timeout,
                quarantine=quarantine,
            )
            for cores, part in zip(all_cores, tiers.split(replicas) if tiers else [None] * replicas, strict=True)
        ],
        name_key=name_key,
    )


def divide(cores: list[int], parts: int, *, paid: int | None = None) -> list[tuple[int, ...]]:
    """Return the cores in `parts` runs of neighbours, as equal as can be, which together have no more cores than the
    quota `paid`, but one each. Raises ConfigError if there are too few.
    """
    if parts > len(cores):
        raise ConfigError(f"replicas is {parts}, but this process may use {len(cores)} cores: set at most {len(cores)}")
    most = len(cores) if paid is None else max(1, paid // parts)
    return [tuple(cores[len(cores) * i // parts : len(cores) * (i + 1) // parts][:most]) for i in range(parts)]
