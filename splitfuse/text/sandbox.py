"""Renders chat templates, tokenizes texts and compiles grammars in a process with limits of time and memory.

Templates and tokenizers come with the weights, and texts from anyone: a template may compute forever in one C call, a
text may need gigabytes. A process that exceeds its limits is killed, the one request fails, and the next one gets a new
process (docs/decisions/0021). Messages cross a socket as MessagePack; sandbox_worker.py is the other side.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from splitfuse.core.structured_outputs import StructuredOutputs, refused
from splitfuse.engine.remote.transport import frame, receive
from splitfuse.errors import EngineUnavailableError, InvalidRequestError, TokenizerError
from splitfuse.interrupts import held_back
from splitfuse.text.chat_template import as_json
from splitfuse.text.sandbox_worker import (
    MEMORY_BYTES,
    Compile,
    Compiled,
    Encode,
    Refused,
    Render,
    Reply,
    Request,
    Setup,
    Text,
    Tokens,
)
from splitfuse.text.tokenizer import Tokenizer, check_unicode

SECONDS = 5.0
"""Computing time that a request may take."""
GRAMMAR_SECONDS = 0.5
"""Computing time that the form of an answer may take to be compiled. The engine's own copy takes about as long."""
START_SECONDS = 60.0
"""Time that a process has to start, with a large vocabulary on a busy machine."""
WALL_SECONDS = 2.0
"""Seconds by the clock for each second of computing time that a request may take: other processes compute too."""
CHARACTERS_PER_SECOND = 100_000
"""Characters that a tokenizer has to encode in a second, after a fixed time."""

_decode = msgspec.msgpack.Decoder(Reply).decode
_encode = msgspec.msgpack.Encoder().encode


class StoppedError(Exception):
    """Says why a process was ended: the cause of the error that a request gets which has exceeded a limit."""


