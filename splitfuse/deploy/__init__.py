"""Servers as background processes: start, stop, list."""
