"""Threads that others started."""

import threading


def wait_for_threads(prefix: str) -> None:
    """Return when the last whose name begins so has ended."""
    for thread in threading.enumerate():
        if thread.name.startswith(prefix):
            thread.join(20.0)
            assert not thread.is_alive()
