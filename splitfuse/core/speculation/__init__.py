"""Speculates: computes several tokens of a request in one step."""
