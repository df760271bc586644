"""What the server costs, measured from outside: `python -m benchmarks.server.<name>`."""

import sys
from pathlib import Path

_ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(_ROOT / "tests" / "helpers"), str(_ROOT / "tools" / "bundled_model")]  # helpers; stories
