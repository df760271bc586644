"""Computes: backends of operations on flat tensors. Knows no request, model or config."""
