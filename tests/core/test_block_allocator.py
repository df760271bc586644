"""Blocks are conserved, prefixes found by content, and forgotten by least recent use."""

import pytest

from splitfuse.core.kv.block_allocator import BlockAllocator


def published(allocator: BlockAllocator, tokens: list[int], salt: str = "") -> list[int]:
    blocks = allocator.allocate(allocator.blocks_for(len(tokens)))
    allocator.publish(blocks, tokens, salt=salt)
    return blocks


def test_allocate_and_release_conserve_blocks() -> None:
    allocator = BlockAllocator(4, 2)
    first, second = allocator.allocate(3), allocator.allocate(1)
    allocator.check([first, second])
    assert allocator.num_available == 0
    allocator.release(first)
    allocator.check([second])
    assert (allocator.num_available, allocator.num_held) == (3, 1)


def test_match_finds_the_longest_prefix_and_leaves_a_token_to_compute() -> None:
    allocator = BlockAllocator(10, 2)
    blocks = published(allocator, [1, 2, 3, 4, 5, 6])
    for tokens, found in (
        ([1, 2, 3, 4, 5, 6, 7], 3),
        ([1, 2, 3, 4, 5, 6], 2),
        ([1, 2, 3, 9, 5, 6], 1),
        ([9, 2, 3], 0),
    ):
        matched = allocator.match(tokens)
        assert matched == blocks[:found]
        allocator.check([blocks, matched])
        allocator.release(matched)


def test_a_block_is_found_only_behind_its_own_predecessor() -> None:
    allocator = BlockAllocator(10, 2)
    published(allocator, [1, 2, 5, 6])
    other = published(allocator, [3, 4])
    assert allocator.match([3, 4, 5, 6, 0]) == other


def test_a_hash_collision_is_not_a_match(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockAllocator, "_digest", lambda *_: 7)
    allocator = BlockAllocator(10, 2)
    blocks = published(allocator, [1, 2, 3, 4])
    assert allocator.match([8, 9, 1]) == []
    assert allocator.match([1, 2, 3, 4, 0]) == blocks[:1], "the second content found its place taken"
    assert allocator.match([1, 2, 1, 2, 0]) == blocks[:1], "the same tokens, but behind others"
    assert allocator.publish(allocator.allocate(1), [5, 6]) == 0
    assert allocator.match([1, 2, 3, 4, 0], salt="other") == []


def test_the_least_recently_used_prefix_is_forgotten_first_its_end_before_its_beginning() -> None:
    allocator = BlockAllocator(4, 2)
    old, new = published(allocator, [1, 2, 3, 4]), published(allocator, [5, 6, 7, 8])
    allocator.release(old)
    allocator.release(new)
    allocator.release(allocator.match([1, 2, 3, 4, 0]))  # used again: now [5, 6, 7, 8] is the older one
    taken = allocator.allocate(1)
    assert taken == new[1:]
    assert allocator.match([5, 6, 7, 8, 0]) == new[:1]


def test_a_second_holder_keeps_a_block_alive() -> None:
    allocator = BlockAllocator(2, 2)
    blocks = published(allocator, [1, 2])
    again = allocator.match([1, 2, 3])
    allocator.release(blocks)
    assert again == blocks and allocator.num_held == 1
    allocator.release(again)
    assert allocator.num_held == 0


def test_equal_content_is_published_once_and_what_follows_the_copy_is_not() -> None:
    allocator = BlockAllocator(10, 2)
    first = published(allocator, [1, 2])
    copy = allocator.allocate(2)
    assert allocator.publish(copy, [1, 2, 3, 4]) == 0
    assert allocator.match([1, 2, 3, 4, 5]) == first


def test_without_prefix_caching_nothing_is_remembered() -> None:
    allocator = BlockAllocator(4, 2, enable_prefix_caching=False)
    blocks = published(allocator, [1, 2])
    allocator.release(blocks)
    assert allocator.match([1, 2, 3]) == []
    allocator.check([])


def test_check_sees_a_leak_and_a_double_release() -> None:
    allocator = BlockAllocator(4, 2)
    blocks = allocator.allocate(2)
    with pytest.raises(AssertionError, match="references"):
        allocator.check([blocks[:1]])
    allocator.release(blocks)
    with pytest.raises(AssertionError, match="released too often"):
        allocator.release(blocks)
