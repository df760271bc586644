"""Everything that an engine and whoever uses it from another thread or process say to each other.

Plain data, encoded as MessagePack: nothing in a message can be more than a number, a text or a list. The same types
cross between threads, unencoded.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from splitfuse.core.limits import EngineLimits
from splitfuse.core.request import DEFAULT_SCHEDULING, FinishReason, RequestOutput, SchedulingOptions
from splitfuse.core.sampling_params import SamplingParams

# To the engine -------------------------------------------------------------------------------------------------------


class Add(msgspec.Struct, frozen=True, tag=True):
    """A request, checked against the engine's limits already. `params.n` is not the engine's business: a choice a
    message."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    choice: int = 0
    scheduling: SchedulingOptions = DEFAULT_SCHEDULING
    sent: float | None = None
    """When, on the machine's monotonic clock."""


class Finish(msgspec.Struct, frozen=True, tag=True):
    """Nobody wants more of a request: keep its first `num_tokens` tokens, or all."""

    request_id: str
    reason: FinishReason
    num_tokens: int | None = None
    ended: float | None = None
    """Since when, on the machine's monotonic clock; None: since the engine hears of it."""


class Stop(msgspec.Struct, frozen=True, tag=True):
    """End, whatever is unfinished."""


Command = Add | Finish | Stop

# From the engine -----------------------------------------------------------------------------------------------------


class Loading(msgspec.Struct, frozen=True, tag=True):
    """Start-up has come so far: `fraction` of `stage`, 0 to 1."""

    stage: str
    fraction: float = 0.0
    memory_plan: str = ""
    """Said once, before anything is loaded."""


@dataclass(frozen=True)
class EngineInfo:
    """What does not change while an engine lives."""

    model: str
    limits: EngineLimits
    max_num_batched_tokens: int
    max_num_seqs: int
    memory_plan: str
    """As it is printed; its first line says which kernels compute."""
    slo_enabled: bool = False


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The model is loaded."""

    info: EngineInfo


@dataclass(frozen=True)
class EngineStats:
    """Counters since the engine began, and how things stand after its last step."""

    num_steps: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_free_blocks: int = 0
    num_prompt_tokens: int = 0  # of requests that were begun
    num_cached_tokens: int = 0  # of those, found in the prefix cache
    num_generated_tokens: int = 0
    num_computed_tokens: int = 0  # of all steps
    num_preemptions: int = 0
    step_tokens: int = 0  # of the last step
    step_seconds: float = 0.0
    predicted_step_seconds: float = 0.0  # 0: nothing was predicted


class StepReport(msgspec.Struct, frozen=True, tag=True):
    """What one step, or a command between two, changed."""

    outputs: tuple[RequestOutput, ...]
    stats: EngineStats


class Alive(msgspec.Struct, frozen=True, tag=True):
    """Sent a few times a second by a process, whatever its engine does."""

    seconds_in_step: float
    """Since the step that runs now began; 0 if none runs."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The engine has ended by an error."""

    error: str
    """For people: no traceback, which went to standard error."""
    kind: str = ""
    """Its class, if it is one of errors.py."""


Report = Loading | Ready | StepReport | Alive | Failed

_decode_command = msgspec.msgpack.Decoder(Command).decode
_decode_report = msgspec.msgpack.Decoder(Report).decode
_encode = msgspec.msgpack.Encoder().encode


def encode(message: Command | Report) -> bytes:
    """One message as MessagePack."""
    return _encode(message)


def decode_command(data: bytes) -> Command:
    """Raises msgspec.DecodeError for what is none."""
    command: Command = _decode_command(data)
    return command


def decode_report(data: bytes) -> Report:
    """Raises msgspec.DecodeError for what is none."""
    report: Report = _decode_report(data)
    return report
