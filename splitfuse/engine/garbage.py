"""Exempt loaded objects from garbage collection: a full collection pauses all requests for tens of milliseconds."""

from __future__ import annotations

import gc


def freeze() -> None:
    """Collect once, then exempt every object that is left from later collections."""
    gc.unfreeze()  # what an earlier call has frozen, and is gone since
    gc.collect()
    gc.freeze()
