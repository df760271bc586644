"""With the C++ kernels a request's tokens and logprobs are the same floats alone and in any crowd: on the bundled
model, in bf16, int8 and int4, and with an int8 KV cache.

Random requests (greedy and random, penalties, filters, stop strings, logprobs of output and prompt, several choices)
that share beginnings, each alone in an engine of its own, and all together: for every budget of 1, 7, 64 and 512, block
sizes of 32 and 64, one thread and two. The default run takes a part of it, the slow one 500 requests and every setting.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from backends import emulation_slow, variants
from draft_models import count_drafts, draft_always, first_layers
from forced_preemption import force_preemptions
from guessed_drafts import guess_answers
from scheduler_checks import check_scheduler
from stories import make_story
from torch.utils._python_dispatch import TorchDispatchMode

import splitfuse
from splitfuse.core.plan import DraftKind
from splitfuse.models.sources.hub import BUNDLED_MODEL
from splitfuse.text.prompts import PreparedRequest
from splitfuse.text.responses import Response

MANY, SOME, FEW = 500, 100, 20
PRECISIONS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "int8": {"quantization": "int8"},
    "int8-groups": {"quantization": "int8", "quantization_group_size": 128},
    "int4": {"quantization": "int4"},
    "int4-groups-of-128": {"quantization": "int4", "quantization_group_size": 128},
    "int8-cache": {"kv_cache_dtype": "int8"},
    "int4-int8-cache": {"quantization": "int4", "kv_cache_dtype": "int8"},
}


@pytest.fixture(autouse=True)
def threads_of_torch() -> Iterator[None]:
    """The sampler's threads change with those of the kernels, and back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make_pipe(variant: str, precision: str, *, num_threads: int, **settings: Any) -> splitfuse.Pipeline:
    torch.set_num_threads(num_threads)
    return splitfuse.pipeline(kernels=variant, num_threads=num_threads, **PRECISIONS[precision], **settings)


def make_requests(pipe: splitfuse.Pipeline, count: int) -> list[PreparedRequest]:
    """Stories of 10 to 300 words with questions; half of them begin with one of a few passages that many share."""
    rng = Random("bits")

    def tell(words: int) -> Any:
        return make_story(rng, words, lambda text: len(text.split()))

    shared = [tell(words).passage for words in (70, 80, 100, 150)]
    requests: list[PreparedRequest] = []
    for number in range(count):
        told = tell(rng.choice((10, 10, 20, 20, 40, 60, 300)))
        story = f"{rng.choice(shared)} {told.passage}" if number % 2 else told.passage
        keywords: dict[str, Any] = {"max_new_tokens": rng.randint(1, 20), "chat": rng.random() < 0.7}
        keywords["logprobs"] = rng.choice((None, 0, 1, 5))
        if rng.random() < 0.5:
            keywords |= {"temperature": rng.choice((0.5, 1.0, 1.5)), "seed": rng.randrange(2**32)}
            keywords |= rng.choice(({}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.05}, {"n": 2}))
        keywords |= rng.choice(({}, {}, {"repetition_penalty": 1.3}, {"presence_penalty": 1.0}, {"ignore_eos": True}))
        keywords |= rng.choice(({}, {}, {"stop": [" a", "the"]}, {"min_new_tokens": 1}, {"logit_bias": {17: 2.0}}))
        if number % 25 == 7:
            keywords["prompt_logprobs"] = 2
        requests += pipe.prepare(f"{story}\n\n{rng.choice(told.questions).text}", **keywords)
    return requests


def answers(pipe: splitfuse.Pipeline, requests: Sequence[PreparedRequest]) -> list[Response]:
    responses = [piece.response for piece in pipe.run(requests) if piece.response is not None]
    check_scheduler(pipe.engine.scheduler)
    return sorted(responses, key=lambda response: (response.index, response.choice))


def outcome(response: Response) -> tuple[object, ...]:
    """All that a request's own: every float of it, but neither times nor what the prefix cache spared."""
    return (
        response.token_ids,
        response.logprobs,
        response.prompt_logprobs,
        response.generated_text,
        response.finish_reason,
        response.stop_string,
        response.error,
    )


@functools.cache
def alone(variant: str, precision: str, count: int) -> tuple[list[PreparedRequest], list[tuple[object, ...]]]:
    """The requests, and what each gives alone: one at a time, its prompt whole, nothing reused, one thread."""
    pipe = make_pipe(
        variant,
        precision,
        num_threads=1,
        enable_prefix_caching=False,
        max_num_seqs=1,
        max_num_batched_tokens=2048,
        num_blocks=64,
    )
    requests = make_requests(pipe, count)
    outcomes = [outcome(response) for response in answers(pipe, requests)]
    assert sum(len(one[0]) for one in outcomes) > 4 * count  # type: ignore[arg-type]
    return requests, outcomes


