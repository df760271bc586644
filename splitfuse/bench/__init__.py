"""Measuring: loads, clocks, the arithmetic of promises, reports, and a simulator of the same."""
