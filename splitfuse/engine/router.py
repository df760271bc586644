"""Serve several engines as one: each request goes to the replica that would finish it first (core/routing.py)."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence

from splitfuse.core.kv.names import BlockNamer, new_key
from splitfuse.core.routing import PrefixMemory, ReplicaLoad, choose_replica
from splitfuse.engine.client import EngineClient, EngineState, LocalClient, Stream
from splitfuse.engine.messages import Add, EngineInfo, EngineStats, Loading
from splitfuse.errors import EngineUnavailableError


class Router(EngineClient):
    """Spreads requests over replicas of one model.

    A replica that is dead or starting gets none, one that may be hanging none while another accepts; the others go on.
    """

    def __init__(self, replicas: Sequence[EngineClient], *, name_key: bytes | None = None) -> None:
        """`name_key` is the key by which the replicas name KV blocks; left out, the router's names are its own."""
        self.replicas = list(replicas)
        self._memories: list[PrefixMemory | None] = [None] * len(self.replicas)
        self._key = name_key or new_key()
        self._namer: BlockNamer | None = None  # made for the first request: replicas that are ready have a block size

    @property
    def state(self) -> EngineState:
        states = [replica.state for replica in self.replicas]
        return next((s for s in (EngineState.READY, EngineState.STARTING) if s in states), EngineState.DEAD)

    @property
    def stage(self) -> Loading:
        """Return the stage of the replica that has come farthest of those that are not ready; ready once all are."""
        stages = [replica.stage for replica in self.replicas]
        return max([stage for stage in stages if stage.stage != "ready"] or stages, key=_progress)

    @property
    def info(self) -> EngineInfo:
        for replica in self.replicas:
            try:
                return replica.info
            except EngineUnavailableError:
                continue
        raise EngineUnavailableError("no engine is ready yet")

    @property
    def stats(self) -> list[EngineStats]:
        return [stats for replica in self.replicas for stats in replica.stats]

    @property
    def engines(self) -> list[LocalClient]:
        return [engine for replica in self.replicas for engine in replica.engines]

    @property
    def outstanding_tokens(self) -> int:
        return sum(replica.outstanding_tokens for replica in self.replicas if replica.state is EngineState.READY)

    @property
    def adapters(self) -> Mapping[str, str]:
        return {name: digest for replica in self.replicas for name, digest in replica.adapters.items()}

    @property
    def loading_adapters(self) -> Collection[str]:
        return {name for replica in self.replicas for name in replica.loading_adapters}

    async def load_adapter(self, name: str, path: str) -> None:
        """See EngineClient: in all replicas, or in none if one is not ready or cannot load it."""
        if not all(replica.state is EngineState.READY for replica in self.replicas):
            raise EngineUnavailableError("an engine is not ready: load the adapter again when all are")
        self.check_not_loading(name)
        loads = (replica.load_adapter(name, path) for replica in self.replicas)
        errors = await asyncio.gather(*loads, return_exceptions=True)
        if failures := [error for error in errors if error is not None]:
            for replica, error in zip(self.replicas, errors, strict=True):
                if error is None and name not in replica.loading_adapters:  # it is, if the replica died since
                    replica.unload_adapter(name)
            raise failures[0]

    def unload_adapter(self, name: str) -> None:
        self.check_not_loading(name)
        for replica in self.replicas:
            replica.unload_adapter(name)

    def has_adapter(self, digest: str) -> bool:
        return any(replica.has_adapter(digest) for replica in self.replicas)

    def hold_adapter(self, digest: str) -> None:
        for replica in self.replicas:
            replica.hold_adapter(digest)

    def let_go_adapter(self, digest: str) -> None:
        for replica in self.replicas:
            replica.let_go_adapter(digest)

    def open(self, request: Add) -> Stream:
        names = self._name_blocks(request)
        index = choose_replica([self._load(i, names, request.adapter) for i in range(len(self.replicas))])
        if index is None:
            which = " that has the adapter of the request: send it again" if request.adapter else ""
            raise EngineUnavailableError(f"no engine is ready{which}")
        stream = self.replicas[index].open(request)
        memory = self._memories[index]
        if memory is None:
            limits = self.replicas[index].info.limits
            memory = self._memories[index] = PrefixMemory(limits.num_blocks, limits.block_size)
        memory.add(names)
        return stream

    async def start(self) -> None:
        """Return when all replicas are ready; raise the error of the first that failed.

        The first replica is started alone: if it packs weights that all share, the others find them.
        """
        await self.replicas[0].start()
        await asyncio.gather(*(replica.start() for replica in self.replicas[1:]))

    async def close(self) -> None:
        await asyncio.gather(*(replica.close() for replica in self.replicas))

    def _name_blocks(self, request: Add) -> list[bytes]:
        """Return the names of the prompt's blocks that a prefix cache may hold."""
        names: list[bytes] = []
        if request.params.prompt_logprobs is None:  # those need every position computed, so the cache is not read
            if self._namer is None:
                info = self.info
                self._namer = BlockNamer(info.limits.block_size, key=self._key, fingerprint=info.kv_fingerprint)
            self._namer.extend(names, request.prompt_token_ids, salt=request.cache_salt)
        return names

    def _load(self, index: int, names: Sequence[bytes], adapter: str) -> ReplicaLoad | None:
        replica, memory = self.replicas[index], self._memories[index]
        if replica.state is not EngineState.READY:
            self._memories[index] = None  # when it comes back, its cache is empty
            return None
        if adapter and not replica.has_adapter(adapter):  # it is loaded again after a restart
            return None
        cached = 0 if memory is None else memory.cached_tokens(names)
        return ReplicaLoad(replica.silent, replica.outstanding_tokens - cached)


def _progress(stage: Loading) -> tuple[int, float]:
    order = ("starting", "importing", "loading", "ready")
    return order.index(stage.stage) if stage.stage in order else 0, stage.fraction
