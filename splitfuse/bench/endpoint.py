"""Makes an endpoint of OpenAI's API a target, which is probed once, then driven by streams of /v1/completions.

Tokens are counted from their ids or by the server's own count, never from text. http_stream.py does the HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import msgspec

from splitfuse.bench.target import Answer, Target
from splitfuse.bench.workload import WORDS, LoadRequest, TokenIds, Vocabulary, Words
from splitfuse.clients.http_stream import Address, get, post_stream
from splitfuse.errors import ConfigError, InvalidRequestError, RequestFailedError, ServerError
from splitfuse.runtime.machine import resident_bytes

MODEST_VOCABULARY = 1000
"""Number of token ids that any model has: the range of random prompts if the vocabulary size is unknown."""
PROBE_TOKENS = 8
"""Tokens that a probe generates."""
PROBE_WORDS = 64
"""Words whose tokens are counted."""


AT_THE_END = "usage at the end"
WAYS_TO_TELL: dict[str, dict[str, Any]] = {
    "token_ids": {"return_token_ids": True},
    "usage with each event": {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    "timings with each event": {"timings_per_token": True},
    AT_THE_END: {},
}
"""Ways of servers to report tokens, the most exact first, with the parameters that ask for them."""


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Timings(msgspec.Struct):
    """Holds llama.cpp's counts."""

    predicted_n: int | None = None
    prompt_n: int | None = None
    cache_n: int | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None


class _Event(msgspec.Struct):
    """Holds the fields of a stream's event that matter here."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    timings: _Timings | None = None
    error: Any = None


_decode_event = msgspec.json.Decoder(_Event).decode


@dataclass
class _Reading:
    """Holds a stream as it is read."""

    event_times: list[float] = field(default_factory=list)
    """Arrival times of the events with a part of the answer."""
    token_ids: list[int] = field(default_factory=list)
    counts: list[tuple[float, int]] = field(default_factory=list)
    """Times and numbers of generated tokens, as the server counts them."""
    texts: list[str] = field(default_factory=list)
    usage: _Usage | None = None
    timings: _Timings | None = None
    id_times: list[float] = field(default_factory=list)
    error: str | None = None

    def take(self, data: bytes, now: float) -> None:
        """Add one event."""
        event = _decode_event(data)
        if event.error is not None:
            self.error = error_text(event.error)
        self.usage = event.usage or self.usage
        self.timings = event.timings or self.timings
        has_piece = False
        for choice in event.choices:
            if choice.token_ids:
                self.token_ids += choice.token_ids
                self.id_times += [now] * len(choice.token_ids)
            if choice.text:
                self.texts.append(choice.text)
            has_piece |= bool(choice.text or choice.token_ids or choice.finish_reason)
        if has_piece:
            self.event_times.append(now)
        count = None if event.usage is None else event.usage.completion_tokens
        if count is None and event.timings is not None:
            count = event.timings.predicted_n
        if count is not None:
            self.counts.append((now, count))

    def tells(self, told: str) -> bool:
        """Return whether a probe's tokens were reported that way: one by one, or nearly, unless it is at the end."""
        if told == "token_ids":
            return bool(self.token_ids)
        several = len({time for time, _ in self.counts}) > 1 or (len(self.counts) > 1 and self.counts[0][1] == 1)
        return several or (told == AT_THE_END and bool(self.counts))

    def token_times(self, told: str) -> list[float]:
        """Return the arrival time of each token, by the server's way `told` of reporting them."""
        if told == "token_ids":
            return self.id_times
        if told == AT_THE_END:
            total = self.counts[-1][1] if self.counts else 0
            return spread(total, self.event_times)
        times: list[float] = []
        for now, count in self.counts:
            times += [now] * (count - len(times))
        return times


