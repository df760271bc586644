"""`splitfuse engine`: run one engine, for servers on other machines."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from splitfuse.cli.flags import given, take, with_flags
from splitfuse.cli.log import logging_to_stderr
from splitfuse.config.engine import EngineConfig
from splitfuse.config.server import ListenConfig
from splitfuse.errors import ConfigError


@with_flags(also=(ListenConfig,))
def engine(
    model_argument: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="The same as --model.", show_default=False)
    ] = None,
    **flags: Any,
) -> None:
    """Run one engine of a model, for servers on other machines: splitfuse serve --engine HOST:PORT.

    It listens until SIGTERM or Ctrl-C, and accepts one server at a time that has the secret of --key-file.
    """
    if model_argument is not None:
        if flags["model"] is not None:
            raise ConfigError(f"MODEL {model_argument} and --model {flags['model']} are mutually exclusive")
        flags["model"] = model_argument
    listen = take(ListenConfig, flags)
    config = EngineConfig.from_settings(given(flags))
    from splitfuse.engine.remote.standalone import StandaloneEngine

    with logging_to_stderr():
        StandaloneEngine.of(config, listen).run()
