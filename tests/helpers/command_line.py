"""Runs the command line within a test."""

import io
import json
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest


class Ended(NamedTuple):
    """How a command ended and what it printed."""

    status: int
    out: str
    err: str

    @property
    def answers(self) -> list[dict[str, Any]]:
        """The JSON lines, in the order of the prompts."""
        return sorted((json.loads(line) for line in self.out.splitlines()), key=lambda line: line["index"])

    def assert_mistake(self, *sentences: str, status: int = 1) -> None:
        """Nothing on standard output, and on standard error a clear sentence."""
        assert (self.status, self.out) == (status, "")
        assert self.err.startswith("splitfuse: ") and "Traceback" not in self.err
        for sentence in sentences:
            assert sentence in self.err


Run = Callable[..., Ended]
"""Runs a command by its arguments. `stdin` is its input, empty unless given; with None it is the process's own."""


def runner(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    from splitfuse import cli  # not before conftest.py, which imports this file, has set the environment

    def run(*arguments: object, stdin: str | None = "") -> Ended:
        monkeypatch.setattr(sys, "argv", ["splitfuse", *map(str, arguments)])
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as end:
            cli.main()
        return Ended(int(end.value.code or 0), *capsys.readouterr())

    return run
