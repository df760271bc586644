"""Computes bidirectional encoders: networks that read a text at once and keep nothing of it, for embeddings."""
