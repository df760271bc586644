"""KV blocks: which request holds which, and what the prefix cache knows."""
