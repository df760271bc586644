"""Says how long an answer will be at least, and how far apart its tokens, by the newest answers that ended.

A mean or a percentile of the gaps is judged at the end of an answer: if it goes on for long enough, a long gap near its
beginning can be made up for. How long it will be is not known. It is taken to be no shorter than the shortest of the
newest that ended, and its gaps to be as long as theirs were on average.
"""

from __future__ import annotations

from collections import deque

from splitfuse.core.request import Request
from splitfuse.core.request_output import FinishReason
from splitfuse.core.slo.usual_step import MOST_LOOKED_AT


class Answers:
    """Holds the gaps of the newest answers that ended."""

    def __init__(self) -> None:
        self._ended: deque[tuple[int, float]] = deque(maxlen=MOST_LOOKED_AT)  # number of gaps, and their sum

    def end(self, request: Request) -> None:
        """Take note of a request that has finished. One that was ended from outside says nothing of others."""
        if request.slo.exists and request.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._ended.append((request.slo.num_gaps, request.slo.gap_seconds))

    def expect(self, request: Request) -> None:
        """Tell the SLO of a new request what its answer will be like, once enough have ended to say so."""
        if len(self._ended) == MOST_LOOKED_AT:
            shortest, total = min(self._ended)[0], sum(count for count, _ in self._ended)
            if shortest:
                seconds = sum(seconds for _, seconds in self._ended)
                request.slo.expect(min(shortest, request.max_tokens - 1), seconds / total)
