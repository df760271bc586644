"""Runs CPU kernels in C++: weights, keys and values packed for one micro-kernel; equal bits whatever the batch."""
