"""Generates flags from the fields of the configurations, and errors without tracebacks, for all commands."""

from __future__ import annotations

import dataclasses
import errno
import inspect
import os
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar

import typer

from splitfuse.config.engine import EngineConfig
from splitfuse.config.files import read_text
from splitfuse.config.server import ServerConfig
from splitfuse.core.sampling_params import Parameter
from splitfuse.deploy.daemon import KEY_VARIABLES, first_key
from splitfuse.engine.line_writer import LineWriter
from splitfuse.errors import ConfigError, SplitfuseError, printable, unreadable
from splitfuse.interrupts import INTERRUPTED, raising_at_ctrl_c
from splitfuse.text.chat_options import CHAT_KEYWORDS
from splitfuse.text.kwargs import SAMPLING_KEYWORDS

if typing.TYPE_CHECKING:
    from splitfuse.clients.sync import Client

JSONL_ONLY = ("logit_bias", "stop_token_ids", "prompt_logprobs", "structured_outputs")
"""Sampling parameters without a flag, which a line of a .jsonl file can set."""


@dataclasses.dataclass(frozen=True)
class Flag:
    """Holds a flag's type, default and help text."""

    type: Any
    default: Any
    help: str

    @classmethod
    def of(cls, parameter: Parameter) -> Flag:
        """Return the flag of a sampling parameter; without a value where the model's own default applies."""
        if parameter.is_collection:
            return cls(list[str] | None, None, parameter.description)
        if parameter.samples or parameter.default is None:
            return cls(parameter.type | None, None, parameter.description)
        return cls(parameter.type, parameter.default, parameter.description)


