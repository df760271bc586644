"""Drafts by a second model: equal outputs on random workloads, and when its guesses are worth their seconds."""

from random import Random

import pytest
from scheduler_harness import VOCABULARY, FakeDraftModel, Run, Workload

from splitfuse.core.events import StepRecord
from splitfuse.core.plan import DraftKind
from splitfuse.core.request import Request
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.speculation.acceptance import Acceptance
from splitfuse.core.speculation.model_drafts import (
    CATCH_UP_SHARE,
    FEW_TOKENS,
    MAX_CATCH_UP,
    MAX_FAILURES,
    Guesses,
    most_tokens,
)

PARTS = [pytest.param(part, marks=() if part < 1 else pytest.mark.slow) for part in range(20)]


def drafts_by(run: Run, kind: DraftKind) -> int:
    return sum(chunk.num_drafts for plan in run.plans for chunk in plan.chunks if chunk.draft_kind is kind)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("slo", [False, pytest.param(True, marks=pytest.mark.interpreted)])
@pytest.mark.parametrize("part", PARTS)
def test_every_workload_ends_as_if_no_model_drafted(depth: int, part: int, slo: bool) -> None:
    preemptions = drafted = accepted = failures = 0
    for seed in range(part * 75, part * 75 + 75):
        try:
            run = Workload(seed).run(depth, slo=slo, draft_model=True, ticks=slo)
        except AssertionError as error:
            raise AssertionError(f"Workload({seed}).run({depth}, slo={slo}, draft_model=True): {error}") from error
        assert run.scheduler.drafting is not None and run.scheduler.drafting.model is not None
        model = run.scheduler.drafting.model._model
        assert isinstance(model, FakeDraftModel)
        drafted += drafts_by(run, DraftKind.MODEL)
        accepted += run.num_accepted
        failures += model.num_failures
        preemptions += run.scheduler.queue.num_preemptions
    assert drafted > 100 and accepted > 50 and preemptions > 3 and failures, "too tame to prove anything"


class Drafted:
    """A run of requests that decode, for which a fake of a draft model guesses."""

    def __init__(
        self,
        num_requests: int = 1,
        *,
        right: float = 1.0,
        num_prompt_tokens: int = 3,
        max_tokens: int = 30,
        budget: int = 64,
        cost: float = 0.1,
        per_token: float = 0.02,
        seconds: float = 0.0,
        vocab_size: int = VOCABULARY,
    ) -> None:
        self.model = FakeDraftModel(Random(0), 4, right=right, seconds=seconds, vocab_size=vocab_size)
        drafting = self.model.drafting(4, 200, cost=cost, per_token=per_token)
        self.run = Run.make(num_blocks=200, block_size=4, budget=budget, drafting=drafting)
        self.drafts = drafting.model
        update = drafting._update  # prompt lookup finds nothing
        drafting._update = lambda request: bool(request.drafts.forced) and update(request)  # type: ignore[method-assign]
        for number in range(num_requests):
            rng = Random(number)
            prompt = tuple(rng.randrange(16) for _ in range(num_prompt_tokens))
            self.run.add(Request(f"r{number}", prompt, SamplingParams(), max_tokens=max_tokens, seed=0))
        while any(not request.output_token_ids for request in self.run.running) or self.run.waiting:
            self.run.step()

    def num_drafts(self) -> list[int]:
        """Run a step, and return how many drafts each of its requests had from the model."""
        self.run.step()
        chunks = self.run.plans[-1].chunks
        return [chunk.num_drafts if chunk.draft_kind is DraftKind.MODEL else 0 for chunk in chunks]


def test_a_cheap_model_that_is_right_drafts_the_most() -> None:
    drafted = Drafted(2, max_tokens=100)
    counts = [drafted.num_drafts() for _ in range(12)]
    assert counts[0][0] in (1, 2, 3) and counts[-1] == [4, 4], "more as it turns out to be right"
    assert drafted.run.num_accepted == sum(map(sum, counts))


@pytest.mark.parametrize(("cost", "per_token", "drafts"), [(0.1, 0.02, True), (0.9, 0.02, False), (0.1, 9.0, False)])
def test_guesses_must_be_worth_the_seconds_of_both_models(cost: float, per_token: float, drafts: bool) -> None:
    assert any(Drafted(cost=cost, per_token=per_token).num_drafts()) is drafts


def test_guesses_get_what_is_left_of_the_budget() -> None:
    drafted = Drafted(2, budget=5, max_tokens=60)
    for _ in range(6):
        assert sum(drafted.num_drafts()) <= 3
    assert sum(drafted.num_drafts()) == 3


def test_a_model_that_is_wrong_is_soon_asked_no_more() -> None:
    drafted = Drafted(right=0.0, max_tokens=200)
    for _ in range(40):
        drafted.run.step()
    num_steps = len(drafted.model.computed)
    for _ in range(40):
        drafted.run.step()
    assert 0 < num_steps < 20 and len(drafted.model.computed) < num_steps + 5


def test_prompt_lookup_goes_first() -> None:
    drafted = Drafted(2)
    drafted.run.running[0].drafts.forced = (15, 15)
    before = len(drafted.model.computed)
    assert drafted.num_drafts()[1] > 0
    kinds = [chunk.draft_kind for chunk in drafted.run.plans[-1].chunks]
    assert kinds == [DraftKind.FORM, DraftKind.MODEL]
    assert all(len(chunks) == 1 for chunks in drafted.model.computed[before:])


