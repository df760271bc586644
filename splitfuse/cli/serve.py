"""`splitfuse serve`: a model over HTTP, with OpenAI's API."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from splitfuse.cli.flags import given, with_flags
from splitfuse.config import EngineConfig, ServerConfig
from splitfuse.errors import ConfigError

if TYPE_CHECKING:
    from splitfuse.engine.messages import Loading


@with_flags(also=(ServerConfig,))
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

    with _logging_to_stderr():
        asyncio.run(run_server(engine, config, show_stage=_show_stage if sys.stderr.isatty() else None))


CLEAR_LINE = "\r\033[K"


def _show_stage(stage: Loading) -> None:
    """Show a stage of start-up on a terminal, in the line of the one before."""
    from splitfuse.server.lifecycle import describe

    line = "" if stage.stage == "ready" else describe(stage)
    print(f"{CLEAR_LINE}{line}", end="", file=sys.stderr, flush=True)


@contextmanager
def _logging_to_stderr() -> Iterator[None]:
    """Write what a server logs to standard error while the context lasts, in place of a stage shown there."""
    handler, logger = logging.StreamHandler(), logging.getLogger("splitfuse")
    handler.setFormatter(_Formatter(f"{CLEAR_LINE if sys.stderr.isatty() else ''}%(level)s%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Formatter(logging.Formatter):
    """Puts the level before warnings and errors."""

    def format(self, record: logging.LogRecord) -> str:
        record.level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        return super().format(record)
