"""`splitfuse chat`: a conversation in a terminal, or through a pipe, with a server or with a model in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from splitfuse.cli.flags import SAMPLING_HELP, changed, given, with_flags
from splitfuse.config import EngineConfig, ServerConfig
from splitfuse.errors import ConfigError, ServerError, SplitfuseError

if TYPE_CHECKING:
    from splitfuse.text.responses import Piece

CHAT_SAMPLING = {
    name: flag for name, flag in SAMPLING_HELP.items() if name not in ("n", "logprobs", "chat", "return_full_text")
}
HELP = "a \\ at the end of a line: it goes on in the next; /reset begins anew, /exit or Ctrl-D ends, Ctrl-C breaks off"

GOES_ON = "\\"
"""At the end of a line."""

Messages = list[dict[str, str]]
Answer = Callable[[Messages], "Iterator[Piece]"]


@with_flags(sampling=CHAT_SAMPLING)
def chat(
    name: Annotated[str | None, typer.Option(help="Talk with the deployment of that name.")] = None,
    url: Annotated[str | None, typer.Option(help="Talk with the server there, such as http://127.0.0.1:8000.")] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    **flags: Any,
) -> None:
    """Talk with a model: that of a server, or one loaded here.

    Without --name, --url and engine flags: the deployment named splitfuse if it runs, else the bundled model. Each line
    is a turn; one that ends in a backslash goes on in the next. In a conversation, /reset begins anew, /exit or Ctrl-D
    ends, and Ctrl-C breaks an answer off.
    """
    settings = {name: flags.pop(name) for name in EngineConfig.setting_fields()}
    with closing(_partner(name, url, settings, list(changed(settings)), given(flags))) as partner:
        conversation = _Conversation(next(partner), system)
        ended_well = conversation.on_terminal() if sys.stdin.isatty() else conversation.through_pipe()
    if not ended_well:
        raise typer.Exit(1)


def _partner(
    name: str | None, url: str | None, settings: dict[str, Any], engine_flags: list[str], keywords: dict[str, Any]
) -> Generator[Answer, None, None]:
    """What answers; closing it lets go of the server."""
    if name is not None and url is not None:
        raise ConfigError("--name and --url both name a server: give one")
    if (name or url) and engine_flags:
        raise ConfigError(
            f"--{engine_flags[0].replace('_', '-')} is for a model loaded here: leave it out, or the server"
        )
    where = name or url
    if where is None and not engine_flags:
        from splitfuse.deploy import registry

        with suppress(ServerError):
            where = registry.find(ServerConfig().name).name
    if where is None:
        from splitfuse.api import pipeline

        _say("loading the model here")
        pipe = pipeline(settings.pop("model"), **given(settings))
        yield lambda messages: pipe(messages, chat=True, stream=True, **keywords)
        return
    from splitfuse.clients.sync import client

    with client(where) as connected:
        if connected.deployment is not None:
            _say(f"talking with {connected.deployment.model} at {connected.url}")
        yield lambda messages: connected(messages, chat=True, stream=True, **keywords)


class _Conversation:
    """The turns so far, and how the next one comes about."""

    def __init__(self, answer: Answer, system: str | None) -> None:
        self._answer = answer
        self._system = system
        self._messages: Messages = []
        self._reset()

    def on_terminal(self) -> bool:
        """Until somebody has had enough. True."""
        with suppress(ImportError):
            import readline  # noqa: F401 - line editing and a history for input()
        _say(HELP)
        while True:
            try:
                line = input("> ")
                while line.endswith(GOES_ON):
                    line = line.removesuffix(GOES_ON) + "\n" + input(". ")
            except EOFError:
                print()
                return True
            except KeyboardInterrupt:  # what was typed is taken back
                print()
                continue
            if line.strip() == "/exit":
                return True
            if line.strip() == "/reset":
                self._reset()
                _say("the conversation begins anew")
            elif line.strip() == "/help":
                _say(HELP)
            elif line.strip():
                self._turn(line, breaks_off=True)

    def through_pipe(self) -> bool:
        """A turn for each line of standard input, with those it goes on in; whether all were answered."""
        ended_well = True
        for line in _joined(sys.stdin):
            command = line.strip()
            if command == "/exit":
                break
            if command == "/reset":
                self._reset()
            elif command:
                ended_well &= self._turn(line, breaks_off=False)
        return ended_well

    def _reset(self) -> None:
        self._messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def _turn(self, line: str, *, breaks_off: bool) -> bool:
        """Ask, and print the answer as it comes. A turn that fails is as if it had not been."""
        messages = [*self._messages, {"role": "user", "content": line}]
        text, error = "", None
        try:
            with closing(self._answer(messages)) as pieces:  # type: ignore[type-var]
                for piece in pieces:
                    print(piece.text, end="", flush=True)
                    text += piece.text
                    if piece.response is not None:
                        error = piece.response.error
        except KeyboardInterrupt:
            if not breaks_off:
                raise
        except SplitfuseError as refusal:
            error = str(refusal)
        if text or error is None:
            print(flush=True)
        if error is not None:
            print(f"splitfuse: {error}", file=sys.stderr, flush=True)
            return False
        if text:
            self._messages = [*messages, {"role": "assistant", "content": text}]
        return True


def _joined(lines: Iterable[str]) -> Iterator[str]:
    """Without their ends, each with those that it goes on in."""
    begun = ""
    for line in lines:
        whole = begun + line.rstrip("\r\n")
        goes_on = whole.endswith(GOES_ON)
        begun = whole.removesuffix(GOES_ON) + "\n" if goes_on else ""
        if not goes_on:
            yield whole
    if begun:
        yield begun.rstrip("\n")


def _say(line: str) -> None:
    print(f"({line})", file=sys.stderr, flush=True)
