"""What a request was promised: when its first token comes, and how long it waits for each that follows."""

from __future__ import annotations

import math
from dataclasses import dataclass

from splitfuse.config import PER_TOKEN, SchedulerConfig, parse_seconds
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

    def __post_init__(self) -> None:
        for name in ("ttft", "itl"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and 0 < value < math.inf):
                raise InvalidRequestError(f"{name} must be a positive number of seconds, not {value!r}")

    @classmethod
    def promised(cls, config: SchedulerConfig, num_prompt_tokens: int) -> Targets:
        """What an engine promises to a request that brings no targets of its own."""
        first = None
        if config.ttft is not None:
            first = parse_seconds("ttft", config.ttft.removesuffix(PER_TOKEN))
            if config.ttft.endswith(PER_TOKEN):
                first *= num_prompt_tokens
        return cls(first, None if config.itl is None else parse_seconds("itl", config.itl))

    def due(self, *, arrived: float) -> float:
        """When the first token must be there; infinity without a promise."""
        return math.inf if self.ttft is None else arrived + self.ttft


NO_TARGETS = Targets()
