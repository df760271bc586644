"""`splitfuse serve`: a model over HTTP, with OpenAI's API."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import typer

from splitfuse.cli.flags import given, with_flags
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
