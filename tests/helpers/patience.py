"""How long the tests wait for what should come: so long that it only ends what hangs, on however busy a machine."""

PATIENCE = 600.0
"""Seconds until a condition that should come true is given up."""
