"""`splitfuse chat`: talk with a model, of a server or in this process, in a terminal or through a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from splitfuse.cli.flags import (
    FORM_FLAGS,
    SAMPLING_FLAGS,
    THOUGHT_FLAGS,
    ApiKeyFlag,
    NameFlag,
    UrlFlag,
    changed,
    connect,
    flag_of,
    given,
    with_flags,
    with_form,
)
from splitfuse.config.engine import EngineConfig
from splitfuse.config.server import ServerConfig
from splitfuse.errors import ConfigError, ServerError, SplitfuseError

if TYPE_CHECKING:
    from splitfuse.text.responses import Piece

CHAT_SAMPLING = {
    name: flag for name, flag in SAMPLING_FLAGS.items() if name not in ("n", "logprobs", "chat", "return_full_text")
}
HELP = "\\ at the end of a line continues it; /reset starts over, /exit or Ctrl-D ends, Ctrl-C interrupts an answer"

CONTINUED = "\\"
"""Last character of a line that continues in the next."""

DIM, NOT_DIM = "\x1b[2m", "\x1b[22m"
"""Codes of terminals around thoughts, which are shown in terminals alone."""

Messages = list[dict[str, str]]
Answer = Callable[[Messages], "Iterator[Piece]"]


@with_flags(sampling={**CHAT_SAMPLING, **FORM_FLAGS, **THOUGHT_FLAGS})
def chat(
    name: NameFlag = None,
    url: UrlFlag = None,
    api_key: ApiKeyFlag = None,
    system: Annotated[str | None, typer.Option(help="System message before the conversation.")] = None,
    **flags: Any,
) -> None:
    """Chat with the model of a server, or with one loaded in this process.

    Without --name, --url and engine flags: the deployment named splitfuse if it runs, else the bundled model. Each line
    is a turn; one that ends in a backslash continues in the next. In a conversation, /reset starts over, /exit or
    Ctrl-D ends, and Ctrl-C interrupts an answer. A terminal shows the thought before an answer dimmed.
    """
    settings = {name: flags.pop(name) for name in EngineConfig.setting_fields()}
    with _model(name, url, api_key, settings, list(changed(settings)), given(with_form(flags))) as answer:
        interactive = sys.stdin.isatty()
        lines = _typed() if interactive else _joined(sys.stdin)
        succeeded = _Conversation(answer, system).run(lines, interactive=interactive)
    if not (succeeded or interactive):
        raise typer.Exit(1)


@contextmanager
def _model(
    name: str | None,
    url: str | None,
    api_key: str | None,
    settings: dict[str, Any],
    engine_flags: list[str],
    keywords: dict[str, Any],
) -> Iterator[Answer]:
    """Open a server, or load a model; yield the function that answers."""
    if (name or url) and engine_flags:
        server = "--name" if name else "--url"
        raise ConfigError(
            f"{flag_of(engine_flags[0])} and {server} are mutually exclusive: it configures an engine here"
        )
    if not (name or url or engine_flags):
        from splitfuse.deploy import registry

        with suppress(ServerError):
            name = registry.find(ServerConfig().name).name
    if not (name or url):
        from splitfuse.api import pipeline

        _say("loading the model")
        pipe = pipeline(settings.pop("model"), **given(settings))
        yield lambda messages: pipe(messages, chat=True, stream=True, **keywords)
        return
    with connect(name, url, api_key) as connected:
        if connected.deployment is not None:
            _say(f"chatting with {connected.deployment.model} at {connected.url}")
        yield lambda messages: connected(messages, chat=True, stream=True, **keywords)


class _Conversation:
    """Holds the turns so far, and the next one."""

    def __init__(self, answer: Answer, system: str | None) -> None:
        self._answer = answer
        self._system = system
        self._messages: Messages = []
        self._reset()

    def run(self, lines: Iterable[str], *, interactive: bool) -> bool:
        """Take a turn for each line until /exit; return whether all were answered."""
        succeeded = True
        for line in lines:
            match line.strip():
                case "":
                    pass
                case "/exit":
                    break
                case "/reset":
                    self._reset()
                    if interactive:
                        _say("starting over")
                case "/help" if interactive:
                    _say(HELP)
                case _:
                    succeeded &= self._turn(line, interruptible=interactive)
        return succeeded

    def _reset(self) -> None:
        self._messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def _turn(self, line: str, *, interruptible: bool) -> bool:
        """Send a turn and print the answer as it is generated; a failed turn leaves the conversation as it was."""
        messages = [*self._messages, {"role": "user", "content": line}]
        text, error, after_thought = "", None, ""
        shows_thoughts = sys.stdout.isatty()
        try:
            with closing(self._answer(messages)) as pieces:  # type: ignore[type-var]
                for piece in pieces:
                    if piece.reasoning and shows_thoughts:
                        print(f"{DIM}{piece.reasoning}{NOT_DIM}", end="", flush=True)
                        after_thought = "\n\n"
                    if piece.text:
                        print(f"{after_thought}{piece.text}", end="", flush=True)
                        after_thought = ""
                    text += piece.text
                    if piece.response is not None:
                        error = piece.response.error
        except KeyboardInterrupt:
            if not interruptible:
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


def _typed() -> Iterator[str]:
    """Yield what is typed into a terminal until Ctrl-D; Ctrl-C discards the line."""
    with suppress(ImportError):
        import readline  # noqa: F401 - line editing and a history for input()
    _say(HELP)
    while True:
        try:
            line = input("> ")
            while line.endswith(CONTINUED):
                line = line.removesuffix(CONTINUED) + "\n" + input(". ")
        except (EOFError, KeyboardInterrupt) as end:
            print()
            if isinstance(end, EOFError):
                return
        else:
            yield line


def _joined(lines: Iterable[str]) -> Iterator[str]:
    """Yield lines without their ends, joined with the lines that continue them."""
    pending = ""
    for line in lines:
        whole = pending + line.rstrip("\r\n")
        continues = whole.endswith(CONTINUED)
        pending = whole.removesuffix(CONTINUED) + "\n" if continues else ""
        if not continues:
            yield whole
    if pending:
        yield pending.rstrip("\n")


def _say(line: str) -> None:
    print(f"({line})", file=sys.stderr, flush=True)
