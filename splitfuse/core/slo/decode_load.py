"""What those who generate need of steps, whatever length these have.

Streams with the same interval count together, so that many lengths can be tried for one look at the streams.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from splitfuse.core.request import Request
from splitfuse.core.slo.cost_model import Features


class DecodeLoad:
    """Of streams that were promised an interval: how many there are of each, and how many tokens they read."""

    def __init__(self, streams: Iterable[Request]) -> None:
        self._streams: dict[float, int] = {}
        self._known: dict[float, int] = {}
        for stream in streams:
            if interval := stream.interval:
                self._streams[interval] = self._streams.get(interval, 0) + 1
                self._known[interval] = self._known.get(interval, 0) + stream.num_known

    def within(self, seconds: float, *, margin: float) -> Features:
        """What a step of `seconds` must have for them, if it may take the part `margin` of an interval."""
        shares = {interval: min(1.0, seconds / (margin * interval)) for interval in self._streams}
        served = math.ceil(sum(share * self._streams[interval] for interval, share in shares.items()))
        read = int(sum(share * self._known[interval] for interval, share in shares.items()))
        return Features(served, served, read, read, served)
