"""Drafts by a second, smaller model: decides which requests have some, how many, and what its KV cache holds.

Tokens are guessed in rounds: a step of the draft model gives one more for each request that takes part. A round is
worth the chances that its guesses are right times the seconds of a token without it; it costs its own seconds, and
those by which its guesses lengthen the step that checks them. This is weighed before each round, by the chances that
guesses had so far: a request whose guesses are poor has none, and a step of many requests few.

Before a request has guesses, that model must have computed its tokens: the prompt, and what came since it last guessed.
What is long is computed in pieces, which take a fraction of a step each, and only if as many tokens as the request has
generated would pay for it: that is what is left of an answer that may end anywhere.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from splitfuse.core.kv.block_allocator import BlockAllocator
from splitfuse.core.plan import Chunk
from splitfuse.core.request import Request
from splitfuse.core.speculation.acceptance import Acceptance
from splitfuse.core.speculation.token_cost import TokenCost

WORTH = 1.25
"""Least worth of a draft, relative to its cost: both are estimates, and deciding takes time too."""
FEW_TOKENS = 8
"""Most tokens of a request that are computed with its first guess whatever they take: about those of a step."""
CATCH_UP_SHARE = 1 / 4
"""Fraction of the seconds of a step that the draft model may take for tokens of requests which do not guess yet."""
MAX_CATCH_UP = 256
"""Most such tokens in a step of the draft model."""
MIN_SECONDS = 1e-9
"""Lower bound of the time of a token, which is divided by."""
MAX_FAILURES = 3
"""Number of failures in a row after which the draft model is not used any more."""

logger = logging.getLogger(__name__)


def most_tokens(num_requests: int) -> int:
    """Return the most tokens of a step of the draft model, for so many requests."""
    return MAX_CATCH_UP + FEW_TOKENS * num_requests


class Guess(NamedTuple):
    """Holds what the draft model takes to come next."""

    token: int
    confidence: float
    """How sure it is, from 0 to 1. What that means is learned."""


class Guesses(NamedTuple):
    """Holds what a step of the draft model has given."""

    guesses: Sequence[Guess | None]
    """Guess of each chunk; None for one without logits, and where nothing can follow."""
    seconds: float


class DraftModel(Protocol):
    """Computes steps of the draft model."""

    def guess(self, chunks: Sequence[Chunk], drafts: Sequence[Sequence[int]]) -> Guesses:
        """Compute chunks over the KV cache of the draft model, and guess what follows each that has logits: its request
        has been given all tokens before the `drafts` that go with the chunk.
        """


class StepWorth(NamedTuple):
    """Describes a step of decodes before the model has drafted anything."""

    tokens: float
    """Number of tokens that it will give."""
    seconds: float
    per_token: float
    """Seconds that one more token adds to it."""
    least: float
    """Chance of a draft that is not worth computing."""
    seconds_left: float
    """Seconds that drafts may take until one of its requests would miss its SLO."""
    most_drafts: int
    """Largest number of drafts that it may have."""


@dataclass(slots=True)
class _Run:
    """Holds what the draft model has computed of one request."""

    blocks: list[int] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)
    token_ids: array[int] = field(default_factory=lambda: array("i"))
    """Tokens whose keys and values are written: of guesses too, until `confirm`."""
    num_confirmed: int = 0
    """Number of leading tokens that the request has been given."""
    num_full: int = 0
    """Number of blocks that were full when it was last published."""
    num_published: int = 0

    def confirm(self, request: Request) -> None:
        """Keep the tokens that the request has been given, but for its newest one, whose logits are wanted."""
        end = min(len(self.token_ids), request.num_tokens - 1)
        known = request.tokens(self.num_confirmed, end)
        pairs = zip(known, self.token_ids[self.num_confirmed : end], strict=True)
        self.num_confirmed += next((n for n, (own, guess) in enumerate(pairs) if own != guess), len(known))
        del self.token_ids[self.num_confirmed :]


@dataclass(slots=True, eq=False)
class _Ask:
    """Follows the guesses for one request in a step."""

    request: Request
    acceptance: Acceptance
    most: int
    """Largest number of drafts."""
    run: _Run = field(default_factory=_Run)
    drafts: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    chance: float = 1.0
    """Chance that all drafts are right; 0: nothing can follow them."""

    @property
    def gain(self) -> float:
        """Return the chance that the next guess is right, and all before it."""
        return self.chance * self.acceptance.mean

    @property
    def num_missing(self) -> int:
        """Return how many tokens are to be computed for the next guess."""
        return self.request.num_tokens + len(self.drafts) - len(self.run.token_ids)

    def tokens(self, count: int) -> tuple[int, ...]:
        """Return the next `count` tokens to compute."""
        start, num_known = len(self.run.token_ids), self.request.num_tokens
        known = self.request.tokens(start, min(start + count, num_known)) if start < num_known else ()
        first = max(start - num_known, 0)
        return known + tuple(self.drafts[first : first + count - len(known)])

    def take(self, guess: Guess | None, vocab_size: int) -> None:
        """Take in a guess. One that ends the request is none: nothing comes after it."""
        request, chance = self.request, 0.0
        if guess is not None and (guess.token in request.eos_token_ids or guess.token in request.params.stop_token_ids):
            self.chance = 0.0
            return
        if guess is not None and 0 <= guess.token < vocab_size:
            chance = self.acceptance.chance(guess.confidence)
            self.drafts.append(guess.token)
            self.confidences.append(guess.confidence)
        self.acceptance.note_guess(chance)
        self.chance *= chance


class ModelDrafts:
    """Drafts by a second model. `allocator` has the blocks of its KV cache, `vocab_size` is how many token ids both
    models have, and `max_positions` how many positions it has itself. Until its steps are measured, one is taken to
    last for `relative_cost` of a step of the other.
    """

    def __init__(
        self,
        model: DraftModel,
        allocator: BlockAllocator,
        *,
        vocab_size: int,
        max_positions: int,
        relative_cost: float,
    ) -> None:
        self.cost = TokenCost()
        self.acceptance = Acceptance()
        """How right its guesses are for any request."""
        self.seconds = 0.0
        """Seconds that its steps have taken."""
        self.num_failures = 0
        """Failures since it last guessed."""
        self._model = model
        self._allocator = allocator
        self._vocab_size = vocab_size
        self._max_positions = max_positions
        self._relative_cost = relative_cost
        self._runs: dict[str, _Run] = {}  # the least recently used first

    @property
    def is_on(self) -> bool:
        """Return whether the draft model is used."""
        return self.num_failures < MAX_FAILURES

    def draft(self, requests: Sequence[Request], most: int, worth: StepWorth) -> dict[Request, list[tuple[int, float]]]:
        """Return up to `most` tokens that may come next of some requests, each with the chance that it and those before
        it are right. A failure of the draft model is logged; then there are none.
        """
        if not self.is_on or worth.most_drafts < 1:
            return {}
        try:
            asks = self._draft(requests, most, worth)
        except Exception:
            self.num_failures += 1
            logger.exception("the draft model failed%s", "" if self.is_on else ", and is not used any more")
            for request_id in list(self._runs):
                self.forget(request_id)
            return {}
        if any(ask.drafts for ask in asks):
            self.num_failures = 0
        found = {}
        for ask in asks:
            chance, drafts = 1.0, []
            for token, confidence in zip(ask.drafts, ask.confidences, strict=True):
                chance *= ask.acceptance.chance(confidence)
                if chance <= worth.least:
                    break
                drafts.append((token, chance))
            if drafts:
                found[ask.request] = drafts
                ask.request.drafts.confidences = tuple(ask.confidences)
        return found

    def forget(self, request_id: str) -> None:
        """Give back the blocks of a request."""
        if (run := self._runs.pop(request_id, None)) is not None:
            self._allocator.release(run.blocks)

    @property
    def num_held(self) -> int:
        """Return how many blocks of its KV cache requests hold."""
        return self._allocator.num_held

    def check(self) -> None:
        """Assert that its requests hold all blocks that are held. For tests."""
        self._allocator.check(run.blocks for run in self._runs.values())

    # A step -----------------------------------------------------------------------------------------------------------

    def _draft(self, requests: Sequence[Request], most: int, worth: StepWorth) -> Sequence[_Ask]:
        """Return what was guessed, in rounds, for the requests for which that is worth it."""
        if not self.cost.is_measured:
            for count in (1, 8):  # the first measured steps outweigh it
                of_other = worth.seconds + worth.per_token * (count - worth.tokens)
                self.cost.observe(count, self._relative_cost * of_other)
        value, asks = worth.seconds / worth.tokens, list[_Ask]()
        for request in requests:
            if (ask := self._ask(request, most)) is not None:
                if self._is_worth_it(ask, value, worth):
                    asks.append(ask)
                else:
                    ask.acceptance.note_pause()
        if not self._pays(asks, value, worth, worth.seconds_left):
            return ()
        for ask in asks:
            self._begin(ask)
        pieces = self._pieces(asks, value, worth)
        asks = ready = [ask for ask in asks if ask.num_missing <= FEW_TOKENS][: worth.most_drafts]
        spent, tokens, seconds = 0.0, worth.tokens, worth.seconds
        while True:
            if not self._pays(ready, value, worth, worth.seconds_left - spent):
                ready = []
            if not ready and not pieces:
                return asks
            spent += self._compute(ready, pieces)
            tokens += sum(ask.chance for ask in ready)
            seconds += len(ready) * worth.per_token
            value, pieces = (seconds + spent) / tokens, []
            ready = [
                ask
                for ask in ready
                if ask.chance > worth.least and len(ask.drafts) < ask.most and self._is_worth_it(ask, value, worth)
            ]
            del ready[max(worth.most_drafts - sum(len(ask.drafts) for ask in asks), 0) :]

    def _ask(self, request: Request, most: int) -> _Ask | None:
        """Return the state of a request that has no guesses yet in this step; None if it can have none."""
        most = min(
            most, request.max_tokens - len(request.output_token_ids) - 1, self._max_positions - request.num_tokens
        )
        if most < 1 or not request.sent_to_executor or request.pooling is not None:
            return None
        if not self._can_read(request):
            self.forget(request.request_id)
            return None
        if request.drafts.acceptance is None:
            request.drafts.acceptance = self.acceptance.begin()
        return _Ask(request, request.drafts.acceptance, most)

    def _can_read(self, request: Request) -> bool:
        """Return whether the draft model has all tokens of a request. One that it lacks would fail its step, and on a
        GPU the engine.
        """
        drafts, end = request.drafts, request.num_tokens
        if drafts.num_readable is not None:
            new = request.tokens(drafts.num_readable, end)
            drafts.num_readable = end if max(new, default=0) < self._vocab_size else None
        return drafts.num_readable is not None

    def _is_worth_it(self, ask: _Ask, value: float, worth: StepWorth) -> bool:
        """Return whether the next guess for a request is worth its own row in both models' steps, at so many seconds a
        token.
        """
        return ask.gain * value > WORTH * (self.cost.per_token + worth.per_token)

    def _pays(self, asks: Sequence[_Ask], value: float, worth: StepWorth, seconds_left: float) -> bool:
        """Return whether a round of guesses is worth its seconds, and in time."""
        takes = self.cost.seconds(len(asks)) + len(asks) * worth.per_token
        return bool(asks) and sum(ask.gain for ask in asks) * value > WORTH * takes and takes < seconds_left

    def _begin(self, ask: _Ask) -> None:
        """Give an ask the run of its request, as the most recently used one, with what is known of its tokens."""
        request, size, salt = ask.request, self._allocator.block_size, ask.request.scheduling.cache_salt
        run = self._runs.pop(request.request_id, None)
        if run is None:
            run, tokens = _Run(), request.tokens(0, request.num_tokens)
            run.blocks = self._allocator.match(tokens, run.names, salt=salt)
            run.num_confirmed = len(run.blocks) * size
            run.num_full = run.num_published = len(run.blocks)
            run.token_ids.extend(tokens[: run.num_confirmed])
        ask.run = self._runs[request.request_id] = run
        run.confirm(request)
        if self._allocator.reuses_content and run.num_confirmed // size > run.num_full:
            run.num_full, tokens = run.num_confirmed // size, request.tokens(0, run.num_confirmed)
            run.num_published = self._allocator.publish(
                run.blocks, tokens, run.names, first=run.num_published, salt=salt
            )

    def _pieces(self, asks: Sequence[_Ask], value: float, worth: StepWorth) -> list[tuple[_Ask, int]]:
        """Return which requests that are behind catch up in a fraction of a step, and by how many tokens."""
        takes = self.cost.seconds(len(asks)) + len(asks) * worth.per_token
        saved = (sum(ask.gain for ask in asks) * value - takes) / len(asks)  # of each, in a step
        per_token = max(self.cost.per_token, MIN_SECONDS)
        seconds = min(CATCH_UP_SHARE * worth.seconds, worth.seconds_left - takes)
        left, pieces = min(int(seconds / per_token), MAX_CATCH_UP), list[tuple[_Ask, int]]()
        for ask in asks:
            num_output = len(ask.request.output_token_ids)
            expected = min(num_output, ask.request.max_tokens - num_output)
            count = min(ask.num_missing - 1, left)
            pays = saved * expected > WORTH * per_token * ask.num_missing
            if ask.num_missing > FEW_TOKENS and count > 0 and pays:
                pieces.append((ask, count))
                left -= count
        return pieces

    def _compute(self, ready: Sequence[_Ask], pieces: Sequence[tuple[_Ask, int]]) -> float:
        """Compute a step of the draft model: what is missing of requests that guess, and pieces of others. Returns its
        seconds.
        """
        wanted = [*((ask, ask.num_missing, 1) for ask in ready), *((ask, count, 0) for ask, count in pieces)]
        held = {ask.request.request_id for ask, _, _ in wanted}
        chunks, parts = list[Chunk](), list[tuple[_Ask, int]]()
        for ask, count, num_logits in wanted:
            run, start = ask.run, len(ask.run.token_ids)
            missing = max(self._allocator.blocks_for(start + count) - len(run.blocks), 0)
            if not self._make_room(missing, held):
                ask.chance = 0.0
                continue
            run.blocks += self._allocator.allocate(missing)
            tokens, table = ask.tokens(count), tuple(run.blocks)
            chunks.append(Chunk(ask.request.request_id, start, tokens, table, num_logits, samples=bool(num_logits)))
            parts.append((ask, num_logits))
        if not chunks:
            return 0.0
        guesses, seconds = self._model.guess(chunks, [ask.drafts for ask, _ in parts])
        self.seconds += seconds
        self.cost.observe(sum(len(chunk.token_ids) for chunk in chunks), seconds)
        for (ask, num_logits), chunk, guess in zip(parts, chunks, guesses, strict=True):
            ask.run.token_ids.extend(chunk.token_ids)
            if num_logits:
                ask.take(guess, self._vocab_size)
        return seconds

    def _make_room(self, num_blocks: int, held: Collection[str]) -> bool:
        """Make sure that so many blocks can be allocated: what was computed for others goes, but not for those whose
        blocks are `held`.
        """
        while self._allocator.num_available < num_blocks:
            oldest = next((each for each in self._runs if each not in held), None)
            if oldest is None:
                return False
            self.forget(oldest)
        return True
