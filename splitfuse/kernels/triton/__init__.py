"""Offers Triton kernels for NVIDIA GPUs as a backend. Triton is imported by the modules that have kernels alone."""
