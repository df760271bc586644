"""The faults of DeepSpeed-MII, each by its number in our list of them, as far as one process can show them.

Those of streams' characters (6) and of sampling's order (4) are held closer to their code, in tests/text and
tests/runtime; broken models' files (10) in tests/models.
"""

from dataclasses import replace
from typing import Any

import pytest
from readable_answers import PROMPT, READABLE, texts
from scheduler_checks import check_scheduler

import splitfuse
from splitfuse.core.events import StepRecord
from splitfuse.core.plan import StepPlan
from splitfuse.errors import InvalidRequestError, PromptTooLongError
from splitfuse.text.prompts import PreparedRequest


@pytest.fixture(scope="module")
def pipe() -> splitfuse.Pipeline:
    return splitfuse.pipeline(dtype="float32", max_num_batched_tokens=64)


def test_mii_fault_1_preemption_loses_no_text() -> None:
    prompts = [f"{PROMPT} {number}" for number in range(6)]
    keywords = {**READABLE, "max_new_tokens": 60}
    roomy = splitfuse.pipeline(dtype="float32")(prompts, **keywords)
    starts: dict[str, int] = {}
    preempted: set[str] = set()

    def watch(step: StepRecord) -> None:
        for chunk in step.plan.chunks:
            if chunk.start < starts.get(chunk.request_id, 0):
                preempted.add(chunk.request_id)
            starts[chunk.request_id] = chunk.end

    tight = splitfuse.pipeline(dtype="float32", block_size=8, num_blocks=24, observer=watch)
    responses = tight(prompts, **keywords)
    assert preempted, "the cache was too large to force anybody out"
    for response, wanted in zip(responses, roomy, strict=True):
        assert (response.generated_text, response.token_ids) == (wanted.generated_text, wanted.token_ids)
        assert (response.prompt_length, response.generated_length) == (wanted.prompt_length, 60)


def test_mii_fault_2_a_full_cache_kills_nothing() -> None:
    pipe = splitfuse.pipeline(dtype="float32", block_size=8, num_blocks=8)
    assert pipe.engine.max_model_len == 65
    assert len(pipe([PROMPT] * 12, ignore_eos=True, max_new_tokens=40)) == 12
    check_scheduler(pipe.engine.scheduler)


def test_mii_fault_2_a_prompt_beyond_the_cache_is_refused() -> None:
    pipe = splitfuse.pipeline(dtype="float32", block_size=8, num_blocks=8)
    with pytest.raises(PromptTooLongError, match=r"^prompt 1: .* the prompt has .*\d+ tokens: .* at most 64"):
        pipe([PROMPT, PROMPT * 10])
    assert not pipe.engine.has_unfinished
    assert len(pipe(PROMPT, max_new_tokens=3)) == 1


def test_mii_fault_3_settings_may_be_mixed_in_a_batch(pipe: splitfuse.Pipeline) -> None:
    settings: list[dict[str, Any]] = [
        {"max_new_tokens": 9},
        {"stop": ["a"]},
        {"stop": ["e", " the", "xyz"], "n": 2},
        {"temperature": 0.3, "top_p": 0.5},
        {"top_k": 3, "min_new_tokens": 5, "ignore_eos": True},
        {"repetition_penalty": 1.5, "logprobs": 3},
    ]
    requests: list[PreparedRequest] = []
    wanted: list[tuple[int, ...]] = []
    for setting in settings:
        prepared = pipe.prepare(PROMPT, **{**READABLE, **setting})
        requests += prepared
        wanted += [piece.response.token_ids for piece in pipe.run(prepared) if piece.response is not None]
    together = [piece.response for piece in pipe.run(requests) if piece.response is not None]
    assert sorted(wanted) == sorted(response.token_ids for response in together)


