"""Makes workloads: the requests of a load as data, seeded, distinct, and equal for every system.

A workload is an endless sequence of sessions. The n-th session is a function of the seed, the stream and n alone. Most
sessions are one request; in a conversation the next request depends on the previous answer, so a workload makes a
request's successor from it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, ClassVar, TypeAlias

import msgspec

from splitfuse.bench.metrics import PROMPT_TOKENS_PER_SECOND
from splitfuse.config.fields import setting
from splitfuse.config.files import LARGE_BYTES, read_text
from splitfuse.errors import ConfigError, unreadable
from splitfuse.recording.format import Recording, is_recording
from splitfuse.recording.requests import read_requests

Prompt: TypeAlias = tuple[int, ...] | str
DEVIATION = 0.3
"""Standard deviation of lengths as a fraction of their mean, as in the paper."""
UNLIMITED = 2**31 - 1
FIRST_TOKEN_ID = 10
"""Lowest token id of random prompts: those below are often special tokens."""
WORDS = (  # noqa: SIM905
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work number night point home water room mother area money "
    "story fact month lot right study book eye job word business side kind head house service friend father power hour "
    "game line end member law car city team minute idea body back parent face level office door health person art war"
).split()


@dataclass(frozen=True)
class LoadRequest:
    """Describes a request of a load."""

    stream: str
    """Name of its point and repetition, so that no two points share a prompt."""
    number: int
    """Number of its session."""
    turn: int
    prompt: Prompt
    max_tokens: int
    prefix: int = 0
    """Number of tokens at the beginning that earlier requests may have had, too."""
    pause: float = 0.0
    """Seconds between the answer before and this request."""


@dataclass(frozen=True)
class TokenIds:
    """Draws random token ids below `size`."""

    size: int

    def draw(self, random: Random, count: int) -> Prompt:
        """Return `count` tokens."""
        return tuple(random.choices(range(min(FIRST_TOKEN_ID, self.size - 1), self.size), k=count))


@dataclass(frozen=True)
class Words:
    """Draws random English words, for servers that do not take token ids."""

    tokens_per_word: float = 1.0

    def draw(self, random: Random, count: int) -> Prompt:
        """Return text of about `count` tokens; the server counts them exactly."""
        return " ".join(random.choices(WORDS, k=max(round(count / self.tokens_per_word), 1)))


Vocabulary: TypeAlias = TokenIds | Words


def joined(first: Prompt, second: Prompt) -> Prompt:
    """Return one prompt after the other. Raises ConfigError for text and token ids."""
    if isinstance(first, str) or isinstance(second, str):
        if not isinstance(first, str) or not isinstance(second, str):
            raise ConfigError("a conversation mixes text and token ids: use one kind of prompt")
        return f"{first} {second}"
    return first + second


@dataclass(frozen=True)
class Lengths:
    """Draws lengths in tokens of prompts and answers: Normal(mean, deviation * mean), clipped to 1 and to `room`."""

    prompt: float
    generate: float
    deviation: float = DEVIATION
    room: int = UNLIMITED
    """Maximum of prompt and answer together."""

    def __post_init__(self) -> None:
        if not (self.prompt >= 1 and self.generate >= 1):
            raise ConfigError(f"--prompt {self.prompt:g} and --generate {self.generate:g} must be at least 1")
        if not 0 <= self.deviation < 10:
            raise ConfigError(
                f"--deviation {self.deviation:g} must be a fraction of the mean, from 0 to 10, such as 0.3"
            )
        if self.room < 2:
            raise ConfigError(f"a context of {self.room} tokens is too short for a prompt and an answer")

    def draw(self, random: Random, *, before: int = 0) -> tuple[int, int]:
        """Return the lengths of a prompt and its answer that follow `before` other tokens."""
        prompt = _clipped(random.gauss(self.prompt, self.deviation * self.prompt), self.room - before - 1)
        generate = _clipped(random.gauss(self.generate, self.deviation * self.generate), self.room - before - prompt)
        return prompt, generate


def _clipped(value: float, most: int) -> int:
    return max(min(round(value), most), 1)


class Workload(ABC):
    """Makes an endless sequence of sessions."""

    kind: ClassVar[str]
    lengths: Lengths

    @property
    def settings(self) -> dict[str, Any]:
        """Return the settings by name, for the record; `workload_maker` makes the workload of them again."""
        fields = {"kind": self.kind, **vars(self.lengths), **vars(self)}
        return {name: value for name, value in fields.items() if name not in ("lengths", "room", "vocabulary")}

    @abstractmethod
    def first(self, stream: str, number: int) -> LoadRequest:
        """Return the first request of session `number`, from 0."""

    def successor(self, request: LoadRequest, answer: Prompt) -> LoadRequest | None:  # noqa: ARG002
        """Return the next request of its session after this answer; None at its end."""
        return None


@dataclass(frozen=True)
class Independent(Workload):
    """Makes unrelated requests, as in the paper."""

    kind = "independent"
    lengths: Lengths
    vocabulary: Vocabulary
    seed: int = 0

    def first(self, stream: str, number: int) -> LoadRequest:
        random = Random(f"{self.seed} {stream} {number}")
        prompt, generate = self.lengths.draw(random)
        return LoadRequest(stream, number, 0, self.vocabulary.draw(random, prompt), generate)


@dataclass(frozen=True)
class SharedPrefix(Workload):
    """Makes requests that start with one of a few long prefixes, such as a system prompt, and differ after it."""

    kind = "prefix"
    lengths: Lengths
    """Lengths of the prompt after the prefix, and of the answer."""
    vocabulary: Vocabulary
    prefix: int
    prefixes: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.prefix <= self.lengths.room - 2:
            raise ConfigError(
                f"--prefix {self.prefix} must be between 1 and {self.lengths.room - 2}, to leave room for a request"
            )
        if self.prefixes < 1:
            raise ConfigError(f"--prefixes {self.prefixes} must be at least 1")

    def first(self, stream: str, number: int) -> LoadRequest:
        random = Random(f"{self.seed} {stream} {number}")
        which = random.randrange(self.prefixes)
        prefix = self.vocabulary.draw(Random(f"{self.seed} prefix {which}"), self.prefix)
        own, generate = self.lengths.draw(random, before=self.prefix)
        prompt = joined(prefix, self.vocabulary.draw(random, own))
        return LoadRequest(stream, number, 0, prompt, generate, prefix=self.prefix)


@dataclass(frozen=True)
class Chat(Workload):
    """Makes conversations: the prompt of a turn is the whole conversation so far and something new.

    A conversation ends after `turns` turns, or when the context has no room for another.
    """

    kind = "chat"
    lengths: Lengths
    """Lengths of the new part of a turn, and of an answer."""
    vocabulary: Vocabulary
    turns: int = 5
    seed: int = 0
    think: float = 0.0
    """Mean number of seconds, exponentially distributed, from an answer to the next request."""

    def __post_init__(self) -> None:
        if self.turns < 1:
            raise ConfigError(f"--turns {self.turns} must be at least 1")
        if not 0 <= self.think < float("inf"):
            raise ConfigError(f"--think {self.think:g} must be a number of seconds, at least 0, such as 60")

    def first(self, stream: str, number: int) -> LoadRequest:
        random = Random(f"{self.seed} {stream} {number} 0")
        prompt, generate = self.lengths.draw(random)
        return LoadRequest(stream, number, 0, self.vocabulary.draw(random, prompt), generate)

    def successor(self, request: LoadRequest, answer: Prompt) -> LoadRequest | None:
        history = joined(request.prompt, answer)
        before = 0 if isinstance(history, str) else len(history)
        if request.turn + 1 >= self.turns or before + 2 > self.lengths.room:
            return None
        random = Random(f"{self.seed} {request.stream} {request.number} {request.turn + 1}")
        new, generate = self.lengths.draw(random, before=before)
        prompt = joined(history, self.vocabulary.draw(random, new))
        pause = random.expovariate(1 / self.think) if self.think else 0.0
        return replace(request, turn=request.turn + 1, prompt=prompt, max_tokens=generate, prefix=before, pause=pause)


class TraceLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Holds a line of a trace: either `prompt`, as text or token ids, or its length in `prompt_tokens`."""

    generate: int
    prompt_tokens: int | None = None
    prompt: str | tuple[int, ...] | None = None
    at: float | None = None
    """Arrival time in seconds, from any origin."""


