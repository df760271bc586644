"""One line of JSON for each request that a server has answered, and the record that it is made from.

Decides what is written about a request. It must not know HTTP or the engine, and sees keys by their name only.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TextIO


@dataclass(frozen=True, kw_only=True)
class RequestRecord:
    """What is known of one HTTP request when its answer has ended. Counts are sums over its prompts and choices;
    times are in seconds, from the request's arrival unless they say otherwise.
    """

    request_id: str
    route: str
    """The path as it is declared, such as /v1/completions: never what a client sent."""
    status: int
    total_seconds: float
    key: str | None = None
    """Which key it brought, by name or place in the list: never the key."""
    prompt_tokens: int = 0
    generated_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompts, found in the prefix cache."""
    finish_reasons: tuple[str, ...] = ()
    """Of each choice that an engine began, in order; empty if none was."""
    error: str | None = None
    """The kind: a name of a class of errors.py, or of another exception. No message."""
    queue_seconds: float | None = None
    """Until an engine took it up."""
    time_to_first_token_seconds: float | None = None
    """Until the first token of any choice."""
    inter_token_latency_seconds: tuple[float, ...] = ()
    """Between each token and the next of the same choice, all choices after each other."""
    steps: int = 0
    """Forward steps that gave it something."""
    slo_met: bool | None = None
    """Whether what was promised was kept; None if nothing was."""
    slo_violation: str | None = None
    """A sentence, if a promise was broken: what took the longest."""


class RequestLog:
    """Writes records to a stream, flushed line by line. A stream that fails loses lines, and harms no request."""

    def __init__(self, stream: TextIO, *, log_prompts: bool, now: Callable[[], float] = time.time) -> None:
        self.num_lost = 0  # lines that the stream did not take
        self._stream = stream
        self._log_prompts = log_prompts
        self._now = now

    def write(self, record: RequestRecord, prompt: Any = None, text: Any = None) -> None:
        """One line. `prompt` (a text, token ids, messages) and `text` (a text, or one a choice) appear in it only with
        log_prompts.
        """
        gaps = record.inter_token_latency_seconds
        fields: dict[str, Any] = {
            "time": datetime.fromtimestamp(self._now(), UTC).isoformat(timespec="milliseconds"),
            "request_id": record.request_id,
            "route": record.route,
            "status": record.status,
            "key": record.key,
            "prompt_tokens": record.prompt_tokens,
            "generated_tokens": record.generated_tokens,
            "cached_tokens": record.cached_tokens,
            "finish_reasons": record.finish_reasons,
            "error": record.error,
            "queue_seconds": _rounded(record.queue_seconds),
            "time_to_first_token_seconds": _rounded(record.time_to_first_token_seconds),
            "inter_token_latency_median_seconds": _rounded(statistics.median(gaps) if gaps else None),
            "inter_token_latency_max_seconds": _rounded(max(gaps, default=None)),
            "total_seconds": _rounded(record.total_seconds),
            "steps": record.steps,
            "slo_met": record.slo_met,
            "slo_violation": record.slo_violation,
        }
        # With all but ASCII escaped, no text can break the line or be more than the stream's encoding can write.
        line = json.dumps(fields)
        if self._log_prompts:
            line = f'{line[:-1]}, "prompt": {_encoded(prompt)}, "text": {_encoded(text)}}}'
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except (OSError, ValueError):  # full, or closed
            self.num_lost += 1


def _rounded(seconds: float | None) -> float | None:
    """To microseconds; None for what JSON has no number for."""
    return None if seconds is None or not math.isfinite(seconds) else round(seconds, 6)


def _encoded(value: Any) -> str:
    """As JSON; what JSON cannot hold, as the text that Python shows."""
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return json.dumps(repr(value))
