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
    """Serve a model over HTTP with OpenAI's API, until SIGTERM or Ctrl-C.

    SIGTERM drains: running requests may finish, new ones are rejected; a second SIGTERM, or Ctrl-C, ends at once. Give
    API keys in the environment or in a file: all users of the machine can read command lines.
    """
    if model_argument is not None:
        if flags["model"] is not None:
            raise ConfigError(f"MODEL {model_argument} and --model {flags['model']} are mutually exclusive")
        flags["model"] = model_argument
    engine_settings = given({name: flags.pop(name) for name in EngineConfig.setting_fields()})
    config, engine = ServerConfig.from_settings(given(flags)), EngineConfig.from_settings(engine_settings)
    from splitfuse.server.lifecycle import run_server

    asyncio.run(run_server(engine, config))
