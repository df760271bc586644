"""Names of blocks: the same for equal prefixes, key and fingerprint, and different for any other."""

from __future__ import annotations

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from splitfuse.core.kv.names import NAME_BYTES, BlockNamer

TOKENS = list(range(100_000, 100_008))


def names(tokens: list[int], size: int = 2, key: bytes = b"key", fingerprint: bytes = b"", salt: str = "") -> list[str]:
    made: list[bytes] = []
    BlockNamer(size, key=key, fingerprint=fingerprint).extend(made, tokens, salt=salt)
    assert all(len(name) == NAME_BYTES for name in made)
    return [name.hex() for name in made]


def test_only_full_blocks_have_a_name() -> None:
    assert [len(names(TOKENS[:count])) for count in (0, 1, 2, 3, 4)] == [0, 0, 1, 1, 2]


def test_beginnings_of_a_block_have_names_of_their_own() -> None:
    namer, full = BlockNamer(4, key=b"key"), list[bytes]()
    namer.extend(full, TOKENS)
    parts = namer.name_parts(full[:1], TOKENS[4:7])
    assert len({*parts, *full}) == 3 + 2
    for count in (1, 2):
        assert namer.name_parts(full[:1], TOKENS[4 : 4 + count]) == parts[:count]
        assert namer.name_part(full[:1], TOKENS[4 : 4 + count]) == parts[count - 1]
    for others in (namer.name_parts([], TOKENS[4:7]), namer.name_parts(full, TOKENS[4:7])):
        assert not {*others} & {*parts}


def test_any_other_input_gives_other_names() -> None:
    base = names(TOKENS)
    others = (
        names(TOKENS, key=b"other"),
        names(TOKENS, fingerprint=b"other"),
        names(TOKENS, salt="other"),
        names([*TOKENS[:1], 7, *TOKENS[2:]]),
        names(TOKENS, salt="\ud800"),  # JSON may hold half of a surrogate pair
    )
    assert all(not set(base) & set(other) for other in others)
    assert len({name for chain in (base, *others) for name in chain}) == 6 * 4


def test_names_agree_up_to_the_block_that_differs() -> None:
    other = names([*TOKENS[:5], 7, *TOKENS[6:]])
    assert [a == b for a, b in zip(names(TOKENS), other, strict=True)] == [True, True, False, False]


def test_names_are_those_of_another_process() -> None:
    program = f"""
from splitfuse.core.kv.names import BlockNamer
names = []
BlockNamer(2, key=b"key").extend(names, {TOKENS})
print(*(name.hex() for name in names))
"""
    out = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert out.split() == names(TOKENS)


@given(st.lists(st.integers(0, 2**31 - 1), max_size=40), st.integers(1, 5), st.lists(st.integers(0, 40)))
def test_names_do_not_depend_on_the_pieces_they_are_made_in(tokens: list[int], size: int, ends: list[int]) -> None:
    namer, made = BlockNamer(size, key=b"key"), list[bytes]()
    for end in sorted(ends):
        namer.extend(made, tokens, min(end, len(tokens)) // size)
    namer.extend(made, tokens)
    assert [name.hex() for name in made] == names(tokens, size)
