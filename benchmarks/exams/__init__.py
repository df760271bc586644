"""Exams of a server, from outside, with figures: `python -m benchmarks.exams.<name>`. What must hold always is in
tests/server."""

import sys
from pathlib import Path

_ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(_ROOT / "tests"), str(_ROOT / "tools" / "bundled_model")]  # how servers are started; texts
