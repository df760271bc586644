"""Describe the request that a row of logits belongs to, and compute the row's random number."""

from __future__ import annotations

from dataclasses import dataclass, field

from splitfuse.core.plan import NewRequest
from splitfuse.core.sampling_params import SamplingParams

_MASK = 2**64 - 1


@dataclass
class SamplingState:
    """Holds what choosing tokens needs of a request: its introduction, and the tokens it has generated so far.

    The executor keeps it from the request's first chunk to its retirement; preemption does not change it.
    """

    request: NewRequest
    output_token_ids: list[int] = field(default_factory=list)

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def uniform(self) -> float:
        """Return the random number in [0, 1) that decides this row's token."""
        position = len(self.request.prompt_token_ids) + len(self.output_token_ids)
        return uniform(self.request.seed, self.request.choice, position)


def uniform(seed: int, choice: int, position: int) -> float:
    """Return a number in [0, 1) that is a pure function of its three keys.

    Counter-based: each key is a jump ahead in the SplitMix64 sequence that starts where the one before led (Steele,
    Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014). 53 bits, all a float64 can hold.
    """
    state = 0
    for key in (seed, choice, position):
        state = (state + (key + 1) * 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return (state >> 11) * 2.0**-53
