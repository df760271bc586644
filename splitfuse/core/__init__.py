"""WHAT to compute: requests, plans, blocks and the scheduler. No torch, no I/O, no clock."""
