"""Follows the thought that a model writes before its answer: where it opens and ends, and when it must be closed.

All of it is a function of the tokens generated so far: nothing else decides what may come next, so that a request has
the same tokens in any company, preempted or not. It is kept up token by token where tokens are chosen
(runtime/sampling/), and again where they become text (text/generation.py).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, fields

from splitfuse.errors import InvalidRequestError, brief

MAX_TOKEN_IDS = 1024
"""Number of token ids that a marker or a sequence between thought and answer may have."""


@dataclass(frozen=True, kw_only=True)
class Reasoning:
    """Says by which tokens a model opens and ends a thought, and how many tokens that may have.

    Nothing changes which tokens are chosen unless there is a budget, `max_tokens`, or the answer must have a form
    (`structured_outputs`). With either of them every thought ends before the request does: one that has used up its
    budget is closed, and so is one within which the model would end the request. An answer without a form may be empty,
    and tokens of `stop_token_ids` end the request anywhere.

    >>> Reasoning(start_token_ids=(5,), end_token_ids=(6,), max_tokens=100)
    """

    start_token_ids: tuple[int, ...] = ()
    """Sequence that opens a thought at the beginning of an answer; empty if only the prompt may open one."""
    end_token_ids: tuple[int, ...]
    """Sequence that ends a thought."""
    is_open: bool = False
    """Flag of a prompt that has opened the thought."""
    reopens: bool = False
    """Flag of a model for which start_token_ids open a thought anywhere in an answer."""
    max_tokens: int | None = None
    """Most tokens of thoughts, their markers not counted; None: as many as the model generates."""
    close_token_ids: tuple[int, ...] = ()
    """Sequence that closes a thought which has used up its budget, with end_token_ids at its end; empty: those."""
    answer_token_ids: tuple[int, ...] = ()
    """Sequence between a thought that was closed for its budget, or any before an answer of a form, and the answer."""
    space_token_ids: tuple[int, ...] = ()
    """Tokens of white space: what comes after them is still the beginning of an answer without a form."""

    def __post_init__(self) -> None:
        for each in fields(self):
            if each.name.endswith("_ids"):
                _check_token_ids(each.name, getattr(self, each.name))
        if not self.end_token_ids:
            raise _refused("end_token_ids", self.end_token_ids, "at least one token id")
        if not self.start_token_ids and not self.is_open:
            raise _refused("start_token_ids", self.start_token_ids, "at least one token id unless is_open")
        if self.close_token_ids and self.close_token_ids[-len(self.end_token_ids) :] != self.end_token_ids:
            raise _refused("close_token_ids", self.close_token_ids, "a sequence with end_token_ids at its end")
        if self.max_tokens is not None and not _is_count(self.max_tokens):
            raise _refused("max_tokens", self.max_tokens, "a whole number from 0 on, or None")

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Return all tokens that it names."""
        return self.start_token_ids + self.end_token_ids + self.close_token_ids + self.answer_token_ids


class Phase(enum.Enum):
    """Says what the next token is part of."""

    START = enum.auto()
    """Of start_token_ids, or the first of an answer, perhaps after white space."""
    THOUGHT = enum.auto()
    """Of a thought, or of the sequence that ends it."""
    BETWEEN = enum.auto()
    """Of answer_token_ids."""
    ANSWER = enum.auto()


