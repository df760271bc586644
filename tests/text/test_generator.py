"""Text in, text out: stop strings, choices, streams that are left, and streams that take turns."""

import json
from collections.abc import Iterator
from itertools import zip_longest
from random import Random
from typing import Any

import pytest
import tokenizers
from readable_answers import NO_SPECIAL_TOKENS, PROMPT
from scheduler_checks import check_scheduler

import splitfuse
from splitfuse.core.request_output import FinishReason
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.errors import InvalidRequestError
from splitfuse.models.sources.hub import BUNDLED_MODEL
from splitfuse.text.generation import Generation
from splitfuse.text.generator import TextGenerator
from splitfuse.text.prompts import PromptEncoder
from splitfuse.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def generator() -> TextGenerator:
    return splitfuse.pipeline(dtype="float32", max_num_batched_tokens=64, max_num_seqs=128).generator


@pytest.fixture(autouse=True)
def no_block_is_left_behind(generator: TextGenerator) -> Iterator[None]:
    yield
    assert generator.engine.allocator.num_held == 0 and not generator.engine.has_unfinished
    check_scheduler(generator.engine.scheduler)


def params(**changes: Any) -> SamplingParams:
    """Something to read whatever the model has learnt: 40 tokens at random, none without a text."""
    usual = {"max_tokens": 40, "temperature": 1.0, "seed": 7, "logit_bias": NO_SPECIAL_TOKENS, "logprobs": 0}
    return SamplingParams(**{**usual, **changes})


def add(generator: TextGenerator, **changes: Any) -> list[Generation]:
    return generator.add(PromptEncoder(generator.tokenizer).encode(PROMPT, params(**changes)))


def run(generator: TextGenerator, **changes: Any) -> Generation:
    [generation] = add(generator, **changes)
    for _ in generator.stream([generation]):
        pass
    return generation


def whole(generation: Generation) -> tuple[object, ...]:
    """Everything but the time it took and the last digits of logprobs, which may depend on the neighbours."""
    assert [entry.token_id for entry in generation.logprobs] == generation.token_ids
    return (generation.text, generation.token_ids, generation.finish_reason)


class Free:
    """The same request without stop strings: its text, and how much of it each token had brought."""

    def __init__(self, generator: TextGenerator) -> None:
        [generation] = add(generator)
        self.lengths: list[int] = []
        for _, _ in generator.stream([generation]):
            self.lengths += [len(generation.text)] * (len(generation.token_ids) - len(self.lengths))
        self.text, self.token_ids, self.logprobs = generation.text, generation.token_ids, generation.logprobs

    def num_tokens(self, length: int) -> int:
        """Tokens whose text covers the first `length` characters."""
        return next(i for i, reached in enumerate([0, *self.lengths]) if reached >= length)


@pytest.fixture(scope="module")
def free(generator: TextGenerator) -> Free:
    found = Free(generator)
    assert len(found.token_ids) == 40 and len(found.text) > 40
    return found


def assert_cut(generation: Generation, free: Free, cut: int) -> None:
    """Everything ends with the token that completes the text before the stop string."""
    count = free.num_tokens(cut)
    assert generation.finish_reason is FinishReason.STOP
    assert generation.text == free.text[:cut]
    assert generation.token_ids == free.token_ids[:count]
    logprobs, wanted = ([entry.logprob for entry in g.logprobs] for g in (generation, free))
    assert logprobs == pytest.approx(wanted[:count], abs=1e-3)
    assert len(generation.timings.tokens) == count
    assert generation.timings.tokens == sorted(generation.timings.tokens)
    assert generation.timings.total is not None


# Stop strings --------------------------------------------------------------------------------------------------------


def test_a_stop_string_ends_a_text_at_any_token_boundary(generator: TextGenerator, free: Free) -> None:
    rng = Random(1)
    stops = set()
    for _ in range(60):
        start = rng.randrange(len(free.text) - 1)
        stops.add(free.text[start : start + rng.choice((1, 2, 5, 15))])
    generations = [(stop, *add(generator, stop=(stop,))) for stop in sorted(stops)]
    across = 0
    for _ in generator.stream([generation for _, generation in generations]):
        pass
    for stop, generation in generations:
        cut = free.text.find(stop)
        assert_cut(generation, free, cut)
        assert generation.stop_string == stop
        across += free.num_tokens(cut + 1) != free.num_tokens(cut + len(stop))
    assert across > 20, "hardly any stop string crossed a token's border"


