"""Describes networks: families as data, checkpoints, and one decoder for all."""