class Thought:
    """Follows the tokens of one answer. `has_form` says that the answer must have a form, from its first token on.

    >>> thought = Thought(Reasoning(end_token_ids=(6,), is_open=True, max_tokens=1), has_form=False)
    >>> thought.push(7), thought.forced, thought.push(6), thought.phase, thought.num_tokens
    (False, 6, False, <Phase.ANSWER: 4>, 1)
    """

    def __init__(self, reasoning: Reasoning, *, has_form: bool) -> None:
        self.reasoning = reasoning
        self.phase = Phase.START
        self._has_form = has_form
        self._num_taken = 0  # tokens of thoughts so far, with the beginning of the marker that ends the last one
        self._matched = 0  # tokens of the marker that is looked for, which the newest tokens are
        self._forced: tuple[int, ...] = ()
        self._used_up = self._has_thought = False
        if reasoning.is_open:
            self._open()

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens of thoughts so far, without their markers."""
        return self._num_taken - (self._matched if self.phase is Phase.THOUGHT else 0)

    @property
    def forced(self) -> int | None:
        """Return the only token that may come next, if there is only one."""
        return self._forced[0] if self._forced else None

    @property
    def heeds_form(self) -> bool:
        """Return whether the form of the answer says which token may come next."""
        return not self._forced and self.phase in (Phase.START, Phase.ANSWER)

    @property
    def opening(self) -> int | None:
        """Return the token that may come next whatever the form of the answer, since it opens a thought."""
        return self.reasoning.start_token_ids[0] if self.heeds_form and self.phase is Phase.START else None

    @property
    def closing(self) -> int | None:
        """Return the token that replaces one with which the model would end the request within a thought."""
        needs_answer = self.reasoning.max_tokens is not None or self._has_form
        if self.phase is not Phase.THOUGHT or self._forced or not needs_answer:
            return None
        return self.reasoning.end_token_ids[self._matched]

    @property
    def forbidden(self) -> int | None:
        """Return the token that may not come next, since it would open a thought again with no budget left."""
        start = self.reasoning.start_token_ids
        if not self._used_up or self._has_form or not self._may_open or self._matched != min(1, len(start) - 1):
            return None
        return start[self._matched]

    @property
    def _may_open(self) -> bool:
        return self.phase is Phase.START or (self.phase is Phase.ANSWER and self.reasoning.reopens)

    def push(self, token_id: int) -> bool:
        """Take in the next token. Returns whether it is part of the answer. Without a form, so is the beginning of a
        sequence that opens a thought, until that is complete; white space after a thought is not.
        """
        self._forced = self._forced[1:]
        match self.phase:
            case Phase.THOUGHT:
                self._push_thought(token_id)
                return False
            case Phase.BETWEEN:
                if not self._forced:
                    self._begin_answer()
                return False
            case Phase.ANSWER if self._has_form or not self.reasoning.reopens:
                return True
        return self._push_start(token_id)

    def _push_start(self, token_id: int) -> bool:
        start, before = self.reasoning.start_token_ids, self._matched
        self._matched = _matched(start, before, token_id)
        if self._matched == len(start) > 0:
            self._open()
            return False
        if self._matched > before:
            if self._has_form:  # the choice is made: what the form would say of these tokens is not asked
                self._forced = start[self._matched :]
            return not self._has_form
        is_start = self.phase is Phase.START and self._matched == before == 0 and not self._has_form
        if is_start and token_id in self.reasoning.space_token_ids:
            return not self._has_thought
        self.phase = Phase.ANSWER
        return True

    def _push_thought(self, token_id: int) -> None:
        end = self.reasoning.end_token_ids
        self._num_taken += 1
        self._matched = _matched(end, self._matched, token_id)
        if self._matched < len(end):
            self._close_if_used_up()
            return
        self._num_taken -= len(end)
        self._matched = 0
        self._forced = self.reasoning.answer_token_ids if self._used_up or self._has_form else ()
        if self._forced:
            self.phase = Phase.BETWEEN
        else:
            self._begin_answer()

    def _begin_answer(self) -> None:
        can_open = self.reasoning.start_token_ids and not self._has_form
        self.phase = Phase.START if can_open else Phase.ANSWER

    def _open(self) -> None:
        self._has_thought = True
        self.phase, self._matched, self._forced = Phase.THOUGHT, 0, ()
        self._close_if_used_up()

    def _close_if_used_up(self) -> None:
        budget, end = self.reasoning.max_tokens, self.reasoning.end_token_ids
        if self._forced or budget is None or self._num_taken < budget:
            return
        self._used_up = True
        self._forced = end[self._matched :] if self._matched else self.reasoning.close_token_ids or end


def _matched(marker: tuple[int, ...], matched: int, token_id: int) -> int:
    """Return how many tokens at the beginning of a marker the newest tokens are, after `token_id`, if `matched` were
    before it.
    """
    newest = (*marker[:matched], token_id)
    while newest != marker[: len(newest)]:
        newest = newest[1:]
    return len(newest)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _check_token_ids(name: str, value: object) -> None:
    if not isinstance(value, tuple) or len(value) > MAX_TOKEN_IDS or not all(map(_is_count, value)):
        raise _refused(name, value, f"a tuple of at most {MAX_TOKEN_IDS} token ids")


def _refused(name: str, value: object, valid: str) -> InvalidRequestError:
    return InvalidRequestError(f"reasoning.{name} must be {valid}, not {brief(value)}", parameter="reasoning")
