"""`splitfuse ps`: list the deployments of this user on this machine, and their engines."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

from splitfuse.cli.flags import ApiKeyFlag, cli_errors
from splitfuse.deploy.daemon import first_key


@cli_errors()
def ps(api_key: ApiKeyFlag = None) -> None:
    """List the running deployments of this user on this machine, and their engines: where each runs, its role and load,
    and what it did in the last minute.

    A server with keys shows its engines with an administrator's key only.
    """
    from splitfuse.clients.client import server_engines, server_state
    from splitfuse.deploy.registry import deployments

    running = deployments()
    rows = [("NAME", "MODEL", "URL", "PID", "UP SINCE", "STATE")]
    engines: list[tuple[str, ...]] = [_HEADS]
    with ThreadPoolExecutor(16) as pool:
        states = pool.map(server_state, running)
        found = pool.map(lambda each: server_engines(each, first_key(api_key)), running)
        for deployment, state, shown in zip(running, states, found, strict=True):
            since = datetime.fromtimestamp(deployment.started).strftime("%Y-%m-%d %H:%M:%S")
            rows.append((deployment.name, deployment.model, deployment.url, str(deployment.pid), since, state))
            engines += [_row(deployment.name, each) for each in shown or ()]
            if shown is None and state == "ready":
                engines.append((f"{deployment.name}/*", "shown with an administrator's key: --api-key"))
    _print(rows)
    if len(engines) > 1:
        print()
        _print(engines)


_HEADS = ("ENGINE", "MACHINE", "ROLE", "STATE", "RUNNING", "WAITING", "KV", "REQUESTS/S", "GOODPUT/S", "SLO MET")


def _row(name: str, engine: dict[str, Any]) -> tuple[str, ...]:
    goodput, attainment = engine["goodput"], engine["slo_attainment"]
    return (
        f"{name}/{engine['engine']}",
        engine["address"] or "here",
        engine["role"],
        engine["state"],
        str(engine["running"]),
        str(engine["waiting"]),
        f"{engine['kv_usage']:.0%}",
        f"{engine['requests_per_second']:.2f}",
        "-" if goodput is None else f"{goodput:.2f}",
        "-" if attainment is None else f"{attainment:.0%}",
    )


def _print(rows: Sequence[Sequence[str]]) -> None:
    """Print a table. A row may be shorter than the head, and its last cell longer than the column."""
    full = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(len(row[i]) for row in full) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip())
