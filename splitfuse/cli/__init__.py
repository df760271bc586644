"""Holds the command line: a module for each command. Flags are generated from the fields of the configurations."""

from __future__ import annotations

from splitfuse.interrupts import ending_at_ctrl_c


def main() -> None:
    """Run the command line. An unknown flag ends it with status 2."""
    with ending_at_ctrl_c():
        from splitfuse.cli.commands import run

        run()
