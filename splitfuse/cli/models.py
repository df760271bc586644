"""`splitfuse models`: list the architectures that can be loaded."""

from __future__ import annotations

from splitfuse.cli.flags import cli_errors


@cli_errors()
def models() -> None:
    """List the architectures that can be loaded, models that have them, and what their networks have."""
    from splitfuse.cli.tables import console, make_table
    from splitfuse.models.families.table import rows

    heads = ("architecture", "models", "beyond Llama", "limits")
    found = [(row.architecture, row.models, ", ".join(row.properties), row.limits) for row in rows()]
    console().print(make_table(None, heads, found, left=heads))
