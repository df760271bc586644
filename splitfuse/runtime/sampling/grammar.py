"""Allow only tokens with which an answer can have the form that its request asks for.

Each such request has a matcher, which knows the tokens chosen so far and gives a mask: a bit for each token of the
vocabulary. A matcher depends on nothing but its grammar and these tokens, so that a request has the same tokens in any
company, and preempted or not. The masks of a step are computed on threads while the network runs.
"""

from __future__ import annotations

import json
import re
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import TypeAlias
from weakref import WeakValueDictionary

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask_par
from numpy.typing import NDArray
from torch import Tensor

from splitfuse.core.plan import SamplingState
from splitfuse.core.structured_outputs import StructuredOutputs, refused

MAX_KEPT = 64
"""Number of grammars whose compiled form is kept for further requests."""

FEW_WORDS = 256
"""Number of a mask's 32-bit words with an allowed token up to which its tokens are looked at one by one."""

_CONTROL = re.compile(r"<(?!0x)[^<>]*>")
"""Texts of added tokens that the library holds for control tokens, whatever the tokenizer says."""

Mask: TypeAlias = NDArray[np.int32]
"""Type of a mask: a bit for each token, the first in the lowest bit of the first number."""


class Grammars:
    """Makes matchers for one model, and their masks. Safe to share between threads.

    `tokenizer` returns the model's tokenizer.json; it is read for the first request that asks for a form.
    """

    def __init__(self, tokenizer: Callable[[], str], vocab_size: int, end_tokens: Sequence[int]) -> None:
        self._read_tokenizer = tokenizer
        self._vocab_size = vocab_size
        # The library wants an end token: of a model without one, its last token, which `Masks` never allows.
        self._end_tokens = list(end_tokens) or [vocab_size - 1]
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

    def matcher(self, form: StructuredOutputs) -> LLMatcher:
        """Return a matcher at the beginning of an answer. Raises as the result of `prepare`, for which it waits."""
        return self.prepare(form).result().deep_copy()

    def begin_masks(self, matchers: Mapping[str, LLMatcher]) -> Masks:
        """Begin to fill the masks of the next tokens, by request id."""
        mask = np.empty((len(matchers), (self._vocab_size + 31) // 32), dtype=np.int32)
        filled = None
        if matchers:
            rows = [(matcher, row) for row, matcher in enumerate(matchers.values())]
            filled = self._filler.submit(fill_next_token_bitmask_par, self._executor, rows, mask)
        return Masks(matchers, mask, filled, self._end_tokens)

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
                without_control_texts(self._read_tokenizer()), n_vocab=self._vocab_size, eos_token=self._end_tokens
            )
        except BaseException as error:  # a panic of the library is no Exception
            raise refused(f"cannot be enforced with this model's tokenizer: {error!s:.200}") from error

    @cached_property
    def _executor(self) -> LLExecutor:
        return LLExecutor(torch.get_num_threads())

    @cached_property
    def _filler(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="masks")


class Masks:
    """Holds the masks of one step."""

    def __init__(
        self,
        matchers: Mapping[str, LLMatcher],
        mask: NDArray[np.int32],
        filled: Future[None] | None,
        end_tokens: Sequence[int],
    ) -> None:
        self._matchers = matchers
        self._rows = {request_id: row for row, request_id in enumerate(matchers)}
        self._mask = mask
        self._filled = filled
        self._end_tokens = end_tokens

    def wait(self) -> None:
        """Wait until the masks are filled."""
        if self._filled is not None:
            self._filled.result()

    def error(self, request_id: str) -> str | None:
        """Return why the grammar of a request has no mask, if it has none: it leads to more than the parser holds."""
        matcher = self._matchers.get(request_id)
        if matcher is None or not matcher.is_error():
            return None
        reason = matcher.get_error().split("<state>")[0].strip()
        if "NoExtension" in reason:
            reason = "nothing may follow what was generated, which is no whole answer"
        return f"structured_outputs cannot be enforced any further: {reason:.300}"

    def of(self, state: SamplingState) -> Mask | None:
        """Return the mask of a request; None if it may have any token. It allows tokens that end the answer only if
        they end it for the request, or if it has no other; and one that opens a thought, where one may open.
        """
        row = self._rows.get(state.request_id)
        if row is None:
            return None
        mask: Mask = self._mask[row]
        ends = [token for token in self._end_tokens if token not in state.eos_token_ids]
        if ends:
            others = mask.copy()
            for token in ends:
                others[token >> 5] &= ~_bit(token)
            mask = others if others.any() else mask
        if state.thought is not None and (opening := state.thought.opening) is not None:
            mask = mask.copy()
            mask[opening >> 5] |= _bit(opening)
        return mask


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


def _bit(token: int) -> np.int32:
    """Return the bit of a token in its number of a mask."""
    return np.uint32(1 << (token & 31)).view(np.int32)


def permits(mask: Mask, token: int) -> bool:
    """Return whether a mask allows a token."""
    return bool(mask[token >> 5] >> (token & 31) & 1)


def penalties(mask: Mask, vocab_size: int) -> NDArray[np.float32]:
    """Return what to add to the scores of all tokens: 0 to those that a mask allows, -inf to others."""
    return _OF_BYTE.take(mask.view(np.uint8), axis=0).reshape(-1)[:vocab_size]


_OF_BYTE = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), 0, -np.inf)
_OF_BYTE = _OF_BYTE.astype(np.float32)
"""Penalties of eight tokens, for each value of a byte: several times as fast as a choice by single bits."""


def best_permitted(logits: Tensor, mask: Mask) -> tuple[int, float]:
    """Return the token with the largest of `logits` [vocabulary] that a mask allows, the first of equal ones, and the
    logit: -inf if it allows none.
    """
    numbers = logits.float().cpu().numpy()
    words = np.flatnonzero(mask)
    if 0 < len(words) <= FEW_WORDS:  # mostly, but for within strings: a tenth of the time
        bits = np.unpackbits(mask[words].view(np.uint8).reshape(-1, 4), axis=1, bitorder="little")
        tokens = (words[:, None] * 32 + np.arange(32))[bits.view(bool)]
        best = int(tokens[numbers[tokens].argmax()])
        return best, float(numbers[best])
    numbers = numbers + penalties(mask, len(numbers))
    best = int(numbers.argmax())
    return best, float(numbers[best])


def forbid(scores: Tensor, masks: Sequence[Mask | None]) -> None:
    """Set the scores [rows, vocabulary] of tokens that their rows' masks do not allow to -inf."""
    for row, mask in zip(scores, masks, strict=True):
        if mask is not None:
            row.add_(torch.from_numpy(penalties(mask, len(row))).to(row.device))
