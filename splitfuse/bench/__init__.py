"""Benchmarks: workloads, loads, targets, goodput and latency metrics, reports."""
