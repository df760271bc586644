"""Decides what to compute: requests, policies, plans, KV blocks, SLOs. Needs the standard library alone."""
