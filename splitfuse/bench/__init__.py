"""Holds benchmarks: workloads, loads, targets, goodput and latency metrics, reports."""