@dataclass(frozen=True)
class Trace(Workload):
    """Replays recorded requests. A closed loop ignores their times, and repeats the trace at its end."""

    kind = "trace"
    lines: tuple[TraceLine, ...]
    vocabulary: Vocabulary
    name: str = "trace"
    seed: int = 0
    room: int = UNLIMITED

    @classmethod
    def read(cls, path: Path | Recording, vocabulary: Vocabulary, *, seed: int = 0, room: int = UNLIMITED) -> Trace:
        """Read a trace, or the requests of a recording. Raises ConfigError, naming the line, for an invalid one, and
        RecordingError.
        """
        if isinstance(path, Recording) or is_recording(path):
            recording = path if isinstance(path, Recording) else Recording.open(path)
            return cls(_recorded_lines(recording, room), vocabulary, recording.path.name, seed, room)
        try:
            texts = read_text(path, LARGE_BYTES).splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} cannot be read: {unreadable(error)}") from error
        lines = []
        for number, text in enumerate(texts, start=1):
            if text.strip():
                try:
                    line = msgspec.json.decode(text, type=TraceLine)
                except msgspec.MsgspecError as error:
                    raise ConfigError(f"{path}, line {number}: {error}") from error
                if fault := _fault(line, room):
                    raise ConfigError(f"{path}, line {number}: {fault}")
                lines.append(line)
        if not lines:
            raise ConfigError(f"{path} is empty: a trace has one JSON object per line")
        if len({line.at is None for line in lines}) > 1:
            raise ConfigError(f"{path}: either all lines have a time (at) or none")
        return cls(tuple(sorted(lines, key=lambda line: line.at or 0.0)), vocabulary, path.name, seed, room)

    @property
    def settings(self) -> dict[str, Any]:
        return {"kind": self.kind, "trace": self.name, "requests": len(self.lines), "seed": self.seed}

    @property
    def is_timed(self) -> bool:
        """Return whether its lines have times."""
        return self.lines[0].at is not None

    def arrivals(self) -> Iterator[float]:
        """Return its arrival times in seconds after the first. Raises ConfigError if its lines have no times."""
        if not self.is_timed:
            raise ConfigError(f"{self.name} has no times (at): give --clients or --rate")
        return ((line.at or 0.0) - (self.lines[0].at or 0.0) for line in self.lines)

    def first(self, stream: str, number: int) -> LoadRequest:
        line = self.lines[number % len(self.lines)]
        prompt: Prompt | None = line.prompt
        if prompt is None:
            prompt = self.vocabulary.draw(Random(f"{self.seed} {stream} {number}"), line.prompt_tokens or 1)
        return LoadRequest(stream, number, 0, prompt, line.generate)