def test_of_several_stop_strings_the_first_complete_one_counts(generator: TextGenerator, free: Free) -> None:
    late, early = free.text[30:33], free.text[10:14]
    ends = {stop: free.text.find(stop) + len(stop) for stop in (late, early)}
    first = min(ends, key=lambda stop: ends[stop])
    generation = run(generator, stop=("\0 never", late, early))
    assert_cut(generation, free, ends[first] - len(first))
    assert generation.stop_string == first


def test_a_stop_string_that_never_comes_changes_nothing(generator: TextGenerator, free: Free) -> None:
    generation = run(generator, stop=(free.text[-3:] + "\0",))  # held back to the end
    assert (generation.text, generation.token_ids) == (free.text, free.token_ids)
    assert (generation.finish_reason, generation.stop_string) == (FinishReason.LENGTH, None)


def test_a_stop_string_within_min_tokens_does_not_count(generator: TextGenerator, free: Free) -> None:
    least = 12
    for stop in (free.text[2:4], free.text[free.lengths[least] :][:4], free.text[free.lengths[least - 1] - 1 :][:2]):
        generation = run(generator, stop=(stop,), min_tokens=least)
        cut = free.text.find(stop, free.lengths[least - 1])
        if cut == -1:
            assert (generation.text, generation.finish_reason) == (free.text, FinishReason.LENGTH)
        else:
            assert generation.text == free.text[:cut]
            assert generation.token_ids == free.token_ids[: max(least, free.num_tokens(cut))]


def test_eos_tokens_still_end_a_request_with_stop_strings(generator: TextGenerator) -> None:
    """DeepSpeed-MII's fault 5: any stop string disabled EOS."""
    biased = {**NO_SPECIAL_TOKENS, generator.engine.model.eos_token_ids[0]: 100.0}
    generation = run(generator, logit_bias=biased, stop=("\0",), max_tokens=10)
    assert (generation.finish_reason, generation.stop_string) == (FinishReason.STOP, None)
    assert generation.token_ids == [generator.engine.model.eos_token_ids[0]] and generation.text == ""


# Choices and streams -------------------------------------------------------------------------------------------------


def test_choices_differ_and_each_is_repeatable(generator: TextGenerator, free: Free) -> None:
    results = []
    for _ in range(2):
        generations = add(generator, n=3)
        for _ in generator.stream(generations):
            pass
        assert [generation.choice for generation in generations] == [0, 1, 2]
        results.append([whole(generation) for generation in generations])
    assert results[0] == results[1]
    assert len({str(result) for result in results[0]}) == 3
    assert results[0][0][1] == free.token_ids  # the first is what n = 1 gives


def test_pieces_join_to_the_text_and_the_last_has_the_end(generator: TextGenerator, free: Free) -> None:
    generations = [*add(generator), *add(generator, seed=8, stop=("e", "a")), *add(generator, max_tokens=1, n=2)]
    texts = {generation.request_id: "" for generation in generations}
    ended: set[str] = set()
    for generation, text in generator.stream(generations):
        assert generation.request_id not in ended
        texts[generation.request_id] += text
        assert texts[generation.request_id] == generation.text
        if generation.finish_reason is not None:
            ended.add(generation.request_id)
        else:
            assert text
    assert ended == texts.keys()
    assert texts[generations[0].request_id] == free.text


def test_closing_a_stream_aborts_what_is_unfinished(generator: TextGenerator, free: Free) -> None:
    generations = [*add(generator), *add(generator, max_tokens=1), *add(generator, seed=9)]
    stream = generator.stream(generations)
    while generations[1].finish_reason is None or not generations[0].text:
        next(stream)
    assert generator.engine.allocator.num_held > 0
    stream.close()
    assert generator.engine.allocator.num_held == 0
    assert [g.finish_reason for g in generations] == [FinishReason.ABORT, FinishReason.LENGTH, FinishReason.ABORT]
    assert free.text.startswith(generations[0].text)
    assert run(generator).text == free.text, "the generator is no longer usable"


