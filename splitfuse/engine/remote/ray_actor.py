"""Runs an engine in a process that Ray has placed: `splitfuse engine`, listening on the address of its node.

It serves one server, and ends when that has left, or does not come.
"""

from __future__ import annotations

import logging
import os
import threading
import traceback

import msgspec

from splitfuse.config.engine import EngineConfig
from splitfuse.engine.remote.standalone import StandaloneEngine
from splitfuse.runtime.secret import Secret

WAIT_SECONDS = 60.0
"""Longest time in seconds until the server connects."""


class EngineActor:
    """Runs one engine in a thread. A driver makes it an actor of Ray."""

    def listen(self, config: bytes, link_key: bytes, name_key: bytes, step_timeout: float) -> tuple[str, int]:
        """Begin to listen, and then to load. Returns the address and the number of this process.

        `config` is an EngineConfig as MessagePack. Raises ConfigError if it cannot be used here.
        """
        from ray.util import get_node_ip_address

        host = get_node_ip_address()
        logging.basicConfig(format="%(message)s", level=logging.INFO, force=True)
        engine = StandaloneEngine(
            msgspec.msgpack.decode(config, type=EngineConfig),
            f"[{host}]:0" if ":" in host else f"{host}:0",
            Secret(link_key, name_key),
            step_timeout=step_timeout,
        )
        address = engine.listen()
        threading.Thread(target=_run, args=(engine,), name="engine", daemon=True).start()
        return address, os.getpid()


def _run(engine: StandaloneEngine) -> None:
    """Run an engine for one server, and then end the process."""
    failed = True
    try:
        engine.serve(most_fronts=1, patience=WAIT_SECONDS)
        failed = False
    except BaseException:
        traceback.print_exc()
    os._exit(failed)
