"""Describes what is simulated: engines with their cost models, the machines that run them, and the links between these.

A deployment is a list of machines. The role of each says which part of a request it is given: all of it, its prompt up
to the first token, or what is generated after that. A request that changes machines takes its KV along over a link.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

from splitfuse.bench.baselines import make_baseline
from splitfuse.config.engine import TARGETS, CacheConfig, EngineConfig, SchedulerConfig
from splitfuse.config.values import EngineRole
from splitfuse.core.kv.fetching import FIRST_BANDWIDTH
from splitfuse.core.kv.loans import TILE
from splitfuse.core.kv.names import BlockNamer
from splitfuse.core.slo.cost_model import StepFeatures
from splitfuse.core.step_budget import StepBudget
from splitfuse.errors import ConfigError
from splitfuse.runtime.calibration import Calibration
from splitfuse.simulator.lending import Lending
from splitfuse.simulator.pace import MeasuredPace
from splitfuse.simulator.tiers import SharedTiers, TierStore

MAX_BLOCKS = 2**24
"""Number of KV blocks that a simulation can have: it keeps lists of them, for each machine."""
LONG_QUEUE = 8192
"""Number of prompt tokens that wait for a machine from which on another role's machine is borrowed: Splitwise's."""


@dataclass(frozen=True, kw_only=True)
class SimulationConfig:
    """Describes an engine: a calibrated model on a machine, and how it is run."""

    calibration: Calibration
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    policy: str = "splitfuse"
    enable_prefix_caching: bool = True
    step_overhead: float = 0.0
    """Seconds between steps, in addition to the cost model."""
    client_overhead: float = 0.0
    """Seconds from a client to the engine."""
    kv_memory_tier: int = 0
    """Size in bytes of the memory for KV blocks that all engines share; 0: there is none."""
    kv_disk_tier: int = 0
    """The same on a disk."""
    kv_memory_speed: float = FIRST_BANDWIDTH
    """Bytes per second that are read from the memory tier, and written to it; in a step, those that are copied into the
    cache and out of it.
    """
    kv_disk_speed: float = FIRST_BANDWIDTH
    """Bytes per second that are read from the disk tier, and written to it."""

    def __post_init__(self) -> None:
        make_baseline(self.policy, self.scheduler)
        refuse_drafts(self.scheduler)
        if self.calibration.num_blocks > MAX_BLOCKS:
            raise ConfigError(
                f"num_blocks must be at most {MAX_BLOCKS} in a simulation, not {self.calibration.num_blocks}"
            )
        for name in ("step_overhead", "client_overhead"):
            if not 0 <= getattr(self, name) < float("inf"):
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} {getattr(self, name)} must be a number of seconds, at least 0")
        for name in ("kv_memory_speed", "kv_disk_speed"):
            if not 0 < getattr(self, name) < float("inf"):
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} {getattr(self, name)} must be a number of bytes/s above 0, such as 25e9")
        if not (self.has_tiers or self.kv_memory_speed == FIRST_BANDWIDTH):
            raise ConfigError("--kv-memory-speed needs --kv-memory-tier or --kv-disk-tier, whose blocks are copied")
        if not (self.kv_disk_tier or self.kv_disk_speed == FIRST_BANDWIDTH):
            raise ConfigError("--kv-disk-speed needs --kv-disk-tier")
        if self.has_tiers:
            if not self.enable_prefix_caching:
                raise ConfigError("KV tiers need enable_prefix_caching: without it no block is found again")
            if not self.calibration.kv_bytes_per_token:
                raise ConfigError(
                    "the cost model does not say how many KV bytes a token has, which a KV tier keeps: give "
                    "--kv-bytes-per-token, or calibrate again"
                )

    def make_namer(self) -> BlockNamer | None:
        """Return a namer of blocks; all of them give the same names. None without prefix caching."""
        return BlockNamer(self.calibration.block_size, key=b"simulation") if self.enable_prefix_caching else None

    @property
    def has_tiers(self) -> bool:
        return bool(self.kv_memory_tier or self.kv_disk_tier)

    @property
    def block_bytes(self) -> float:
        """Return the size of a KV block."""
        return self.calibration.kv_bytes_per_token * self.calibration.block_size

    def make_tiers(self, num_engines: int) -> SharedTiers | None:
        """Return the empty tiers of so many engines; None without any. Raises ConfigError for one that is too small."""
        kinds = {
            "kv_memory_tier": (self.kv_memory_tier, self.kv_memory_speed),
            "kv_disk_tier": (self.kv_disk_tier, self.kv_disk_speed),
        }
        tiers = []
        for name, (num_bytes, speed) in kinds.items():
            if num_bytes:
                num_slots = int(num_bytes / self.block_bytes)
                if num_slots < num_engines:
                    raise ConfigError(
                        f"{name} of {num_bytes} bytes has no KV block of {self.block_bytes:.0f} bytes for each of "
                        f"{num_engines} engines: choose a larger size"
                    )
                tiers.append(TierStore(num_slots, num_parts=num_engines, seconds_per_block=self.block_bytes / speed))
        return SharedTiers(tiers, num_engines) if tiers else None

    @classmethod
    def of(cls, calibration: Calibration, config: EngineConfig, **how: Any) -> Self:
        """Return the simulation of a calibrated engine with these settings; `how` are the other fields. Raises
        ConfigError for settings that are not simulated.
        """
        refuse_loans(config.cache)
        calibration = replace(
            calibration,
            num_blocks=config.cache.num_blocks or calibration.num_blocks,
            max_model_len=config.model.max_model_len or calibration.max_model_len,
        )
        cache = config.cache
        return cls(
            calibration=calibration,
            scheduler=config.scheduler,
            enable_prefix_caching=cache.enable_prefix_caching,
            kv_memory_tier=cache.memory_tier_bytes,
            kv_disk_tier=cache.disk_tier_bytes,
            **how,
        )

    @property
    def budget(self) -> StepBudget:
        """Return the token budget that an engine would have, chosen by the cost model if the settings leave it open."""
        return StepBudget.of(self.scheduler, self.calibration.cost)

    @property
    def settings(self) -> dict[str, Any]:
        """Return the settings by name, for the record."""
        own = {"cost_model": self.calibration.name, **vars(self), **vars(self.scheduler)}
        own |= {"num_blocks": self.calibration.num_blocks, "block_size": self.calibration.block_size}
        own |= {"max_num_batched_tokens": self.budget.tokens}
        return {name: value for name, value in own.items() if name not in ("calibration", "scheduler")}


def refuse_drafts(config: SchedulerConfig) -> None:
    """Raise ConfigError if requests would draft tokens: what is simulated has no text that could repeat."""
    if config.num_speculative_tokens:
        raise ConfigError(
            f"num_speculative_tokens must be 0 in a simulation, whose answers have no text to draft from, not "
            f"{config.num_speculative_tokens}"
        )


def refuse_tiers(config: CacheConfig) -> None:
    """Raise ConfigError if KV blocks would be kept in tiers: of machines with roles that is not simulated."""
    if config.has_tiers:
        raise ConfigError("--place does not simulate kv_memory_tier and kv_disk_tier: leave them out")


def refuse_loans(config: CacheConfig) -> None:
    """Raise ConfigError if engines would hold KV blocks of each other's requests: see `Deployment.lending`."""
    if config.kv_loans:
        raise ConfigError("kv_loans is not simulated with a calibrated engine: leave it out")


