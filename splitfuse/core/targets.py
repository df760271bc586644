"""What a request was promised: when its first token comes, and how long it waits for each that follows."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from splitfuse.config import PER_TOKEN, parse_seconds
from splitfuse.errors import InvalidRequestError


@dataclass(frozen=True)
class Targets:
    """Seconds; None promises nothing. A request that met all of its targets was on time.

    Raises InvalidRequestError for what is no positive number.
    """

    ttft: float | None = None
    """To the first token, from the request's arrival."""
    itl: float | None = None
    """From each token to the next."""
    ttft_per_token: float | None = None
    """To the first token, for each token of the prompt; added to `ttft` if both are given."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not (isinstance(value, int | float) and 0 < value < math.inf):
                raise InvalidRequestError(f"{field.name} must be a positive number of seconds, not {value!r}")

    @classmethod
    def parse(cls, ttft: str | None, itl: str | None) -> Targets:
        """As settings say it: `1s` or `2ms/token`, and `250ms`. Raises ConfigError."""
        between = None if itl is None else parse_seconds("itl", itl)
        if ttft is None:
            return cls(itl=between)
        first = parse_seconds("ttft", ttft.removesuffix(PER_TOKEN))
        return cls(itl=between, ttft_per_token=first) if ttft.endswith(PER_TOKEN) else cls(first, between)

    def allowance(self, num_prompt: int) -> float:
        """From a request's arrival to its first token, if its prompt has so many tokens; infinity without a promise."""
        if self.ttft is None and self.ttft_per_token is None:
            return math.inf
        return (self.ttft or 0.0) + (self.ttft_per_token or 0.0) * num_prompt


NO_TARGETS = Targets()
