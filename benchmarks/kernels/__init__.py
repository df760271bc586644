"""Benchmarks of the CPU kernels against the limits of the machine."""
