"""Connects a front to the engines of the server's process: an EngineClient over the channel."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from functools import partial

from splitfuse.core.limits import EngineLimits
from splitfuse.core.request_output import FinishReason, RequestOutput
from splitfuse.engine.client import EngineClient, EngineState
from splitfuse.engine.messages import Add, EngineInfo, EngineStats, Finish, Loading
from splitfuse.engine.stream import Stream
from splitfuse.errors import EngineUnavailableError
from splitfuse.server.fronts.messages import (
    Channel,
    Close,
    Closed,
    FromFront,
    Hold,
    Open,
    Output,
    ToFront,
    View,
)


class ServerEngines(EngineClient):
    """Opens requests at the engines of the server's process, which routes them, and lets them go on elsewhere."""

    def __init__(self, channel: Channel[ToFront, FromFront]) -> None:
        self._channel = channel
        self._view = View(EngineState.STARTING, Loading("starting"), None, None, {}, ())
        self._is_known = asyncio.Event()  # the view
        self._streams: dict[int, Stream] = {}
        self._num_opened = 0

    @property
    def state(self) -> EngineState:
        return self._view.state

    @property
    def stage(self) -> Loading:
        return self._view.stage

    @property
    def info(self) -> EngineInfo:
        if self._view.info is None:
            raise EngineUnavailableError("no engine is ready yet")
        return self._view.info

    @property
    def open_limits(self) -> EngineLimits:
        return self._view.open_limits or self.info.limits

    @property
    def stats(self) -> list[EngineStats]:
        return []

    @property
    def outstanding_tokens(self) -> int:
        return 0

    @property
    def adapters(self) -> Mapping[str, str]:
        return self._view.adapters

    @property
    def loading_adapters(self) -> Collection[str]:
        return self._view.loading_adapters

    def hold_adapter(self, digest: str) -> None:
        self._channel.send(Hold(digest))

    def let_go_adapter(self, digest: str) -> None:
        self._channel.send(Hold(digest, ends=True))

    def open(self, request: Add) -> Stream:
        """See EngineClient. What the server's process raises, the stream raises. Raises InvalidRequestError for what is
        too large for the channel.
        """
        if self.state is not EngineState.READY:
            raise EngineUnavailableError(f"no engine is ready: {self.state}")
        self._num_opened += 1
        number = self._num_opened
        self._channel.send(Open(number, request))
        stream = self._streams[number] = Stream(request, partial(self._finish, number))
        return stream

    async def start(self) -> None:
        await self._is_known.wait()

    async def close(self) -> None:
        """Forget all: the server's process aborts what a front leaves."""
        self._streams = {}

    def take(self, message: View | Output | Closed) -> None:
        """Take in what the server's process says."""
        if isinstance(message, View):
            self._view = message
            self._is_known.set()
        elif isinstance(message, Output):
            if (stream := self._streams.get(message.number)) is not None:
                stream.num_resumed, stream.on_loan = message.num_resumed, message.on_loan
                stream.push(_output_of(message, stream), message.step_seconds)
        elif (stream := self._streams.pop(message.number, None)) is not None:
            stream.num_resumed, stream.on_loan = message.num_resumed, message.on_loan
            _close(stream, message)

    def _finish(self, number: int, command: Finish) -> None:
        if number in self._streams:
            self._channel.send(Close(number, command.num_tokens if command.reason is FinishReason.STOP else None))


def _output_of(message: Output, stream: Stream) -> RequestOutput:
    if message.rest is not None:
        return message.rest
    return RequestOutput(
        stream.request.request_id,
        message.token_ids,
        num_cached_tokens=message.num_cached_tokens,
        slo_met=message.slo_met,
    )


def _close(stream: Stream, message: Closed) -> None:
    if not stream.breakdown.done():
        stream.breakdown.set_result(message.breakdown)
    if message.failure is not None:
        stream.fail(message.failure.error)
    else:
        last = message.output or RequestOutput(stream.request.request_id, finish_reason=FinishReason.ABORT)
        stream.push(last, message.step_seconds)