def check(variant: str, precision: str, count: int, *, budget: int, block_size: int, threads: int, **more: Any) -> None:
    requests, wanted = alone(variant, precision, count)
    settings = {"num_blocks": 32768 // block_size, "max_num_seqs": 4 if count == FEW else 24} | more
    pipe = make_pipe(
        variant, precision, num_threads=threads, max_num_batched_tokens=budget, block_size=block_size, **settings
    )
    together = answers(pipe, requests)
    assert sum(response.num_cached_tokens > 0 for response in together) >= count // 10, "the prefix cache was not hit"
    for response, expected in zip(together, wanted, strict=True):
        assert outcome(response) == expected, f"request {response.index}, choice {response.choice}"


PART = [  # precision, requests, budget, block size, threads
    ("bf16", SOME, 7, 32, 2),
    ("bf16", SOME, 512, 64, 1),
    ("bf16", FEW, 1, 32, 2),
    ("int8", SOME, 64, 32, 2),
    ("int8", FEW, 7, 64, 1),
    ("int8-groups", FEW, 64, 32, 2),
    ("int4", SOME, 64, 64, 2),
    ("int4", FEW, 7, 32, 1),
    ("int4-groups-of-128", FEW, 64, 32, 2),
    ("int8-cache", SOME, 64, 32, 2),
    ("int4-int8-cache", FEW, 7, 64, 2),
]
TILED = (f"bf16-{FEW}-1", f"int4-{FEW}-7")


@pytest.mark.parametrize(
    ("variant", "precision", "count", "budget", "block_size", "threads"),
    emulation_slow([case for part in PART for case in variants(*part, id="-".join(map(str, part)))], *TILED),
)
def test_concurrent_requests_change_no_bit(
    variant: str, precision: str, count: int, budget: int, block_size: int, threads: int
) -> None:
    count = min(count, SOME if variant == "avx512_bf16" else FEW)
    check(variant, precision, count, budget=budget, block_size=block_size, threads=threads)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("block_size", [32, 64])
@pytest.mark.parametrize("budget", [1, 7, 64, 512])
@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("variant", variants())
def test_500_concurrent_requests_change_no_bit(
    variant: str, precision: str, budget: int, block_size: int, threads: int
) -> None:
    check(variant, precision, MANY, budget=budget, block_size=block_size, threads=threads)


@pytest.mark.slow
@pytest.mark.parametrize("budget", [7, 512])
@pytest.mark.parametrize("precision", ["int8-groups", "int4-groups-of-128", "int8-cache", "int4-int8-cache"])
@pytest.mark.parametrize("variant", variants())
def test_500_concurrent_requests_in_other_precisions(variant: str, precision: str, budget: int) -> None:
    check(variant, precision, MANY, budget=budget, block_size=32, threads=2)


@pytest.mark.parametrize("variant", emulation_slow(variants()))
def test_preemption_changes_no_bit(variant: str) -> None:
    requests, wanted = alone(variant, "bf16", SOME)
    pipe = make_pipe(variant, "bf16", num_threads=2, num_blocks=17, max_num_batched_tokens=512)
    force_preemptions(pipe.engine)
    assert [outcome(response) for response in answers(pipe, requests)] == wanted
    assert pipe.engine.scheduler.queue.num_preemptions >= 3


@pytest.mark.parametrize("variant", emulation_slow(variants()))
def test_drafts_change_no_bit(variant: str) -> None:
    """A rejected draft leaves its keys and values in the cache, where an int8 cache has two tokens in one place."""
    requests, wanted = alone(variant, "int8-cache", FEW)
    pipe = make_pipe(variant, "int8-cache", num_threads=2, max_num_batched_tokens=512, num_blocks=256, max_num_seqs=4)
    drafting = guess_answers(pipe.engine, requests, [tokens for tokens, *_ in wanted])
    assert [outcome(response) for response in answers(pipe, requests)] == wanted
    assert drafting.accepted > 20


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("variant", variants())
def test_drafts_change_no_bit_of_1000_requests(variant: str, precision: str) -> None:
    """Those of prompt lookup, and those that are mostly right, in a crowd that is preempted."""
    requests, wanted = alone(variant, precision, MANY)
    known = [tokens for tokens, *_ in wanted]
    for guesses in (False, True):
        pipe = make_pipe(variant, precision, num_threads=2, num_blocks=64, num_speculative_tokens=7)
        force_preemptions(pipe.engine)
        if guesses:
            guess_answers(pipe.engine, requests, known)
        assert [outcome(response) for response in answers(pipe, requests)] == wanted


def check_draft_model(variant: str, precision: str, count: int, draft_model: str, *, preempt: bool) -> list[int]:
    """Let a draft model guess for a crowd. Returns how much was drafted and accepted."""
    requests, wanted = alone(variant, precision, count)
    settings = {"num_blocks": 64, "max_num_seqs": 3, "num_speculative_tokens": 4, "draft_model": draft_model}
    pipe = make_pipe(variant, precision, num_threads=2, max_num_batched_tokens=1024, **settings)
    if preempt:
        force_preemptions(pipe.engine)
    draft_always(pipe.engine)
    counts = count_drafts(pipe.engine)
    for response, expected in zip(answers(pipe, requests), wanted, strict=True):
        assert outcome(response) == expected, f"request {response.index}, choice {response.choice}"
    drafting = pipe.engine.scheduler.drafting
    assert drafting is not None and drafting.model is not None
    drafting.model.check()
    assert drafting.model.num_failures == drafting.model.num_held == 0
    return counts[DraftKind.MODEL]


@pytest.mark.parametrize("num_layers", [4, 2])
@pytest.mark.parametrize("variant", emulation_slow(variants()))
def test_a_draft_model_changes_no_bit(variant: str, num_layers: int, tmp_path: Path) -> None:
    """The model itself, which guesses sampled tokens too, and one of which little is right."""
    draft_model = first_layers(BUNDLED_MODEL, tmp_path, num_layers)
    drafted, accepted = check_draft_model(variant, "int8-cache", FEW, draft_model, preempt=num_layers == 2)
    assert drafted > 10 and (accepted == drafted if num_layers == 4 else 0 < accepted < drafted)


@pytest.mark.slow
@pytest.mark.parametrize("num_layers", [4, 3, 1])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("variant", variants())
def test_a_draft_model_changes_no_bit_of_500_requests(
    variant: str, precision: str, num_layers: int, tmp_path: Path
) -> None:
    draft_model = first_layers(BUNDLED_MODEL, tmp_path, num_layers)
    drafted, accepted = check_draft_model(variant, precision, MANY, draft_model, preempt=True)
    assert drafted > MANY // 2 and 0 < accepted <= drafted


@pytest.mark.parametrize("variant", emulation_slow(variants()))
def test_a_second_run_of_the_same_engine_changes_no_bit(variant: str) -> None:
    """Everything is in the prefix cache now, and the order of arrival is another."""
    requests, wanted = alone(variant, "bf16", FEW)
    pipe = make_pipe(variant, "bf16", num_threads=2)
    answers(pipe, requests)
    again = [outcome(response) for response in answers(pipe, requests[::-1])]
    first_choices = [index for index, request in enumerate(requests) for _ in range(request.params.n)]
    order = sorted(range(len(wanted)), key=lambda i: -first_choices[i])
    assert again == [wanted[i] for i in order]


# --- nothing computed by PyTorch --------------------------------------------------------------------------------------

# Reductions whose order of additions PyTorch chooses by shape or threads, and the network's own operations.
FORBIDDEN = (
    *("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "mv", "addmv", "dot", "vdot", "_linear_pointwise"),
    *("sum", "nansum", "mean", "var", "std", "norm", "linalg_vector_norm", "prod", "logsumexp", "logcumsumexp"),
    *("softmax", "_softmax", "log_softmax", "_log_softmax", "embedding", "silu", "gelu", "sigmoid", "tanh", "rsqrt"),
    *("scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu", "native_layer_norm", "index_add"),
)


class Watch(TorchDispatchMode):
    """Remembers the names of all operations that PyTorch carries out."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__.removesuffix("_"))
        return func(*args, **(kwargs or {}))


def test_watching_sees_what_the_reference_computes() -> None:
    pipe = splitfuse.pipeline(kernels="reference", num_blocks=64)
    with Watch() as watch:
        pipe("Once upon a time", max_new_tokens=2, temperature=1.0, logprobs=2)
    assert {"linear", "softmax", "embedding", "mean"} <= watch.names & set(FORBIDDEN)


@pytest.mark.parametrize("precision", ["bf16", "int8", "int4", "int8-cache"])
@pytest.mark.parametrize("variant", emulation_slow(variants()))
def test_no_product_and_no_sum_is_pytorchs(variant: str, precision: str) -> None:
    requests, _ = alone(variant, precision, FEW)
    pipe = make_pipe(variant, precision, num_threads=2, num_blocks=512)
    with Watch() as watch:
        answers(pipe, requests)
    assert {"cumsum", "exp"} <= watch.names, "the sampler was not seen"
    assert not watch.names & set(FORBIDDEN)
