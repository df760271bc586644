"""Several engines as one: each request goes to the replica where it is done first. The rule is in core/routing.py."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from splitfuse.core.routing import PrefixMemory, ReplicaLoad, choose_replica, prefix_hashes
from splitfuse.engine.client import EngineClient, EngineState, Stream
from splitfuse.engine.messages import Add, EngineInfo, EngineStats, Loading
from splitfuse.errors import EngineDiedError


class Router(EngineClient):
    """Replicas of one model. One that is dead or starting gets nothing, one that may be hanging nothing while there is
    another; the others go on.
    """

    def __init__(self, replicas: Sequence[EngineClient]) -> None:
        self.replicas = list(replicas)
        self._memories: list[PrefixMemory | None] = [None] * len(self.replicas)

    @property
    def state(self) -> EngineState:
        states = [replica.state for replica in self.replicas]
        return next((s for s in (EngineState.READY, EngineState.STARTING) if s in states), EngineState.DEAD)

    @property
    def stage(self) -> Loading:
        """Of the replica that has come farthest."""
        return max((replica.stage for replica in self.replicas), key=_progress)

    @property
    def info(self) -> EngineInfo:
        for replica in self.replicas:
            try:
                return replica.info
            except EngineDiedError:
                continue
        raise EngineDiedError("no engine is ready yet")

    @property
    def stats(self) -> list[EngineStats]:
        return [stats for replica in self.replicas for stats in replica.stats]

    @property
    def outstanding_tokens(self) -> int:
        return sum(replica.outstanding_tokens for replica in self.replicas if replica.state is EngineState.READY)

    def open(self, request: Add) -> Stream:
        hashes = prefix_hashes(request.prompt_token_ids, request.scheduling.cache_salt)
        if request.params.prompt_logprobs is not None:  # it reads no prefix cache
            hashes = []
        index = choose_replica(
            [self._load(i, hashes) for i in range(len(self.replicas))], len(request.prompt_token_ids)
        )
        if index is None:
            raise EngineDiedError("no engine is ready")
        stream = self.replicas[index].open(request)
        memory = self._memories[index]
        if memory is None:
            limits = self.replicas[index].info.limits
            memory = self._memories[index] = PrefixMemory(limits.num_blocks)
        memory.add(hashes)
        return stream

    async def start(self) -> None:
        """Returns when all are ready; raises what kept the first that failed. The first is started alone: if it packs
        the weights of all, the others find them.
        """
        await self.replicas[0].start()
        await asyncio.gather(*(replica.start() for replica in self.replicas[1:]))

    async def close(self) -> None:
        await asyncio.gather(*(replica.close() for replica in self.replicas))

    def _load(self, index: int, hashes: Sequence[int]) -> ReplicaLoad:
        replica, memory = self.replicas[index], self._memories[index]
        if replica.state is not EngineState.READY:
            self._memories[index] = None  # when it comes back, its cache is empty
            return ReplicaLoad(accepts=False, outstanding_tokens=0, cached_tokens=0)
        cached = 0 if memory is None else memory.cached_tokens(hashes)
        return ReplicaLoad(
            accepts=True,
            outstanding_tokens=replica.outstanding_tokens,
            cached_tokens=cached,
            silent=replica.silent,
        )


def _progress(stage: Loading) -> tuple[int, float]:
    order = ("starting", "importing", "loading", "calibrating", "ready")
    return order.index(stage.stage) if stage.stage in order else 0, stage.fraction
