"""Allows only tokens with which an answer can have the form that its request asks for.

Each such request has a matcher, which knows the tokens chosen so far. It says in microseconds whether a token may come
next; a mask of all that may costs up to milliseconds, and most where nearly every token may. So tokens are chosen first
and asked for afterwards, and a mask is made only where those fail. A matcher depends on nothing but its grammar and
these tokens, so that a request has the same tokens in any company, and preempted or not.
"""

from __future__ import annotations

import json
import re
import secrets
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, cached_property
from typing import TypeAlias
from weakref import WeakValueDictionary

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask_par
from numpy.typing import NDArray

from splitfuse.core.plan import SamplingState
from splitfuse.core.reasoning import Thought
from splitfuse.core.structured_outputs import StructuredOutputs, refused

MAX_KEPT = 64
"""Number of grammars whose compiled form is kept for further requests."""

TRIES = 16
"""Number of tokens of a row that a matcher is asked about, one by one, before all that it allows are looked for."""

_CONTROL = re.compile(r"<(?!0x)[^<>]*>")
"""Texts of added tokens that the library holds for control tokens, whatever the tokenizer says."""

FEW_WORDS = 256
"""Number of a mask's words with a token up to which only these are unpacked: mostly, and in a third of the time."""

TokenIds: TypeAlias = NDArray[np.int64]
"""Type of a set of tokens, in ascending order."""


class Grammars:
    """Makes matchers for one model. Safe to share between threads.

    `tokenizer` returns the model's tokenizer.json; it is read for the first request that asks for a form.
    """

    def __init__(self, tokenizer: Callable[[], str], vocab_size: int, eos_tokens: Sequence[int]) -> None:
        self._read_tokenizer = tokenizer
        self._vocab_size = vocab_size
        # The library wants an EOS token: of a model without one, its last token, which ends no request.
        self._eos_tokens = list(eos_tokens) or [vocab_size - 1]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._made: WeakValueDictionary[str, Future[LLMatcher]] = WeakValueDictionary()  # kept here, or by a request
        self._kept: dict[str, Future[LLMatcher]] = {}  # the least recently used first
        self._lock = threading.Lock()

    def prepare(self, form: StructuredOutputs) -> Future[LLMatcher]:
        """Begin to make what `matcher` copies, unless there is one: while its result is referred to, there is. The
        result raises InvalidRequestError if the grammar cannot be enforced with this tokenizer.
        """
        with self._lock:
            self._kept.pop(form.compiled, None)
            made = self._made.get(form.compiled)
            if made is None or made.cancelled() or (made.done() and made.exception() is not None):
                made = self._thread.submit(self._make, form.compiled)
            self._made[form.compiled] = self._kept[form.compiled] = made
            if len(self._kept) > MAX_KEPT:
                del self._kept[next(iter(self._kept))]
            return made

    def matcher(self, form: StructuredOutputs, state: SamplingState) -> Matcher:
        """Return a matcher at the beginning of a request's answer. Raises as the result of `prepare`, for which it
        waits.
        """
        ends = frozenset(self._eos_tokens).difference(state.eos_token_ids)
        return Matcher(self.prepare(form).result().deep_copy(), self._vocab_size, ends, state.thought)

    def _make(self, compiled: str) -> LLMatcher:
        matcher = LLMatcher(self._tokenizer, compiled, log_level=0)
        if matcher.is_error():
            raise refused(f"cannot be enforced: {matcher.get_error():.300}")
        return matcher

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        """Return the vocabulary as the library needs it, which takes seconds for a large one."""
        try:
            return LLTokenizer(
                without_control_texts(self._read_tokenizer()), n_vocab=self._vocab_size, eos_token=self._eos_tokens
            )
        except BaseException as error:  # a panic of the library is no Exception
            raise refused(f"cannot be enforced with this model's tokenizer: {error!s:.200}") from error


