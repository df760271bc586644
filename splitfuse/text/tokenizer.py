"""Converts text to token ids and back by a model's own `tokenizer.json`, also while the tokens still come.

A stream keeps one Detokenizer per request. Built on the `tokenizers` library alone; the results equal those of
transformers for the same files. In particular `tokenizer.json` says whether a text begins with the BOS token;
`add_bos_token` in `tokenizer_config.json` is for folders without one, and is not read.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import subprocess
import sys
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import tokenizers
from tokenizers.decoders import DecodeStream

from splitfuse.errors import InvalidRequestError, ModelError, SplitfuseError, TokenizerError, brief
from splitfuse.models.sources.files import MAX_TOKENIZER_BYTES, check_json
from splitfuse.models.sources.source import ModelSource
from splitfuse.text.chat_formats.formats import ChatFormat, format_of
from splitfuse.text.chat_formats.response_template import with_response_template
from splitfuse.text.chat_template import check_syntax, variables_of
from splitfuse.text.pooling.decisions import USUAL, DecisionSettings

_logger = logging.getLogger(__name__)

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Names of tokens that a configuration may have, in the order of transformers."""
MAX_ADDED_CHARACTERS = 2_000_000
"""Number of characters that the added tokens of a configuration may have together: each takes 70 bytes of memory."""
MAX_GROWTH = 64
"""Factor by which the replacements of a decoder may make a text longer."""
HARMLESS_BYTES = 64 * 1024
"""Size of a tokenizer.json that is loaded untried: what it says cannot take more than some 200 MB."""
_CONVERT = "AutoTokenizer.from_pretrained(folder).save_pretrained(folder) of Hugging Face transformers writes one"
OTHER_FILES = {
    "tokenizer.model": ("only a SentencePiece tokenizer.model, which cannot be read as it is", _CONVERT),
    "tekken.json": (
        "only Mistral's tekken.json, which cannot be read as it is",
        "convert_tekken_tokenizer(file).save_pretrained(folder) of transformers.integrations.mistral writes one",
    ),
}
"""File of a tokenizer in another format -> what it is, and how to convert it."""


