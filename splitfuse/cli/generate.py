"""`splitfuse generate`: run a model in this process, with prompts from arguments, files and pipes."""

from __future__ import annotations

import dataclasses
import json
import sys
import typing
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from splitfuse.cli.flags import FORM_FLAGS, JSONL_ONLY, SAMPLING_FLAGS, given, with_flags, with_form
from splitfuse.config.engine import EngineConfig
from splitfuse.config.files import LARGE_BYTES, MIB, read_text
from splitfuse.errors import InvalidRequestError, SplitfuseError, did_you_mean, unreadable
from splitfuse.text.chat_options import CHAT_KEYWORDS

if typing.TYPE_CHECKING:
    from splitfuse.api import Pipeline
    from splitfuse.text.responses import Piece, Response

JSONL_KEYWORDS = {*SAMPLING_FLAGS, *JSONL_ONLY, *CHAT_KEYWORDS, "max_length", "do_sample"}


@with_flags(sampling={**SAMPLING_FLAGS, **FORM_FLAGS})
def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Prompts (default: from --input or standard input).")
    ] = None,
    input: Annotated[  # noqa: A002 - the flag's name
        str | None,
        typer.Option(
            help="A .jsonl file with a request per line, or a text file with one prompt; - is standard input."
        ),
    ] = None,
    lines: Annotated[bool, typer.Option(help="Treat each line of a text as a prompt.")] = False,
    jsonl: Annotated[bool, typer.Option(help="Print JSON lines to a terminal, too.")] = False,
    quiet: Annotated[bool, typer.Option(help="Print no memory plan and no progress bar.")] = False,
    **flags: Any,
) -> None:
    """Generate answers: streamed to a terminal, as one JSON object per answer to a file or a pipe.

    A line of a .jsonl file is {"prompt": text or token ids} or {"messages": [...]}, with any sampling flag by its name,
    and max_length, do_sample, stop_token_ids, logit_bias, prompt_logprobs and structured_outputs; messages also with
    tools, tool_choice, reasoning_effort and the other keywords of chats. The index of an answer is that of its prompt
    or input line, from 0; rejected requests come first.
    """
    settings = {name: flags.pop(name) for name in EngineConfig.setting_fields()}
    flags = with_form(flags)
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
    """Holds a prompt with its own keywords; with `error`, one that is invalid or was rejected."""

    prompt: Any = None
    keywords: dict[str, Any] = dataclasses.field(default_factory=dict)
    error: str | None = None
    index: int = 0
    """Position among the prompts or input lines."""


def _requests(prompts: list[str], source: str | None, *, lines: bool) -> list[_Request]:
    if prompts and source is not None:
        raise InvalidRequestError("prompts as arguments and --input are mutually exclusive")
    if prompts:
        return [_Request(prompt, index=index) for index, prompt in enumerate(prompts)]
    if source is None and sys.stdin.isatty():
        raise InvalidRequestError("no prompt: give one as an argument, with --input FILE, or on standard input")
    text = _read(source or "-")
    if not text.strip():
        raise InvalidRequestError(f"no prompt: {'standard input' if source in (None, '-') else source} is empty")
    numbered = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    is_jsonl = source is not None and source.endswith(".jsonl")
    if is_jsonl or (source in (None, "-") and not lines and text.lstrip().startswith("{")):
        return [dataclasses.replace(_parse(line, number), index=number - 1) for number, line in numbered]
    if lines:
        return [_Request(line, index=number - 1) for number, line in numbered]
    return [_Request(text.removesuffix("\n"))]


def _read(source: str) -> str:
    try:
        if source != "-":
            return read_text(source, LARGE_BYTES)
        if len(text := sys.stdin.read(LARGE_BYTES + 1)) > LARGE_BYTES:
            raise OSError(f"it has more than {LARGE_BYTES // MIB} MiB, the most that is read")
        return text
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"{source} cannot be read: {unreadable(error)}") from error


def _parse(line: str, number: int) -> _Request:
    """Parse a line of a .jsonl file; an error is reported for this line alone."""
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


Answer = tuple[int, "Piece | None", str | None]
"""Index of a prompt or input line, a piece of its answer unless it was rejected, and the error of the request."""


def _answers(pipe: Pipeline, requests: list[_Request], keywords: dict[str, Any]) -> Iterator[Answer]:
    """Yield the rejections first, then the pieces of all other answers, which run together."""
    indices, prepared = [], []
    for request in requests:
        try:
            if request.error is not None:
                raise InvalidRequestError(request.error)
            prepared += pipe.prepare([request.prompt], **{**keywords, **request.keywords})
            indices.append(request.index)
        except SplitfuseError as error:
            yield request.index, None, str(error)
    for piece in pipe.run(prepared):
        yield indices[piece.index], piece, None if piece.response is None else piece.response.error


def _print_jsonl(answers: Iterator[Answer]) -> bool:
    """Print a line for each answer when it is complete; return whether any failed."""
    failed = False
    is_utf8 = sys.stdout.encoding.lower() in ("utf-8", "utf8")
    for index, piece, error in answers:
        failed |= error is not None
        if piece is None:
            line: dict[str, Any] = {"index": index, "error": error}
        elif piece.response is not None:
            line = _as_json(index, piece.response)
        else:
            continue
        print(json.dumps(line, ensure_ascii=not is_utf8), flush=True)
    return failed


def _print_text(answers: Iterator[Answer], *, several: bool) -> bool:
    """Print one answer as it is generated, or several by number when complete; return whether any failed."""
    failed = False
    for index, piece, error in answers:
        if piece is not None and not several:
            print(piece.text, end="" if piece.response is None else "\n", flush=True)
        elif piece is not None and piece.response is not None:
            print(f"[{index + 1}] {piece.response}", flush=True)
        if error is not None:
            failed = True
            print(f"splitfuse: request {index + 1}: {error}", file=sys.stderr)
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
    if response.reasoning:
        line["reasoning"] = response.reasoning
    if response.tool_calls:
        line["tool_calls"] = response.message["tool_calls"]
    for name in ("logprobs", "prompt_logprobs"):
        if (logprobs := getattr(response, name)) is not None:
            line[name] = [dataclasses.asdict(logprob) for logprob in logprobs]
    return line if response.error is None else {**line, "error": response.error}
