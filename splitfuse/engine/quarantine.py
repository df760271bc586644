"""Refuses requests that were in the step in flight whenever an engine died: docs/decisions/0020.

Whatever kills an engine takes the requests of others along, and a client that gets an error sends its request again.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Collection, Iterable

import msgspec

from splitfuse.engine.messages import Add
from splitfuse.engine.stream import Stream
from splitfuse.errors import RequestQuarantinedError

NUM_DEATHS = 2
"""Number of deaths after which a request is refused."""
SECONDS = 600.0
"""Seconds for which it is refused, and after which a death is forgotten."""
NUM_COMPLETED = 3
"""Number of requests alike that ran to their end within SECONDS, after which one death is not put down to them."""
MAX_REMEMBERED, MAX_TOKENS = 1024, 256
"""Number of requests that are remembered for that, and the longest of their prompts."""

_encode = msgspec.msgpack.Encoder().encode
_logger = logging.getLogger(__name__)


class Quarantine:
    """Knows requests by the digest of their tokens and sampling parameters; engines may share one. It belongs to the
    event loop's thread.

        quarantine = Quarantine()
        quarantine.engine_died([request])
        quarantine.engine_died([request])
        quarantine.check(request)  # raises RequestQuarantinedError
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._deaths: dict[bytes, tuple[int, float]] = {}  # how many a request was in, and the time of the last one
        self._completed: dict[bytes, tuple[int, float]] = {}  # how many ran to their end, and when; the oldest first

    def engine_died(self, in_flight: Iterable[Add]) -> None:
        """Note the requests to which the death of an engine is put down: see `find_suspects`."""
        self._forget()
        now = self._clock()
        for digest, request in {_digest(request): request for request in in_flight}.items():  # choices count once
            completed, last = self._completed.pop(digest, (0, 0.0))
            if completed >= NUM_COMPLETED and now - last < SECONDS:
                continue  # what is sent all the time, such as a load balancer's probe, is in flight at any death
            count, _ = self._deaths.get(digest, (0, 0.0))
            self._deaths[digest] = count + 1, now
            if count + 1 == NUM_DEATHS:
                _logger.error(
                    "request %s was in the step in flight at %d deaths of an engine: requests with these tokens and "
                    "parameters are refused (422) for %g s",
                    request.request_id,
                    NUM_DEATHS,
                    SECONDS,
                )

    def completed(self, request: Add) -> None:
        """Clear a request of suspicion, since one like it ran to its end. One that is refused stays so."""
        if request.choice > 0:
            return  # a request with several choices counts once
        if not self._deaths and len(request.prompt_token_ids) > MAX_TOKENS:
            return  # its digest takes long, at every request
        digest = _digest(request)
        now = self._clock()
        completed, last = self._completed.pop(digest, (0, now))
        self._completed[digest] = (completed + 1 if now - last < SECONDS else 1), now
        if len(self._completed) > MAX_REMEMBERED:
            del self._completed[next(iter(self._completed))]
        count, _ = self._deaths.get(digest, (0, 0.0))
        if 0 < count < NUM_DEATHS:
            del self._deaths[digest]

    def absolve(self, request: Add) -> None:
        """Forget the death at which a request was, since it has come past that step. One that is refused stays so."""
        digest = _digest(request)
        if self._deaths.get(digest, (NUM_DEATHS, 0.0))[0] < NUM_DEATHS:
            del self._deaths[digest]

    def check(self, request: Add) -> None:
        """Raise RequestQuarantinedError if a request is refused."""
        self._forget()
        if not self._deaths:  # the usual case: no digest is computed
            return
        count, last = self._deaths.get(_digest(request), (0, 0.0))
        if count >= NUM_DEATHS:
            raise RequestQuarantinedError(
                f"a request with these tokens and parameters was being computed at {count} deaths of an engine, and is "
                f"refused for another {last + SECONDS - self._clock():.0f} s: change it, or send it again then"
            )

    def _forget(self) -> None:
        oldest = self._clock() - SECONDS
        for digest in [digest for digest, (_, last) in self._deaths.items() if last <= oldest]:
            del self._deaths[digest]


def find_suspects(streams: Iterable[Stream], in_flight: Collection[str]) -> tuple[list[Stream], list[Stream]]:
    """Return which of the streams of an engine that has died may have caused it, and to which it is put down; the ids
    `in_flight` were in its last step.

    A request that kills before its first step is in none. So one that has had no output of this engine is a suspect
    wherever it was, unless a trial has cleared it. While some are on trial, these and the new ones are all; among
    several of them the cause is not known, and is put down to none.
    """
    streams, in_flight = list(streams), set(in_flight)
    in_step = [stream for stream in streams if stream.request.request_id in in_flight]
    candidates = [each for each in streams if each.on_trial or not (each.num_outputs_here or each.is_cleared)]
    if any(stream.on_trial for stream in candidates):
        return candidates, candidates if len(candidates) == 1 else []
    return list(dict.fromkeys([*in_step, *candidates])), in_step


def _digest(request: Add) -> bytes:
    # Mappings in the order of their keys.
    params = msgspec.to_builtins(request.params, str_keys=True, order="deterministic")
    return hashlib.blake2b(
        _encode((request.prompt_token_ids, params, request.pooling, request.adapter)), digest_size=16
    ).digest()
