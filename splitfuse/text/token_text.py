"""Gives the texts and bytes of single tokens, for log-probabilities. A token may be a part of a character only."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from splitfuse.text.tokenizer import Tokenizer

_MAX_REMEMBERED = 65536  # tokens


@dataclass(frozen=True)
class TokenPiece:
    """Holds what one token adds to a text. A token of incomplete characters has the `text` `bytes:\\xe2\\x80`, as
    OpenAI writes it.
    """

    text: str
    utf8: bytes


class TokenPieces:
    """Looks up the pieces of a vocabulary and remembers them. Safe to share between threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._length = len(self._decode(()))
        self.of = functools.lru_cache(_MAX_REMEMBERED)(self._of)
        """Function of a token id that returns its TokenPiece."""

    def _decode(self, token_ids: tuple[int, ...]) -> str:
        # The first word of a text loses its space.
        return self._tokenizer.decode([*self._tokenizer.letter, *token_ids], skip_special_tokens=False)

    def _of(self, token_id: int) -> TokenPiece:
        text = self._decode((token_id,))[self._length :]
        if "\ufffd" not in text:
            return TokenPiece(text, text.encode())
        utf8 = _raw_bytes(self._tokenizer.token(token_id) or "")
        if utf8 is None:
            return TokenPiece(text, text.encode())
        try:
            return TokenPiece(utf8.decode(), utf8)
        except UnicodeDecodeError:
            return TokenPiece("bytes:" + "".join(f"\\x{byte:02x}" for byte in utf8), utf8)


def _raw_bytes(token: str) -> bytes | None:
    """Return the bytes that `token` stands for: `<0xE2>`, or characters by which byte-level BPE writes bytes."""
    if match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token):
        return bytes([int(match[1], 16)])
    alphabet = _byte_alphabet()
    return bytes(alphabet[c] for c in token) if token and all(c in alphabet for c in token) else None


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """Return the alphabet of byte-level BPE (GPT-2): printable bytes are themselves, others follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}