class Tokenizer:
    """Encodes and decodes by a model's vocabulary and rules. Immutable; safe to share between requests and threads.

    >>> tokenizer = Tokenizer.from_source(open_model(None))
    >>> tokenizer.decode(tokenizer.encode("Once upon a time"))
    'Once upon a time'
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        chat_template: str | None = None,
        response_template: Any = None,
        decisions: DecisionSettings = USUAL,
    ) -> None:
        """Make `special_tokens`, by role as in `{"bos_token": "<s>"}`, special, and add those that are missing."""
        backend.no_truncation()
        backend.no_padding()
        self.special_tokens = dict(special_tokens or {})
        self.chat_template = chat_template
        self.decisions = decisions
        self._response_template = response_template
        known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
        backend.add_special_tokens([known.get(token, token) for token in self.special_tokens.values()])
        self._backend = backend
        self._special_ids = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        self._byte_ids = _byte_fallback_ids(backend)

    @classmethod
    def from_source(cls, source: ModelSource) -> Tokenizer:
        """Read `tokenizer.json`, with `tokenizer_config.json`, `special_tokens_map.json` and `chat_template.jinja`
        where they exist. Raises TokenizerError for a file that is missing, unreadable or hostile."""
        with _LibraryErrors(f"{source.location}/tokenizer.json cannot be read as a tokenizer"):
            content = source.read("tokenizer.json", MAX_TOKENIZER_BYTES)
            check_json(content or b"")
        if content is None:
            _refuse_unknown(source)  # which no tokenizer would help
            found, convert = next(
                (each for file, each in OTHER_FILES.items() if source.read(file, MAX_TOKENIZER_BYTES) is not None),
                ("no tokenizer.json", _CONVERT),
            )
            raise TokenizerError(f"{source.location} has {found}; a fast tokenizer.json is needed: {convert}")
        config = source.tokenizer_config(TokenizerError)
        added = config.get("added_tokens_decoder")
        special, extra = _special_tokens(config), _extra_special_tokens(config)
        template = _chat_template(source, config)
        with _LibraryErrors(f"the added tokens of {source.location} cannot be read"):
            if added is None:
                named = source.read_json("added_tokens.json", TokenizerError) or {}
                added_tokens = _plain_added_tokens(named, {*special.values(), *extra})
            else:
                added_tokens = [_added_token(**added[number]) for number in sorted(added, key=int)]
            length = sum(map(len, [*special.values(), *extra, *(token.content for token in added_tokens)]))
            if length > MAX_ADDED_CHARACTERS:
                raise ValueError(f"they have {length} characters together; at most {MAX_ADDED_CHARACTERS} are read")
        with _LibraryErrors(f"{source.location}/tokenizer.json cannot be read as a tokenizer"):
            if len(content) > HARMLESS_BYTES:
                _try_apart(content)
            backend = tokenizers.Tokenizer.from_buffer(content)
            if backend.decoder is not None:
                check_decoder(json.loads(backend.decoder.__getstate__()))
            backend.add_tokens(added_tokens)
            answers = config.get("response_template")
            tokenizer = cls(
                backend,
                special_tokens=special,
                chat_template=template,
                response_template=answers,
                decisions=_decisions(source),
            )
            backend.add_special_tokens(extra)
            return tokenizer

    @property
    def vocab_size(self) -> int:
        """Return the number of ids, added tokens included. A model's own vocabulary may be padded beyond it."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def bos_token_id(self) -> int | None:
        """Return the id of the BOS token, if the model has one."""
        return self._role("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """Return the id of the EOS token, if the model has one."""
        return self._role("eos_token")

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Return the token ids of `text`; special tokens written out in it are read as such. Raises InvalidRequestError
        for text that is not valid Unicode or that the vocabulary cannot express."""
        check_unicode(text)
        with _LibraryErrors("the model's tokenizer cannot encode this text", InvalidRequestError):
            # Unlike `encode`, this lets go of the GIL: a long text holds up no other thread.
            (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            return tuple(encoding.ids)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `token_ids`, with U+FFFD for bytes that make no character. Unknown ids give no text.
        Raises InvalidRequestError if the decoder fails on them.
        """
        with _LibraryErrors("the model's tokenizer cannot decode these tokens", InvalidRequestError):
            return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def to_json(self) -> str:
        """Return what `tokenizers.Tokenizer.from_str` makes the same tokenizer of."""
        return self._backend.to_str()

    @functools.cached_property
    def chat_format(self) -> ChatFormat:
        """Return how answers to the chat template write thoughts and calls of tools."""
        chat_format = format_of(self.chat_template, self.special_tokens)
        if self._response_template is None:
            return chat_format
        return with_response_template(chat_format, self._response_template)

    def marker_ids(self, markers: Iterable[str]) -> dict[str, int]:
        """Return the ids of those `markers` that only a token of their own can write in an answer with a grammar:
        special tokens, and added tokens such as `<tool_call>`.
        """
        added = self._backend.get_added_tokens_decoder()
        ids = {text: self._backend.token_to_id(text) for text in markers}
        return {
            text: token_id
            for text, token_id in ids.items()
            if token_id in added and (token_id in self._special_ids or (text[0] == "<" and text[-1] == ">"))
        }

    @functools.cached_property
    def template_variables(self) -> frozenset[str]:
        """Return the names of the variables that the chat template reads."""
        return frozenset() if self.chat_template is None else variables_of(self.chat_template)

    @functools.cached_property
    def control_texts(self) -> tuple[str, ...]:
        """Return the texts of special tokens, and of added ones such as `<think>`, the longest first."""
        added = self._backend.get_added_tokens_decoder().values()
        texts = [each.content for each in added if each.special or (each.content[:1], each.content[-1:]) == ("<", ">")]
        return tuple(sorted(texts, key=len, reverse=True))

    def hidden_ids(self, shown: Iterable[str]) -> frozenset[int]:
        """Return the special tokens but for those which the texts `shown` are."""
        return frozenset(self._special_ids - {self._backend.token_to_id(text) for text in shown})

    @functools.cached_property
    def added_ids(self) -> frozenset[int]:
        """Return the ids of added tokens, special or not: wherever a text has one, it is this token and no other."""
        return frozenset(self._backend.get_added_tokens_decoder())

    @functools.cached_property
    def letter(self) -> tuple[int, ...]:
        """Return a token that reads as letters by itself, or nothing if none of the first ones does."""
        ids = (i for i in range(min(self.vocab_size, 65536)) if i not in self._byte_ids)
        return next(((i,) for i in ids if self.decode([i]).isalpha()), ())

    def token(self, token_id: int) -> str | None:
        """Return how the vocabulary writes a token, such as `"Ġthe"`; None for an unknown id."""
        return self._backend.id_to_token(token_id)

    def _role(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self._backend.token_to_id(token)


class Detokenizer:
    """Turns the tokens of one request into text as they come. `push` and `finish` together give `decode` of all.

    With `prompt_token_ids` the pieces are what the output adds to the prompt's text: decoders drop the space before the
    first word of a text, and a continuation's first word is not that. Leave them out for a reply that stands alone.
    Special tokens are skipped but for `shown_tokens`, which are texts of some.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, prompt_token_ids: Sequence[int] = (), shown_tokens: Sequence[str] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens = not shown_tokens
        self._hidden_ids = tokenizer.hidden_ids(shown_tokens) if shown_tokens else frozenset()
        self._context = self._last_word(prompt_token_ids)
        self._stream = DecodeStream(ids=self._context, skip_special_tokens=skip_special_tokens)
        self._token_ids: list[int] = []
        self._byte_run: list[int] = []
        self.lengths: list[int] = []
        """Number of characters emitted after each token; a character counts with the token that completed it."""

    def push(self, token_ids: Iterable[int]) -> str:
        """Return the text that is certain now and was not before. An incomplete character is held back.

        So is a run of byte tokens (`<0xF0>`) to its end: if a later one spoils it, all of it reads as U+FFFD.
        """
        return "".join([self.push_one(token_id) for token_id in token_ids])

    def push_one(self, token_id: int) -> str:
        """Return the text that is certain with one more token."""
        piece = ""
        if token_id not in self._hidden_ids:
            piece = self._step(token_id)
            self._token_ids.append(token_id)
        self.lengths.append(self._length + len(piece))
        return piece

    def finish(self) -> str:
        """Return the text still held back, with U+FFFD for bytes that never made a character."""
        before = len(self._decode(self._context))
        rest = self._decode([*self._context, *self._token_ids])[before + self._length :]
        if rest:
            self.lengths[-1] += len(rest)
        return rest

    def num_tokens(self, length: int) -> int:
        """Return how many of the tokens it takes to emit the first `length` characters."""
        return bisect_left(self.lengths, length) + 1 if length > 0 else 0

    @property
    def _length(self) -> int:
        return self.lengths[-1] if self.lengths else 0

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip)

    def _step(self, token_id: int) -> str:
        # DecodeStream sees a run of byte tokens as one step: fed singly, it emits what a later byte would take back.
        tokenizer = self._tokenizer
        if token_id in tokenizer._byte_ids or (self._byte_run and not self._is_visible(token_id)):
            self._byte_run.append(token_id)
            return ""
        step = [*self._byte_run, token_id]
        self._byte_run.clear()
        with _STEP_ERRORS:
            return self._stream.step(tokenizer._backend, step) or ""

    def _is_visible(self, token_id: int) -> bool:
        known = self._tokenizer._backend.id_to_token(token_id) is not None
        return known and not (self._skip and token_id in self._tokenizer._special_ids)

    def _last_word(self, prompt_token_ids: Sequence[int]) -> list[int]:
        """Return the prompt's last token that reads as text by itself: decoders need no more of what came before."""
        for token_id in reversed(prompt_token_ids):
            text = self._decode([token_id])
            if text and not text.endswith("\ufffd") and token_id not in self._tokenizer._byte_ids:
                return [token_id]
        return []


def check_unicode(text: str) -> None:
    """Raise InvalidRequestError for text that is not valid Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = f"the text is not valid Unicode: half a surrogate pair at character {error.start}"
        raise InvalidRequestError(message, parameter="prompt") from error


def check_decoder(decoder: Mapping[str, Any]) -> None:
    """Raise ValueError for a decoder, as `tokenizer.json` has it, that could take much time or memory for a token.

    Texts are tokenized in a process with limits, but tokens are decoded where all requests are.
    """
    growth = 1.0
    for step in _decoder_steps(decoder):
        if step["type"] == "Replace":
            pattern = step["pattern"].get("String")
            if pattern is None:
                raise ValueError(f"its decoder has a regular expression, {step['pattern']!r:.80}: only texts are read")
            growth *= max(len(step["content"]) / len(pattern) if pattern else len(step["content"]) + 1, 1)
    if growth > MAX_GROWTH:
        raise ValueError(f"its decoder can make a text {growth:.0f} times longer; at most {MAX_GROWTH} times is read")


def _decoder_steps(decoder: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if decoder["type"] != "Sequence":
        yield decoder
    else:
        for step in decoder["decoders"]:
            yield from _decoder_steps(step)


class _LibraryErrors:
    """Raises errors of the tokenizers library, panics of its Rust code among them, as one of ours."""

    def __init__(self, message: str, kind: type[SplitfuseError] = TokenizerError) -> None:
        self._message, self._kind = message, kind

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is None or isinstance(error, SplitfuseError):
            return
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise self._kind(f"{self._message}: {error!s:.300}") from error


_STEP_ERRORS = _LibraryErrors("the model's tokenizer cannot decode these tokens one by one", InvalidRequestError)


def _byte_fallback_ids(backend: tokenizers.Tokenizer) -> frozenset[int]:
    """Return the ids of `<0x00>` to `<0xFF>`, if the decoder reads them as bytes."""
    if backend.decoder is None or backend.decoder.decode(["<0x41>"]) != "A":
        return frozenset()
    ids = (backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(token_id for token_id in ids if token_id is not None)


def _refuse_unknown(source: ModelSource) -> None:
    """Raise UnsupportedModelError if a folder's config.json names an architecture that is not known."""
    from splitfuse.models.families.registry import ENCODERS, find_family  # with PyTorch, which a front does not need

    try:
        architectures = source.config().get("architectures")
    except ModelError:
        return  # a folder of a tokenizer alone
    match architectures:
        case [str(name), *_] if name not in ENCODERS:
            find_family(name)


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Return every `*_token` of the configuration, whose value is the token or an object with it as `content`, in the
    order in which transformers adds those that the vocabulary lacks.
    """
    named = {name: config.get(name) for name in SPECIAL_TOKENS}
    named |= {name: value for name, value in config.items() if name.endswith("_token") and name not in named}
    if isinstance(extra := config.get("extra_special_tokens"), dict):
        named |= extra
    tokens = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    for name in SPECIAL_TOKENS:
        if not isinstance(tokens[name], str | None):
            raise TokenizerError(
                f"{name} must be a text, or an object with the text as content, not {brief(named[name])}"
            )
    return {name: token for name, token in tokens.items() if isinstance(token, str)}


def _extra_special_tokens(config: Mapping[str, Any]) -> list[str]:
    """Return the special tokens of the configuration that have no name."""
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    tokens = [each.get("content") if isinstance(each, dict) else each for each in extra if isinstance(extra, list)]
    return [token for token in tokens if isinstance(token, str)]


def _added_token(content: str, **flags: Any) -> tokenizers.AddedToken:
    names = ("lstrip", "normalized", "rstrip", "single_word", "special")
    return tokenizers.AddedToken(content, **{name: flags[name] for name in names if name in flags})


def _plain_added_tokens(ids: Mapping[str, Any], special: Set[str]) -> list[tokenizers.AddedToken]:
    """Return the tokens of an `added_tokens.json`, in the order of their ids."""
    return [
        tokenizers.AddedToken(token, normalized=token not in special, special=token in special)
        for token in sorted(ids, key=lambda token: int(ids[token]))
    ]


_tried: set[bytes] = set()
"""Digests of the tokenizers that this process has tried: their content itself may be tens of MB."""


def _try_apart(content: bytes) -> None:
    """Load a tokenizer in a process of its own, with limits: a few hundred kB can take gigabytes or overflow a stack.
    Raises ValueError if it cannot be loaded within them.
    """
    digest = hashlib.sha256(content).digest()
    if digest in _tried or not sys.executable or sys.platform == "win32":  # no such limits there
        return
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}  # threads have memory of their own
    ended = subprocess.run([sys.executable, "-c", _TRIAL], input=content, capture_output=True, env=environment)
    if ended.returncode == 1:
        raise ValueError(ended.stdout.decode(errors="replace") or "it needs more than 400 MiB of memory")
    if ended.returncode:
        raise ValueError("loading it takes more than 400 MiB of memory or 4 s of computing time, or crashes")
    _tried.add(digest)


_TRIAL = """
import resource, sys, tokenizers
resource.setrlimit(resource.RLIMIT_DATA, (400 << 20, 400 << 20))
resource.setrlimit(resource.RLIMIT_CPU, (4, 4))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
try:
    tokenizers.Tokenizer.from_buffer(sys.stdin.buffer.read())
except BaseException as error:
    sys.stdout.buffer.write(str(error).encode(errors="replace")[:500])
    sys.exit(1)
"""


def _decisions(source: ModelSource) -> DecisionSettings:
    """Return what the model's decision.json says, if it has one."""
    values = source.read_json("decision.json", TokenizerError)
    has_template = source.read("decision_template.jinja") is not None
    return DecisionSettings.of(values or {}, has_template=has_template)


def _chat_template(source: ModelSource, config: Mapping[str, Any]) -> str | None:
    """Return `chat_template.jinja` or the configuration's: one template, or that of a list which is named default."""
    try:
        template = source.read_text("chat_template.jinja")
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{source.location}/chat_template.jinja cannot be read: {error}") from error
    template = config.get("chat_template") if template is None else template
    if isinstance(template, list) and all(isinstance(entry, dict) and "name" in entry for entry in template):
        named = {str(entry["name"]): entry.get("template") for entry in template}
        if "default" not in named:
            names = ", ".join(named) or "none at all"
            _logger.warning(
                "%s has chat templates (%.200s), but none named default: chats are refused", source.location, names
            )
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise TokenizerError(
            f"chat_template in {source.location}/tokenizer_config.json must be text or a list of named texts"
        )
    if template is not None:
        check_syntax(template)
    return template
