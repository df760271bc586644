"""`splitfuse serve`: serve a model over HTTP, with OpenAI's API."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from splitfuse.cli.flags import given, is_chosen, with_flags
from splitfuse.cli.log import CLEAR_LINE, logging_to_stderr
from splitfuse.config.engine import EngineConfig
from splitfuse.config.server import ServerConfig
from splitfuse.deploy.daemon import KEY_VARIABLES
from splitfuse.errors import ConfigError

if TYPE_CHECKING:
    from splitfuse.server.lifecycle import ShowStage


@with_flags(also=(ServerConfig,))
def serve(
    context: typer.Context,
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
    variable = KEY_VARIABLES["api_key"]
    if not flags["api_key"] and not os.environ.get(variable, "key").strip():
        raise ConfigError(f"{variable} is set but has no key in it: set one, or unset it to serve without")
    chosen = [name for name in EngineConfig.setting_fields() if is_chosen(context, name)]
    engine_settings = given({name: flags.pop(name) for name in EngineConfig.setting_fields()})
    config, engine = ServerConfig.from_settings(given(flags)), EngineConfig.from_settings(engine_settings)
    from splitfuse.server.lifecycle import run_server

    with logging_to_stderr() as write:
        show_stage = _shown_by(write) if sys.stderr.isatty() else None
        asyncio.run(run_server(engine, config, given=chosen, show_stage=show_stage))


def _shown_by(write: Callable[[str], None]) -> ShowStage:
    """Return a function that shows stages of start-up on a terminal, each in the line of the one before."""
    from splitfuse.server.lifecycle import describe

    return lambda stage: write(f"{CLEAR_LINE}{'' if stage.stage == 'ready' else describe(stage)}")
