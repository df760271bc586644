"""The scheduler's law, one sentence a test. The faults are those of DeepSpeed-MII that led to the law."""

import subprocess
import sys

import pytest
from scheduler_harness import Run, reference

from splitfuse.core.limits import ceil_div
from splitfuse.core.request import Request, RequestStatus
from splitfuse.core.request_output import FinishReason
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.scheduling_options import SchedulingOptions
from splitfuse.errors import InvalidRequestError, RequestTooLargeError


def make(name: str, prompt: int, max_tokens: int, **params: int) -> Request:
    tokens = tuple((len(name) * 7 + i * i) % 16 for i in range(prompt))
    return Request(name, tokens, SamplingParams(**params), max_tokens, seed=0)


def sizes(run: Run, number: int = -1) -> dict[str, int]:
    return {chunk.request_id: len(chunk.token_ids) for chunk in run.plans[number].chunks}


def test_prompts_are_split_and_fused_to_fill_the_budget_exactly() -> None:
    run = Run.make(num_blocks=100, block_size=4, budget=8)
    for name, prompt in (("a", 13), ("bb", 2), ("ccc", 30)):
        run.add(make(name, prompt, 4))
    run.step()
    assert sizes(run) == {"a": 8}
    run.step()
    assert sizes(run) == {"a": 5, "bb": 2, "ccc": 1}
    run.step()
    assert sizes(run) == {"a": 1, "bb": 1, "ccc": 6}
    assert not run.plans[0].chunks[0].samples and run.plans[1].chunks[0].samples


def test_a_prompt_alone_is_cut_evenly() -> None:
    run = Run.make(num_blocks=200, block_size=16, budget=256)
    run.add(make("p", 600, 1))
    run.drain()
    assert [plan.num_tokens for plan in run.plans] == [208, 208, 184], "multiples of 16, and no step more than of 256"


def test_what_an_even_cut_leaves_goes_to_the_next_request() -> None:
    run = Run.make(num_blocks=200, block_size=16, budget=256)
    run.add(make("p", 600, 1))
    run.add(make("q", 600, 1))
    run.drain()
    assert [plan.num_tokens for plan in run.plans] == [256, 256, 256, 224, 208]
    assert [len(plan.chunks[0].token_ids) for plan in run.plans[:3]] == [208, 208, 184]


@pytest.mark.parametrize("budget", [1, 7, 15, 16, 17, 100, 256])
def test_an_even_cut_takes_no_step_more(budget: int) -> None:
    for length in (1, 2, 15, 16, 17, 31, 100, 255, 257, 300, 511, 600):
        run = Run.make(num_blocks=200, block_size=16, budget=budget)
        run.add(make("p", length, 1))
        run.drain()
        steps = [plan.num_tokens for plan in run.plans]
        assert len(steps) == ceil_div(length, budget) and sum(steps) == length
        assert steps == sorted(steps, reverse=True)


