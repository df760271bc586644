"""Owns the KV blocks: which requests hold them, what is in them, which content to give up first.

A block is in exactly one of three states: *held* (its reference count is above zero), *cached* (no request holds it,
but its content is known and may be wanted again; the least recently used goes first), or *free* (no known content).
The allocator knows ids and tokens. It does not know what a key or a value is, nor where a block lies in memory.

Prefix reuse: a full block is published under its name (names.py), so that requests with equal beginnings find it. Its
tokens are compared on every hit; what precedes it is trusted by the name.

In a network with recurrent states, a prefix is of use up to a snapshot of them (state_allocator.py). A snapshot goes
with the block that it is named by.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from splitfuse.core.kv.names import BlockNamer
from splitfuse.core.kv.state_allocator import StateAllocator
from splitfuse.core.limits import ceil_div
from splitfuse.core.plan import Save

NAMED_TOGETHER = 16
"""Blocks named per batch: little is wasted after a miss, and batching halves the cost per block."""


class BlockAllocator:
    """Hands out `num_blocks` blocks of `block_size` tokens; without a `namer`, no content is reused. Not thread-safe.

    The lists called `names` belong to a request: its blocks' names as far as they have been computed. Methods append
    what they need, so that each name is computed once per request, however often it is matched, published or preempted.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        namer: BlockNamer | None = None,
        states: StateAllocator | None = None,
        saves_blocks: bool = False,
    ) -> None:
        """`states` are those of a network with recurrent states. If it `saves_blocks`, all that is published is noted
        for `take_saves`.
        """
        assert namer is None or namer.block_size == block_size
        assert states is None or states.interval is None or (namer is not None and states.interval % block_size == 0)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.states = states
        self._namer = namer
        self._references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._contents: dict[int, tuple[bytes, tuple[int, ...]]] = {}  # published block -> its name and tokens
        self._index: dict[bytes, int] = {}  # name -> published block
        self.saves_published = saves_blocks
        """Whether all that is published is saved."""
        self._saves: list[Save] = []
        self.num_lent = 0
        """Blocks held for requests of other engines."""

    @property
    def num_available(self) -> int:
        """Return how many blocks `allocate` can give: free ones, and cached ones, whose content it forgets."""
        return len(self._free) + len(self._cached)

    @property
    def reuses_content(self) -> bool:
        """Return whether content that is published is found again."""
        return self._namer is not None

    @property
    def capacity(self) -> int:
        """Return how many blocks requests can have: all that are not lent."""
        return self.num_blocks - self.num_lent

    @property
    def num_cached(self) -> int:
        """Return how many blocks no request holds, with content that is known."""
        return len(self._cached)

    @property
    def num_held(self) -> int:
        """Return how many blocks are held."""
        return self.num_blocks - self.num_available

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks `num_tokens` tokens need."""
        return ceil_div(num_tokens, self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Return `count` blocks with one reference each and no known content. The caller checks `num_available`."""
        assert count <= self.num_available, f"{count} blocks wanted, {self.num_available} available"
        blocks = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                name, _ = self._contents.pop(block)
                del self._index[name]
                if self.states is not None:
                    self.states.forget(name)
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Give back one reference of each block, the last first: tail blocks are then evicted before their prefix."""
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} released too often"
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._contents:
                    self._cached[block] = None
                else:
                    self._free.append(block)

    def lend(self, count: int) -> list[int]:
        """Take `count` blocks for a request of another engine."""
        blocks = self.allocate(count)
        self.num_lent += count
        return blocks

    def take_back(self, blocks: Sequence[int]) -> None:
        """End a loan."""
        self.release(blocks)
        self.num_lent -= len(blocks)

    def match(self, token_ids: Sequence[int], names: list[bytes], *, salt: str = "") -> list[int]:
        """Return the published blocks that hold the longest known beginning of `token_ids`, one reference taken on
        each.

        At least one token is left uncovered: it must be computed, since its logits are wanted.
        """
        blocks = self._known(token_ids, names, salt=salt)
        for block in blocks:
            self._cached.pop(block, None)
            self._references[block] += 1
        return blocks

    def count_cached(self, token_ids: Sequence[int], names: list[bytes], *, salt: str = "") -> int:
        """Return how many tokens `match` would cover. Only names are added, for `match` to use."""
        return len(self._known(token_ids, names, salt=salt)) * self.block_size

    def _known(self, token_ids: Sequence[int], names: list[bytes], *, salt: str) -> list[int]:
        blocks: list[int] = []
        if self._namer is None:
            return blocks
        limit = (len(token_ids) - 1) // self.block_size
        for index in range(limit):
            if index == len(names):
                self._namer.extend(names, token_ids, min(index + NAMED_TOGETHER, limit), salt=salt)
            block = self._index.get(names[index])
            if block is None or self._contents[block][1] != self._tokens(token_ids, index):
                break
            blocks.append(block)
        return blocks

    def name_blocks(self, token_ids: Sequence[int], names: list[bytes], num_blocks: int, *, salt: str = "") -> None:
        """Append the names of the leading `num_blocks` blocks of `token_ids` that are not known yet."""
        if self._namer is not None:
            self._namer.extend(names, token_ids, num_blocks, salt=salt)

    def publish(
        self, blocks: Sequence[int], token_ids: Sequence[int], names: list[bytes], *, first: int = 0, salt: str = ""
    ) -> int:
        """Publish the full blocks of `token_ids` from `first` on, which are in the same places of `blocks`.

        Those before `first` must have been published or matched. Returns how many leading blocks are published now; it
        stops at a block whose name another block has already, unless there are states: then such a block was computed
        for the state behind it, and what follows is found behind the other block.
        """
        if self._namer is None:
            return 0
        num_full = len(token_ids) // self.block_size
        self._namer.extend(names, token_ids, num_full, salt=salt)
        for index in range(first, num_full):
            if names[index] in self._index:
                if self.states is None:
                    return index
                continue
            content = names[index], self._tokens(token_ids, index)
            self._contents[blocks[index]] = content
            self._index[names[index]] = blocks[index]
            if self.saves_published:
                self._saves.append(Save(blocks[index], *content, before=names[index - 1] if index else b""))
        return max(first, num_full)

    def adopt(self, block: int, name: bytes, token_ids: tuple[int, ...]) -> None:
        """Publish a block that has come from elsewhere, unless another one has its name."""
        if name not in self._index:
            self._contents[block] = name, token_ids
            self._index[name] = block

    def count_known(self, names: Sequence[bytes], token_ids: Sequence[tuple[int, ...]]) -> int:
        """Return how many leading blocks of these names and tokens are published, which then are the last to go of
        those that no request holds.
        """
        known: list[int] = []
        for name, tokens in zip(names, token_ids, strict=True):
            if (block := self._index.get(name)) is None or self._contents[block][1] != tokens:
                break
            known.append(block)
        for block in reversed(known):
            if block in self._cached:
                self._cached.move_to_end(block)
        return len(known)

    def saves_of(
        self,
        blocks: Sequence[int],
        token_ids: Sequence[int],
        names: list[bytes],
        *,
        first: int = 0,
        part: bool = False,
        salt: str = "",
    ) -> tuple[Save, ...]:
        """Return the saves of the full blocks of `token_ids` from `first` on, which have been computed, and with `part`
        of the last one too if it is not full. Without names there is nothing to save.
        """
        if self._namer is None:
            return ()
        num_full = len(token_ids) // self.block_size
        self._namer.extend(names, token_ids, num_full, salt=salt)
        before = [b"", *names[:num_full]]
        saves = [
            Save(blocks[index], names[index], self._tokens(token_ids, index), before=before[index])
            for index in range(first, num_full)
        ]
        if part and (rest := tuple(token_ids[num_full * self.block_size :])):
            name = self._namer.name_part(names[:num_full], rest, salt=salt)
            saves.append(Save(blocks[num_full], name, rest, before=before[num_full]))
        return tuple(saves)

    def name_part(self, names: Sequence[bytes], token_ids: Sequence[int], *, salt: str = "") -> bytes:
        """Return the name of tokens that do not fill a block, behind the blocks of these names."""
        assert self._namer is not None, "blocks have no names"
        return self._namer.name_part(names, token_ids, salt=salt)

    def name_parts(self, names: Sequence[bytes], token_ids: Sequence[int], *, salt: str = "") -> list[bytes]:
        """Return the names of the beginnings of tokens that do not fill a block, the shortest first, behind the blocks
        of these names; none if blocks have no names.
        """
        return [] if self._namer is None else self._namer.name_parts(names, token_ids, salt=salt)

    def save(self, saves: Sequence[Save]) -> None:
        """Note blocks for `take_saves`, which are not written to any more."""
        self._saves += saves

    def take_saves(self) -> tuple[Save, ...]:
        """Return the blocks that have been published or noted since the last call. Their content is there until the
        next step writes to the cache, though `allocate` may have given them away since.
        """
        if not self._saves:
            return ()
        taken = tuple(self._saves)
        self._saves.clear()
        return taken

    def states_of_blocks(self, stride: int = 1) -> bytes:
        """Return the state of every `stride`-th block, to be shown: 0 free, 1 cached, 2 held by one request, 3 shared.

        >>> allocator = BlockAllocator(4, 16)
        >>> allocator.allocate(1), allocator.states_of_blocks()
        ([0], b'\\x02\\x00\\x00\\x00')
        """
        references = self._references[::stride]
        cached = map(self._cached.__contains__, range(0, self.num_blocks, stride))
        if not any(references):  # of an idle engine, which takes a third of the time
            return bytes(cached)
        return bytes(min(count, 2) + 1 if count else each for count, each in zip(references, cached, strict=True))

    def check(self, holders: Iterable[Sequence[int]]) -> None:
        """Assert that every block is in exactly one state, and that `holders`, one list of blocks each, hold exactly
        the blocks that are held.
        """
        held = [0] * self.num_blocks
        for blocks in holders:
            assert len(set(blocks)) == len(blocks), f"a block twice in {blocks}"
            for block in blocks:
                held[block] += 1
        assert held == self._references, f"references {self._references}, holders {held}"
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free) and not free & cached, "a block twice among the free"
        assert held.count(0) == len(free) + len(cached), "a block lost or given away twice"
        assert not any(map(held.__getitem__, free)) and not any(map(held.__getitem__, cached)), "a held block is free"
        assert cached <= self._contents.keys() and not free & self._contents.keys(), "content in the wrong state"
        assert self._index == {name: block for block, (name, _) in self._contents.items()}, "index is stale"
        assert self.states is None or self.states.names <= self._index.keys(), "a snapshot without its block"

    def _tokens(self, token_ids: Sequence[int], index: int) -> tuple[int, ...]:
        return tuple(token_ids[index * self.block_size : (index + 1) * self.block_size])
