"""Starts, stops and lists servers as background processes."""
