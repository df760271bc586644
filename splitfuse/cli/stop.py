"""`splitfuse stop`: stop a deployment."""

from __future__ import annotations

from typing import Annotated

import typer

from splitfuse.cli.flags import cli_errors


@cli_errors()
def stop(
    name: Annotated[str, typer.Argument(help="Name of the deployment, as ps shows it.")],
    now: Annotated[bool, typer.Option("--now", help="Abort running requests.")] = False,
) -> None:
    """Stop a deployment. Its running requests may finish first, unless --now is given."""
    from splitfuse.deploy.daemon import terminate
    from splitfuse.deploy.registry import find

    deployment = find(name)
    terminate(deployment, now=now)
    print(f"{deployment.name} (process {deployment.pid}) has ended")
