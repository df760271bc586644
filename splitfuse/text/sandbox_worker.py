"""Renders templates and tokenizes texts in a process of its own: `python -m splitfuse.text.sandbox_worker FD`.

sandbox.py starts it. FD is a connected socket that it inherits; the process ends when the other end closes. It answers
one request after another. A request that takes too much computing time or memory ends the process.
"""

from __future__ import annotations

import json
import resource
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

import msgspec
import tokenizers

from splitfuse import interrupts
from splitfuse.core.structured_outputs import StructuredOutputs
from splitfuse.engine.memory import give_back_memory, return_large_blocks
from splitfuse.engine.remote.transport import frame, receive
from splitfuse.errors import InvalidRequestError, TokenizerError
from splitfuse.text.chat_template import ChatTemplate
from splitfuse.text.tokenizer import Tokenizer, check_unicode

MEMORY_BYTES = 2**30
"""Memory for one request, beyond what the process has when it is ready."""
MAX_RENDERED = 2**24
"""Number of characters that a template may write."""
MAX_TOKENS = 2**22
"""Number of tokens that a text may have."""


class Setup(msgspec.Struct, frozen=True):
    """Holds a tokenizer, as `tokenizer.json` has it, and the chat template."""

    tokenizer: str
    special_tokens: dict[str, str]
    chat_template: str | None
    compile_seconds: float


class Encode(msgspec.Struct, frozen=True, tag=True):
    """Asks for the tokens of a text."""

    text: str
    add_special_tokens: bool
    seconds: float


class Render(msgspec.Struct, frozen=True, tag=True):
    """Asks for the text of a conversation. `messages`, `variables` and `tools` are JSON."""

    messages: str
    variables: str
    tools: str
    add_generation_prompt: bool
    seconds: float


class Compile(msgspec.Struct, frozen=True, tag=True):
    """Asks for the grammar of an answer's form."""

    form: StructuredOutputs
    seconds: float


Request = Encode | Render | Compile


class Tokens(msgspec.Struct, frozen=True, tag=True):
    """Answers Encode."""

    token_ids: tuple[int, ...]


class Text(msgspec.Struct, frozen=True, tag=True):
    """Answers Render."""

    text: str


class Compiled(msgspec.Struct, frozen=True, tag=True):
    """Answers Compile."""

    form: StructuredOutputs


class Refused(msgspec.Struct, frozen=True, tag=True):
    """Says what is wrong: with the request, or else with the template or the tokenizer."""

    message: str
    parameter: str | None
    is_request: bool


Reply = Tokens | Text | Compiled | Refused


class Worker:
    """Answers requests with one tokenizer and one template."""

    def __init__(self, setup: Setup) -> None:
        self._tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(setup.tokenizer), special_tokens=setup.special_tokens)
        self._source, self._compile_seconds = setup.chat_template, setup.compile_seconds
        self._template: ChatTemplate | None = None

    def compile(self) -> Refused | None:
        """Compile the template, if there is one, and say what is wrong with it."""
        limit_time(self._compile_seconds)
        try:
            if self._source is not None:
                self._template = ChatTemplate(self._source, self._tokenizer.special_tokens)
        except TokenizerError as error:
            return Refused(_valid(error), None, is_request=False)
        return None

    def answer(self, request: Request) -> Reply:
        """Return the reply to a request. Raises MemoryError."""
        limit_time(request.seconds)
        try:
            match request:
                case Encode():
                    return Tokens(self._encode(request))
                case Render():
                    return Text(self._render(request))
                case Compile():
                    return Compiled(_compile(request))
        except InvalidRequestError as error:
            return Refused(_valid(error), error.parameter, is_request=True)
        except TokenizerError as error:
            return Refused(_valid(error), None, is_request=False)

    def _encode(self, request: Encode) -> tuple[int, ...]:
        token_ids = self._tokenizer.encode(request.text, add_special_tokens=request.add_special_tokens)
        if len(token_ids) > MAX_TOKENS:
            message = f"the text has {len(token_ids)} tokens; at most {MAX_TOKENS} are accepted"
            raise InvalidRequestError(message, parameter="prompt")
        return token_ids

    def _render(self, request: Render) -> str:
        if self._template is None:
            self._template = ChatTemplate(self._source, self._tokenizer.special_tokens)
        text = self._template.render(
            json.loads(request.messages),
            add_generation_prompt=request.add_generation_prompt,
            variables=json.loads(request.variables),
            tools=json.loads(request.tools),
        )
        if len(text) > MAX_RENDERED:
            raise TokenizerError(f"it wrote {len(text)} characters; at most {MAX_RENDERED} are accepted")
        check_unicode(text)
        return text


def _compile(request: Compile) -> StructuredOutputs:
    from splitfuse.text.grammar import compile_structured_outputs  # a library that few requests need

    return compile_structured_outputs(request.form)


def main() -> None:
    """Answer until the other end closes."""
    interrupts.ignore()
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    connection = socket.socket(fileno=int(sys.argv[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    setup = receive(connection)
    if setup is None:
        return
    worker = Worker(msgspec.msgpack.decode(setup, type=Setup))
    del setup
    return_large_blocks()
    limit_memory()
    refused = worker.compile()
    limit_time(0)
    decode, encode = msgspec.msgpack.Decoder(Request).decode, msgspec.msgpack.Encoder().encode
    connection.sendall(frame(b"" if refused is None else encode(refused)))  # ready
    while (message := receive(connection)) is not None:
        request = decode(message)
        del message
        reply = worker.answer(request)
        limit_time(0)
        connection.sendall(frame(encode(reply)))
        del reply
        del request
        give_back_memory()


def limit_time(seconds: float) -> None:
    """End this process after `seconds` more of computing time; 0: no limit. The other end may be gone, and measures
    nothing then.
    """
    signal.setitimer(signal.ITIMER_PROF, seconds)


def limit_memory() -> None:
    """Refuse this process more than MEMORY_BYTES beyond what it has, where the system says how much that is."""
    with suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * resource.getpagesize() + MEMORY_BYTES
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        limits = [limit, *(each for each in (soft, hard) if each != resource.RLIM_INFINITY)]
        resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))


def _valid(error: Exception) -> str:
    """Return an error's message as valid Unicode: it may quote what is not."""
    return str(error).encode(errors="replace").decode()


if __name__ == "__main__":
    main()
