"""Text to tokens and back, in the process that faces the caller."""