class Matcher:
    """Follows the form of one answer: says which tokens may come next, and is advanced by the one that is chosen.

    A token of the model's that ends answers, but not this request (`others_ends`), is allowed only if nothing else is.
    One that opens a thought is allowed where a thought may open.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        vocab_size: int,
        others_ends: frozenset[int] = frozenset(),
        thought: Thought | None = None,
    ) -> None:
        self.is_loose = True
        """Whether one of TRIES tokens is likely to be allowed, as far as is known: it changes no choice."""
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._others_ends = others_ends
        self._thought = thought
        self._is_ahead = False  # by a token that was taken and is not settled

    def forced(self) -> TokenIds | None:
        """Return what may come next if the grammar leaves no choice of a text: of its tokens, the tokenizer's own. Only
        that one is in a mask, though `take` would take others; so it is asked for first.
        """
        tokens = self.run
        return self._with_opening(np.array(tokens[:1])) if tokens else None

    def take(self, token: int, *, nothing_else: bool = False) -> bool:
        """Advance by a token if it may come next. Until `settle`, other tokens are for the same place."""
        self._go_back()
        if self._thought is not None and token == self._thought.opening:
            return True
        if nothing_else or token not in self._others_ends:
            self._is_ahead = self._matcher.try_consume_tokens([token]) == 1
        return self._is_ahead

    def after(self, tokens: Sequence[int], thought: Thought | None) -> Matcher | None:
        """Return a matcher which is some tokens ahead of this one, which stays as it is: None if they may not come
        next, or if nothing can follow them.
        """
        self._go_back()
        matcher = self._matcher.deep_copy()
        if matcher.try_consume_tokens(list(tokens)) != len(tokens) or matcher.is_stopped():
            return None
        ahead = Matcher(matcher, self._vocab_size, self._others_ends, thought)
        ahead.is_loose = self.is_loose
        return ahead

    @property
    def run(self) -> list[int]:
        """Return the tokens that must follow, as far as the grammar leaves no choice of a text."""
        self._go_back()
        tokens: list[int] = self._matcher.compute_ff_tokens()
        return tokens

    def settle(self, tokens: Sequence[int]) -> bool:
        """Keep the token that was taken; or advance by several, before any was. Returns whether nothing can follow."""
        if not self._is_ahead:
            self._matcher.consume_tokens(list(tokens))
        self._is_ahead = False
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def error(self) -> str | None:
        """Return why the grammar cannot be enforced any further, if so: it leads to more than the parser holds."""
        if not self._matcher.is_error():
            return None
        reason = self._matcher.get_error().split("<state>")[0].strip()
        if "NoExtension" in reason:
            reason = "nothing may follow what was generated, which is no whole answer"
        return f"structured_outputs cannot be enforced any further: {reason:.300}"

    def _go_back(self) -> None:
        """Undo a step that failed after its tokens were chosen."""
        if self._is_ahead:
            self._matcher.rollback(1)
            self._is_ahead = False

    def _allowed(self, mask: NDArray[np.int32]) -> TokenIds:
        if self._matcher.is_error():
            return np.empty(0, dtype=np.int64)
        tokens = _tokens(mask, self._vocab_size)
        self.is_loose = len(tokens) * TRIES > self._vocab_size
        others = tokens
        for end in self._others_ends:
            others = others[others != end]
        return self._with_opening(others if len(others) else tokens)

    def _with_opening(self, tokens: TokenIds) -> TokenIds:
        opening = None if self._thought is None else self._thought.opening
        return tokens if opening is None else np.union1d(tokens, [opening])

    @staticmethod
    def allowed(matchers: Sequence[Matcher]) -> list[TokenIds]:
        """Return all tokens that may come next, for each matcher: none if it has an error. Computed in parallel."""
        if not matchers:
            return []
        masks = np.empty((len(matchers), (matchers[0]._vocab_size + 31) // 32), dtype=np.int32)
        for matcher in matchers:
            matcher._go_back()
        rows = [(matcher._matcher, row) for row, matcher in enumerate(matchers)]
        fill_next_token_bitmask_par(_executor(torch.get_num_threads()), rows, masks)
        return [matcher._allowed(mask) for matcher, mask in zip(matchers, masks, strict=True)]


@cache
def _executor(num_threads: int) -> LLExecutor:
    return LLExecutor(num_threads)


def _tokens(mask: NDArray[np.int32], vocab_size: int) -> TokenIds:
    """Return the tokens of a mask: a bit for each token, the first in the lowest bit of the first number."""
    words = np.flatnonzero(mask)
    if len(words) > FEW_WORDS:
        return np.flatnonzero(np.unpackbits(mask.view(np.uint8), count=vocab_size, bitorder="little").view(bool))
    bits = np.unpackbits(mask[words].view(np.uint8).reshape(-1, 4), axis=1, bitorder="little")
    tokens: TokenIds = (words[:, None] * 32 + np.arange(32))[bits.view(bool)]
    return tokens


def without_control_texts(tokenizer: str) -> str:
    """Return a tokenizer.json in which no text that a grammar asks for is a control token.

    The library takes the text `<|user|>` within a string of JSON for the token, which it then forbids as control: the
    answer fails. With names that nothing foresees, that text is one of ordinary tokens.
    """
    content, secret = json.loads(tokenizer), secrets.token_hex(16)
    names = {}
    for token in content.get("added_tokens", ()):
        name = token["content"]
        if token["special"] or _CONTROL.fullmatch(name):
            names[name] = token["content"] = f"<|{secret}-{token['id']}|>"
    model = content["model"]
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(name, name): token_id for name, token_id in vocab.items()}
    else:
        model["vocab"] = [[names.get(name, name), score] for name, score in vocab]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    return json.dumps(content, ensure_ascii=False)
