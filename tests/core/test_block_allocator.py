"""Blocks are conserved, prefixes found by content, and forgotten by least recent use."""

import pytest

from splitfuse.core.kv.block_allocator import BlockAllocator
from splitfuse.core.kv.names import BlockNamer


class CountingNamer(BlockNamer):
    """Counts the blocks that it hashes."""

    count = 0

    def extend(self, names, token_ids, num_blocks=None, *, salt=""):  # type: ignore[no-untyped-def]
        before = len(names)
        super().extend(names, token_ids, num_blocks, salt=salt)
        self.count += len(names) - before


class OneName(BlockNamer):
    """Gives all blocks the same name."""

    def extend(self, names, token_ids, num_blocks=None, *, salt=""):  # type: ignore[no-untyped-def]  # noqa: ARG002
        names[:] = [b"name"] * (len(token_ids) // self.block_size if num_blocks is None else num_blocks)


def make_allocator(num_blocks: int, namer: BlockNamer | None = None) -> BlockAllocator:
    return BlockAllocator(num_blocks, 2, namer=BlockNamer(2, key=b"test") if namer is None else namer)


def published(allocator: BlockAllocator, tokens: list[int], salt: str = "") -> list[int]:
    blocks = allocator.allocate(allocator.blocks_for(len(tokens)))
    allocator.publish(blocks, tokens, [], salt=salt)
    return blocks


def test_allocate_and_release_conserve_blocks() -> None:
    allocator = make_allocator(4)
    first, second = allocator.allocate(3), allocator.allocate(1)
    allocator.check([first, second])
    assert allocator.num_available == 0
    allocator.release(first)
    allocator.check([second])
    assert (allocator.num_available, allocator.num_held) == (3, 1)


def test_match_finds_the_longest_prefix_and_leaves_a_token() -> None:
    allocator = make_allocator(10)
    blocks = published(allocator, [1, 2, 3, 4, 5, 6])
    for tokens, found in (
        ([1, 2, 3, 4, 5, 6, 7], 3),
        ([1, 2, 3, 4, 5, 6], 2),
        ([1, 2, 3, 9, 5, 6], 1),
        ([9, 2, 3], 0),
    ):
        matched = allocator.match(tokens, [])
        assert matched == blocks[:found]
        allocator.check([blocks, matched])
        allocator.release(matched)


def test_a_block_is_found_only_behind_its_own_predecessor() -> None:
    allocator = make_allocator(10)
    published(allocator, [1, 2, 5, 6])
    other = published(allocator, [3, 4])
    assert allocator.match([3, 4, 5, 6, 0], []) == other


def test_nothing_is_shared_between_salts() -> None:
    allocator = make_allocator(10)
    blocks = published(allocator, [1, 2], salt="a")
    assert allocator.match([1, 2, 3], []) == []
    assert allocator.match([1, 2, 3], [], salt="b") == []
    assert allocator.match([1, 2, 3], [], salt="a") == blocks


def test_tokens_are_compared_where_names_are_equal() -> None:
    allocator = make_allocator(10, OneName(2, key=b""))
    blocks = published(allocator, [1, 2, 3, 4])
    assert allocator.match([8, 9, 1], []) == []
    assert allocator.match([1, 2, 3, 4, 0], []) == blocks[:1], "the second block found its name taken"
    assert allocator.publish(allocator.allocate(1), [5, 6], []) == 0


def test_a_block_is_hashed_once_for_each_request() -> None:
    namer = CountingNamer(2, key=b"test")
    allocator = make_allocator(10, namer)
    tokens, names = [1, 2, 3, 4, 5, 6, 7], list[bytes]()
    assert allocator.match(tokens, names) == []
    blocks = allocator.allocate(4)
    for end, first in ((3, 0), (4, 1), (7, 2)):
        allocator.publish(blocks, tokens[:end], names, first=first)
    allocator.release(blocks)
    assert allocator.match(tokens, names) == blocks[:3]
    assert namer.count == 3


def test_the_least_recently_used_prefix_is_forgotten_end_first() -> None:
    allocator = make_allocator(4)
    old, new = published(allocator, [1, 2, 3, 4]), published(allocator, [5, 6, 7, 8])
    allocator.release(old)
    allocator.release(new)
    allocator.release(allocator.match([1, 2, 3, 4, 0], []))  # used again: now [5, 6, 7, 8] is the older one
    taken = allocator.allocate(1)
    assert taken == new[1:]
    assert allocator.match([5, 6, 7, 8, 0], []) == new[:1]


def test_a_second_holder_keeps_a_block_alive() -> None:
    allocator = make_allocator(2)
    blocks = published(allocator, [1, 2])
    again = allocator.match([1, 2, 3], [])
    allocator.release(blocks)
    assert again == blocks and allocator.num_held == 1
    allocator.release(again)
    assert allocator.num_held == 0


def test_equal_content_is_published_once_and_stops_its_copy() -> None:
    allocator = make_allocator(10)
    first = published(allocator, [1, 2])
    copy = allocator.allocate(2)
    assert allocator.publish(copy, [1, 2, 3, 4], []) == 0
    assert allocator.match([1, 2, 3, 4, 5], []) == first


def test_without_a_namer_nothing_is_remembered() -> None:
    allocator = BlockAllocator(4, 2)
    blocks = published(allocator, [1, 2])
    allocator.release(blocks)
    assert allocator.match([1, 2, 3], []) == []
    allocator.check([])


def test_check_sees_a_leak_and_a_double_release() -> None:
    allocator = make_allocator(4)
    blocks = allocator.allocate(2)
    with pytest.raises(AssertionError, match="references"):
        allocator.check([blocks[:1]])
    allocator.release(blocks)
    with pytest.raises(AssertionError, match="released too often"):
        allocator.release(blocks)
