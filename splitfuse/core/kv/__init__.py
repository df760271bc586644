"""Manage KV blocks: name them, give them to requests, and reuse them by prefix."""
