"""Names the prefixes of the prompt in a request's body: requests whose prompts begin alike find their keys and values
in the same cell.

Nothing is tokenized here: a name stands for bytes of the body, and for all that decides what a cell has cached: the
model, which may be an adapter, and the key of the client, since each key has caches of its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

import msgspec

from splitfuse.core.replicas.cells import Prefix

SHORTEST = 128
"""Number of bytes of the shortest prefix, about a KV block of 32 tokens. Each next one is twice as long."""
LONGEST = 2**20
"""Number of bytes of a prompt that are looked at."""
LAST_MESSAGES = 16
"""Number of messages, the last ones of a conversation, whose ends are ends of prefixes too: the next turn of a
conversation begins with all of this one."""
BYTES_PER_TOKEN = 4
"""Number of bytes of a text that count as a token."""

_RAW = msgspec.Raw()


class _Asked(msgspec.Struct):
    """Holds what is looked at of a body. What a prompt consists of stays JSON."""

    model: msgspec.Raw = _RAW
    tools: msgspec.Raw = _RAW
    system: msgspec.Raw = _RAW
    instructions: msgspec.Raw = _RAW
    messages: msgspec.Raw = _RAW
    prompt: msgspec.Raw = _RAW
    input: msgspec.Raw = _RAW
    previous_response_id: msgspec.Raw = _RAW
    splitfuse_on_time_only: msgspec.Raw = _RAW
    store: msgspec.Raw = _RAW


class _Item(msgspec.Struct):
    """Holds what is looked at of an item of an input."""

    type: msgspec.Raw = _RAW
    id: msgspec.Raw = _RAW


_read = msgspec.json.Decoder(_Asked).decode
_list = msgspec.json.Decoder(list[msgspec.Raw]).decode
_item = msgspec.json.Decoder(_Item).decode
_text = msgspec.json.Decoder(str).decode


class PromptPrefixes(NamedTuple):
    """Holds the prefixes of a prompt: the name of each, the shortest first, and which fraction of the prompt it is."""

    names: Sequence[tuple[bytes, float]]
    num_tokens: int
    """Number of tokens of the prompt, roughly."""
    follows: str | None = None
    """Id of the stored answer that the request goes on from, or of an item of one."""
    on_time_only: bool = False
    """Flag of a request that is refused where it would miss its SLO, however much room there is."""
    store: bool | None = None
    """Flag of an answer that is to be stored; None: it is left out."""

    def in_seconds(self, token_seconds: float) -> list[Prefix]:
        """Return the prefixes with the seconds that they take, if each token takes so many."""
        whole = self.num_tokens * token_seconds
        return [Prefix(name, fraction * whole) for name, fraction in self.names]


def prefixes_of(body: bytes, *, salt: bytes) -> PromptPrefixes:
    """Return the prefixes of the prompt in a body; of one that is no JSON object of a prompt, those of its bytes. One
    without a body has no tokens. `salt` is what else decides what a cell has cached.

    >>> short = prefixes_of(b'{"prompt": "Once"}', salt=b"")
    >>> short == prefixes_of(b'{"max_tokens": 3, "prompt": "Once"}', salt=b""), short.num_tokens
    (True, 1)
    """
    if not body:
        return PromptPrefixes([(blake2b(salt, digest_size=16).digest(), 1.0)], 0)
    try:
        asked = _read(body)
        main = next((each for each in map(bytes, (asked.messages, asked.prompt, asked.input)) if each), b"")
        pieces = _pieces(main)
        follows = _text_in(asked.previous_response_id) or _referred(pieces)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return _named([body], salt)
    if not main:
        return _named([body], salt)
    before = b"\0".join(map(bytes, (asked.tools, asked.system, asked.instructions)))
    found = _named([before, *pieces], salt + b"\0" + bytes(asked.model))
    return found._replace(
        num_tokens=_num_tokens(main),
        follows=follows,
        on_time_only=bytes(asked.splitfuse_on_time_only) == b"true",
        store={b"true": True, b"false": False}.get(bytes(asked.store)),
    )


def _pieces(main: bytes) -> list[bytes]:
    """Return a prompt in pieces: the messages or items of a list, else itself without the quotes."""
    if re.match(rb"\s*\[\s*\{", main):
        return [bytes(each) for each in _list(main)]
    return [main.strip().strip(b'"')]


def _referred(items: Sequence[bytes]) -> str | None:
    """Return the id of the first item that stands for one of a stored answer."""
    for each in items:
        if b"item_reference" in each and bytes((item := _item(each)).type) == b'"item_reference"':
            return _text_in(item.id)
    return None


def _text_in(raw: msgspec.Raw) -> str | None:
    """Return a text in JSON; None for anything else."""
    return _text(raw) if bytes(raw).startswith(b'"') else None


def _num_tokens(main: bytes) -> int:
    """Return roughly how many tokens a prompt has: lists of token ids are counted, texts measured."""
    if re.match(rb"[\s\[]*\d", main):
        return main.count(b",") + 1
    return max(len(main) // BYTES_PER_TOKEN, 1)


def _named(pieces: Sequence[bytes], salt: bytes) -> PromptPrefixes:
    """Return the prefixes of a text in pieces: those that end with one of the last pieces, or after a power of two
    bytes. There is one at least.
    """
    text = b"\0".join(pieces)
    ends, at = set[int](), 0
    for piece in pieces:
        at += len(piece) + 1
        ends.add(at - 1)
    ends = {end for end in sorted(ends)[-LAST_MESSAGES:] if end >= SHORTEST}
    length = SHORTEST
    while length < len(text):
        ends.add(length)
        length *= 2
    ends = {end for end in ends if end <= LONGEST} or {len(text)}
    digest, done, names = blake2b(salt + b"\0", digest_size=16), 0, []
    for end in sorted(ends):
        digest.update(text[done:end])
        done = end
        names.append((digest.digest(), end / max(len(text), 1)))
    return PromptPrefixes(names, max(len(text) // BYTES_PER_TOKEN, 1))
