"""`splitfuse gateway`: pass requests on to several servers."""

from __future__ import annotations

import asyncio
from typing import Any

from splitfuse.cli.flags import given, with_flags
from splitfuse.cli.log import logging_to_stderr
from splitfuse.config.engine import EngineConfig
from splitfuse.config.server import GatewayConfig


@with_flags(also=(GatewayConfig,), without=EngineConfig.setting_fields())
def gateway(**flags: Any) -> None:
    """Pass requests on to several servers (cells), until SIGTERM or Ctrl-C.

    A request goes to the cell whose engines have most of its prompt in their prefix caches, unless others would answer
    it sooner. One that a cell does not answer is tried at another. Keys are the cells' own, and are passed on. SIGTERM
    drains: open requests may finish, new ones are rejected; a second SIGTERM, or Ctrl-C, ends at once.
    """
    config = GatewayConfig.from_settings(given(flags))
    from splitfuse.gateway.lifecycle import run_gateway

    with logging_to_stderr():
        asyncio.run(run_gateway(config))
