"""The requests of a load, as data: seeded, distinct, the same for every system. Knows no clock and no server.

A workload is an endless row of sessions, of which the n-th is a function of the seed, the stream and n alone, whoever
asks for it and when. Most sessions are one request; in a conversation the next request depends on the answer to the
last one, so a workload is asked for a request's successor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, TypeAlias

import msgspec

from splitfuse.errors import ConfigError

Prompt: TypeAlias = tuple[int, ...] | str
DEVIATION = 0.3  # of lengths, as a share of their mean: the paper's
UNLIMITED = 2**31 - 1
FIRST_TOKEN_ID = 10  # those before it are often special
WORDS = (  # noqa: SIM905
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work number night point home water room mother area money "
    "story fact month lot right study book eye job word business side kind head house service friend father power hour "
    "game line end member law car city team minute idea body back parent face level office door health person art war"
).split()


@dataclass(frozen=True)
class LoadRequest:
    """One request of a load."""

    stream: str
    """Names the point and repetition it belongs to, so that no two share a prompt."""
    number: int
    """Of its session."""
    turn: int
    prompt: Prompt
    max_tokens: int
    prefix: int = 0  # tokens at the beginning that other sessions share


@dataclass(frozen=True)
class TokenIds:
    """Prompts as token ids: random ones below `size`."""

    size: int

    def draw(self, random: Random, count: int) -> Prompt:
        """`count` tokens."""
        return tuple(random.choices(range(min(FIRST_TOKEN_ID, self.size - 1), self.size), k=count))


@dataclass(frozen=True)
class Words:
    """Prompts as text, for servers that take no ids: random English words, about `count` tokens of them."""

    tokens_per_word: float = 1.0

    def draw(self, random: Random, count: int) -> Prompt:
        """About `count` tokens; the server says how many they are."""
        return " ".join(random.choices(WORDS, k=max(round(count / self.tokens_per_word), 1)))


Vocabulary: TypeAlias = TokenIds | Words


def joined(first: Prompt, second: Prompt) -> Prompt:
    """One prompt after the other. Ids go with ids, text with text."""
    if isinstance(first, str) or isinstance(second, str):
        if not isinstance(first, str) or not isinstance(second, str):
            raise ConfigError("a conversation mixes text and token ids: the trace must have one kind")
        return f"{first} {second}"
    return first + second


@dataclass(frozen=True)
class Lengths:
    """Of prompts and answers, in tokens: Normal(mean, deviation * mean), from 1 to what the model has room for."""

    prompt: float
    generate: float
    deviation: float = DEVIATION
    room: int = UNLIMITED
    """Tokens of prompt and answer together."""

    def __post_init__(self) -> None:
        if not (self.prompt >= 1 and self.generate >= 1):
            raise ConfigError(f"lengths must be at least 1, not {self.prompt:g} and {self.generate:g}")
        if not 0 <= self.deviation < 10:
            raise ConfigError(f"the deviation is a share of the mean, from 0 to 10, not {self.deviation:g}")
        if self.room < 2:
            raise ConfigError(f"a model that holds {self.room} tokens has no room for a prompt and an answer")

    def draw(self, random: Random, *, before: int = 0) -> tuple[int, int]:
        """Tokens of a prompt, and of its answer, that come after `before` others."""
        prompt = _clipped(random.gauss(self.prompt, self.deviation * self.prompt), self.room - before - 1)
        generate = _clipped(random.gauss(self.generate, self.deviation * self.generate), self.room - before - prompt)
        return prompt, generate


def _clipped(value: float, most: int) -> int:
    return max(min(round(value), most), 1)


class Workload(ABC):
    """What is asked, in what order."""

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """By name, for the record."""

    @abstractmethod
    def first(self, stream: str, number: int) -> LoadRequest:
        """The first request of session `number`, from 0."""

    def successor(self, request: LoadRequest, answer: Prompt) -> LoadRequest | None:  # noqa: ARG002
        """What its session asks when it has the answer; None if that was all."""
        return None


@dataclass(frozen=True)
class Independent(Workload):
    """The paper's: requests that have nothing to do with each other."""

    lengths: Lengths
    vocabulary: Vocabulary
    seed: int = 0

    @property
    def settings(self) -> dict[str, Any]:
        return {"kind": "independent", **_said(self.lengths), "seed": self.seed}

    def first(self, stream: str, number: int) -> LoadRequest:
        random = Random(f"{self.seed} {stream} {number}")
        prompt, generate = self.lengths.draw(random)
        return LoadRequest(stream, number, 0, self.vocabulary.draw(random, prompt), generate)


@dataclass(frozen=True)
class SharedPrefix(Workload):
    """Requests that begin with one of a few long prefixes, such as a system prompt, and differ after it."""

    lengths: Lengths
    """Of what comes after the prefix."""
    vocabulary: Vocabulary
    prefix: int
    num_prefixes: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.prefix <= self.lengths.room - 2:
            raise ConfigError(f"a prefix of {self.prefix} tokens leaves no room in {self.lengths.room}")
        if self.num_prefixes < 1:
            raise ConfigError(f"there must be at least one prefix, not {self.num_prefixes}")

    @property
    def settings(self) -> dict[str, Any]:
        own = {"prefix": self.prefix, "prefixes": self.num_prefixes}
        return {"kind": "prefix", **_said(self.lengths), **own, "seed": self.seed}

    def first(self, stream: str, number: int) -> LoadRequest:
        random = Random(f"{self.seed} {stream} {number}")
        which = random.randrange(self.num_prefixes)
        prefix = self.vocabulary.draw(Random(f"{self.seed} prefix {which}"), self.prefix)
        own, generate = self.lengths.draw(random, before=self.prefix)
        prompt = joined(prefix, self.vocabulary.draw(random, own))
        return LoadRequest(stream, number, 0, prompt, generate, prefix=self.prefix)


