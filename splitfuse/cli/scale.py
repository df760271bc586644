"""`splitfuse scale`: change the number of replicas of a deployment while it serves."""

from __future__ import annotations

from typing import Annotated

import typer

from splitfuse.cli.flags import ApiKeyFlag, cli_errors, connect


@cli_errors()
def scale(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the deployment, as ps shows it.")],
    replicas: Annotated[int, typer.Argument(metavar="N", help="Number of replicas to have.")],
    api_key: ApiKeyFlag = None,
) -> None:
    """Change the number of replicas of a deployment, up to its --max-replicas. Requests of those that end go on at the
    others, with their KV blocks and without an error.

    Needs an administrator's key if the server has keys.
    """
    with connect(name, None, api_key) as server:
        done = server.scale(replicas)
    print(f"{name} has {done['replicas']} replicas; requests that went on elsewhere: {done['moved']}")
