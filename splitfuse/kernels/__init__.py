"""Computes: backends of operations on flat tensors."""
