"""`splitfuse rank`: compute a part of a model for a server on another machine."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from splitfuse.cli.flags import take, with_flags
from splitfuse.cli.log import logging_to_stderr
from splitfuse.config.engine import EngineConfig
from splitfuse.config.server import RankConfig
from splitfuse.errors import ConfigError


@with_flags(also=(RankConfig,), without=EngineConfig.setting_fields())
def rank(
    model_argument: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="The same as --model.", show_default=False)
    ] = None,
    **flags: Any,
) -> None:
    """Compute a part of a model for a server on another machine: splitfuse serve --rank HOST:PORT.

    It listens until SIGTERM or Ctrl-C, and serves one server at a time, which must have the secret of --key-file. Its
    settings come from the server.
    """
    if model_argument is not None:
        if flags["model"] is not None:
            raise ConfigError(f"MODEL {model_argument} and --model {flags['model']} are mutually exclusive")
        flags["model"] = model_argument
    from splitfuse.runtime.parallel.rank_server import RankServer

    with logging_to_stderr():
        RankServer(take(RankConfig, flags)).run()
