"""Passes requests on to one of several servers, its cells: `splitfuse gateway`."""