def _recorded_lines(recording: Recording, room: int) -> tuple[TraceLine, ...]:
    """Return the requests of a recording at the times at which they were sent, to generate as much as they did. Those
    which ran when the file began go on from its beginning.
    """
    lines = [
        TraceLine(
            generate=max(each.num_output_tokens, 1),
            prompt=each.detail.prompt_token_ids + each.detail.output_token_ids,
            at=max(each.request.sent_time - recording.header.monotonic, 0.0),
        )
        for each in read_requests(recording.frames())
    ]
    if not lines:
        raise ConfigError(f"{recording.path} is a recording without requests: record a server while it has some")
    for number, line in enumerate(lines):
        if fault := _fault(line, room):
            raise ConfigError(f"{recording.path}, request {number}: {fault}")
    return tuple(sorted(lines, key=lambda line: line.at or 0.0))


def _fault(line: TraceLine, room: int) -> str | None:
    """Return what is wrong with a line; None if it is valid."""
    if (line.prompt is None) == (line.prompt_tokens is None):
        return "give exactly one of prompt and prompt_tokens"
    length = line.prompt_tokens if line.prompt is None else len(line.prompt)
    if line.generate < 1 or not length or length < 1:
        return "prompt and generate must be at least one token each"
    if line.at is not None and not 0 <= line.at < float("inf"):
        return f"at {line.at} must be a number of seconds, at least 0"
    if not isinstance(line.prompt, str) and length + line.generate > room:
        return f"{length} prompt tokens and {line.generate} to generate exceed the context of {room} tokens"
    return None


def poisson(rate: float, *, seed: int, stream: str) -> Iterator[float]:
    """Yield the arrival times, in seconds, of a Poisson process of `rate` requests/s, without end."""
    random, time = Random(f"{seed} arrivals {stream}"), 0.0
    while True:
        time += random.expovariate(rate)
        yield time


@dataclass(frozen=True, kw_only=True)
class Loads:
    """Describes loads and repetitions. Without clients and rates, it is a trace at its recorded times."""

    clients: tuple[int, ...] = setting(
        (), "Closed loops: numbers of clients, one after the other (default: 1,2,4,8,16,32)."
    )
    rate: tuple[float, ...] = setting((), "Open loops: arrival rates in requests/s (Poisson), such as 0.5,1.")
    requests: int | None = setting(None, "Requests that count at each load (default: 4 per client plus 32, or 100).")
    spacing: float | None = setting(
        None, "Seconds between the starts of clients (default: a quarter of a lone request's latency)."
    )
    prompt_speed: float = setting(
        PROMPT_TOKENS_PER_SECOND, "Prompt speed of the SLO in tokens/s, which gives the TTFT target."
    )
    repeat: int = 2

    def __post_init__(self) -> None:
        if not 0 < self.prompt_speed < float("inf"):
            raise ConfigError(f"--prompt-speed {self.prompt_speed} must be a positive number of tokens/s, such as 512")
        if self.clients and self.rate:
            raise ConfigError("--clients (closed loop) and --rate (open loop) are mutually exclusive")
        if any(count < 1 for count in self.clients) or any(not 0 < rate < float("inf") for rate in self.rate):
            raise ConfigError(
                "--clients takes positive integers and --rate positive numbers, such as --clients 1,8 or --rate 0.5"
            )
        if self.spacing is not None and not self.clients:
            raise ConfigError("--spacing applies to --clients only: leave it out, or give --clients")
        if self.repeat < 1 or (self.requests is not None and self.requests < 1):
            raise ConfigError(f"--repeat and --requests must be at least 1, not {self.repeat} and {self.requests}")
        if self.spacing is not None and not 0 <= self.spacing < float("inf"):
            raise ConfigError(f"--spacing {self.spacing} must be a number of seconds, at least 0")
