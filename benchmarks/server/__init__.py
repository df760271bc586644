"""What the server costs, measured from outside: `python -m benchmarks.server.<name>`."""

import sys
from pathlib import Path

_ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(_ROOT / "tests"), str(_ROOT / "tools" / "bundled_model")]  # server_process, server_load; stories
