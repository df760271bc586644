"""The model that comes with the package: it reads, it is small enough, and transformers agrees with us about it."""

import pytest
import torch
from backends import variants
from held_out import count_right, held_out_problems
from stories import ANSWERS
from transformers import AutoModelForCausalLM

import splitfuse
from splitfuse.models.sources.hub import BUNDLED_MODEL
from splitfuse.text.prompts import PromptEncoder

NUM_PROBLEMS = 40


@pytest.fixture(scope="module")
def pipe() -> splitfuse.Pipeline:
    return splitfuse.pipeline(max_num_batched_tokens=512)


def test_it_answers_from_the_passage_and_only_from_it(pipe: splitfuse.Pipeline) -> None:
    problems = list(held_out_problems(NUM_PROBLEMS, lambda text: len(pipe.tokenizer.encode(text)) - 1))
    assert max(len(pipe.tokenizer.encode(problem.passage)) for problem in problems) > 900
    assert count_right(pipe, problems) >= 0.95 * NUM_PROBLEMS
    assert count_right(pipe, problems, with_passage=False) <= 0.05 * NUM_PROBLEMS


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("variant", variants()[1:2])  # not what is emulated
def test_it_still_answers_when_it_is_quantized(variant: str, quantization: str) -> None:
    pipe = splitfuse.pipeline(max_num_batched_tokens=512, kernels=variant, quantization=quantization)
    problems = list(held_out_problems(NUM_PROBLEMS, lambda text: len(pipe.tokenizer.encode(text)) - 1))
    assert count_right(pipe, problems) >= {"int8": 0.94, "int4": 0.9}[quantization] * NUM_PROBLEMS


def test_there_are_many_possible_answers() -> None:
    assert len(ANSWERS) >= 500


def test_it_is_small_and_every_quantization_will_apply(pipe: splitfuse.Pipeline) -> None:
    assert sum(file.stat().st_size for file in BUNDLED_MODEL.iterdir()) <= 12_000_000
    spec = pipe.engine.model.spec
    attention, inner = spec.layers[0].mixer, spec.layers[0].mlp.intermediate_size
    heads = (attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim)
    assert all(width % 256 == 0 for width in (*heads, spec.hidden_size, inner, spec.vocab_size))


def test_greedy_tokens_equal_those_of_transformers() -> None:
    pipe = splitfuse.pipeline(dtype="float32", max_num_batched_tokens=100)
    oracle = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)
    problems = list(held_out_problems(4, lambda text: len(pipe.tokenizer.encode(text)) - 1))
    responses = pipe([problem.prompt for problem in problems], chat=True, max_new_tokens=20, ignore_eos=True)
    for problem, response in zip(problems, responses, strict=True):
        ids = torch.tensor([PromptEncoder(pipe.tokenizer).encode_chat(problem.prompt).token_ids])
        wanted = oracle.generate(ids, max_new_tokens=20, min_new_tokens=20, do_sample=False, eos_token_id=None)
        assert list(response.token_ids) == wanted[0, ids.shape[1] :].tolist()