def test_nothing_is_guessed_while_a_prompt_is_computed() -> None:
    drafted = Drafted(2, budget=16)
    drafted.run.add(Request("long", (1,) * 40, SamplingParams(), max_tokens=5, seed=0))
    before = len(drafted.model.computed)
    drafted.run.step()
    assert len(drafted.run.plans[-1].chunks) == 3 and len(drafted.model.computed) == before


def test_a_long_prompt_is_caught_up_with_in_pieces_once_that_pays() -> None:
    drafted = Drafted(num_prompt_tokens=40, cost=0.2, per_token=0.05, max_tokens=20)
    steps = [drafted.num_drafts() for _ in range(8)]
    assert steps[0] == [0] and max(steps) > [0]
    first = next(number for number, each in enumerate(drafted.model.computed) if each[0] <= FEW_TOKENS)
    pieces = [count for (count,) in drafted.model.computed[:first]]
    per_token = drafted.drafts.cost.per_token
    assert sum(pieces) >= 40 - FEW_TOKENS and all(count * per_token <= CATCH_UP_SHARE * 1.5 for count in pieces)
    assert Drafted(num_prompt_tokens=50, max_tokens=3).model.computed == [], "for an answer of three tokens"


def test_all_requests_may_be_behind_at_once() -> None:
    drafted = Drafted(4, max_tokens=40)
    drafted.drafts.num_failures = MAX_FAILURES
    while drafted.run.running[0].num_tokens < FEW_TOKENS:
        drafted.run.step()
    drafted.drafts.num_failures = 0
    drafted.run.step()
    assert drafted.model.computed[0] == [FEW_TOKENS] * 4
    assert most_tokens(4) == MAX_CATCH_UP + 4 * FEW_TOKENS


def test_a_draft_model_that_dies_is_used_no_more(caplog: pytest.LogCaptureFixture) -> None:
    drafted = Drafted(2, max_tokens=200)
    drafted.model.fails = 1.0
    for _ in range(MAX_FAILURES + 3):
        assert drafted.num_drafts() == [0, 0]
    assert not drafted.drafts.is_on and drafted.drafts.num_held == 0
    assert [record.message for record in caplog.records][-1].endswith("and is not used any more")
    assert len(caplog.records) == MAX_FAILURES


def test_failures_with_guesses_between_them_do_not_add_up() -> None:
    drafted = Drafted(2, max_tokens=57)
    for _ in range(MAX_FAILURES + 1):
        drafted.model.fails = 1.0
        assert drafted.num_drafts() == [0, 0] and drafted.drafts.num_failures == 1
        drafted.model.fails = 0.0
        assert any(sum(drafted.num_drafts()) for _ in range(4))
    assert drafted.drafts.is_on and drafted.drafts.num_failures == 0


def test_a_request_with_a_token_that_the_model_lacks_is_left_alone() -> None:
    """A generated one, or one of the prompt: all others have drafts as before."""
    odd = VOCABULARY - 1
    drafted, lacking, num_drafts = Drafted(6, max_tokens=40, vocab_size=odd), set[str](), 0
    drafted.run.add(Request("odd", (1, odd, 2), SamplingParams(), max_tokens=40, seed=0))
    while drafted.run.running:
        lacking = {each.request_id for each in drafted.run.running if odd in each.tokens(0, each.num_tokens)}
        drafted.run.step()
        guessed = {each.request_id for each in drafted.run.plans[-1].chunks if each.draft_kind is DraftKind.MODEL}
        assert not guessed & lacking
        num_drafts += len(guessed)
    assert "odd" in lacking and num_drafts > 6 and drafted.drafts.num_failures == drafted.drafts.num_held == 0


def test_a_model_that_answers_too_little_is_taken_to_have_failed() -> None:
    drafted = Drafted()
    drafted.model.guess = lambda *_: Guesses((), 0.0)  # type: ignore[method-assign]
    assert drafted.num_drafts() == [0] and drafted.drafts.num_failures == 1


def test_a_step_begins_when_its_drafts_are_there() -> None:
    drafted = Drafted(seconds=0.25)
    records: list[StepRecord] = []
    drafted.run.scheduler.events.subscribe(StepRecord, records.append)
    drafted.run.now = 10.0
    drafted.run.step()
    rounds = len(drafted.model.computed)
    assert rounds and records[0].start_time == 10.0 + 0.25 * rounds
    assert drafted.drafts.seconds == 0.25 * rounds


def test_chances_are_learned_by_confidence() -> None:
    common = Acceptance()
    own = common.begin()
    for _ in range(40):
        own.observe([0.97, 0.2], num_right=1)
    assert own.chance(0.97) > 0.95 and own.chance(0.2) < 0.05
    other = common.begin()
    assert 0.8 < other.chance(0.97) < own.chance(0.97) and own.chance(0.2) < other.chance(0.2) < 0.2
    for _ in range(300):
        last = common.begin()
    assert abs(last.chance(0.2) - 0.2) < 0.01, "what is not tried is forgotten"
