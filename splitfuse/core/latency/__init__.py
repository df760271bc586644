"""Accounts for the latency of each request, phase by phase."""
