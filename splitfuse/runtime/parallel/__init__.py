"""Divides a network among the ranks of an engine: processes that compute it together (tensor parallelism)."""