class Sandbox:
    """Runs one process, started when it is first needed. Safe to share between threads, which take turns.

    >>> Sandbox(tokenizer).render([{"role": "user", "content": "Hello"}])
    '<|user|>Hello<|end|><|assistant|>'
    """

    def __init__(self, tokenizer: Tokenizer, *, seconds: float = SECONDS, compile_seconds: float = SECONDS / 2) -> None:
        """Let a request take `seconds` of computing time, more for a long text, and compiling `compile_seconds`."""
        self._tokenizer = tokenizer
        self._seconds = seconds
        self._compile_seconds = compile_seconds
        self._turn = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._closed = False
        self.num_ended = 0
        """Number of processes that were ended at a limit, or killed by others."""

    @property
    def pid(self) -> int | None:
        """Return the id of the process, if one runs."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the process if none runs. Raises EngineUnavailableError if the machine cannot, TokenizerError if the
        chat template does not compile.
        """
        with self._turn:
            self._connected()

    def close(self) -> None:
        """End the process, and what it does; nothing can be asked afterwards."""
        self._closed = True
        if (process := self._process) is not None:
            process.kill()  # what waits for its answer ends too, and gives up its turn
        with self._turn:
            self._stop()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Return the token ids of a text, as Tokenizer.encode does. Raises InvalidRequestError also if that takes too
        much time or memory.
        """
        check_unicode(text)
        seconds = self._seconds + len(text) / CHARACTERS_PER_SECOND
        try:
            reply = self._ask(Encode(text, add_special_tokens, seconds), seconds)
        except StoppedError as error:
            message = f"the tokenizer was stopped, at a text of {len(text)} characters: {error}"
            raise InvalidRequestError(message, parameter="prompt") from error
        assert isinstance(reply, Tokens)
        return reply.token_ids

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Return the text of a conversation, as ChatTemplate.render does. Raises TokenizerError also if that takes too
        much time or memory.
        """
        plain = as_json(messages, "messages"), as_json(variables or {}, "variables"), as_json(tools, "tools")
        try:
            reply = self._ask(Render(*plain, add_generation_prompt, self._seconds), self._seconds)
        except StoppedError as error:
            raise TokenizerError(f"the chat template was stopped: {error}") from error
        assert isinstance(reply, Text)
        return reply.text

    def compile(self, form: StructuredOutputs) -> StructuredOutputs:
        """Return the form with its grammar, as compile_structured_outputs does. Raises InvalidRequestError also if that
        takes too much time or memory.
        """
        check_unicode(form.source)
        try:
            reply = self._ask(Compile(form, GRAMMAR_SECONDS), GRAMMAR_SECONDS)
        except StoppedError as error:
            raise refused(f"could not be compiled: {error}", form.kind) from error
        assert isinstance(reply, Compiled)
        return reply.form

    def _ask(self, request: Request, seconds: float) -> Tokens | Text | Compiled:
        """Return the reply. Raises StoppedError if there is none, the errors of ChatTemplate and Tokenizer, and
        EngineUnavailableError if there is no process, or others have killed it.
        """
        with self._turn:
            connection = self._connected()
            try:
                connection.settimeout(WALL_SECONDS * seconds)
                connection.sendall(frame(_encode(request)))
                answer = receive(connection)
            except TimeoutError:
                self._stop()
                raise StoppedError(_too_slow(seconds)) from None
            except OSError:
                answer = None
            if answer is None:
                code = self._stop()
                if self._closed:
                    raise EngineUnavailableError("the server is shutting down")
                if code == -signal.SIGKILL:  # not for its limits, but such as for want of memory
                    raise EngineUnavailableError("the process for texts was killed; try again")
                raise StoppedError(_too_slow(seconds) if code == -signal.SIGPROF else _TOO_LARGE)
        reply: Reply = _decode(answer)
        if not isinstance(reply, Refused):
            return reply
        if reply.is_request:
            raise InvalidRequestError(reply.message, parameter=reply.parameter)
        raise TokenizerError(reply.message)

    def _connected(self) -> socket.socket:
        if self._closed:
            raise EngineUnavailableError("the server is shutting down")
        if self._connection is None:
            try:
                self._start()
            except OSError as error:  # no descriptors, memory or processes now: there may be later
                self._stop()
                if self._closed:  # meanwhile, by another thread
                    raise EngineUnavailableError("the server is shutting down") from error
                raise EngineUnavailableError(
                    f"the process for texts could not be started: {error}; try again"
                ) from error
        assert self._connection is not None
        return self._connection

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        self._connection = ours
        with theirs, held_back():
            self._process = subprocess.Popen(
                [sys.executable, "-m", "splitfuse.text.sandbox_worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # of a panic of the tokenizer; its error is in the reply
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},  # no pool of threads for one text
            )
        ours.settimeout(START_SECONDS)
        ours.sendall(frame(_encode(self._setup())))
        answer = receive(ours)
        if answer is None:
            if self._stop() == -signal.SIGPROF:
                raise TokenizerError(f"the chat template cannot be compiled: {_too_slow(self._compile_seconds)}")
            raise OSError("it ended at once")
        if answer:
            self._stop()
            raise TokenizerError(msgspec.msgpack.decode(answer, type=Refused).message)

    def _setup(self) -> Setup:
        tokenizer = self._tokenizer
        return Setup(tokenizer.to_json(), tokenizer.special_tokens, tokenizer.chat_template, self._compile_seconds)

    def _stop(self) -> int | None:
        """End the process. Return the status that it ended with, if it ran."""
        if self._connection is not None:
            self._connection.close()
        process, self._process, self._connection = self._process, None, None
        if process is None:
            return None
        self.num_ended += not self._closed
        process.kill()
        return process.wait()


_TOO_LARGE = f"it needed more than {MEMORY_BYTES // 2**20} MiB of memory, or crashed"


def _too_slow(seconds: float) -> str:
    return f"it ran for more than {seconds:g} s"
