"""Serves one front with what only the server's process has: engines, limits, adapters, records of requests.

It keeps what the front holds, and gives all of it back when the front ends: nothing of a front that dies goes on.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

from splitfuse.core.latency.phases import LatencyBreakdown
from splitfuse.core.limits import EngineLimits
from splitfuse.core.request_output import RequestOutput
from splitfuse.engine.client import EngineClient, EngineState
from splitfuse.engine.messages import Add, EngineInfo
from splitfuse.engine.stream import Stream
from splitfuse.errors import EngineUnavailableError, InvalidRequestError, SplitfuseError
from splitfuse.server.access_log import RequestRecord
from splitfuse.server.app import CLIENT_GONE, count_end, explain_end, explained
from splitfuse.server.errors import RefusedError
from splitfuse.server.fronts.messages import (
    Admit,
    Admitted,
    Began,
    Channel,
    Close,
    Closed,
    Ended,
    Failure,
    Found,
    FromFront,
    Hold,
    Keep,
    Kept,
    Look,
    Open,
    Output,
    Release,
    ToFront,
    View,
)
from splitfuse.server.state import AppState
from splitfuse.server.traces import RequestEnd

FRONT_DIED = "front_died"
"""Kind of error, in log and metrics, of a request whose front has died."""

ForSession = Admit | Release | Hold | Open | Close | Began | Ended | Keep | Look
"""Messages of a front that a session takes."""

_logger = logging.getLogger(__name__)


def view_of(state: AppState) -> View:
    """Return what a front must know of the engines."""
    client = state.service.client
    is_ready = client.state is EngineState.READY and not state.service.is_starting
    info: EngineInfo | None
    limits: EngineLimits | None
    try:
        info, limits = client.info, client.open_limits
    except EngineUnavailableError:  # none was ready yet
        info = limits = None
    return View(
        EngineState.STARTING if client.state is EngineState.READY and not is_ready else client.state,
        client.stage,
        info,
        limits,
        dict(client.adapters),
        tuple(sorted(client.loading_adapters)),
    )


class FrontSession:
    """Serves one life of a front."""

    def __init__(self, state: AppState, channel: Channel[FromFront, ToFront]) -> None:
        self._state, self._channel = state, channel
        self._streams: dict[int, Stream] = {}
        self._admitted: dict[int, Callable[[], None]] = {}
        self._held: Counter[str] = Counter()
        self._begun: dict[str, Began] = {}

    def take(self, message: ForSession) -> None:
        """Take in a message of the front."""
        client = self._state.service.client
        match message:
            case Open():
                self._open(client, message)
            case Close():
                if (stream := self._streams.get(message.number)) is not None:
                    stream.close() if message.num_tokens is None else stream.stop(message.num_tokens)
            case Admit():
                self._admit(message)
            case Release():
                if (release := self._admitted.pop(message.number, None)) is not None:
                    release()
            case Hold(ends=False):
                self._held[message.digest] += 1
                client.hold_adapter(message.digest)
            case Hold():
                self._held[message.digest] -= 1
                client.let_go_adapter(message.digest)
            case Began():
                self._begun[message.unique_id] = message
                self._state.explanations.begin_one(message.unique_id, message.request_id, key=message.key)
            case Ended():
                self._end(message)
            case Look():
                self._look(message)
            case Keep():
                self._state.store.put(message.owner, message.answer_id, message.answer)
                self._channel.send(Kept(message.number))

    def close(self) -> None:
        """Give back all that the front held, and abort its requests."""
        for stream in [*self._streams.values()]:
            stream.close()
        self._streams = {}
        for release in self._admitted.values():
            release()
        self._admitted = {}
        for digest, count in self._held.items():
            for _ in range(count):
                self._state.service.client.let_go_adapter(digest)
        self._held.clear()
        now = time.monotonic()
        for began in [*self._begun.values()]:
            record = RequestRecord(
                request_id=began.request_id,
                route=began.route,
                status=CLIENT_GONE,
                total_seconds=now - began.arrival,
                key=began.key,
                error=FRONT_DIED,
            )
            self._end(Ended(began.unique_id, record, None, now, "", ""))

    def _look(self, message: Look) -> None:
        owner, answer_id, store = message.owner, message.answer_id, self._state.store
        try:
            if message.with_previous:
                answers = store.chain(owner, answer_id, parameter="")
            else:
                answers = [store.find(owner, answer_id, kind=message.kind)]
            self._channel.send(Found(message.number, answers))
        except (RefusedError, InvalidRequestError) as error:  # it is not there, or too large for the channel
            self._channel.send(Found(message.number, [], Failure.of(error)))

    def _admit(self, message: Admit) -> None:
        admitted = ExitStack()
        sizes = message.num_tokens, message.num_requests
        try:
            admitted.enter_context(self._state.admission.admit(*sizes, num_logprobs=message.num_logprobs))
        except SplitfuseError as error:
            self._channel.send(Admitted(message.number, Failure.of(error)))
        else:
            self._admitted[message.number] = admitted.close
            self._channel.send(Admitted(message.number))

    def _open(self, client: EngineClient, message: Open) -> None:
        number, request = message.number, message.request
        try:
            stream = client.open(request)
        except Exception as error:
            if not isinstance(error, SplitfuseError):
                _logger.exception("a request of a front could not be opened")
            self._send_failure(number, request, error)
            return
        self._streams[number] = stream
        stream.deliver = partial(self._deliver, number, stream)
        stream.breakdown.add_done_callback(partial(self._settled, number, stream))

    def _send_failure(self, number: int, request: Add, error: Exception) -> None:
        now = time.monotonic()
        opened = now if request.sent is None else request.sent
        self._channel.send(Closed(number, LatencyBreakdown(opened, now), 0, False, failure=Failure.of(error)))

    def _deliver(self, number: int, stream: Stream, output: RequestOutput, step_seconds: float) -> None:
        """Pass on an output, or end a request whose output is too large for the channel."""
        try:
            self._pass_on(number, stream, output, step_seconds)
        except InvalidRequestError as error:
            self._streams.pop(number, None)
            stream.close()
            self._send_failure(number, stream.request, error)

    def _pass_on(self, number: int, stream: Stream, output: RequestOutput, step_seconds: float) -> None:
        """Pass on an output; the last one with what is known of the whole request."""
        if output.finish_reason is not None:
            del self._streams[number]
            breakdown = stream.breakdown.result()  # which is settled before
            output.latency_breakdown = None
            self._channel.send(Closed(number, breakdown, stream.num_resumed, stream.on_loan, output, step_seconds))
            return
        is_plain = (
            output.logprobs is None and output.prompt_logprobs is None and not output.num_drafted and not output.values
        )
        self._channel.send(
            Output(
                number,
                step_seconds,
                output.token_ids,
                output.num_cached_tokens,
                output.slo_met,
                stream.num_resumed,
                stream.on_loan,
                None if is_plain else output,
            )
        )

    def _settled(self, number: int, stream: Stream, breakdown: asyncio.Future[LatencyBreakdown]) -> None:
        """Report the end of a request whose last output was not passed on: the front has ended it, or it has failed."""
        if self._streams.pop(number, None) is None:
            return
        failure = None if stream.error is None else Failure.of(stream.error)
        self._channel.send(Closed(number, breakdown.result(), stream.num_resumed, stream.on_loan, failure=failure))

    def _end(self, message: Ended) -> None:
        state, record = self._state, message.record
        self._begun.pop(message.unique_id, None)
        count_end(state, record, message.refused)
        explain_end(state, RequestEnd(message.unique_id, record, message.breakdown, message.ended))
        texts: dict[str, Any] = json.loads(message.texts) if message.texts else {}
        state.log.write(explained(record, message.breakdown), **texts)