def test_mii_fault_3_a_bad_request_does_not_hang_the_others(pipe: splitfuse.Pipeline) -> None:
    good, bad = pipe.prepare(PROMPT, max_new_tokens=2), pipe.prepare(PROMPT, max_new_tokens=2)
    bad[0] = replace(bad[0], token_ids=(1, 99_999))
    with pytest.raises(InvalidRequestError, match="token id 99999"):
        list(pipe.run(good + bad))
    assert not pipe.engine.has_unfinished
    assert len(pipe([PROMPT, PROMPT], max_new_tokens=2)) == 2


def test_mii_fault_4_min_new_tokens_does_not_count_the_prompt(pipe: splitfuse.Pipeline) -> None:
    eos = pipe.engine.model.eos_token_ids[0]
    eager = {"logit_bias": {eos: 100.0}, "max_new_tokens": 20}
    assert pipe(PROMPT, **eager)[0].generated_length == 1
    assert pipe(PROMPT, min_new_tokens=7, **eager)[0].generated_length == 8


def test_mii_fault_5_any_text_may_stop_and_eos_still_counts(pipe: splitfuse.Pipeline) -> None:
    [free] = pipe(PROMPT, **READABLE)
    text = free.generated_text
    stop = text[1:-1]
    [stopped] = pipe(PROMPT, stop=[stop], **READABLE)
    assert len(pipe.tokenizer.encode(stop, add_special_tokens=False)) > 3
    assert (stopped.generated_text, stopped.finish_reason, stopped.stop_string) == (text[:1], "stop", stop)
    assert stopped.generated_length == len(stopped.token_ids) < free.generated_length
    eos = pipe.engine.model.eos_token_ids[0]
    assert pipe(PROMPT, stop=[stop], logit_bias={eos: 100}, max_new_tokens=5)[0].token_ids == (eos,)


def test_mii_fault_6_streams_keep_spaces_and_their_own_state(pipe: splitfuse.Pipeline) -> None:
    prompts = ["Erik plays", "Ella lives in a house.", "Otto"]
    responses = pipe(prompts, **READABLE)
    streamed = ["", "", ""]
    for piece in pipe(prompts, stream=True, **READABLE):
        streamed[piece.index] += piece.text
    assert streamed == texts(responses)
    for prompt, text, response in zip(prompts, streamed, responses, strict=True):
        assert prompt + text == pipe.tokenizer.decode([*pipe.tokenizer.encode(prompt), *response.token_ids])


def test_mii_fault_7_a_long_prompt_begins_with_few_blocks() -> None:
    steps: list[StepPlan] = []
    length, size = 1500, 16
    pipe = splitfuse.pipeline(
        dtype="float32",
        max_num_batched_tokens=64,
        block_size=size,
        num_blocks=-(-(length + 8) // size),
        observer=lambda step: steps.append(step.plan),
    )
    long = [7 + i % 900 for i in range(length)]
    stream = pipe([PROMPT, long, PROMPT], stream=True, ignore_eos=True, max_new_tokens=8)
    order = [piece.index for piece in stream if piece.response is not None]
    assert sorted(order) == [0, 1, 2] and order[0] == 0
    assert len(steps[0].chunks) == 2, "the long prompt waited for blocks that it did not need yet"


def test_mii_fault_9_missing_features_are_there(pipe: splitfuse.Pipeline) -> None:
    ids = pipe.tokenizer.encode(PROMPT * 10)
    keywords = {"temperature": 1.0, "seed": 3, "presence_penalty": 0.5, "logprobs": 1, "max_new_tokens": 5}
    computed: list[int] = []
    unsubscribe = pipe.engine.events.subscribe(StepRecord, lambda step: computed.append(step.plan.num_tokens))
    first, second = pipe(ids, **keywords), pipe(ids, **keywords)
    unsubscribe()
    assert first[0].token_ids == second[0].token_ids and first[0].logprobs is not None
    assert sum(computed) < 2 * len(ids), "the second prompt was computed anew"


def test_mii_fault_10_tied_embeddings_are_tied(pipe: splitfuse.Pipeline) -> None:
    assert pipe.engine.model.spec.tied_embeddings
    weights = pipe.engine.executor.decoder.weights
    assert weights.head.data_ptr() == weights.embed.data_ptr()
