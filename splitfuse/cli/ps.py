"""`splitfuse ps`: list the deployments of this user on this machine."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

from splitfuse.cli.flags import cli_errors


@cli_errors()
def ps() -> None:
    """List the running deployments of this user on this machine."""
    from splitfuse.clients.client import server_state
    from splitfuse.deploy.registry import deployments

    running = deployments()
    rows = [("NAME", "MODEL", "URL", "PID", "UP SINCE", "STATE", "ENGINES")]
    with ThreadPoolExecutor(16) as pool:
        for deployment, state in zip(running, pool.map(server_state, running), strict=True):
            since = datetime.fromtimestamp(deployment.started).strftime("%Y-%m-%d %H:%M:%S")
            engines = ", ".join([f"{deployment.replicas} here"] * bool(deployment.replicas) + [*deployment.engines])
            engines += f" ({deployment.roles})" * bool(deployment.roles)
            row = (deployment.name, deployment.model, deployment.url, str(deployment.pid), since, state, engines)
            rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
