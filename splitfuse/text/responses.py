"""Defines answers as a caller of `pipeline()` or of a client receives them: whole, or in pieces.

Plain data without PyTorch or a tokenizer, so that a client of a remote server can import it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from splitfuse.core.plan import TokenLogprob
from splitfuse.core.request_output import FinishReason
from splitfuse.text.chat_formats.message import ToolCall


@dataclass
class Timings:
    """Holds moments on a monotonic clock, in seconds: `tokens` has one per generated token, when its step ended.

    Empty where a server generated the answer: it reports times by `splitfuse_timing`, not on this machine's clock.
    """

    arrival: float = 0.0
    tokens: list[float] = field(default_factory=list)
    finished: float | None = None

    @property
    def time_to_first_token(self) -> float | None:
        """Return the seconds from arrival to the first token, or None before there is one."""
        return self.tokens[0] - self.arrival if self.tokens else None

    @property
    def total(self) -> float | None:
        """Return the seconds from arrival to the end, or None before the end."""
        return None if self.finished is None else self.finished - self.arrival


@dataclass(frozen=True)
class TextLogprob:
    """Holds the log-probability of a generated token and of the most probable alternatives, with tokens as texts.

    A server reports these; a model in this process reports `TokenLogprob`, with the tokens as ids.
    """

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Response:
    """Holds one answer. `str(response)` is its text.

    >>> response = splitfuse.pipeline()("Once upon a time", max_new_tokens=20)[0]
    >>> response.generated_text, response.finish_reason, response.generated_length
    """

    generated_text: str
    prompt_length: int
    """Number of tokens of the prompt."""
    generated_length: int
    """Number of generated tokens."""
    finish_reason: FinishReason
    """Reason of the end; a string too: "stop", "length", "abort" or "error"."""
    index: int
    """Position of the prompt in the call."""
    choice: int = 0
    """Number of the answer among the `n` to its prompt."""
    token_ids: tuple[int, ...] = ()
    """Generated token ids; empty from a server, which answers in text."""
    logprobs: tuple[TokenLogprob | TextLogprob, ...] | None = None
    """Log-probabilities, one for each generated token, if they were asked for."""
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    """Log-probabilities, one for each prompt token but the first, if they were asked for."""
    timings: Timings = field(default_factory=Timings)
    reasoning: str = ""
    """Thought before the answer to a chat, which is not part of `generated_text`."""
    tool_calls: tuple[ToolCall, ...] = ()
    """Calls in the answer to a chat with tools; `arguments` of each are JSON, which is cut off where the answer is."""
    stop_string: str | None = None
    """Stop string that ended the answer, where the model ran in this process."""
    num_cached_tokens: int = 0
    """Number of prompt tokens found in the prefix cache."""
    error: str | None = None
    """Reason of the failure where `finish_reason` is "error"."""

    def __str__(self) -> str:
        return self.generated_text

    @property
    def message(self) -> dict[str, Any]:
        """Return the answer to a chat as the next message of the conversation, in OpenAI's form.

        >>> [*messages, response.message, {"role": "tool", "tool_call_id": "call_1", "content": "20 degrees"}]
        """
        calls = [
            {"id": each.call_id, "type": "function", "function": {"name": each.name, "arguments": each.arguments}}
            for each in self.tool_calls
        ]
        parts = {"reasoning_content": self.reasoning, "tool_calls": calls}
        given = {name: value for name, value in parts.items() if value}
        return {"role": "assistant", "content": self.generated_text, **given}


@dataclass(frozen=True)
class Piece:
    """Holds new text of one answer in a stream; the last piece of an answer carries the whole `response`."""

    index: int
    choice: int
    text: str
    response: Response | None = None
    reasoning: str = ""
    """New text of the thought before the answer to a chat."""


def in_order(pieces: Iterable[Piece]) -> list[Response]:
    """Return the responses that pieces carry, in the order of prompts and choices."""
    responses = [piece.response for piece in pieces if piece.response is not None]
    return sorted(responses, key=lambda response: (response.index, response.choice))
