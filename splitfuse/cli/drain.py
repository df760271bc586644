"""`splitfuse drain`: let an engine of a deployment take no requests, or restart engines without an error."""

from __future__ import annotations

from typing import Annotated

import typer

from splitfuse.cli.flags import ApiKeyFlag, cli_errors, connect
from splitfuse.errors import ConfigError


@cli_errors()
def drain(
    target: Annotated[
        str,
        typer.Argument(
            metavar="NAME/ENGINE", help="Name of the deployment, as ps shows it, and number of the engine, from 0 on."
        ),
    ],
    restart: Annotated[
        bool, typer.Option("--restart", help="Restart the engine; with NAME alone all, one after the other.")
    ] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Let a drained engine take requests again.")] = False,
    api_key: ApiKeyFlag = None,
) -> None:
    """Let the requests of an engine go on at the others, without an error. It takes none until it is restarted, or
    until --undo.

    Needs an administrator's key if the server has keys.
    """
    name, slash, number = target.partition("/")
    if slash and not number.isdecimal():
        raise ConfigError(f"{target} has no number after the slash: give NAME/ENGINE, such as splitfuse/0")
    if not slash and not restart:
        raise ConfigError(f"{target} names no engine: give NAME/ENGINE, such as {name}/0, or --restart for all")
    with connect(name, None, api_key) as server:
        done = server.drain(int(number) if slash else None, restart=restart, undo=undo)
    what = "restarted" if restart else "taking requests again" if undo else "drained"
    print(f"{target} is {what}; requests that went on elsewhere: {done['moved']}")
