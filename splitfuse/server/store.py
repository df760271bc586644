"""Keeps finished answers in memory, for clients that ask for them again or go on from them: so many, and so many bytes.

An answer is JSON here, of whatever API. Each belongs to the owner of a key, and is known to that owner only.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict
from dataclasses import dataclass

from splitfuse.config.server import ServerConfig
from splitfuse.server.errors import RefusedError

OVERHEAD = 512
"""Number of bytes that an answer takes besides its own."""
STORE_DISABLED = "this server stores no answers (--max-stored-responses 0)"
"""Reason why an answer is not there, or cannot be stored."""


@dataclass(frozen=True, slots=True)
class StoredAnswer:
    """Holds an answer and what it was asked, both as JSON, and the id of the answer that it goes on from. `kind` is the
    API of which it is, which others do not know of it.
    """

    answer: bytes
    asked: bytes
    previous_id: str | None = None
    kind: str = "response"

    @property
    def size(self) -> int:
        """Return the number of bytes that it takes."""
        return len(self.answer) + len(self.asked) + OVERHEAD


class _Shelf(OrderedDict[str, StoredAnswer]):
    """Holds the answers of one owner by id, the one that was least recently used first."""

    size = 0


class AnswerStore:
    """Keeps the answers that were used last. Safe to share between threads.

    Where there is no room, the answer goes that its owner has not used for the longest: of the owner who has the most.

    >>> store = AnswerStore(max_answers=2, max_bytes=10_000)
    >>> store.put(None, "resp_1", StoredAnswer(b"{}", b"[]"))
    >>> store.find(None, "resp_1").answer
    b'{}'
    """

    def __init__(self, *, max_answers: int, max_bytes: int) -> None:
        self._max_answers, self._max_bytes = max_answers, max_bytes
        self._shelves: dict[str | None, _Shelf] = defaultdict(_Shelf)
        self._num_answers = self._num_bytes = 0
        self._lock = threading.Lock()  # answers of many log-probabilities are written off the event loop

    @classmethod
    def of(cls, config: ServerConfig) -> AnswerStore:
        """Return the store of a server."""
        return cls(max_answers=config.max_stored_responses, max_bytes=int(config.max_stored_mib * 2**20))

    @property
    def is_enabled(self) -> bool:
        """Return whether it keeps anything."""
        return self._max_answers > 0

    def has_room_for(self, answer: StoredAnswer) -> bool:
        """Return whether it keeps an answer of that size: others are dropped for it."""
        return self.is_enabled and answer.size <= self._max_bytes

    def keeps(self, asked: bool | None, *, left_out: bool) -> bool:
        """Return whether to keep an answer, where a request has the `store` `asked`, which means `left_out` if it is
        left out. Raises RefusedError (400) for store: true where nothing is kept.
        """
        if asked and not self.is_enabled:
            message = f"store: true is not possible, since {STORE_DISABLED}: leave store out or send false"
            raise RefusedError(400, message, code="unsupported_parameter", parameter="store")
        return self.is_enabled and (left_out if asked is None else asked)

    def put(self, owner: str | None, answer_id: str, answer: StoredAnswer) -> None:
        """Keep an answer, unless it is larger than all room that there is."""
        if not self.has_room_for(answer):
            return
        with self._lock:
            shelf = self._shelves[owner]
            shelf[answer_id] = answer
            shelf.size += answer.size
            self._num_answers += 1
            self._num_bytes += answer.size
            while self._num_answers > self._max_answers:
                self._drop_oldest(max(self._shelves, key=lambda each: len(self._shelves[each])))
            while self._num_bytes > self._max_bytes:
                self._drop_oldest(max(self._shelves, key=lambda each: self._shelves[each].size))

    def find(
        self, owner: str | None, answer_id: str, *, parameter: str | None = None, kind: str = "response"
    ) -> StoredAnswer:
        """Return an answer, which is the last one used then. Raises RefusedError (404)."""
        with self._lock:
            answer = self._get(owner, answer_id, parameter, kind=kind)
            self._shelves[owner].move_to_end(answer_id)
            return answer

    def chain(self, owner: str | None, answer_id: str, *, parameter: str) -> list[StoredAnswer]:
        """Return an answer and those that it goes on from, the oldest first. Raises RefusedError (404) if one of them
        is not there.
        """
        chain: dict[str, StoredAnswer] = {}
        wanted: str | None = answer_id
        with self._lock:
            while wanted is not None:
                before = f"{answer_id!r:.200} goes on from {wanted!r}, and " if chain else ""
                chain[wanted] = self._get(owner, wanted, parameter, before)
                wanted = chain[wanted].previous_id
            for each in reversed(chain):
                self._shelves[owner].move_to_end(each)
        return [*reversed(chain.values())]

    def delete(self, owner: str | None, answer_id: str, *, kind: str = "response") -> None:
        """Forget an answer. Raises RefusedError (404)."""
        with self._lock:
            self._get(owner, answer_id, kind=kind)
            self._drop(owner, answer_id)

    def _get(
        self,
        owner: str | None,
        answer_id: str,
        parameter: str | None = None,
        before: str = "",
        *,
        kind: str = "response",
    ) -> StoredAnswer:
        found = self._shelves[owner].get(answer_id) if owner in self._shelves else None
        if found is not None and found.kind == kind:
            return found
        reason = (
            "no answer had this id, or it was deleted, made with store: false or with another API key, or has given "
            f"way: the server keeps the {self._max_answers} answers used last (--max-stored-responses), of "
            f"{self._max_bytes / 2**20:g} MiB in all (--max-stored-mib), until it ends"
        )
        message = (
            f"{before}there is no stored answer {answer_id!r:.200}: {reason if self.is_enabled else STORE_DISABLED}"
        )
        raise RefusedError(404, message, code="answer_not_found", parameter=parameter)

    def _drop_oldest(self, owner: str | None) -> None:
        self._drop(owner, next(iter(self._shelves[owner])))

    def _drop(self, owner: str | None, answer_id: str) -> None:
        shelf = self._shelves[owner]
        size = shelf.pop(answer_id).size
        shelf.size -= size
        self._num_bytes -= size
        self._num_answers -= 1
        if not shelf:
            del self._shelves[owner]
