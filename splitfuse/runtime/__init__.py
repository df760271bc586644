"""Executing plans on a device: load, plan memory, run, sample."""
