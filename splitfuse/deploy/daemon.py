"""Starts a server as a process of its own, and ends one, from another process of the same user.

Decides when a server counts as started or ended, by its entry in the registry.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from splitfuse.config.engine import EngineConfig
from splitfuse.config.fields import refuse_unknown
from splitfuse.config.server import ServerConfig
from splitfuse.deploy import registry
from splitfuse.deploy.registry import Deployment
from splitfuse.errors import ConfigError, ServerError

KEY_VARIABLES = {"api_key": "SPLITFUSE_API_KEY"}
"""Settings that go through the environment: all users of a machine can read command lines."""
POLL_SECONDS = 0.05
SLACK_SECONDS = 30.0
"""Time to end the engines, after the drain."""
NOW_SECONDS = 10.0
"""Time to end without a drain, after which the server is killed."""
LAST_LINES = 20
"""Number of lines of the log that an error shows."""

_children: dict[int, subprocess.Popen[bytes]] = {}  # servers that this process has started, and must wait for


def start(settings: Mapping[str, Any], *, wait: bool, echo: TextIO) -> Deployment:
    """Start `splitfuse serve` with settings of EngineConfig and ServerConfig by name, detached from this process.

    Returns when it is ready; without `wait`, as soon as it listens. What it writes goes to a file in
    ~/.cache/splitfuse/log, and until then to `echo` too. Raises ConfigError for a setting that cannot be, ServerError
    with its last lines if it ends before. If the caller is interrupted while it waits, the server is killed.
    """
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    server_names = ServerConfig.__dataclass_fields__
    refuse_unknown(settings, [*EngineConfig.setting_fields(), *server_names])
    config = ServerConfig.from_settings({name: value for name, value in settings.items() if name in server_names})
    EngineConfig.from_settings({name: value for name, value in settings.items() if name not in server_names})
    registry.check_free(config.name)
    shown = {name: value for name, value in settings.items() if name not in KEY_VARIABLES}
    log = registry.cache_folder("log") / f"{config.name}.log"
    with os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "splitfuse.cli", "serve", *flags_of(shown)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **_key_variables(config)},
            start_new_session=True,  # Ctrl-C here is not meant for it
        )
    _children[child.pid] = child
    try:
        with log.open("rb") as lines:
            return _wait_for(child, lines, echo, ready=wait)
    except BaseException:
        child.kill()
        child.wait()
        del _children[child.pid]
        raise


def terminate(deployment: Deployment, *, now: bool = False) -> None:
    """End a server of this user, and wait until it has ended: after its requests, or with `now` before.

    Raises ServerError if it does not end in the time it has for that.
    """
    limit = time.monotonic() + (NOW_SECONDS if now else deployment.drain_timeout + SLACK_SECONDS)
    _signal(deployment, signal.SIGINT if now else signal.SIGTERM)
    while deployment.is_alive:
        if time.monotonic() > limit:
            if not now:
                raise ServerError(
                    f"process {deployment.pid} of {deployment.name!r} has not ended; this ends it in any case: "
                    f"splitfuse stop {deployment.name} --now"
                )
            _signal(deployment, signal.SIGKILL)
        time.sleep(POLL_SECONDS)
    if (child := _children.pop(deployment.pid, None)) is not None:
        child.wait()


def _signal(deployment: Deployment, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        if deployment.is_alive:
            os.kill(deployment.pid, number)


def _wait_for(child: subprocess.Popen[bytes], log: BinaryIO, echo: TextIO, *, ready: bool) -> Deployment:
    """Return the deployment of a child when it is registered, or `ready`. Its log is copied to `echo` meanwhile."""
    logged = b""

    def copy_log() -> None:
        nonlocal logged
        new = log.read()
        echo.write(new.decode(errors="replace"))
        echo.flush()
        logged = (logged + new)[-10_000:]

    while True:
        status = child.poll()
        found = next((each for each in registry.deployments() if each.pid == child.pid), None)
        copy_log()
        if status is not None:
            last = "\n".join(logged.decode(errors="replace").splitlines()[-LAST_LINES:])
            raise ServerError(f"the server ended with status {status} before it was ready. Its last lines:\n{last}")
        if found is not None and (found.ready or not ready):
            return found
        time.sleep(POLL_SECONDS)


def first_key(api_keys: str | None) -> str | None:
    """Return the first of several keys, as SPLITFUSE_API_KEY may have them for a server."""
    return next(iter((api_keys or "").split()), None)


def flags_of(settings: Mapping[str, Any]) -> list[str]:
    """Return settings as flags of the command line.

    >>> flags_of({"num_blocks": 5, "log_prompts": False})
    ['--num-blocks', '5', '--no-log-prompts']
    """
    flags: list[str] = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            for item in value if isinstance(value, list | tuple) else [value]:
                flags += [f"--{flag}", str(item)]
    return flags


def _key_variables(config: ServerConfig) -> dict[str, str]:
    if any(len(key.split()) != 1 for key in config.api_key):
        raise ConfigError("api_key must have no white space in it")
    return {KEY_VARIABLES["api_key"]: " ".join(config.api_key)} if config.api_key else {}
