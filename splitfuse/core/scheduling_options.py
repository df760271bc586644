"""Says how a request is to be scheduled."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, replace

from splitfuse.core.slo.targets import SloTargets
from splitfuse.errors import InvalidRequestError

MIN_WEIGHT, MAX_WEIGHT = 0.001, 1000
"""Bounds of a weight, beyond which a single request would count for more than all that others ever send."""


class Priority(enum.IntEnum):
    """Orders requests before fair shares and age: all claims of a smaller number come first, except after urgent
    decodes.
    """

    HIGH = 0
    NORMAL = 1
    LOW = 2


@dataclass(frozen=True)
class SchedulingOptions:
    """Says how one request is scheduled: its SLO, its share of the machine, its isolation. It is made at the HTTP edge;
    `settled` fills in the engine's SLO and the arrival time where they are None.

        SchedulingOptions(targets=SloTargets(ttft=1.0, itl=0.1), priority=Priority.HIGH)

    Raises InvalidRequestError for a weight out of bounds, and for an arrival time that is no time.
    """

    cache_salt: str = ""
    """Cached blocks are shared only among requests with the same salt."""
    targets: SloTargets | None = None
    """SLO of the request; None: the engine's default."""
    arrival_time: float | None = None
    """Time of arrival on the engine's monotonic clock, from which the TTFT target counts; None: when a client
    opens it, or it is added to an engine."""
    on_time_only: bool = False
    """True to reject the request when it is added unless its SLO can be met."""
    owner: str = ""
    """Tenant whose fair share the request uses."""
    weight: float = 1.0
    """Weight of the owner's fair share, relative to other owners."""
    priority: Priority = Priority.NORMAL

    def __post_init__(self) -> None:
        if not MIN_WEIGHT <= self.weight <= MAX_WEIGHT:
            raise InvalidRequestError(f"weight must be a number from {MIN_WEIGHT} to {MAX_WEIGHT}, not {self.weight!r}")
        if self.arrival_time is not None and not math.isfinite(self.arrival_time):
            raise InvalidRequestError(f"arrival_time must be a time in seconds, not {self.arrival_time!r}")

    def settled(self, targets: SloTargets, now: float) -> SchedulingOptions:
        """Return these options with an SLO and an arrival time: where they have none, `targets` and `now`."""
        return replace(
            self,
            targets=targets if self.targets is None else self.targets,
            arrival_time=now if self.arrival_time is None else self.arrival_time,
        )


DEFAULT_SCHEDULING = SchedulingOptions()
"""Options of a request which asks for nothing special."""
