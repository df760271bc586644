"""`splitfuse generate`: a model in this process, prompts from arguments, files and pipes."""

from __future__ import annotations

import dataclasses
import json
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from splitfuse.cli.flags import NO_FLAG, SAMPLING_HELP, given, with_flags
from splitfuse.config import EngineConfig
from splitfuse.errors import InvalidRequestError, SplitfuseError, did_you_mean

if typing.TYPE_CHECKING:
    from splitfuse.api import Pipeline
    from splitfuse.text.responses import Piece, Response

JSONL_KEYWORDS = {*SAMPLING_HELP, *NO_FLAG, "max_length", "do_sample"}


@with_flags(sampling=SAMPLING_HELP)
def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Prompts; left out, they come from --input or standard input.")
    ] = None,
    input: Annotated[  # noqa: A002 - the flag's name
        str | None,
        typer.Option(help="A .jsonl file with a request a line, or a text that is one prompt; - is standard input."),
    ] = None,
    lines: Annotated[bool, typer.Option(help="Take each line of a text as a prompt of its own.")] = False,
    jsonl: Annotated[bool, typer.Option(help="Print JSON lines even to a terminal.")] = False,
    quiet: Annotated[bool, typer.Option(help="No memory plan, no progress bar.")] = False,
    **flags: Any,
) -> None:
    """Answer prompts. Streams to a terminal; prints a JSON object per answer to a file or a pipe.

    A line of a .jsonl file is {"prompt": text or token ids} or {"messages": [...]}, with any sampling flag by its name,
    and max_length, do_sample, stop_token_ids, logit_bias and prompt_logprobs. The index of an answer counts prompts, or
    lines of the input, from 0; refused ones come first.
    """
    settings = {name: flags.pop(name) for name in EngineConfig.setting_fields()}
    requests = _requests(prompts or [], input, lines=lines)
    from splitfuse.api import pipeline

    pipe = pipeline(settings.pop("model"), progress=not quiet and sys.stderr.isatty(), **given(settings))
    answers = _answers(pipe, requests, given(flags))
    if jsonl or not sys.stdout.isatty():
        failed = _print_jsonl(answers)
    else:
        several = len(requests) > 1 or {**flags, **requests[0].keywords}["n"] != 1
        failed = _print_text(answers, several=several)
    if failed:
        raise typer.Exit(1)


@dataclasses.dataclass(frozen=True)
class _Request:
    """One prompt with the keywords of its own; or, with `error`, a line that was none."""

    prompt: Any = None
    keywords: dict[str, Any] = dataclasses.field(default_factory=dict)
    error: str | None = None
    place: int = 0  # among the prompts or lines given


def _requests(prompts: list[str], source: str | None, *, lines: bool) -> list[_Request]:
    if prompts and source is not None:
        raise InvalidRequestError("prompts are given twice: as arguments and with --input")
    if prompts:
        return [_Request(prompt, place=place) for place, prompt in enumerate(prompts)]
    if source is None and sys.stdin.isatty():
        raise InvalidRequestError("no prompt: give one as an argument, with --input FILE, or on standard input")
    text = _read(source or "-")
    if not text.strip():
        raise InvalidRequestError(f"no prompt: {'standard input' if source in (None, '-') else source} is empty")
    numbered = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    is_jsonl = source is not None and source.endswith(".jsonl")
    if is_jsonl or (source in (None, "-") and not lines and text.lstrip().startswith("{")):
        return [dataclasses.replace(_parse(line, number), place=number - 1) for number, line in numbered]
    if lines:
        return [_Request(line, place=number - 1) for number, line in numbered]
    return [_Request(text.removesuffix("\n"))]


def _read(source: str) -> str:
    try:
        return sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"{source} cannot be read: {error}") from error


def _parse(line: str, number: int) -> _Request:
    """One line of a .jsonl file; what is wrong with it is said in its place, and the other lines go on."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        return _Request(error=f"line {number} is not JSON: {error}")
    if not isinstance(fields, dict) or ("prompt" in fields) == ("messages" in fields):
        return _Request(error=f'line {number} must be an object with either "prompt" or "messages"')
    for name in fields:
        if name not in JSONL_KEYWORDS | {"prompt", "messages"}:
            return _Request(error=f"line {number}: unknown keyword {name!r}{did_you_mean(name, JSONL_KEYWORDS)}")
    if "messages" in fields:
        return _Request(fields.pop("messages"), {**fields, "chat": True})
    if "logit_bias" in fields and isinstance(fields["logit_bias"], dict):  # JSON has no numbers as keys
        try:
            fields["logit_bias"] = {int(token): bias for token, bias in fields["logit_bias"].items()}
        except ValueError:
            return _Request(error=f"line {number}: the keys of logit_bias must be token ids")
    return _Request(fields.pop("prompt"), fields)


def _answers(pipe: Pipeline, requests: list[_Request], keywords: dict[str, Any]) -> Iterator[Piece | _Refusal]:
    """The refusals first, then the pieces of all others, run together; both by their place in the input."""
    places, prepared = [], []
    for request in requests:
        try:
            if request.error is not None:
                raise InvalidRequestError(request.error)
            prepared += pipe.prepare([request.prompt], **{**keywords, **request.keywords})
            places.append(request.place)
        except SplitfuseError as error:
            yield _Refusal(request.place, str(error))
    for piece in pipe.run(prepared):
        yield dataclasses.replace(piece, index=places[piece.index])


@dataclasses.dataclass(frozen=True)
class _Refusal:
    """A request that was not begun, and why."""

    index: int
    error: str


def _print_jsonl(answers: Iterator[Piece | _Refusal]) -> bool:
    """A line for every answer as soon as it is whole; whether any failed."""
    failed = False
    for answer in answers:
        if isinstance(answer, _Refusal):
            failed = True
            line: dict[str, Any] = {"index": answer.index, "error": answer.error}
        elif answer.response is not None:
            failed |= answer.response.error is not None
            line = _as_json(answer.index, answer.response)
        else:
            continue
        print(json.dumps(line, ensure_ascii=False), flush=True)
    return failed


def _print_text(answers: Iterator[Piece | _Refusal], *, several: bool) -> bool:
    """One answer as it grows; several, each under its number when it is whole. Whether any failed."""
    failed = False
    for answer in answers:
        error = answer.error if isinstance(answer, _Refusal) else answer.response and answer.response.error
        if isinstance(answer, _Refusal):
            pass
        elif not several:
            print(answer.text, end="" if answer.response is None else "\n", flush=True)
        elif answer.response is not None:
            print(f"[{answer.index + 1}] {answer.response}", flush=True)
        if error is not None:
            failed = True
            print(f"splitfuse: request {answer.index + 1}: {error}", file=sys.stderr)
    return failed


def _as_json(index: int, response: Response) -> dict[str, Any]:
    line: dict[str, Any] = {
        "index": index,
        "choice": response.choice,
        "text": response.generated_text,
        "finish_reason": response.finish_reason,
        "prompt_tokens": response.prompt_length,
        "generated_tokens": response.generated_length,
        "token_ids": response.token_ids,
        "seconds_to_first_token": response.timings.time_to_first_token,
        "seconds": response.timings.total,
    }
    for name in ("logprobs", "prompt_logprobs"):
        if (logprobs := getattr(response, name)) is not None:
            line[name] = [dataclasses.asdict(logprob) for logprob in logprobs]
    return line if response.error is None else {**line, "error": response.error}
