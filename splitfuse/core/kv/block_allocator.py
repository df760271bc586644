"""Owner of the KV blocks: who holds which, what is in them, and which to give up first.

A block is in exactly one of three states: *held* (reference count above zero), *cached* (nobody holds it, but its
content is known and may be wanted again; least recently used goes first), or *free* (no known content). It knows ids
and tokens; it does not know what a key or a value is, nor where a block lies in memory.

Prefix reuse: the content of a full block is named by a salted hash of its tokens and of what precedes them, so that
equal beginnings meet in one dictionary. A hash is only a hint: the tokens are compared, and the predecessor is
compared by an identity that is never reused, so that two different prefixes are never taken for one another.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ROOT = 0  # the identity of the empty prefix


@dataclass(frozen=True)
class Content:
    """What a published block holds: `tokens`, preceded by the content `parent`, for requests of one `salt`."""

    identity: int
    parent: int
    tokens: tuple[int, ...]
    salt: str
    digest: int


class BlockAllocator:
    """Hands out `num_blocks` blocks of `block_size` tokens. Not thread-safe: one owner, one thread."""

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._salt = secrets.randbits(64)  # so that no caller can construct prompts whose hashes collide
        self._references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._contents: dict[int, Content] = {}  # block -> what it holds
        self._index: dict[int, int] = {}  # digest -> block
        self._last_identity = ROOT

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give: free ones, and cached ones whose content would be forgotten."""
        return len(self._free) + len(self._cached)

    @property
    def num_held(self) -> int:
        return self.num_blocks - self.num_available

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks `num_tokens` tokens fill."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one reference each and no known content. The caller has checked `num_available`."""
        assert count <= self.num_available, f"{count} blocks wanted, {self.num_available} available"
        blocks = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                self._forget(block)
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Give back one reference of each. The last one goes first, so that a prefix outlives what continues it."""
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} released too often"
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._contents:
                    self._cached[block] = None
                else:
                    self._free.append(block)

    def match(self, token_ids: Sequence[int], *, salt: str = "") -> list[int]:
        """Blocks that hold the longest known beginning of `token_ids`, one reference taken on each.

        At least one token is left uncovered: its logits are wanted, so it must be computed.
        """
        blocks: list[int] = []
        if not self.enable_prefix_caching:
            return blocks
        parent = ROOT
        for start in range(0, len(token_ids) - self.block_size, self.block_size):
            found = self._find(parent, tuple(token_ids[start : start + self.block_size]), salt)
            if found is None:
                break
            blocks.append(found)
            parent = self._contents[found].identity
        for block in blocks:
            self._cached.pop(block, None)
            self._references[block] += 1
        return blocks

    def publish(self, blocks: Sequence[int], token_ids: Sequence[int], *, first: int = 0, salt: str = "") -> int:
        """Make known that `blocks[i]` holds `token_ids[i * block_size : (i + 1) * block_size]`, for full blocks from
        `first` on.

        The earlier ones must have been published, or matched, before. Returns how many leading blocks are now
        published; it stops short of a block whose content another block already holds.
        """
        if not self.enable_prefix_caching:
            return 0
        parent = self._contents[blocks[first - 1]].identity if first else ROOT
        for index in range(first, len(token_ids) // self.block_size):
            tokens = tuple(token_ids[index * self.block_size : (index + 1) * self.block_size])
            digest = self._digest(parent, tokens, salt)
            if digest in self._index:  # the same content, or a collision: the older one keeps the place
                return index
            block = blocks[index]
            self._last_identity += 1
            self._contents[block] = Content(self._last_identity, parent, tokens, salt, digest)
            self._index[digest] = block
            parent = self._last_identity
        return max(first, len(token_ids) // self.block_size)

    def check(self, holders: Iterable[Sequence[int]]) -> None:
        """Assert that every block is in exactly one state and that `holders` (one list of blocks each) hold what is
        held.
        """
        held = [0] * self.num_blocks
        for blocks in holders:
            assert len(set(blocks)) == len(blocks), f"a block twice in {blocks}"
            for block in blocks:
                held[block] += 1
        assert held == self._references, f"references {self._references}, holders {held}"
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free) and not free & cached, "a block twice among the free"
        assert {b for b in range(self.num_blocks) if not held[b]} == free | cached, "a block lost or given away twice"
        assert cached <= self._contents.keys() and not free & self._contents.keys(), "content in the wrong state"
        assert self._index == {content.digest: block for block, content in self._contents.items()}, "index is stale"

    def _find(self, parent: int, tokens: tuple[int, ...], salt: str) -> int | None:
        block = self._index.get(self._digest(parent, tokens, salt))
        if block is None:
            return None
        content = self._contents[block]
        return block if (content.parent, content.tokens, content.salt) == (parent, tokens, salt) else None

    def _digest(self, parent: int, tokens: tuple[int, ...], salt: str) -> int:
        return hash((self._salt, salt, parent, tokens))

    def _forget(self, block: int) -> None:
        content = self._contents.pop(block)
        del self._index[content.digest]
