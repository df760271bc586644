"""Tells what running decodes need of a step, whatever its length.

Decodes with the same ITL target count together, so that many lengths can be tried for one look at the requests.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from splitfuse.core.request import Request
from splitfuse.core.slo.cost_model import StepFeatures


class DecodeLoad:
    """Counts the decodes with an ITL target: how many there are with each, and how many tokens they attend to."""

    def __init__(self, decodes: Iterable[Request]) -> None:
        self._num_decodes: dict[float, int] = {}
        self._num_tokens: dict[float, int] = {}
        for decode in decodes:
            if itl := decode.slo.itl_target:
                self._num_decodes[itl] = self._num_decodes.get(itl, 0) + 1
                self._num_tokens[itl] = self._num_tokens.get(itl, 0) + decode.num_tokens

    def within(self, seconds: float, *, safety_factor: float) -> StepFeatures:
        """Return what a step of `seconds` must compute for them, if it may take the fraction `safety_factor` of an ITL
        target.
        """
        shares = {itl: min(1.0, seconds / (safety_factor * itl)) for itl in self._num_decodes}
        served = math.ceil(sum(share * self._num_decodes[itl] for itl, share in shares.items()))
        read = int(sum(share * self._num_tokens[itl] for itl, share in shares.items()))
        return StepFeatures(served, served, read, read, served)
