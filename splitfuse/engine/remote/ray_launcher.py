"""Launches engines on a Ray cluster: Ray finds the places (ray_cluster.py), and the rest goes over our own sockets."""

from __future__ import annotations

import logging

from splitfuse.engine.remote.connector import Agreement, ConnectLauncher
from splitfuse.engine.remote.launcher import Link
from splitfuse.engine.remote.ray_cluster import EngineSpec, RayCluster

_logger = logging.getLogger(__name__)


class RayLauncher(ConnectLauncher):
    """Asks for a place each time that the engine is started, and connects to the engine there."""

    ends, begins = "died", "placing it"

    def __init__(self, cluster: RayCluster, spec: EngineSpec, agreement: Agreement) -> None:
        """`spec` describes the engine."""
        super().__init__("", spec.link_key, agreement)
        self.name = "an engine on Ray"
        self._cluster, self._spec = cluster, spec

    @property
    def keeps_trying(self) -> bool:
        return False  # at the start: what has no place then is said at once

    async def launch(self) -> Link:
        placed = await self._cluster.place(self._spec)
        self.address, self.name = placed.address, f"the engine {placed.address} on Ray"
        _logger.info("Ray has placed an engine at %s (process %d)", placed.address, placed.pid)
        try:
            return await self._connect(
                release=lambda: self._cluster.release(placed.number),
                is_lost=lambda: self._cluster.has_lost(placed.number),
            )
        except BaseException:
            self._cluster.release(placed.number)
            raise
