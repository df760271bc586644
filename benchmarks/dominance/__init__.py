"""Compares our scheduling policy with others, point by point, on a virtual clock."""