def test_an_error_while_streaming_aborts_too(generator: TextGenerator) -> None:
    [generation] = add(generator)

    def listen() -> None:
        for _ in generator.stream([generation]):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        listen()
    assert generation.finish_reason is FinishReason.ABORT


def test_streams_take_turns_and_keep_their_own_state(generator: TextGenerator) -> None:
    settings: list[dict[str, Any]] = [{"seed": 1}, {"seed": 2, "max_tokens": 25}, {"seed": 3, "stop": ("e",)}]
    alone = [whole(run(generator, **setting)) for setting in settings]
    generations = [add(generator, **setting) for setting in settings]
    texts = ["", "", ""]
    for turn in zip_longest(*(generator.stream(own) for own in generations)):
        for number, piece in enumerate(turn):
            if piece is not None:
                assert piece[0] is generations[number][0]
                texts[number] += piece[1]
    assert [whole(own[0]) for own in generations] == alone
    assert texts == [own[0].text for own in generations]


def test_a_request_ended_elsewhere_ends_the_stream(generator: TextGenerator) -> None:
    [ended], [other] = add(generator), add(generator)
    heard = []
    for generation, _ in generator.stream([ended, other]):
        heard.append(generation)
        if len(ended.token_ids) == 3:
            generator.engine.abort(ended.request_id)
    assert ended.finish_reason is FinishReason.ABORT and len(ended.token_ids) == 3
    assert other.finish_reason is FinishReason.LENGTH and heard[-1] is other


def test_leaving_one_stream_does_not_touch_another(generator: TextGenerator, free: Free) -> None:
    kept, left = add(generator), add(generator, seed=9)
    stream, other = generator.stream(kept), generator.stream(left)
    next(stream), next(other)
    other.close()
    for _ in stream:
        pass
    assert kept[0].text == free.text


# Prompts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["", 5, None, [1, "a"], [True], [1.0], {"role": "user"}, b"text"])
def test_an_invalid_prompt_is_refused(generator: TextGenerator, prompt: Any) -> None:
    with pytest.raises(InvalidRequestError, match="prompt") as refusal:
        PromptEncoder(generator.tokenizer).encode(prompt)
    assert refusal.value.parameter == "prompt"


def test_a_refused_request_leaves_nothing_behind(generator: TextGenerator) -> None:
    with pytest.raises(InvalidRequestError, match="max_tokens can be at most"):
        add(generator, max_tokens=5000, n=2)


def test_a_conversation_goes_through_the_models_template(generator: TextGenerator) -> None:
    encoder = PromptEncoder(generator.tokenizer)
    turn = encoder.encode_chat("Hello")
    assert turn == encoder.encode_chat([{"role": "user", "content": "Hello"}])
    assert not turn.continues and turn.token_ids != encoder.encode("Hello").token_ids
    with pytest.raises(InvalidRequestError, match="the roles of this model are"):
        encoder.encode_chat([{"role": "stranger", "content": "Hello"}])


def test_tokens_that_the_decoder_fails_on_end_one_request(generator: TextGenerator) -> None:
    content = json.loads((BUNDLED_MODEL / "tokenizer.json").read_text())
    space = content["model"]["vocab"]["\u0120"]
    content["decoder"] = {"type": "Strip", "content": "\u0120", "start": 0, "stop": 9}  # fails on a space alone
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)))
    broken = TextGenerator(generator.engine, tokenizer)
    bias = {**NO_SPECIAL_TOKENS, space: -100.0}
    [alone] = add(broken, logit_bias=bias)
    for _ in broken.stream([alone]):
        pass
    [failing], [other] = add(broken, logit_bias={space: 100.0}), add(broken, logit_bias=bias)
    for _ in broken.stream([failing, other]):
        pass
    assert (failing.finish_reason, failing.text) == (FinishReason.ERROR, "")
    assert "the model's tokenizer cannot decode these tokens" in (failing.error or "")
    assert whole(other) == whole(alone)
