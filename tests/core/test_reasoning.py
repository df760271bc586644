"""What the next token may be, against a search in the whole sequence."""

from dataclasses import replace
from random import Random

import pytest

from splitfuse.core.reasoning import Phase, Reasoning, Thought
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.engine.messages import Add, decode_command, encode
from splitfuse.errors import InvalidRequestError

LETTERS, EOS, SPACE, HEADER = 4, 9, 5, (7, 8)


def sequence(rng: Random) -> tuple[int, ...]:
    return tuple(rng.randrange(LETTERS) for _ in range(rng.randint(1, 3)))


def random_reasoning(rng: Random) -> Reasoning:
    end = sequence(rng)
    return Reasoning(
        start_token_ids=sequence(rng),
        end_token_ids=end,
        is_open=rng.random() < 0.5,
        reopens=rng.random() < 0.5,
        max_tokens=rng.choice([None, 0, 1, 2, 5, 9]),
        close_token_ids=rng.choice([(), (*sequence(rng), *end)]),
        answer_token_ids=HEADER[: rng.randrange(3)],
        space_token_ids=rng.choice([(), (SPACE,)]),
    )


def generate(rng: Random, thought: Thought, count: int = 60) -> tuple[list[int], list[bool]]:
    """Return tokens as a model that ends within thoughts has them, and which are part of the answer."""
    tokens, answered = [], []
    for _ in range(count):
        token = rng.choice([letter for letter in (*range(LETTERS), SPACE, EOS) if letter != thought.forbidden])
        if thought.forced is not None:
            token = thought.forced
        elif token == EOS:
            token = thought.closing if thought.closing is not None else LETTERS
        tokens.append(token)
        answered.append(thought.push(token))
    return tokens, answered


def find(tokens: list[int], part: tuple[int, ...], start: int = 0) -> int:
    """Return where `part` begins in `tokens`, from `start` on; -1 if nowhere."""
    places = range(start, len(tokens) - len(part) + 1)
    return next((i for i in places if tuple(tokens[i : i + len(part)]) == part), -1)


def thoughts_in(tokens: list[int], reasoning: Reasoning, *, has_form: bool) -> list[tuple[int, int]]:
    """Return where thoughts begin and end."""
    start, end, spans, place = reasoning.start_token_ids, reasoning.end_token_ids, [], 0
    is_open = reasoning.is_open
    while True:
        if not is_open:
            first = place
            while not has_form and first < len(tokens) and tokens[first] in (*HEADER, *reasoning.space_token_ids):
                first += 1
            place = find(tokens, start, first)
            is_late = place != first and (has_form or not reasoning.reopens)
            if place < 0 or is_late or (spans and has_form):
                return spans
            place += len(start)
        close = find(tokens, end, place)
        if close < 0:  # the end may have begun
            begun = next(size for size in (2, 1, 0) if tuple(tokens[place:])[-size or len(tokens) :] == end[:size])
            return [*spans, (place, len(tokens) - begun)]
        spans.append((place, close))
        place, is_open = close + len(end), False


@pytest.mark.parametrize("has_form", [False, True])
def test_thoughts_end_within_their_budget_and_answers_follow(has_form: bool) -> None:
    rng, num_answers, num_reopened = Random(1), 0, 0
    for _ in range(1500):
        reasoning = random_reasoning(rng)
        thought = Thought(reasoning, has_form=has_form)
        tokens, answered = generate(rng, thought)
        end, budget = reasoning.end_token_ids, reasoning.max_tokens
        spans = thoughts_in(tokens, reasoning, has_form=has_form)
        assert thought.num_tokens == sum(stop - begin for begin, stop in spans), (reasoning, tokens)
        num_reopened += len(spans) > 1
        if budget is not None:
            words = len(reasoning.close_token_ids or end) - len(end)
            assert thought.num_tokens <= budget + words
            assert thought.phase is not Phase.THOUGHT or thought.num_tokens < budget or thought.forced is not None
        if not spans:
            assert all(answered)
        elif has_form:
            ((_, stop),) = spans
            first = stop + len(end) + len(reasoning.answer_token_ids)
            if first < len(tokens):
                assert tuple(tokens[stop + len(end) : first]) == reasoning.answer_token_ids
                assert not any(answered[:first]) and all(answered[first:])
                num_answers += 1
        for begin, stop in spans:
            assert not any(answered[begin : stop + len(end)])
    assert num_answers > 500 if has_form else num_reopened > 100, (num_answers, num_reopened)


def test_the_phase_follows_from_the_tokens_alone() -> None:
    rng = Random(2)
    for _ in range(300):
        reasoning, has_form = random_reasoning(rng), rng.random() < 0.5
        thought = Thought(reasoning, has_form=has_form)
        tokens, _ = generate(rng, thought, rng.randrange(20))
        again = Thought(reasoning, has_form=has_form)
        for token in tokens:
            again.push(token)
        assert vars(again) == vars(thought)


