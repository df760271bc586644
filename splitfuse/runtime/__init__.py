"""DOING the plan on devices: load, run, sample."""
