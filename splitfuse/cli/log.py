"""Writes the log of a command that serves to standard error."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from splitfuse.engine.line_writer import LineWriter

CLEAR_LINE = "\r\033[K"


@contextmanager
def logging_to_stderr() -> Iterator[Callable[[str], None]]:
    """Write what splitfuse and its libraries log to standard error while the context lasts, in place of a stage shown
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