def without_targets(config: SchedulerConfig) -> SchedulerConfig:
    """Return the settings without an SLO: first come, first served."""
    changes: dict[str, Any] = dict.fromkeys(TARGETS)
    return replace(config, enable_slo=False, **changes)


class StepClock(Protocol):
    """Says how long a step takes, as a CostModel does."""

    def seconds(self, step: StepFeatures) -> float:
        """Return the time of a step."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Describes a machine that runs one engine.

    A pipeline of `stages` takes the whole time of a step for each step, and has as many of them under way: it is
    simulated as that many engines, each with its share of the KV blocks. The stages are taken as equally long.
    """

    engine: SimulationConfig
    role: EngineRole = EngineRole.MIXED
    step_times: StepClock | None = None
    """Times of its steps if they are others than the cost model's, which its scheduler predicts with."""
    pace: MeasuredPace | None = None
    """How much longer or shorter steps take from moment to moment; None: by the noise of the cost model."""
    stages: int = 1
    gpus: int = 1
    price: float = 0.0
    """Price of an hour, in any currency."""
    watts: float = 0.0

    def __post_init__(self) -> None:
        for name in ("stages", "gpus"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} of a machine must be at least 1, not {getattr(self, name)}")
        for name in ("price", "watts"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} of a machine must be a number, at least 0, not {getattr(self, name)}")
        if self.engine.calibration.num_blocks < self.stages:
            raise ConfigError(f"{self.stages} stages need a KV block each, not {self.engine.calibration.num_blocks}")

    @property
    def lanes(self) -> tuple[Machine, ...]:
        """Return the engines that it is simulated as: one for each stage."""
        calibration = self.engine.calibration
        share = replace(calibration, num_blocks=calibration.num_blocks // self.stages)
        return (replace(self, engine=replace(self.engine, calibration=share), stages=1),) * self.stages


@dataclass(frozen=True)
class Link:
    """Connects each machine with all others, in both directions at once: a connection of a machine is shared fairly by
    the transfers on it.
    """

    bytes_per_second: float
    latency: float = 0.0
    """Seconds from the last byte sent to the request that it belongs to."""

    def __post_init__(self) -> None:
        if not self.bytes_per_second > 0:
            raise ConfigError(f"a link must carry a positive number of bytes/s, not {self.bytes_per_second}")
        if not 0 <= self.latency < math.inf:
            raise ConfigError(f"the latency of a link must be a number of seconds, at least 0, not {self.latency}")


@dataclass(frozen=True)
class Failure:
    """Takes a machine away for a while, with all that its cache held. Its requests go on elsewhere, recomputed."""

    machine: int
    """Index of the machine."""
    at: float
    """Time in seconds from the start."""
    seconds: float = math.inf


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """Describes the machines that share a load.

        Deployment.of(engine, replicas=4)
        Deployment(machines=(prompts, prompts, generation), link=Link(25e9), kv_bytes_per_token=327_680)

    Raises ConfigError without machines for both parts of a request, and for parts without a link between them.
    """

    machines: tuple[Machine, ...]
    link: Link | None = None
    kv_bytes_per_token: float = 0.0
    """Size of the keys and values of a token, which a request takes along."""
    long_queue: float = LONG_QUEUE
    """Number of waiting prompt tokens from which on a machine of the other role is borrowed: infinite, none is."""
    failures: tuple[Failure, ...] = ()
    lending: Lending | None = None
    """How machines hold parts of each other's requests, which are then admitted by a `LoanPool`."""

    def __post_init__(self) -> None:
        if not self.machines:
            raise ConfigError("a deployment needs at least one machine")
        if self.lending is not None:
            self._check_lending()
        roles = {machine.role for machine in self.machines}
        if EngineRole.MIXED not in roles and len(roles) < 2:
            raise ConfigError(
                f"{next(iter(roles))} machines alone compute half of each request: add some of the other role"
            )
        if len(roles) > 1 and self.link is None:
            raise ConfigError("machines of different roles need a link, over which requests take their KV along")
        if len(roles) > 1 and not 0 < self.kv_bytes_per_token < math.inf:
            raise ConfigError(
                f"machines of different roles need the KV bytes of a token, such as 327680, not "
                f"{self.kv_bytes_per_token}"
            )
        tiers = {(each.engine.kv_memory_tier, each.engine.kv_disk_tier) for each in self.machines}
        if len(tiers) > 1 or (tiers != {(0, 0)} and len({each.engine.block_bytes for each in self.machines}) > 1):
            raise ConfigError("all machines share their KV tiers: give all the same, and blocks of the same size")
        if tiers != {(0, 0)} and self.is_split:
            raise ConfigError("KV tiers of machines with roles are not simulated: leave out the tiers or the roles")
        for failure in self.failures:
            if not 0 <= failure.machine < len(self.machines):
                raise ConfigError(f"machine {failure.machine} fails, of machines 0 to {len(self.machines) - 1}")
            if not (failure.at >= 0 and failure.seconds > 0):
                raise ConfigError(f"a machine fails at a time from 0 on, for some time, not as {failure}")

    def _check_lending(self) -> None:
        """Raise ConfigError for machines between which loans are not simulated."""
        if self.is_split or self.failures or any(each.stages > 1 for each in self.machines):
            raise ConfigError("loans are not simulated with roles, stages or failures: leave these out")
        sizes = {each.engine.calibration.block_size for each in self.machines}
        if len(sizes) > 1 or TILE % max(sizes):
            raise ConfigError(f"loans need blocks of one size that divides {TILE}, not {', '.join(map(str, sizes))}")
        if any(each.engine.enable_prefix_caching or each.step_times for each in self.machines):
            raise ConfigError(
                "loans are simulated by cost models and without prefix caching: leave out step_times and set "
                "enable_prefix_caching to false"
            )

    @classmethod
    def of(cls, engine: SimulationConfig, *, replicas: int = 1) -> Self:
        """Return equal machines, each of which computes whole requests."""
        if replicas < 1:
            raise ConfigError(f"--replicas {replicas} must be at least 1")
        return cls(machines=(Machine(engine=engine),) * replicas)

    @property
    def is_split(self) -> bool:
        """Return whether there are machines for one part of a request alone."""
        return any(machine.role is not EngineRole.MIXED for machine in self.machines)

    @property
    def gpus(self) -> int:
        return sum(machine.gpus for machine in self.machines)

    @property
    def price(self) -> float:
        """Return the price of an hour of all machines."""
        return sum(machine.price for machine in self.machines)

    @property
    def watts(self) -> float:
        return sum(machine.watts for machine in self.machines)

    @property
    def settings(self) -> dict[str, Any]:
        """Return the settings by name, for the record: those of the first machine, and of the others by role."""
        own = dict(self.machines[0].engine.settings)
        if self.is_split:
            own["roles"] = ",".join(machine.role for machine in self.machines)
            own |= {"link": self.link and vars(self.link), "kv_bytes_per_token": self.kv_bytes_per_token}
        return own