def test_a_long_prompt_never_stalls_a_decode() -> None:
    run = Run.make(num_blocks=1000, block_size=16, budget=64)
    for number in range(8):
        run.add(make(f"g{number}", 5, 100))
    run.step()
    run.step()
    run.add(make("long", 1000, 1))
    steps = 0
    while run.outcomes["long"].finish_reason is None:
        outputs = run.step()
        steps += 1
        assert {o.request_id for o in outputs if o.token_ids} >= {f"g{number}" for number in range(8)}
        assert run.plans[-1].num_tokens == 64 or run.outcomes["long"].finish_reason
    assert steps == -(-1000 // (64 - 8))


def add_as_oldest(run: Run, request: Request) -> None:
    """What a policy other than order of arrival may bring about: the oldest comes when the others are running."""
    run.add(request)
    request.sequence_number = -1
    run.waiting.sort(key=lambda r: r.sequence_number)


def test_the_oldest_prompt_moves_even_when_decodes_fill_the_budget() -> None:
    run = Run.make(num_blocks=100, block_size=4, budget=3, max_num_seqs=4)
    for number in range(3):
        run.add(make(f"g{number}", 1, 30))
    run.step()
    run.step()
    assert sizes(run) == {"g0": 1, "g1": 1, "g2": 1}
    add_as_oldest(run, make("first", 12, 3))
    run.step()
    assert sizes(run) == {"g0": 1, "g1": 1, "first": 1}, "one token is set aside for it"
    while run.outcomes["first"].finish_reason is None:
        run.step()
        assert "first" in sizes(run)
    run.drain()


def test_the_oldest_request_takes_the_slot_of_the_newest() -> None:
    run = Run.make(num_blocks=100, block_size=4, budget=8, max_num_seqs=2)
    requests = [make("g0", 1, 9), make("g1", 1, 9)]
    for request in requests:
        run.add(request)
    run.step()
    add_as_oldest(run, make("first", 4, 2))
    run.step()
    assert sizes(run) == {"g0": 1, "first": 4}
    run.drain()
    assert [request.kv.num_preemptions for request in requests] == [0, 1]


def test_of_several_newer_requests_the_newest_gives_way() -> None:
    run = Run.make(num_blocks=9, block_size=2, budget=16, prefix=False)
    requests = [make(name, 3, 10) for name in ("old", "middle", "newest")]
    for request in requests:
        run.add(request)
    while not any(request.kv.num_preemptions for request in requests):
        run.step()
    assert [request.kv.num_preemptions for request in requests] == [0, 0, 1]
    run.drain()


def test_generated_tokens_are_cached_for_the_next_turn() -> None:
    run = Run.make(num_blocks=100, block_size=4, budget=64)
    run.add(make("a", 5, 9))
    run.drain()
    history = make("a", 5, 9).prompt_token_ids + tuple(run.outcomes["a"].tokens)
    run.add(Request("b", (*history, 1, 2, 3), SamplingParams(), 1, seed=0))
    run.step()
    assert run.plans[-1].chunks[0].start == 12, "13 positions were computed: 3 full blocks of 4"


def test_preemption_takes_the_newest_and_loses_nothing_fault_1() -> None:
    run = Run.make(num_blocks=6, block_size=2, budget=16, prefix=False)
    old, new = make("old", 3, 8), make("newer", 3, 8)
    run.add(old)
    run.add(new)
    preempted = 0
    while run.scheduler.has_unfinished:
        run.step()
        preempted = max(preempted, new.kv.num_preemptions)
        assert old.kv.num_preemptions == 0
    assert preempted > 0
    for request in (old, new):
        assert run.outcomes[request.request_id].tokens == reference(request)[0]
        assert len(request.prompt_token_ids) == 3


def test_a_request_that_can_never_fit_is_refused_fault_2() -> None:
    run = Run.make(num_blocks=4, block_size=4, budget=8)
    with pytest.raises(RequestTooLargeError, match=r"needs 5 KV blocks .* whole cache has 4 blocks .* at most 7"):
        run.add(make("big", 10, 8))
    run.add(make("fits", 10, 7))
    run.drain()
    assert len(run.outcomes["fits"].tokens) == 7


def test_a_prompt_starts_with_the_blocks_there_are_fault_7() -> None:
    run = Run.make(num_blocks=6, block_size=4, budget=64)
    run.add(make("old", 8, 4))
    run.add(make("large", 20, 2))
    run.step()
    assert sizes(run) == {"old": 8, "large": 12}, "it needs 5 blocks, and of the 4 left one is for the other's stream"
    run.drain()


def test_a_large_waiting_prompt_and_small_ones_all_get_through() -> None:
    run = Run.make(num_blocks=8, block_size=4, budget=8, max_num_seqs=2)
    run.add(make("old", 8, 20))
    run.add(make("large", 28, 2))
    small = [f"s{number}" for number in range(20)]
    for name in small:
        run.add(make(name, 3, 3))
    order = []
    while run.scheduler.has_unfinished:
        order += [o.request_id for o in run.step() if o.finish_reason]
    assert order.index("large") < len(order) - 1
    assert set(order) == {"old", "large", *small}


def test_equal_prefixes_are_computed_once_for_each_salt() -> None:
    run = Run.make(num_blocks=100, block_size=4, budget=64)
    prompt = tuple(range(14))
    for name, salt in (("a", ""), ("b", ""), ("c", "other")):
        run.add(Request(name, prompt, SamplingParams(), 2, seed=0, scheduling=SchedulingOptions(cache_salt=salt)))
        run.drain()
    starts = {c.request_id: c.start for plan in run.plans for c in reversed(plan.chunks) if len(c.token_ids) > 1}
    assert starts == {"a": 0, "b": 12, "c": 0}


def test_the_cached_share_of_a_prompt_is_reported() -> None:
    run = Run.make(num_blocks=100, block_size=4, budget=64)
    outputs = []
    for name in ("a", "bb"):
        run.add(Request(name, tuple(range(14)), SamplingParams(), 1, seed=0))
        outputs += run.step()
    assert [output.num_cached_tokens for output in outputs] == [0, 12]


def test_prompt_logprobs_cover_every_token_despite_the_prefix_cache() -> None:
    run = Run.make(num_blocks=100, block_size=4, budget=5)
    run.add(make("a", 14, 2))
    run.drain()
    again = make("b", 14, 2, prompt_logprobs=0)
    run.add(again)
    run.drain()
    assert [p.token_id for p in run.outcomes["b"].prompt_logprobs] == list(again.prompt_token_ids[1:])


def test_a_finish_in_flight_frees_its_blocks_when_the_plan_is_back() -> None:
    run = Run.make(num_blocks=10, block_size=2, budget=4, depth=2)
    run.add(make("a", 2, 10))
    run.step()
    held = run.allocator.num_held
    run.finish("a", FinishReason.STOP, 1)
    assert run.allocator.num_held == held > 0
    run.drain()
    assert run.outcomes["a"].tokens == reference(make("a", 2, 10))[0][:1]


def test_an_id_in_use_is_refused() -> None:
    run = Run.make(num_blocks=10, block_size=2, budget=4)
    run.add(make("a", 2, 2))
    with pytest.raises(InvalidRequestError, match="'a' is still running"):
        run.add(make("a", 2, 2))


def test_finish_of_an_unknown_request_changes_nothing() -> None:
    run = Run.make(num_blocks=10, block_size=2, budget=4)
    assert not run.scheduler.finish("unknown", FinishReason.ABORT)
    waiting = make("a", 2, 2)
    run.add(waiting)
    assert run.scheduler.finish("a", FinishReason.ABORT) and waiting.status is RequestStatus.FINISHED
    assert run.scheduler.schedule() is None


def test_core_needs_no_torch() -> None:
    """In a fresh interpreter where importing torch fails, a scheduler still runs a workload to its end."""
    code = (
        "import sys; sys.modules['torch'] = None; sys.path.insert(0, 'tests/helpers')\n"
        "from scheduler_harness import Workload\n"
        "Workload(1).run(2)\n"
        "assert sorted(m for m in sys.modules if m.startswith('torch') or m == 'numpy') == ['torch']\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
