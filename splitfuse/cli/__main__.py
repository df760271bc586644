"""Does as `python -m splitfuse.cli` what `splitfuse` does."""

from __future__ import annotations

from splitfuse.cli import main

if __name__ == "__main__":
    main()