@dataclass(frozen=True)
class Chat(Workload):
    """Conversations: the prompt of a turn is all that was said before, the last answer, and something new.

    A conversation ends after `turns` turns, or when the model has no room for another.
    """

    lengths: Lengths
    """Of what is new in a turn, and of an answer."""
    vocabulary: Vocabulary
    turns: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.turns < 1:
            raise ConfigError(f"a conversation has at least one turn, not {self.turns}")

    @property
    def settings(self) -> dict[str, Any]:
        return {"kind": "chat", **_said(self.lengths), "turns": self.turns, "seed": self.seed}

    def first(self, stream: str, number: int) -> LoadRequest:
        random = Random(f"{self.seed} {stream} {number} 0")
        prompt, generate = self.lengths.draw(random)
        return LoadRequest(stream, number, 0, self.vocabulary.draw(random, prompt), generate)

    def successor(self, request: LoadRequest, answer: Prompt) -> LoadRequest | None:
        said = joined(request.prompt, answer)
        before = 0 if isinstance(said, str) else len(said)
        if request.turn + 1 >= self.turns or before + 2 > self.lengths.room:
            return None
        random = Random(f"{self.seed} {request.stream} {request.number} {request.turn + 1}")
        new, generate = self.lengths.draw(random, before=before)
        prompt = joined(said, self.vocabulary.draw(random, new))
        return replace(request, turn=request.turn + 1, prompt=prompt, max_tokens=generate, prefix=before)


class TraceLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A line of a trace: `prompt` itself, as text or token ids, or only its length in `prompt_tokens`."""

    generate: int
    prompt_tokens: int | None = None
    prompt: str | tuple[int, ...] | None = None
    at: float | None = None
    """Seconds after the beginning at which it comes."""


@dataclass(frozen=True)
class Trace(Workload):
    """What others once asked, again. In a closed loop, its times are not heeded, and it begins anew at its end."""

    lines: tuple[TraceLine, ...]
    vocabulary: Vocabulary
    name: str = "trace"
    seed: int = 0
    room: int = UNLIMITED

    @classmethod
    def read(cls, path: Path, vocabulary: Vocabulary, *, seed: int = 0, room: int = UNLIMITED) -> Trace:
        """Raises ConfigError, naming the line, for what is no trace."""
        try:
            texts = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error
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
            raise ConfigError(f"{path} has no line")
        if len({line.at is None for line in lines}) > 1:
            raise ConfigError(f"{path}: some lines say when (`at`), some do not")
        return cls(tuple(sorted(lines, key=lambda line: line.at or 0.0)), vocabulary, path.name, seed, room)

    @property
    def settings(self) -> dict[str, Any]:
        return {"kind": "trace", "trace": self.name, "requests": len(self.lines), "seed": self.seed}

    @property
    def is_timed(self) -> bool:
        """Whether it says when its requests come."""
        return self.lines[0].at is not None

    def arrivals(self) -> Iterator[float]:
        """When its requests come, in seconds after the first. Raises ConfigError if it does not say."""
        if not self.is_timed:
            raise ConfigError(f"{self.name} does not say when its requests come: give --clients or --rate")
        return ((line.at or 0.0) - (self.lines[0].at or 0.0) for line in self.lines)

    def first(self, stream: str, number: int) -> LoadRequest:
        line = self.lines[number % len(self.lines)]
        prompt: Prompt | None = line.prompt
        if prompt is None:
            prompt = self.vocabulary.draw(Random(f"{self.seed} {stream} {number}"), line.prompt_tokens or 1)
        return LoadRequest(stream, number, 0, prompt, line.generate)


def _fault(line: TraceLine, room: int) -> str | None:
    """What is wrong with it."""
    if (line.prompt is None) == (line.prompt_tokens is None):
        return "give either prompt or prompt_tokens"
    length = line.prompt_tokens if line.prompt is None else len(line.prompt)
    if line.generate < 1 or not length or length < 1:
        return "prompt and generate must have at least one token"
    if line.at is not None and not 0 <= line.at < float("inf"):
        return f"at must be a number of seconds from 0, not {line.at}"
    if not isinstance(line.prompt, str) and length + line.generate > room:
        return f"{length} tokens of prompt and {line.generate} to generate exceed the {room} that the model holds"
    return None


def poisson(rate: float, *, seed: int, stream: str) -> Iterator[float]:
    """The arrival times, in seconds, of a Poisson process of `rate` a second: without end."""
    random, time = Random(f"{seed} arrivals {stream}"), 0.0
    while True:
        time += random.expovariate(rate)
        yield time


def _said(lengths: Lengths) -> dict[str, Any]:
    return {"prompt": lengths.prompt, "generate": lengths.generate, "deviation": lengths.deviation}
