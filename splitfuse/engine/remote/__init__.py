"""Runs an engine in a process of its own: launcher, transport, supervisor, worker."""
