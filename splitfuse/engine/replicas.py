"""Makes the engines of a server one client: processes on this machine, which divide its cores and have a decoder's
weights in memory once, and engines that run elsewhere.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Collection, Sequence

from splitfuse.config.engine import EngineConfig
from splitfuse.config.server import ServerConfig
from splitfuse.config.values import EngineRole, is_loopback, parse_address, parse_bytes
from splitfuse.core.kv.names import new_key
from splitfuse.engine.quarantine import Quarantine
from splitfuse.engine.remote.connector import Agreement, ConnectLauncher
from splitfuse.engine.remote.launcher import BlockListen, Launcher, SubprocessLauncher
from splitfuse.engine.remote.ray_cluster import EngineSpec, RayCluster
from splitfuse.engine.remote.ray_launcher import RayLauncher
from splitfuse.engine.remote.supervisor import SupervisedEngine
from splitfuse.engine.router import Router
from splitfuse.engine.tier_files import TierFiles, open_tiers
from splitfuse.errors import ConfigError
from splitfuse.kernels.sharing import WeightSharing
from splitfuse.runtime.machine import cores_by_node, paid_cores
from splitfuse.runtime.secret import Secret, read_secret

_logger = logging.getLogger(__name__)


def make_replicas(
    config: EngineConfig,
    *,
    replicas: int = 1,
    max_replicas: int | None = None,
    step_timeout: float = ServerConfig.step_timeout,
    engines: Sequence[str] = (),
    key_file: str | None = None,
    engine_tls: bool = False,
    listen: BlockListen | None = None,
    roles: Sequence[EngineRole] = (),
    given: Collection[str] = (),
    ray: str | None = None,
    ray_memory: str | None = None,
    ray_timeout: float = ServerConfig.ray_timeout,
) -> Router:
    """Return a client of `replicas` engines, each in a process of its own, and of those at the addresses `engines`,
    which have the secret of `key_file`, and fetch KV blocks here at `listen`. They are not started yet. Requests of one
    that dies go on at the others, or once it is there again. They have these `roles`, or are all mixed. Cores and
    memory are divided for `max_replicas`, to which `Router.scale` can raise their number. Settings of the names `given`
    were chosen, though they are the defaults perhaps. With `ray`, the address of a cluster, replicas run where that has
    room.

    Where a control group's CPU quota is below the number of cores, each engine gets its part of the quota.

    Raises ConfigError if there are fewer cores than replicas, if their number cannot change though `max_replicas` is
    above it, or if a KV tier, the key or Ray cannot be used.
    """
    most = max(replicas, max_replicas or replicas)
    _check_together(config, replicas, most, is_spread=bool(engines or ray), roles=roles)
    agreement = Agreement(config, has_local=replicas > 0 and ray is None, given=given)
    secret = None if key_file is None else read_secret(key_file)
    cluster = None
    if ray is not None:
        secret, cluster = secret or Secret(new_key(), new_key()), RayCluster(ray)
        spec = _on_ray(config, secret, step_timeout, ray_memory, ray_timeout)
        launchers: list[Launcher] = [RayLauncher(cluster, spec, agreement) for _ in range(most)]
        name_key, why_no_more = secret.name_key, f"max_replicas is {most}"
    else:
        launchers, name_key = _here(config, most, len(engines), agreement, secret, listen)
        why_no_more = f"cores and memory are divided among {most}; restart with a larger max_replicas for more"
    if not replicas:
        why_no_more = "all engines run elsewhere; restart with replicas of at least 1 for some here"
    launchers, spare = launchers[:replicas], launchers[replicas:]
    if secret is not None:
        hidden = _hidden(engines)
        launchers += [
            ConnectLauncher(each, secret.link_key, agreement, tls=engine_tls, is_source=each not in hidden)
            for each in engines
        ]
    quarantine = Quarantine()

    def supervised(launchers: Sequence[Launcher]) -> list[SupervisedEngine]:
        return [SupervisedEngine(each, step_timeout=step_timeout, quarantine=quarantine) for each in launchers]

    return Router(
        supervised(launchers),
        name_key=name_key,
        agreement=agreement,
        roles=roles,
        lends=config.cache.kv_loans,
        num_scaled=replicas,
        spare=supervised(spare),
        why_no_more=why_no_more,
        on_close=None if cluster is None else cluster.close,
    )


def _check_together(
    config: EngineConfig, replicas: int, most: int, *, is_spread: bool, roles: Sequence[EngineRole]
) -> None:
    """Raise ConfigError for settings that exclude each other. If the engines are spread, some run on other machines."""
    is_split = any(role is not EngineRole.MIXED for role in roles)
    if config.cache.kv_loans and (replicas < 2 or is_spread or is_split):
        raise ConfigError(
            "kv_loans needs another engine to lend, all on this machine and without roles: set replicas to 2 or more "
            "and leave out engines elsewhere, ray and roles, or leave out kv_loans"
        )
    if most > replicas and (config.cache.kv_loans or is_split):
        fixed = "kv_loans" if config.cache.kv_loans else "roles"
        raise ConfigError(
            f"max_replicas is {most}, and with {fixed} there are {replicas} replicas from the start on: leave out "
            f"max_replicas or {fixed}"
        )
    if config.model.rank and most > 1:
        what = "replicas to 1" if replicas > 1 else "max_replicas to 1, and leave out autoscale"
        raise ConfigError(
            f"rank {config.model.rank[0]} computes with one engine at a time, and there could be {most}: set {what}"
        )


def _here(
    config: EngineConfig,
    count: int,
    num_elsewhere: int,
    agreement: Agreement,
    secret: Secret | None,
    listen: BlockListen | None,
) -> tuple[list[Launcher], bytes]:
    """Return launchers of so many engines on this machine, and the key by which they name blocks."""
    if not count:
        return [], b"" if secret is None else secret.name_key
    cores = None
    if count > 1:
        cores = divide(cores_by_node(os.sched_getaffinity(0)), count, paid=min(paid_cores(), default=None))
    tiers, name_key = open_tiers(config.cache, for_moves=count + num_elsewhere > 1)
    if secret is not None:
        name_key = secret.name_key
    weights = None
    if count > 1 and hasattr(os, "memfd_create"):
        weights = WeightSharing(os.memfd_create("splitfuse-weights"), count)
    parts: list[TierFiles | None] = [tiers]
    if count > 1:
        parts = [*tiers.split(count)] if tiers else [None] * count
    launchers: list[Launcher] = [
        SubprocessLauncher(
            config,
            cores=None if cores is None else cores[index],
            weights=weights,
            name_key=name_key,
            tiers=parts[index],
            link_key=None if secret is None else secret.link_key,
            listen=None if listen is None else listen.of_engine(index),
            on_ready=agreement.note,
        )
        for index in range(count)
    ]
    return launchers, name_key


def _on_ray(
    config: EngineConfig, secret: Secret, step_timeout: float, memory: str | None, seconds: float
) -> EngineSpec:
    """Return what each engine on Ray is. Raises ConfigError if Ray, or the number of its threads, is missing."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("ray needs the package ray: pip install splitfuse[ray]")
    if config.model.num_threads is None:
        raise ConfigError("ray needs num_threads: the threads of each engine, for which Ray is asked as CPUs")
    return EngineSpec(
        config=config,
        link_key=secret.link_key,
        name_key=secret.name_key,
        step_timeout=step_timeout,
        cpus=config.model.num_threads * config.model.tensor_parallel_size,
        gpus=config.model.num_local_ranks if config.model.device.startswith("cuda") else 0,
        memory=0 if memory is None else parse_bytes("ray_memory", memory),
        seconds=seconds,
    )


def _hidden(engines: Sequence[str]) -> list[str]:
    """Return the addresses of engines that mean this machine, where others do not: elsewhere they mean another one."""
    hosts = {each: parse_address("engine", each)[0] for each in engines}
    local = [each for each, host in hosts.items() if is_loopback(host)]
    if len(local) == len(engines):
        return []
    if local:
        _logger.warning(
            "engines on other machines fetch no KV blocks from %s: set engine to an address at which they reach it",
            ", ".join(local),
        )
    return local


def divide(cores: list[int], parts: int, *, paid: int | None = None) -> list[tuple[int, ...]]:
    """Return the cores in `parts` runs of neighbours, as equal as can be, which together have no more cores than the
    quota `paid`, but one each. Raises ConfigError if there are too few.
    """
    if parts > len(cores):
        raise ConfigError(f"replicas is {parts}, but this process may use {len(cores)} cores: set at most {len(cores)}")
    most = len(cores) if paid is None else max(1, paid // parts)
    return [tuple(cores[len(cores) * i // parts : len(cores) * (i + 1) // parts][:most]) for i in range(parts)]