SAMPLING_FLAGS: dict[str, Flag] = {
    **{keyword: Flag.of(each) for keyword, each in SAMPLING_KEYWORDS.items() if each.name not in JSONL_ONLY},
    "chat": Flag(bool, False, "Send each prompt through the model's chat template, as a user's turn."),
    "return_full_text": Flag(bool, False, "Put the prompt before the answer."),
    "adapter": Flag(str | None, None, "Name of the LoRA adapter to answer with (default: none)."),
}
FORM_FLAGS: dict[str, Flag] = {
    "json_schema": Flag(str | None, None, "File with a JSON schema, which the answer keeps to."),
    "regex": Flag(str | None, None, "Regular expression, which the whole answer matches."),
}
"""Flags that say which form an answer has: see `with_form`."""
THOUGHT_FLAGS: dict[str, Flag] = {
    "reasoning_effort": Flag(str | None, None, CHAT_KEYWORDS["reasoning_effort"]),
    "reasoning_max_tokens": Flag(int | None, None, CHAT_KEYWORDS["reasoning_max_tokens"]),
}
"""Flags of conversations with models that think before they answer."""
NameFlag = Annotated[str | None, typer.Option(help="Name of a deployment (default: splitfuse).")]
UrlFlag = Annotated[str | None, typer.Option(help="URL of a server, such as http://127.0.0.1:8000.")]
ApiKeyFlag = Annotated[str | None, typer.Option(help="API key of the server.", envvar=KEY_VARIABLES["api_key"])]
Part = TypeVar("Part")
Number = TypeVar("Number", int, float)
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of the errors of a disk, a quota or a file that is full."""
NO_FLAGS: Mapping[str, Any] = types.MappingProxyType({})


def with_flags(
    *,
    sampling: Mapping[str, Flag] = NO_FLAGS,
    also: Collection[type[Any]] = (),
    without: Collection[str] = (),
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command that takes `**flags`: add a flag for every engine setting, and report errors as `cli_errors`.

    `sampling` adds flags of sampling keywords, `also` the settings of other dataclasses, `without` leaves engine
    settings out.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        run = cli_errors()(command)
        signature, hints = inspect.signature(command), typing.get_type_hints(command, include_extras=True)
        parameters = [
            parameter.replace(annotation=hints[name])
            for name, parameter in signature.parameters.items()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        parameters += [_parameter(name, flag) for name, flag in sampling.items()]
        parameters += [_setting(part, field) for part in also for field in settings_of(part)]
        parameters += [
            _setting(part, field)
            for name, (part, field) in EngineConfig.setting_fields().items()
            if name not in without
        ]
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def settings_of(part: type[Any]) -> list[dataclasses.Field[Any]]:
    """Return the fields of a dataclass which have a help text."""
    return [field for field in dataclasses.fields(part) if "help" in field.metadata]


def _setting(part: type[Any], field: dataclasses.Field[Any]) -> inspect.Parameter:
    hint, default = typing.get_type_hints(part)[field.name], field.default
    if hint == tuple[str, ...]:
        hint, default = list[str], []
    elif hint in (tuple[int, ...], tuple[float, ...]):
        hint, default = str | None, None
    return _parameter(field.name, Flag(hint, default, field.metadata["help"]))


def _parameter(name: str, flag: Flag) -> inspect.Parameter:
    annotation: Any = Annotated[flag.type, typer.Option(help=flag.help, envvar=KEY_VARIABLES.get(name))]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=flag.default, annotation=annotation)


def take(part: type[Part], flags: dict[str, Any]) -> Part:
    """Take the settings of a dataclass out of all flags of a command. Raises ConfigError for invalid ones."""
    values = {field.name: flags.pop(field.name) for field in settings_of(part)}
    for name, hint in typing.get_type_hints(part).items():
        if hint in (tuple[int, ...], tuple[float, ...]):
            values[name] = numbers(name, values[name], typing.get_args(hint)[0])
    return part(**values)


def numbers(name: str, text: str | None, kind: type[Number]) -> tuple[Number, ...]:
    """Parse comma-separated numbers of the flag of `name`; empty for None."""
    if text is None:
        return ()
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{flag_of(name)} {text!r} must be comma-separated numbers, such as 1,2,4") from None


@contextmanager
def cli_errors() -> Iterator[None]:
    """End a command without a traceback: status 1 and the message for an error, 130 for Ctrl-C, 141 for a closed pipe.

    Use it in a `with` statement or, as `@cli_errors()`, as a decorator.
    """
    try:
        with raising_at_ctrl_c():
            yield
    except SplitfuseError as error:
        lines = map(printable, str(error).split("\n"))  # a message can have names from a file in it
        _print_last("splitfuse: " + "\n".join(lines))
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        _print_last("splitfuse: interrupted")
        raise typer.Exit(INTERRUPTED) from error
    except OSError as error:
        if error.errno not in (errno.EPIPE, *FULL_DISK):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
        if error.errno == errno.EPIPE:  # the reader has seen enough
            raise typer.Exit(141) from error
        _print_last(f"splitfuse: {error.filename or 'the output'} cannot be written: {error.strerror}")
        raise typer.Exit(1) from error


def _print_last(line: str) -> None:
    """Write to standard error why the process ends, which it does even if nothing reads that."""
    with LineWriter(sys.stderr) as writer:
        writer.write(f"{line}\n")


def connect(name: str | None, url: str | None, api_key: str | None) -> Client:
    """Connect to the server of that name or URL, by default the deployment of the default name."""
    from splitfuse.clients.sync import client

    if name is not None and url is not None:
        raise ConfigError("--name and --url are mutually exclusive")
    return client(url or name or ServerConfig().name, api_key=first_key(api_key))


def with_form(flags: dict[str, Any]) -> dict[str, Any]:
    """Return flags with those of FORM_FLAGS as the keyword structured_outputs. Raises ConfigError for a file that
    cannot be read.
    """
    others = {name: value for name, value in flags.items() if name not in FORM_FLAGS}
    file, regex = flags.get("json_schema"), flags.get("regex")
    form = {} if regex is None else {"regex": regex}
    if file is not None:
        try:
            form["json"] = read_text(file)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--json-schema {file} cannot be read: {unreadable(error)}") from error
    return {**others, "structured_outputs": form} if form else others


def flag_of(name: str) -> str:
    """Return the flag of a setting: `--num-blocks` of `num_blocks`."""
    return f"--{name.replace('_', '-')}"


def given(flags: dict[str, Any]) -> dict[str, Any]:
    """Return the flags that have a value."""
    return {name: value for name, value in flags.items() if value is not None}


def is_chosen(context: typer.Context, name: str) -> bool:
    """Return whether a flag of a command was given, perhaps with the value of its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name in ("COMMANDLINE", "ENVIRONMENT")


def changed(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the engine settings that differ from their defaults."""
    known = EngineConfig.setting_fields()
    given = {name: value for name, value in settings.items() if value not in (None, [])}
    return {name: value for name, value in given.items() if value != known[name][1].default}
