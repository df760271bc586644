"""`python -m splitfuse.cli`: the same as `splitfuse`."""

from __future__ import annotations

from splitfuse.cli import main

if __name__ == "__main__":
    main()
