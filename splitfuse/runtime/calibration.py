"""Stores calibrations: the cost model and sizes of an engine on a machine, as a file."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from splitfuse.config.engine import EngineConfig
from splitfuse.config.files import read_bytes
from splitfuse.core.slo.cost_model import CostModel, Sample
from splitfuse.errors import CostModelError, unreadable
from splitfuse.models.sources.source import ModelSource

FORMAT = 2
"""Version of the stored form: a calibration of another version is not found, and made again."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Holds a cost model and what else a simulation needs to know of the engine it was made from."""

    name: str
    cost: CostModel
    num_blocks: int
    """Number of blocks of the KV cache."""
    block_size: int
    max_model_len: int
    kv_bytes_per_token: float = 0.0
    """Size of the keys and values of a token, which a request takes along to another machine; 0 if it is unknown."""
    identity: dict[str, Any] = field(default_factory=dict)
    """Model, machine and settings that the times depend on."""
    about: dict[str, Any] = field(default_factory=dict)
    """Time and environment of its making."""
    timed: tuple[Sample, ...] = ()
    """Steps that it was fitted to, then those that checked it; empty for a machine that was not measured."""


def save(calibration: Calibration, path: Path) -> None:
    """Write a calibration as JSON, making its folder. Raises CostModelError if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.format(msgspec.json.encode(calibration), indent=1))
    except OSError as error:
        raise CostModelError(f"{path} cannot be written: {error}") from error


def load(path: Path) -> Calibration:
    """Return the calibration in a file. Raises CostModelError for one that cannot be read or holds something else."""
    try:
        return msgspec.json.decode(read_bytes(path), type=Calibration)
    except OSError as error:
        raise CostModelError(f"{path} cannot be read: {unreadable(error)}") from error
    except (msgspec.MsgspecError, CostModelError) as error:
        raise CostModelError(f"{path} holds no cost model: {error}") from error


def identify(config: EngineConfig, source: ModelSource | None = None) -> dict[str, Any]:
    """Return what the time of a step depends on: engines with equal identities have the same cost model.

    Raises ModelError, ConfigError or KernelError if there can be no such engine.
    """
    from splitfuse.models.families.registry import load_spec
    from splitfuse.models.weights import resolve_dtype
    from splitfuse.runtime.backend_choice import choose_backend
    from splitfuse.runtime.device import device_of
    from splitfuse.runtime.loading import open_source, parse_device
    from splitfuse.runtime.machine import gpu, processor

    source = source or open_source(config, weights=False)
    spec = load_spec(source)
    dtype = resolve_dtype(config.model.dtype, spec)
    identity = {
        "format": FORMAT,
        "model": str(Path(source.location).resolve()),
        "network": hashlib.sha256(repr(spec).encode()).hexdigest()[:16],
        "kernels": choose_backend(config, dtype).describe(),
        "dtype": str(dtype).removeprefix("torch."),
        "quantization": config.model.quantization,
        "quantization_group_size": config.model.quantization_group_size,
        "kv_cache_dtype": config.cache.kv_cache_dtype,
        "block_size": config.cache.block_size,
        "device": device_of(config),
        "cpu": processor(),
        "num_threads": config.model.num_threads,
        "cores": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
    if (num_ranks := config.model.tensor_parallel_size) > 1:
        identity |= {"tensor_parallel_size": num_ranks, "ranks": config.model.rank}
    name = gpu(parse_device(device_of(config)))
    return identity if name is None else identity | {"gpu": name}


def cache_path(identity: dict[str, Any]) -> Path:
    """Return the file for the calibration of an engine, in the user's cache folder: `XDG_CACHE_HOME` or `~/.cache`.

    Raises CostModelError for a user without a home folder.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "splitfuse" / "cost-models"
    except RuntimeError as error:
        raise CostModelError("no home folder for cost models: set XDG_CACHE_HOME") from error
    digest = hashlib.sha256(msgspec.json.encode(identity)).hexdigest()[:12]
    return folder / f"{Path(identity['model']).name}-{digest}.json"


def load_cost_model(config: EngineConfig) -> Calibration:
    """Return the calibration that is stored for such an engine on this machine. Raises CostModelError if none is."""
    identity = identify(config)
    path = cache_path(identity)
    if not path.exists():
        raise CostModelError(
            f"no cost model is stored for {identity['model']} with these settings on this machine: run "
            "`splitfuse calibrate` with the same engine flags, or pass --cost-model or --machine"
        )
    return load(path)
