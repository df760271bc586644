"""KV blocks: their names, the requests that hold them, and the prefix cache."""
