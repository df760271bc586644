"""Names KV blocks by content: a chained, keyed digest of all tokens up to a block's end.

    root    = H(key, fingerprint, salt)
    name[0] = H(key, root, tokens of block 0)
    name[i] = H(key, name[i - 1], tokens of block i)

H is BLAKE2b with a digest of 16 bytes. Equal names mean equal tokens from the first one on, in every process that has
the same key and fingerprint; without the key, no prompt can be constructed that takes another's name. See
docs/decisions/0017-block-names.md.
"""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Sequence
from hashlib import blake2b

NAME_BYTES = 16
"""Length of a name: two of n blocks share one by accident with probability n^2 / 2^129."""


def new_key() -> bytes:
    """Return a key at random. A deployment has one: its engines, its router and its stores mean the same by a name."""
    return secrets.token_bytes(32)


class BlockNamer:
    """Computes the names of blocks of `block_size` tokens.

    `key` is a secret of up to 64 bytes. `fingerprint` stands for everything else that the bytes of a block depend on,
    such as the model's weights and the layout of the cache: namers whose fingerprints differ agree on no name.

        namer = BlockNamer(2, key=new_key())
        names = []
        namer.extend(names, [5, 6, 7, 8, 9])  # two names: the fifth token does not fill a block
    """

    def __init__(self, block_size: int, *, key: bytes, fingerprint: bytes = b"") -> None:
        self.block_size = block_size
        self._block = blake2b(key=key, digest_size=NAME_BYTES, person=b"block")
        self._root = blake2b(key=key, digest_size=NAME_BYTES, person=b"root")
        self._root.update(blake2b(fingerprint, key=key).digest())  # fixed length: no salt can imitate it

    def extend(
        self, names: list[bytes], token_ids: Sequence[int], num_blocks: int | None = None, *, salt: str = ""
    ) -> None:
        """Append names to those of the leading blocks of `token_ids` until there are `num_blocks`, or one for each
        full block.

        `names` must have been computed for the same tokens and salt. Only blocks without a name are computed.
        """
        size = self.block_size
        end = len(token_ids) // size if num_blocks is None else num_blocks
        if len(names) >= end:
            return
        parent = names[-1] if names else self._root_name(salt)
        data = array("i", token_ids[len(names) * size : end * size]).tobytes()
        width = len(data) // (end - len(names))  # bytes of a block
        for start in range(0, len(data), width):
            digest = self._block.copy()
            digest.update(parent)
            digest.update(data[start : start + width])
            parent = digest.digest()
            names.append(parent)

    def name_part(self, names: Sequence[bytes], token_ids: Sequence[int], *, salt: str = "") -> bytes:
        """Return the name of tokens that do not fill a block, behind the blocks of these names."""
        assert 0 < len(token_ids) < self.block_size
        digest = self._block.copy()
        digest.update(names[-1] if names else self._root_name(salt))
        digest.update(array("i", token_ids).tobytes())
        return digest.digest()

    def name_parts(self, names: Sequence[bytes], token_ids: Sequence[int], *, salt: str = "") -> list[bytes]:
        """Return the names of the beginnings of tokens that do not fill a block, the first token alone first, behind
        the blocks of these names.
        """
        assert 0 < len(token_ids) < self.block_size
        digest, parts = self._block.copy(), []
        digest.update(names[-1] if names else self._root_name(salt))
        data = array("i", token_ids).tobytes()
        width = len(data) // len(token_ids)  # bytes of a token
        for start in range(0, len(data), width):
            digest.update(data[start : start + width])
            parts.append(digest.copy().digest())
        return parts

    def _root_name(self, salt: str) -> bytes:
        digest = self._root.copy()
        digest.update(salt.encode("utf-8", "surrogatepass"))
        return digest.digest()
