"""`splitfuse serve`, `ps` and `stop`: deployments of this user on this machine."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Annotated, Any

import typer

from splitfuse.cli.flags import ending_in_a_sentence, given, with_flags
from splitfuse.config import EngineConfig, ServerConfig
from splitfuse.errors import ConfigError


@with_flags(also={"Server": ServerConfig})
def serve(
    model_argument: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="The same as --model.", show_default=False)
    ] = None,
    **flags: Any,
) -> None:
    """Serve a model over HTTP, in the manner of OpenAI, until SIGTERM or Ctrl-C.

    SIGTERM drains: requests that run may end, new ones are refused; a second one, or Ctrl-C, ends at once. Keys are
    better given in the environment or a file than here, where everybody on the machine can read them.
    """
    if model_argument is not None:
        if flags["model"] is not None:
            raise ConfigError(f"two models are given: {model_argument} and --model {flags['model']}")
        flags["model"] = model_argument
    engine_settings = given({name: flags.pop(name) for name in EngineConfig.setting_fields()})
    config = ServerConfig.from_settings(given(flags))
    EngineConfig.from_settings(engine_settings)
    from splitfuse.server.lifecycle import run_server

    asyncio.run(run_server(engine_settings, config))


@ending_in_a_sentence
def ps() -> None:
    """List the running deployments of this user on this machine."""
    from splitfuse.clients.client import server_state
    from splitfuse.deploy.registry import deployments

    running = deployments()
    rows = [("NAME", "MODEL", "URL", "PID", "UP SINCE", "STATE")]
    with ThreadPoolExecutor(16) as pool:
        for deployment, state in zip(running, pool.map(server_state, running), strict=True):
            since = datetime.fromtimestamp(deployment.started).strftime("%Y-%m-%d %H:%M:%S")
            row = (deployment.name, deployment.model, deployment.url, str(deployment.pid), since, state)
            rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@ending_in_a_sentence
def stop(
    name: Annotated[str, typer.Argument(help="Name of the deployment, as ps shows it.")],
    now: Annotated[bool, typer.Option("--now", help="Do not wait for the requests that run.")] = False,
) -> None:
    """End a running deployment. Its running requests may end first, unless --now is given."""
    from splitfuse.deploy.daemon import terminate
    from splitfuse.deploy.registry import find

    deployment = find(name)
    terminate(deployment, now=now)
    print(f"{deployment.name} (process {deployment.pid}) has ended")
