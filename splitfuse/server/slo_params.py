"""Reads how a request wants to be scheduled: its SLO, its priority, and its deadline.

Decides what the owner of a key may request, and what a server without SLO scheduling refuses.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from splitfuse.config.values import MAX_TARGET, MIN_TARGET
from splitfuse.core.scheduling_options import Priority, SchedulingOptions
from splitfuse.core.slo.targets import NO_SLO, SLO_DISABLED, SloTargets
from splitfuse.errors import InvalidRequestError
from splitfuse.server.auth import Owner
from splitfuse.server.errors import RefusedError
from splitfuse.server.validation import Body

MIN_DEADLINE, MAX_DEADLINE = 0.001, 86400.0
"""Bounds of a deadline, in seconds."""

_TARGET = Annotated[float, Meta(ge=MIN_TARGET, le=MAX_TARGET)]
Deadline = Annotated[
    float, Meta(ge=MIN_DEADLINE, le=MAX_DEADLINE, description="Seconds after which the request is given up")
]
OnTimeOnly = Annotated[bool, Meta(description="If its SLO cannot be met: 429 at once, with the predicted wait")]
PriorityName = Literal["high", "normal", "low"]


class TargetSeconds(Body, kw_only=True, frozen=True):
    """Sets the SLO of a request in place of its key's or the server's, in seconds; null for none."""

    ttft: Annotated[_TARGET, Meta(description="To the first token, from its arrival")] | None = None
    ttft_per_token: Annotated[_TARGET, Meta(description="Added to it for each prompt token")] | None = None
    itl: Annotated[_TARGET, Meta(description="From each token to the next")] | None = None
    itl_percentile: (
        Annotated[float, Meta(gt=0, lt=100, description="Percentage of the gaps that must be at most itl; needs itl")]
        | None
    ) = None
    tpot: Annotated[_TARGET, Meta(description="From token to token, the mean over the answer")] | None = None

    @property
    def targets(self) -> SloTargets:
        """Return them for the scheduler. Raises InvalidRequestError for a percentile without itl."""
        try:
            return SloTargets(**{name: getattr(self, name) for name in self.__struct_fields__})
        except InvalidRequestError as error:
            message, parameter = f"splitfuse_slo.{error}", f"splitfuse_slo.{error.parameter}"
            raise InvalidRequestError(message, parameter=parameter) from error


class SloParams(Body, kw_only=True, frozen=True):
    """Holds the scheduling parameters of a body. null is a parameter left out."""

    splitfuse_deadline: Deadline | None = None
    splitfuse_slo: TargetSeconds | None = None
    splitfuse_on_time_only: OnTimeOnly | None = None
    splitfuse_priority: PriorityName | None = None

    def scheduling(self, owner: Owner, *, arrival_time: float, slo_enabled: bool) -> SchedulingOptions:
        """Return the options for the scheduler: the key's where the request has none of its own.

        Raises InvalidRequestError for an SLO where SLO scheduling is disabled, RefusedError (403) for a priority above
        the key's.
        """
        asked = self.splitfuse_slo
        targets = None if asked is None else asked.targets
        for name, wants in (
            ("splitfuse_slo", targets not in (None, NO_SLO)),
            ("splitfuse_on_time_only", self.splitfuse_on_time_only),
        ):
            if wants and not slo_enabled:
                raise InvalidRequestError(f"{SLO_DISABLED}, or leave {name} out", parameter=name)
        return SchedulingOptions(
            cache_salt=owner.cache_salt,
            targets=owner.targets if targets is None else targets,
            arrival_time=arrival_time,
            on_time_only=bool(self.splitfuse_on_time_only),
            owner=owner.name or "",
            weight=owner.weight,
            priority=self._priority(owner),
        )

    def _priority(self, owner: Owner) -> Priority:
        if self.splitfuse_priority is None:
            return owner.priority
        priority = Priority[self.splitfuse_priority.upper()]
        if owner.name is not None and priority < owner.priority:
            raise RefusedError(
                403,
                f"this key allows at most priority {owner.priority.name.lower()}, not {self.splitfuse_priority}",
                code="priority_not_allowed",
                parameter="splitfuse_priority",
            )
        return priority
