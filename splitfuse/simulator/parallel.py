"""Computes what a cost model becomes when an engine is spread over several machines by tensor parallelism.

A pipeline needs no cost model of its own: see `Machine.stages`.
"""

from __future__ import annotations

from dataclasses import fields, replace

from splitfuse.core.slo.cost_model import CostModel
from splitfuse.errors import ConfigError
from splitfuse.runtime.calibration import Calibration

MEETING_SECONDS = 1e-3
"""Time of a step in which machines wait for each other if nothing else is said: four meetings in each of 24 layers, of
10 us. Two processes with shared memory took 2 to 10 us for one on free cores, and 40 us or more on busy ones; 80 layers
with two all-reduces each of 20 us, as over NVLink (machines.py), take 3.2 ms.
"""
HOST_SECONDS = 1e-3
"""Time of a step, at most, that is not divided: planning it, and sampling."""


def tensor_parallel(calibration: Calibration, size: int, *, meeting_seconds: float = MEETING_SECONDS) -> Calibration:
    """Return the calibration of an engine over `size` machines such as that of `calibration`.

    Each of them reads and multiplies its share, all but HOST_SECONDS of a step, and in each step all wait for each
    other for `meeting_seconds`, over all layers together. The KV cache grows with the machines; that they hold the
    weights once is not counted.
    """
    if size < 1:
        raise ConfigError(f"--tensor-parallel {size} must be at least 1")
    if not 0 <= meeting_seconds < float("inf"):
        raise ConfigError(f"--meeting-time {meeting_seconds} must be a number of seconds, at least 0, such as 0.004")
    if size == 1:
        return calibration
    names = [each.name for each in fields(CostModel) if each.name not in ("floor", "knee", "noise", "error")]
    shares = {name: getattr(calibration.cost, name) / size for name in names}
    host = min(HOST_SECONDS, calibration.cost.floor)
    floor = host + (calibration.cost.floor - host) / size + meeting_seconds
    return replace(
        calibration,
        name=f"{calibration.name}, tensor parallel over {size}",
        cost=replace(calibration.cost, floor=floor, **shares, error=None),
        num_blocks=size * calibration.num_blocks,
        timed=(),
    )
