"""TEXT <-> TOKENS, in the process that talks to people."""
