"""`splitfuse serve`: serve a model over HTTP, with OpenAI's API."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from splitfuse.cli.flags import given, with_flags
from splitfuse.config import EngineConfig, ServerConfig
from splitfuse.deploy.daemon import KEY_VARIABLES
from splitfuse.engine.line_writer import LineWriter
from splitfuse.errors import ConfigError

if TYPE_CHECKING:
    from splitfuse.server.lifecycle import ShowStage


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
    variable = KEY_VARIABLES["api_key"]
    if not flags["api_key"] and not os.environ.get(variable, "key").strip():
        raise ConfigError(f"{variable} is set but has no key in it: set one, or unset it to serve without")
    engine_settings = given({name: flags.pop(name) for name in EngineConfig.setting_fields()})
    config, engine = ServerConfig.from_settings(given(flags)), EngineConfig.from_settings(engine_settings)
    from splitfuse.server.lifecycle import run_server

    with _logging_to_stderr() as write:
        asyncio.run(run_server(engine, config, show_stage=_shown_by(write) if sys.stderr.isatty() else None))


CLEAR_LINE = "\r\033[K"


def _shown_by(write: Callable[[str], None]) -> ShowStage:
    """Return a function that shows stages of start-up on a terminal, each in the line of the one before."""
    from splitfuse.server.lifecycle import describe

    return lambda stage: write(f"{CLEAR_LINE}{'' if stage.stage == 'ready' else describe(stage)}")


@contextmanager
def _logging_to_stderr() -> Iterator[Callable[[str], None]]:
    """Write what a server and its libraries log to standard error while the context lasts, in place of a stage shown
    there. Yield the function that writes.
    """
    root = logging.getLogger()
    with LineWriter(sys.stderr) as writer:
        handler = logging.StreamHandler(writer)
        handler.setFormatter(_Formatter(f"{CLEAR_LINE if sys.stderr.isatty() else ''}%(level)s%(message)s"))
        root.addHandler(handler)
        logging.getLogger("splitfuse").setLevel(logging.INFO)
        logging.captureWarnings(True)
        try:
            yield writer.write
        finally:
            logging.captureWarnings(False)
            root.removeHandler(handler)


class _Formatter(logging.Formatter):
    """Puts the level before warnings and errors."""

    def format(self, record: logging.LogRecord) -> str:
        record.level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        return super().format(record)
