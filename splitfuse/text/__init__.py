"""Turns text into tokens and back, in the process that faces the caller."""
