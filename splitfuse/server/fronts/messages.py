"""Defines the messages between a server's process and its fronts, and the channel that carries them.

Plain data, encoded as MessagePack. Messages go in batches: what a side has to say in one turn of its event loop, such
as what a step has given to all streams, is one message of the transport.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import msgspec

from splitfuse import errors
from splitfuse.config.server import ServerConfig
from splitfuse.core.latency.phases import LatencyBreakdown
from splitfuse.core.limits import EngineLimits
from splitfuse.core.request_output import RequestOutput
from splitfuse.engine.client import EngineState
from splitfuse.engine.messages import Add, EngineInfo, Loading
from splitfuse.engine.remote.transport import MAX_MESSAGE, READ_AHEAD, frame, read_message
from splitfuse.errors import EngineUnavailableError, InvalidRequestError, SplitfuseError
from splitfuse.models.sources.source import ModelSource
from splitfuse.server.access_log import RequestRecord
from splitfuse.server.auth import Owner
from splitfuse.server.store import StoredAnswer

WINDOW = 2**16
"""Bytes of an answer that are on their way to a client before the server waits, as many as uvicorn keeps."""
BATCH_BYTES = 2**20
"""Bytes from which on a batch is sent at once: the other side takes in what it is sent bit by bit."""
LARGEST = MAX_MESSAGE - 2 * BATCH_BYTES
"""Most bytes of a message: with those before it in a batch, it is not more than the transport allows."""
NOT_OF_FRONTS = (
    *("api_key", "api_key_file", "key_file", "engine", "engine_tls", "engine_listen", "roles"),
    *("replicas", "max_replicas", "autoscale", "ray", "ray_memory", "ray_timeout"),
)
"""Settings that no front reads: keys, which are sent as digests, and engines."""


class FrontSpec(msgspec.Struct, frozen=True):
    """Holds everything that a front is started with."""

    config: ServerConfig
    """Configuration of the server without keys and engines, which are of no use to a front."""
    listener: int
    """Descriptor of the socket on which it accepts connections."""

    @classmethod
    def of(cls, config: ServerConfig, listener: int) -> Self:
        """Return what a front of a server is started with."""
        return cls(replace(config, **{name: getattr(ServerConfig, name) for name in NOT_OF_FRONTS}), listener)


class Failure(msgspec.Struct, frozen=True, array_like=True):
    """Holds an error of errors.py."""

    kind: str
    message: str
    parameter: str | None = None
    retry_after: float | None = None

    @classmethod
    def of(cls, error: Exception) -> Self:
        """Return an error as it is sent; one that is none of errors.py is an EngineUnavailableError."""
        kind = type(error).__name__ if isinstance(error, SplitfuseError) else EngineUnavailableError.__name__
        message = str(error) if isinstance(error, SplitfuseError) else repr(error)
        return cls(kind, message, getattr(error, "parameter", None), getattr(error, "retry_after", None))

    @property
    def error(self) -> SplitfuseError:
        """Return the error."""
        kind: Any = getattr(errors, self.kind)
        if self.retry_after is not None:
            made: SplitfuseError = kind(self.message, retry_after=self.retry_after)
        elif self.parameter is not None:
            made = kind(self.message, parameter=self.parameter)
        else:
            made = kind(self.message)
        return made


# From a front --------------------------------------------------------------------------------------------------------


class Heartbeat(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Reports a few times a second that the front lives, and how many connections it has."""

    num_connections: int
    num_text_restarts: int = 0
    """Number of its processes for texts that were ended at a limit or killed."""