def spread(num_tokens: int, event_times: list[float]) -> list[float]:
    """Spread tokens of which only the number is known evenly over the events, the first and the last on the outer ones.

    >>> spread(3, [1.0, 2.0, 3.0, 4.0])
    [1.0, 2.0, 4.0]
    """
    if not event_times or num_tokens < 1:
        return []
    if num_tokens == 1:
        return event_times[:1]
    return [event_times[j * (len(event_times) - 1) // (num_tokens - 1)] for j in range(num_tokens)]


def error_text(error: Any) -> str:
    """Return the message of an error, whichever shape the server gives it."""
    if isinstance(error, Mapping):
        return str(error.get("message") or error.get("detail") or error)
    return str(error)


class Endpoint(Target):
    """Asks a server at a URL. Its routes are below the path of the URL (`http://host:8000/v3`), by default below `/v1`.

    `timeout`: seconds for a whole answer. `pid`: process of the server, to report its memory.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        ignore_eos: bool = True,
        vocab_size: int | None = None,
        timeout: float = 600.0,
        pid: int | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        try:
            self._address = Address.of(url, api_key)
        except ValueError:
            raise ConfigError(f"invalid server URL {url!r}: use one such as http://127.0.0.1:8000") from None
        self._base = urlsplit(url).path.rstrip("/") or "/v1"
        self._model, self._ignore_eos, self._vocab_size = model, ignore_eos, vocab_size
        self._timeout, self._pid = timeout, pid
        self._extra: dict[str, Any] = {}  # parameters that the server accepts
        self._told = ""
        self.vocabulary: Vocabulary = TokenIds(MODEST_VOCABULARY if vocab_size is None else vocab_size)
        self.answer_vocabulary: Vocabulary = self.vocabulary
        self.about = {}

    async def start(self) -> None:
        max_model_len = await self._choose_model()
        takes_ids = await self._probe()
        self.answer_vocabulary = self.vocabulary
        if not takes_ids or self._told != "token_ids":
            self.answer_vocabulary = await self._words()
        if not takes_ids:
            self.vocabulary = self.answer_vocabulary
        self.about = {
            "url": self.url,
            "model": self._model,
            "room": max_model_len,
            "prompts": f"token ids below {self.vocabulary.size}" if isinstance(self.vocabulary, TokenIds) else "text",
            "token_times": self._told,
            "ignores_eos": "ignore_eos" in self._extra,
            "parameters": dict(self._extra),
        }

    async def _choose_model(self) -> int | None:
        """Choose the model; return its context length, if the server reports it."""
        status, body = await get(self._address, f"{self._base}/models", timeout=self._timeout)
        if status in (401, 403):
            raise ServerError(f"{self.url} requires an API key: give --api-key, or set SPLITFUSE_API_KEY")
        try:
            models = msgspec.json.decode(body)["data"]
            names = [str(model["id"]) for model in models]
        except (msgspec.MsgspecError, KeyError, TypeError):
            raise ServerError(
                f"{self._base}/models at {self.url} returned no list of models (status {status}): does the server have "
                "OpenAI's API there?"
            ) from None
        if not names:
            raise ServerError(f"{self.url} serves no model")
        if self._model is None:
            self._model = names[0]
        elif self._model not in names:
            raise ServerError(f"{self.url} does not serve model {self._model!r}, only {', '.join(names)}")
        entry = models[names.index(self._model)]
        meta = entry.get("meta") or {}  # llama.cpp's
        max_model_len = entry.get("max_model_len")
        if max_model_len is None and meta:
            max_model_len = await self._slot_length()
        max_model_len = None if max_model_len is None else int(max_model_len)
        if max_model_len:
            self.room = max_model_len
        if self._vocab_size is None and meta.get("n_vocab"):
            self.vocabulary = TokenIds(int(meta["n_vocab"]))
        return max_model_len

    async def _slot_length(self) -> int | None:
        """Return the context of a slot: llama.cpp divides its context among slots."""
        status, body = await get(self._address, "/props", timeout=self._timeout)
        try:
            return int(msgspec.json.decode(body)["default_generation_settings"]["n_ctx"]) if status == 200 else None
        except (msgspec.MsgspecError, KeyError, TypeError):
            return None

    async def _probe(self) -> bool:
        """Find out which parameters the server accepts and how it reports tokens; return whether it takes token ids."""
        usage = {"stream_options": {"include_usage": True}}
        ids: Any = list(range(PROBE_TOKENS, 2 * PROBE_TOKENS))
        refusals = []
        for prompt, extra in ((ids, usage), (ids, {}), ("one two three", usage), ("one two three", {})):
            try:
                await self._stream(prompt, PROBE_TOKENS, extra)
            except InvalidRequestError as refusal:
                refusals.append(str(refusal))
                continue
            self._extra = dict(extra)
            break
        else:
            raise ServerError(f"{self.url} rejects even the simplest stream of completions: {refusals[0]}")
        if self._ignore_eos:
            await self._keep(prompt, {"ignore_eos": True}, lambda reading: not reading.error)
        for told, parameters in WAYS_TO_TELL.items():
            if await self._keep(prompt, parameters, partial(_Reading.tells, told=told)):
                self._told = told
                return not isinstance(prompt, str)
        raise ServerError(f"{self.url} reports neither token ids nor usage: its tokens cannot be counted")

    async def _keep(self, prompt: Any, parameters: dict[str, Any], works: Callable[[_Reading], bool]) -> bool:
        """Keep the parameters if the server accepts them and they take effect; return whether they do."""
        extra = {**self._extra, **parameters}
        with suppress(InvalidRequestError):
            if works(await self._stream(prompt, PROBE_TOKENS, extra)):
                self._extra = extra
                return True
        return False

    async def _words(self) -> Words:
        """Return a vocabulary of words, with the server's tokens per word."""
        reading = await self._stream(" ".join(WORDS[:PROBE_WORDS]), 1, self._extra)
        tokens = reading.usage.prompt_tokens if reading.usage else None
        return Words(tokens / PROBE_WORDS if tokens else 1.0)

    async def ask(self, request: LoadRequest) -> Answer:
        length = 0 if isinstance(request.prompt, str) else len(request.prompt)
        try:
            reading = await self._stream(request.prompt, request.max_tokens, self._extra)
        except (InvalidRequestError, RequestFailedError) as error:
            return Answer(length, error=str(error))
        if reading.usage is not None and reading.usage.prompt_tokens:
            length = reading.usage.prompt_tokens
        elif reading.timings is not None and reading.timings.prompt_n:
            length = reading.timings.prompt_n + (reading.timings.cache_n or 0)
        times = reading.token_times(self._told)
        fault = reading.error
        if fault is None and "ignore_eos" in self._extra and len(times) != request.max_tokens:
            fault = f"{len(times)} tokens arrived instead of {request.max_tokens}"
        tokens = "".join(reading.texts) if isinstance(request.prompt, str) else tuple(reading.token_ids)
        return Answer(length, tuple(times), tokens, fault)

    async def _stream(self, prompt: Any, max_tokens: int, extra: Mapping[str, Any]) -> _Reading:
        """Read one stream to its end. Raises InvalidRequestError with the server's message if it is rejected."""
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            **extra,
        }
        reading = _Reading()
        path, content = f"{self._base}/completions", msgspec.json.encode(body)
        try:
            status, refusal = await post_stream(self._address, path, content, reading.take, timeout=self._timeout)
        except msgspec.MsgspecError as error:
            raise RequestFailedError(f"malformed event in the stream of completions: {error}") from error
        if status != 200:
            raise InvalidRequestError(f"status {status}: {_refusal(refusal)}")
        return reading

    async def close(self) -> None:
        """Do nothing: every request had a connection of its own."""

    def resident_bytes(self) -> int | None:
        return None if self._pid is None else resident_bytes(self._pid)


def _refusal(body: bytes) -> str:
    try:
        error = msgspec.json.decode(body)
    except msgspec.MsgspecError:
        return body[:300].decode("utf-8", "replace")
    if isinstance(error, Mapping):
        error = error.get("error", error)
    return error_text(error)[:300]
