"""Executes plans on a device: plans its memory, loads a model, runs steps, samples."""