class Ready(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Reports that the front generates text, or why it cannot."""

    failure: Failure | None = None


class Seen(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Answers View: the front has taken it in."""

    number: int


class Fault(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Reports why the front cannot serve anything any more."""

    reason: str


class Head(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Passes on the head of a request, which has `number` among those of the front."""

    number: int
    method: str
    scheme: str
    http_version: str
    path: str
    raw_path: bytes
    query_string: bytes
    headers: list[tuple[bytes, bytes]]
    client: tuple[str, int] | None
    server: tuple[str, int | None] | None

    @classmethod
    def of(cls, number: int, scope: Any) -> Self:
        """Return the head of a request from its ASGI scope."""
        names = cls.__struct_fields__[1:]
        return cls(number, *(scope[name] for name in names))

    @property
    def scope(self) -> dict[str, Any]:
        """Return the ASGI scope of the request."""
        scope: dict[str, Any] = {name: getattr(self, name) for name in self.__struct_fields__[1:]}
        return scope | {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "root_path": ""}


class Body(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Passes on a part of a request's body, for which Read has asked."""

    number: int
    data: bytes
    more: bool


class Disconnected(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Reports that the client of a request has disconnected."""

    number: int


class Delivered(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Reports that bytes of an answer have been given to the system, or are about to be."""

    number: int
    num_bytes: int


class Admit(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Asks for what `Admission.admit` gives, until Release. Admitted is the answer."""

    number: int
    num_tokens: int
    num_requests: int
    num_logprobs: int


class Release(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Gives back what Admit was granted."""

    number: int


class Hold(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Keeps a LoRA adapter, or with `ends` ends that: see `EngineClient.hold_adapter`."""

    digest: str
    ends: bool = False


class Open(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Opens a request at the engines, which has `number` among those of the front."""

    number: int
    request: Add


class Close(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Ends a request at the engines: after its first `num_tokens` tokens, or, without a number, as aborted."""

    number: int
    num_tokens: int | None


class Began(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Reports that an HTTP request goes to the engines."""

    unique_id: str
    request_id: str
    route: str
    key: str | None
    arrival: float
    """Time on the machine's monotonic clock."""


class Ended(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Reports how an HTTP request has ended that the front has answered."""

    unique_id: str
    record: RequestRecord
    breakdown: LatencyBreakdown | None
    """Where its time went; None if no engine had it."""
    ended: float
    """Time on the machine's monotonic clock."""
    refused: str
    """Reason why it was refused before any work; empty if it was not."""
    texts: str
    """Prompt and answers for the log, as JSON; empty without log_prompts."""


class Keep(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Asks to keep an answer: see AnswerStore. Kept is the answer."""

    number: int
    owner: str | None
    answer_id: str
    answer: StoredAnswer


class Look(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Asks for a kept answer, and for those that it goes on from if `with_previous`. Found is the answer."""

    number: int
    owner: str | None
    answer_id: str
    kind: str
    with_previous: bool


FromFront = (
    Heartbeat
    | Ready
    | Seen
    | Fault
    | Head
    | Body
    | Disconnected
    | Delivered
    | Admit
    | Release
    | Hold
    | Open
    | Close
    | Began
    | Ended
    | Keep
    | Look
)

# To a front ----------------------------------------------------------------------------------------------------------


class Read(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Asks for the next part of a request's body."""

    number: int


class Start(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Begins the answer to a request."""

    number: int
    status: int
    headers: list[tuple[bytes, bytes]]


class Piece(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Holds a part of an answer."""

    number: int
    data: bytes
    more: bool


class BreakOff(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Ends an answer that is not whole: its connection is closed."""

    number: int


class TokenizerFiles(msgspec.Struct, frozen=True, array_like=True):
    """Says which files the server's process has its tokenizer of: no front may have it of others."""

    path: str
    """Absolute path of a model's folder, or of its GGUF file."""
    digest: str
    """Digest of what they said then."""

    @classmethod
    def of(cls, source: ModelSource) -> Self:
        """Return what names the files of a model. Reads them."""
        return cls(str(Path(source.location).absolute()), source.digest(weights=False))


class Generate(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Asks the front to generate text by itself, with the engines of the server's process."""

    tokenizer: TokenizerFiles
    secret: bytes
    owners: list[tuple[bytes, Owner]]
    """API keys: see ApiKeys.restored."""
    started: int
    """Unix time at which the server started."""


class View(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Says what a front must know of the engines, whenever that changes: see EngineClient."""

    state: EngineState
    stage: Loading
    info: EngineInfo | None
    open_limits: EngineLimits | None
    adapters: dict[str, str]
    loading_adapters: tuple[str, ...]
    number: int = 0
    """Number of changes before it. Seen is the answer."""


class Admitted(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Answers Admit: it is granted, or why it is not."""

    number: int
    failure: Failure | None = None


class Kept(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Answers Keep: it is done."""

    number: int


class Found(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Answers Look: the answers, the oldest first, or the error that says which one is not there."""

    number: int
    answers: list[StoredAnswer]
    failure: Failure | None = None


class Output(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Passes on what a step has given to a request: its tokens, and `rest` if there is more than these."""

    number: int
    step_seconds: float
    token_ids: tuple[int, ...]
    num_cached_tokens: int
    slo_met: bool | None
    num_resumed: int
    on_loan: bool
    rest: RequestOutput | None = None


class Closed(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Reports that no engine has a request any more."""

    number: int
    breakdown: LatencyBreakdown
    num_resumed: int
    on_loan: bool
    output: RequestOutput | None = None
    """Its last output, if that was waited for."""
    step_seconds: float = 0.0
    failure: Failure | None = None
    """Why it could not go on; None if it has ended as it should."""


class End(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Ends the front: it accepts nothing more, and answers have a little time to be written unless `at_once`."""

    at_once: bool


ToExchange = Read | Start | Piece | BreakOff
"""Messages to a request that a front has passed on."""
ToFront = ToExchange | Generate | View | Admitted | Kept | Found | Output | Closed | End

# What carries them ---------------------------------------------------------------------------------------------------

_In = TypeVar("_In")
_Out = TypeVar("_Out")
_encode = msgspec.msgpack.Encoder().encode


class Channel(Generic[_In, _Out]):
    """Carries messages over a connected socket. Belongs to one event loop.

    A message is encoded when it is sent, so that batches are divided by what they really take.

    >>> channel = await Channel.on(connection, list[FromFront])
    >>> channel.send(End(at_once=False))
    >>> batch = await channel.receive()
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, batch: Any) -> None:
        """`batch` is the type of a list of the messages that come."""
        self._reader, self._writer = reader, writer
        self._decode: Any = msgspec.msgpack.Decoder(batch).decode
        self._batch: list[msgspec.Raw] = []
        self._num_bytes = 0
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def on(cls, connection: socket.socket, batch: Any) -> Self:
        """Return the channel on a socket."""
        return cls(*await asyncio.open_unix_connection(sock=connection, limit=READ_AHEAD), batch)

    def send(self, message: _Out) -> None:
        """Send a message in this turn of the event loop. Raises InvalidRequestError if it is too large."""
        encoded = _encode(message)
        if len(encoded) > LARGEST:
            raise InvalidRequestError(
                f"it takes a message of {len(encoded)} bytes ({type(message).__name__}) between a front and its "
                f"server, more than the {LARGEST} that are possible"
            )
        if not self._batch:
            self._loop.call_soon(self._flush)
        self._batch.append(msgspec.Raw(encoded))
        self._num_bytes += len(encoded)
        if self._num_bytes >= BATCH_BYTES:
            self._flush()

    async def receive(self) -> Sequence[_In] | None:
        """Return the next batch; None if the other side has closed. Raises ValueError for what is none."""
        try:
            message = await read_message(self._reader)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        try:
            batch: Sequence[_In] = self._decode(message)
        except msgspec.DecodeError as error:
            raise ValueError(str(error)) from error
        return batch

    def close(self) -> None:
        """Close it, once what was sent has been taken."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._batch:
            batch, self._batch, self._num_bytes = self._batch, [], 0
            if not self._writer.is_closing():
                self._writer.write(frame(_encode(batch)))
