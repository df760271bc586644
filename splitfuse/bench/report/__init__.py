"""Draws and reports benchmark results."""
