"""Faults and hours of load on a server, from outside, with figures: `python -m tests.soak.<name>`.

What must hold at any time is in tests/server; these take minutes to hours, and print figures to be read.
"""

import sys
from pathlib import Path

_ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(_ROOT / "tests" / "helpers"), str(_ROOT / "tools" / "bundled_model")]  # helpers; stories
