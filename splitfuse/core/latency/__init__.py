"""Accounting of where the time of each request went, phase by phase."""
