"""Measures what one more token adds to a step of decodes."""

from __future__ import annotations

SHARE = 1 / 8
"""Seconds of one more token, as a fraction of a step of no tokens, where nothing is measured."""
WEIGHT = 8.0
"""Weight of that fraction: of as many measured steps, of which each has a token more or less than the mean."""
FEW_STEPS = 2.5
"""Weight of the first steps, which may be of another kind than those that follow."""
GAIN = 1 / 64
"""Weight of the newest step."""
LONGEST = 2.0
"""Largest ratio of the time of a step to what was expected that is taken in: one held up by the system says little."""


class TokenCost:
    """Fits a line to the seconds of steps by their number of tokens, the newest counting most.

    >>> cost = TokenCost()
    >>> for tokens in (8, 12, 8, 16, 10) * 20:
    ...     cost.observe(tokens, 0.004 + 0.001 * tokens)
    >>> round(cost.per_token, 4), round(cost.seconds(8), 3)
    (0.001, 0.012)
    """

    def __init__(self) -> None:
        self._weight = 0.0
        self._tokens = self._seconds = 0.0  # means
        self._variance = self._covariance = 0.0

    @property
    def is_measured(self) -> bool:
        """Return whether more than a step or two were measured."""
        return self._weight > FEW_STEPS

    @property
    def per_token(self) -> float:
        """Return the seconds that one more token adds; in units of a step of no tokens if none is measured."""
        if not self._weight:
            return SHARE
        usual = self._seconds * SHARE / (1.0 + SHARE * self._tokens)
        weight = WEIGHT / self._weight
        slope = (self._covariance + weight * usual) / (self._variance + weight)
        return min(max(slope, 0.0), self._seconds / self._tokens)

    def seconds(self, tokens: int) -> float:
        """Return the seconds of a step of so many tokens."""
        if not self._weight:
            return 1.0 + SHARE * tokens
        return self._seconds + self.per_token * (tokens - self._tokens)

    def observe(self, tokens: int, seconds: float) -> None:
        """Take in the measured time of a step of decodes."""
        if seconds <= 0.0:
            return
        if self._weight:
            seconds = min(seconds, LONGEST * self.seconds(tokens))
        self._weight += 1.0 - GAIN * self._weight  # it approaches 1 / GAIN
        gain = 1.0 / self._weight
        apart = tokens - self._tokens
        self._tokens += gain * apart
        self._variance += gain * (apart * (tokens - self._tokens) - self._variance)
        self._covariance += gain * ((seconds - self._seconds) * (tokens - self._tokens) - self._covariance)
        self._seconds += gain * (seconds - self._seconds)
