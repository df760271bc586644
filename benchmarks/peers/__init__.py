"""Comparison of other engines with ours under the same workload, from outside."""
