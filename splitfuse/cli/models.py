"""`splitfuse models`: list the architectures that can be loaded."""

from __future__ import annotations

from splitfuse.cli.flags import cli_errors

HEADS = ("architecture", "models", "beyond Llama", "limits", "C++ kernels")
"""Heads of the columns; the last says how the C++ kernels compute the network."""


@cli_errors()
def models() -> None:
    """List the architectures that can be loaded, models that have them, and what their networks have."""
    from splitfuse.cli.tables import console, make_table

    table = make_table(None, HEADS, cells(), left=HEADS)
    table.columns[0].no_wrap = True
    console().print(table)


def cells() -> list[tuple[str, ...]]:
    """Return the rows of the table, under HEADS."""
    from splitfuse.models.families.table import rows
    from splitfuse.runtime.backend_choice import in_cpp

    return [
        (row.architecture, row.models, ", ".join(row.properties), row.limits, in_cpp(row.spec.layers)) for row in rows()
    ]
