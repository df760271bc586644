"""Tries clients and frameworks that people have against a server, unmodified, each in an environment of its own."""
