"""Clients of a splitfuse server, asynchronous and blocking."""
