"""Runs what a script tries with one client, and reports each feature. Standard library only: other environments run it.

A script is called with the URL of a server, without /v1, and the name of its model.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import sys
import traceback
from collections.abc import Awaitable, Callable

URL, MODEL = sys.argv[1:3] if len(sys.argv) > 2 else ("http://127.0.0.1:8000", "storyteller")
V1 = f"{URL}/v1"
KEY = "none"
"""API key for clients that insist on one."""
STORY = "Once upon a time there was a small dog. Tell the story."
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
"""Schema of a person, for structured output and the arguments of a tool."""

Trial = Callable[[], Awaitable[None] | None]
_trials: dict[str, Trial] = {}


def feature(name: str) -> Callable[[Trial], Trial]:
    """Return a decorator that makes a function the trial of a feature. It raises if the feature does not work."""

    def register(trial: Trial) -> Trial:
        _trials[name] = trial
        return trial

    return register


def check(condition: object, found: object = "") -> None:
    """Raise AssertionError, with what was found, unless the condition holds."""
    if not condition:
        raise AssertionError(f"unexpected: {found!r:.300}")


def run() -> None:
    """Run every trial, and write a line of JSON for each: `{"feature": "chat", "error": null}`."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a client prints is no answer
    for name, trial in _trials.items():
        error = None
        try:
            if inspect.isawaitable(awaitable := trial()):
                asyncio.run(asyncio.wait_for(awaitable, 120))  # type: ignore[arg-type]
        except Exception as failure:
            traceback.print_exc()
            error = f"{type(failure).__name__}: {failure}"[:500]
        answers.write(json.dumps({"feature": name, "error": error}) + "\n")
