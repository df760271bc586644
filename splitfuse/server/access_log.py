"""Writes one line of JSON for each request that a server has answered, from its record.

Decides what is written about a request. Of a key it writes the name only.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any


@dataclass(frozen=True, kw_only=True)
class RequestRecord:
    """Describes one HTTP request whose answer has ended. Counts are sums over its prompts and choices; times are in
    seconds, from the request's arrival unless said otherwise.
    """

    request_id: str
    route: str
    """Path as the route table has it, such as /v1/completions: never what a client sent."""
    status: int
    total_seconds: float
    key: str | None = None
    """Name of the key that it brought, never the key."""
    prompt_tokens: int = 0
    """Tokens of the prompts that an engine began."""
    generated_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens found in the prefix cache."""
    finish_reasons: Mapping[str, int] = field(default_factory=dict)
    """Numbers of the choices that an engine began, by their finish reasons: there may be thousands of choices."""
    error: str | None = None
    """Kind of error: the name of a class of errors.py or of another exception, without its message."""
    queue_seconds: float | None = None
    """Time until its first step."""
    time_to_first_token_seconds: float | None = None
    """Time until the first token of any choice."""
    inter_token_latency_seconds: tuple[float, ...] = ()
    """Times between each token and the next of the same choice, in rising order: there may be a hundred thousand."""
    steps: int = 0
    """Number of forward steps that computed a part of it."""
    resumed: int = 0
    """Number of times that a choice went on at another engine, or at its own after a restart."""
    on_loan: bool = False
    """Whether another engine held a part of the keys and values of a choice."""
    slo_met: bool | None = None
    """Flag of a met SLO; None without one."""
    slo_violation: str | None = None
    """Sentence about a missed SLO: what was missed, and the longest phases."""


class RequestLog:
    """Writes records, line by line, with a function that neither waits nor raises."""

    def __init__(
        self, write: Callable[[str], object], *, log_prompts: bool, now: Callable[[], float] = time.time
    ) -> None:
        self._write = write
        self._log_prompts = log_prompts
        self._now = now

    def write(self, record: RequestRecord, prompt: Any = None, text: Any = None) -> None:
        """Write one line. `prompt` (a text, token ids, messages) and `text` (of each choice) are in it only with
        log_prompts.
        """
        times = record.inter_token_latency_seconds
        fields: dict[str, Any] = {
            "time": datetime.fromtimestamp(self._now(), UTC).isoformat(timespec="milliseconds"),
            **vars(record),
            "inter_token_latency_median_seconds": statistics.median(times) if times else None,
            "inter_token_latency_max_seconds": max(times, default=None),
        }
        del fields["inter_token_latency_seconds"]
        fields |= {name: _rounded(value) for name, value in fields.items() if name.endswith("_seconds")}
        # With all but ASCII escaped, no text can break the line.
        line = json.dumps(fields)
        if self._log_prompts:
            line = f'{line[:-1]}, "prompt": {_encoded(prompt)}, "text": {_encoded(text)}}}'
        self._write(line + "\n")


def note_dropped(count: int) -> str:
    """Return the line about lines that were dropped, since nothing read them or the disk was full."""
    return json.dumps({"dropped_lines": count})


def _rounded(seconds: float | None) -> float | None:
    """Return seconds rounded to microseconds; None for what JSON has no number for."""
    return None if seconds is None or not math.isfinite(seconds) else round(seconds, 6)


def _encoded(value: Any) -> str:
    """Return a value as JSON; if JSON cannot hold it, its repr."""
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return json.dumps(repr(value))
