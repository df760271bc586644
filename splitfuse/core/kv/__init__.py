"""Manages KV blocks: names them, gives them to requests, and reuses them by prefix."""
