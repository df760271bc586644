"""What holds for the whole suite, set before anything imports PyTorch.

`make test` runs two pytest workers on two cores. An idle OpenMP thread spins by default, and would take the core from
the other worker's tests: here it sleeps. In a worker an engine gets one thread unless its test asks for more, as those
do that compare threads.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
