"""What a request generates depends on nothing but the request: on the bundled model, in fp32, token for token.

100 random requests, greedy and random, with and without penalties, stop strings and logprobs, each alone and all
together: for every budget of 1, 7, 64 and 512, every block size of 8, 16 and 64, with and without prefix cache, and
under forced preemption.
"""

from random import Random

import pytest
from forced_preemption import force_preemptions
from scheduler_checks import check_scheduler
from stories import make_story

import splitfuse
from splitfuse.text.prompts import PreparedRequest
from splitfuse.text.responses import Response

NUM_REQUESTS = 100


def make_requests(pipe: splitfuse.Pipeline) -> list[PreparedRequest]:
    """Stories of 10 to 200 words with questions; every fourth shares its beginning with the one before."""
    rng = Random("invariance")
    requests: list[PreparedRequest] = []
    story = ""
    for number in range(NUM_REQUESTS):
        told = make_story(rng, rng.choice((10, 10, 20, 20, 40, 200)), lambda text: len(text.split()))
        story = f"{story} {told.passage}" if number % 4 == 3 else told.passage
        keywords: dict[str, object] = {"max_new_tokens": rng.randint(1, 24), "chat": rng.random() < 0.7}
        if rng.random() < 0.5:
            keywords |= {"temperature": rng.choice((0.5, 1.0, 1.5)), "seed": rng.randrange(2**32)}
            keywords |= rng.choice(({}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.05}))
        keywords |= rng.choice(({}, {}, {"repetition_penalty": 1.3}, {"presence_penalty": 1.0}, {"ignore_eos": True}))
        keywords |= rng.choice(({}, {}, {"stop": [" a", "the"]}, {"min_new_tokens": 1}, {"logprobs": 2}))
        requests += pipe.prepare(f"{story}\n\n{rng.choice(told.questions).text}", **keywords)
    return requests


def answers(pipe: splitfuse.Pipeline, requests: list[PreparedRequest]) -> list[tuple[object, ...]]:
    """Everything a caller sees of each answer but probabilities' last digits and the time it took."""
    responses = [piece.response for piece in pipe.run(requests) if piece.response is not None]
    check_scheduler(pipe.engine.scheduler)
    return [outcome(response) for response in sorted(responses, key=lambda r: r.index)]


def outcome(response: Response) -> tuple[object, ...]:
    return (response.token_ids, response.generated_text, response.finish_reason, response.stop_string)


@pytest.fixture(scope="module")
def expected() -> tuple[list[PreparedRequest], list[tuple[object, ...]]]:
    """The requests, and what each gives alone in an engine that knows no other."""
    pipe = splitfuse.pipeline(dtype="float32", enable_prefix_caching=False, max_num_seqs=1, max_num_batched_tokens=2048)
    requests = make_requests(pipe)
    return requests, answers(pipe, requests)


QUICK = ((64, 8, True), (64, 64, True), (512, 16, False), (512, 64, True))
"""Budgets, block sizes and caches that each run of the tests has; the slow suite has all."""
SETTINGS = [
    pytest.param(
        {"max_num_batched_tokens": budget, "block_size": size, "enable_prefix_caching": cached},
        id=f"budget-{budget}-blocks-of-{size}-{'with' if cached else 'no'}-cache",
        marks=() if (budget, size, cached) in QUICK else pytest.mark.slow,
    )
    for budget in (1, 7, 64, 512)
    for size in (8, 16, 64)
    for cached in (True, False)
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_budget_block_size_and_prefix_cache_change_nothing(
    expected: tuple[list[PreparedRequest], list[tuple[object, ...]]], settings: dict[str, object]
) -> None:
    requests, wanted = expected
    pipe = splitfuse.pipeline(dtype="float32", num_blocks=16384 // int(str(settings["block_size"])), **settings)
    assert answers(pipe, requests) == wanted


@pytest.mark.parametrize(("budget", "count"), [(1, 12), (7, 40)])
def test_a_budget_of_few_tokens_changes_nothing(
    expected: tuple[list[PreparedRequest], list[tuple[object, ...]]], budget: int, count: int
) -> None:
    """With all requests they take as long as all other budgets together, which the slow suite spends."""
    requests, wanted = (part[:count] for part in expected)
    pipe = splitfuse.pipeline(dtype="float32", max_num_batched_tokens=budget, block_size=16, num_blocks=1024)
    assert answers(pipe, requests) == wanted


@pytest.mark.parametrize("cached", [True, False])
def test_preemption_changes_nothing(
    expected: tuple[list[PreparedRequest], list[tuple[object, ...]]], cached: bool
) -> None:
    requests, wanted = expected
    pipe = splitfuse.pipeline(
        dtype="float32", num_blocks=80, block_size=8, max_num_batched_tokens=512, enable_prefix_caching=cached
    )
    force_preemptions(pipe.engine)
    assert answers(pipe, requests) == wanted
    assert pipe.engine.scheduler.queue.num_preemptions >= 10


def test_a_second_run_of_the_same_engine_changes_nothing(
    expected: tuple[list[PreparedRequest], list[tuple[object, ...]]],
) -> None:
    """Everything is in the prefix cache now, and the order of arrival is another."""
    requests, wanted = expected
    pipe = splitfuse.pipeline(dtype="float32", block_size=16)
    answers(pipe, requests)
    assert answers(pipe, requests[::-1]) == wanted[::-1]
