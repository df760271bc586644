"""Simulates loads on a virtual clock, with the engine's own scheduler and routing."""
