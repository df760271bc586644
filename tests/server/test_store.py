"""What the server keeps: so many answers, and so many bytes, of each owner of a key the last used."""

import pytest

from splitfuse.server.errors import RefusedError
from splitfuse.server.store import OVERHEAD, AnswerStore, StoredAnswer

SMALL = StoredAnswer(b"{}", b"[]")


def store_of(num_answers: int = 100, max_bytes: int = 1_000_000, **owners: int) -> AnswerStore:
    """A store in which owners have so many answers: `a0`, `a1`, ..."""
    store = AnswerStore(max_answers=num_answers, max_bytes=max_bytes)
    for owner, count in owners.items():
        for number in range(count):
            store.put(owner, f"{owner}{number}", SMALL)
    return store


def has(store: AnswerStore, owner: str, answer_id: str) -> bool:
    try:
        return store.find(owner, answer_id) is not None
    except RefusedError as error:
        assert (error.status, error.code) == (404, "answer_not_found")
        return False


def test_the_least_recently_used_answer_gives_way() -> None:
    store = store_of(3, a=3)
    store.find("a", "a0")
    store.put("a", "a3", SMALL)
    assert [has(store, "a", f"a{number}") for number in range(4)] == [True, False, True, True]


def test_bytes_are_bounded_by_what_answers_take() -> None:
    answer = StoredAnswer(b"x" * 1000, b"y" * 1000)
    store = store_of(max_bytes=3 * answer.size + 10)
    for number in range(5):
        store.put("a", f"a{number}", answer)
    assert [has(store, "a", f"a{number}") for number in range(5)] == [False, False, True, True, True]
    store.put("a", "huge", StoredAnswer(b"z" * 10_000, b""))
    assert not has(store, "a", "huge") and has(store, "a", "a4"), "one larger than all room displaces nothing"
    assert answer.size == 2000 + OVERHEAD


def test_the_owner_with_the_most_gives_way() -> None:
    store = store_of(10, b=2, a=8)
    for number in range(8, 100):
        store.put("a", f"a{number}", SMALL)
    assert has(store, "b", "b0") and has(store, "b", "b1") and has(store, "a", "a99")
    assert not has(store, "a", "a91") and has(store, "a", "a92")


def test_answers_are_known_to_their_owner_only() -> None:
    store = store_of(a=1, b=1)
    assert not has(store, "b", "a0") and not has(store, "c", "a0")
    with pytest.raises(RefusedError, match="another API key"):
        store.delete("b", "a0")
    store.delete("a", "a0")
    assert not has(store, "a", "a0") and has(store, "b", "b0")


def test_a_chain_comes_in_order_and_stays_whole() -> None:
    store = AnswerStore(max_answers=4, max_bytes=1_000_000)
    for number, previous in enumerate((None, "0", "1")):
        store.put("a", str(number), StoredAnswer(b"%d" % number, b"[]", previous))
    store.put("a", "other", SMALL)
    assert [each.answer for each in store.chain("a", "2", parameter="p")] == [b"0", b"1", b"2"]
    store.put("a", "newest", SMALL)
    assert not has(store, "a", "other"), "the chain was used later"
    store.chain("a", "2", parameter="p")
    for number in range(2):
        store.put("a", f"newer{number}", SMALL)
    assert has(store, "a", "1") and has(store, "a", "2") and not has(store, "a", "0"), (
        "the oldest of a chain goes first"
    )
    store.delete("a", "1")
    with pytest.raises(RefusedError, match="'2' goes on from '1', and there is no stored answer '1'") as raised:
        store.chain("a", "2", parameter="p")
    assert raised.value.parameter == "p"


def test_a_store_that_is_off_says_so() -> None:
    store = store_of(0, a=1)
    assert not store.is_enabled
    with pytest.raises(RefusedError, match="--max-stored-responses 0"):
        store.find("a", "a0")
