"""Records what a server's engines do, and runs it again."""