def test_nothing_is_forced_without_a_budget_or_a_form() -> None:
    thought = Thought(Reasoning(start_token_ids=(1, 2), end_token_ids=(3, 4), answer_token_ids=(5,)), has_form=False)
    for token, is_answer, phase in (
        (1, True, Phase.START),  # not yet known
        (2, False, Phase.THOUGHT),
        (3, False, Phase.THOUGHT),
        (3, False, Phase.THOUGHT),
        (4, False, Phase.START),
        (9, True, Phase.ANSWER),
        (1, True, Phase.ANSWER),
        (2, True, Phase.ANSWER),
    ):
        assert thought.forced is None and thought.closing is None and thought.forbidden is None
        assert (thought.push(token), thought.phase) == (is_answer, phase)
    assert thought.num_tokens == 1


def test_a_form_lets_one_token_decide_whether_a_thought_opens() -> None:
    reasoning = Reasoning(start_token_ids=(1, 2), end_token_ids=(3,), answer_token_ids=(5, 6))
    thought = Thought(reasoning, has_form=True)
    assert thought.heeds_form and thought.opening == 1
    assert not thought.push(1) and thought.forced == 2 and not thought.heeds_form
    assert not thought.push(2) and thought.forced is None and thought.closing == 3 and not thought.heeds_form
    assert not thought.push(3) and thought.forced == 5 and not thought.push(5) and not thought.push(6)
    assert thought.heeds_form and thought.opening is None and thought.push(1) and thought.forced is None
    thought = Thought(reasoning, has_form=True)
    assert thought.push(4) and thought.phase is Phase.ANSWER and thought.opening is None


def test_a_marker_that_has_begun_at_the_end_of_the_budget_is_completed() -> None:
    reasoning = Reasoning(end_token_ids=(1, 2), is_open=True, max_tokens=2, close_token_ids=(8, 1, 2))
    thought = Thought(reasoning, has_form=False)
    assert not thought.push(7) and thought.forced is None
    assert not thought.push(1) and thought.forced == 2
    assert not thought.push(2) and thought.phase is Phase.ANSWER and thought.num_tokens == 1
    assert thought.forbidden is None


def test_thoughts_that_reopen_share_one_budget() -> None:
    reasoning = Reasoning(start_token_ids=(1, 2), end_token_ids=(3,), reopens=True, max_tokens=2, answer_token_ids=(5,))
    thought = Thought(reasoning, has_form=False)
    assert [thought.push(token) for token in (7, 1, 2, 7, 3, 7)] == [True, True, False, False, False, True]
    assert [thought.push(token) for token in (1, 2, 7)] == [True, False, False] and thought.forced == 3
    assert [thought.push(token) for token in (3, 5, 7)] == [False, False, True] and thought.forbidden is None
    assert thought.push(1) and thought.forbidden == 2 and thought.push(9) and thought.num_tokens == 2


def test_a_thought_may_open_again_after_white_space_alone() -> None:
    reasoning = Reasoning(start_token_ids=(1,), end_token_ids=(2,), space_token_ids=(6,), max_tokens=5)
    thought = Thought(reasoning, has_form=False)
    assert [thought.push(token) for token in (6, 1, 7, 2, 6, 1, 7, 2)] == [True] + [False] * 7
    assert thought.num_tokens == 2 and thought.push(7) and thought.push(6) and thought.push(1)
    assert thought.phase is Phase.ANSWER and thought.num_tokens == 2
    thought = Thought(replace(reasoning, max_tokens=1), has_form=False)
    assert [thought.push(token) for token in (1, 7, 2)] == [False] * 3 and thought.forbidden == 1
    assert not thought.push(6) and thought.forbidden == 1 and thought.push(7) and thought.forbidden is None


def test_reasoning_crosses_to_an_engine() -> None:
    reasoning = random_reasoning(Random(3))
    add = Add("a", (1, 2), SamplingParams(reasoning=reasoning))
    assert decode_command(encode(add)) == add


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"end_token_ids": ()}, "end_token_ids must be at least one"),
        ({"start_token_ids": ()}, "start_token_ids must be at least one token id unless is_open"),
        ({"close_token_ids": (1, 2)}, "close_token_ids must be a sequence with end_token_ids at its end"),
        ({"max_tokens": -1}, "max_tokens must be a whole number from 0 on, or None, not -1"),
        ({"max_tokens": True}, "max_tokens"),
        ({"answer_token_ids": [1]}, "answer_token_ids must be a tuple"),
        ({"start_token_ids": (-1,)}, "start_token_ids must be a tuple"),
        ({"start_token_ids": (1,) * 1025}, "at most 1024"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong: dict[str, object], named: str) -> None:
    with pytest.raises(InvalidRequestError, match=named):
        Reasoning(**{"start_token_ids": (1,), "end_token_ids": (3,), **wrong})  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="reasoning must be a Reasoning"):
        SamplingParams(reasoning={"max_tokens": 3})  # type: ignore[arg-type]
