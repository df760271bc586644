"""The bidirectional encoder: a network that reads a text at once and keeps nothing of it, for embeddings."""
