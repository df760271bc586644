"""The baselines: each composes as its model did, and every request ends as if it were alone."""

import pytest
from scheduler_harness import Run, Workload

from splitfuse.bench.baselines import BASELINES, POLICIES, make_baseline
from splitfuse.config.engine import SchedulerConfig
from splitfuse.core.plan import StepPlan
from splitfuse.core.request import Request
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.errors import ConfigError

OTHERS = list(BASELINES)


def make(name: str, prompt: int, max_tokens: int) -> Request:
    return Request(name, tuple((len(name) + i * i) % 16 for i in range(prompt)), SamplingParams(), max_tokens, seed=0)


def steps(run: Run) -> list[dict[str, int]]:
    return [{chunk.request_id: len(chunk.token_ids) for chunk in plan.chunks} for plan in run.plans]


def start(policy: str, *, budget: int = 16, num_blocks: int = 1000, max_num_seqs: int = 64) -> Run:
    return Run.make(
        num_blocks=num_blocks,
        block_size=4,
        budget=budget,
        max_num_seqs=max_num_seqs,
        prefix=False,
        policy=make_baseline(policy, SchedulerConfig()),
    )


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("policy", OTHERS)
def test_every_workload_ends_as_if_each_request_were_alone(policy: str, depth: int) -> None:
    preemptions = 0
    for seed in range(100):
        try:
            run = Workload(seed).run(depth, policy=BASELINES[policy]())
        except AssertionError as error:
            raise AssertionError(f"Workload({seed}).run({depth}) under {policy}: {error}") from error
        preemptions += run.scheduler.queue.num_preemptions
    assert (preemptions == 0) == (policy == "static"), "the workloads are too tame to prove anything"


def test_prefill_first_runs_whole_prompts_while_decodes_wait() -> None:
    run = start("prefill-first")
    run.add(make("a", 10, 4))
    run.step()
    run.step()
    run.add(make("b", 40, 4))
    run.add(make("c", 5, 4))
    run.add(make("d", 5, 4))
    for _ in range(3):
        run.step()
    assert steps(run) == [{"a": 10}, {"a": 1}, {"b": 40}, {"c": 5, "d": 5}, {"a": 1, "b": 1, "c": 1, "d": 1}]


def test_orca_runs_whole_prompts_together_with_decodes() -> None:
    run = start("orca")
    run.add(make("a", 10, 4))
    run.step()
    run.add(make("b", 40, 4))
    run.add(make("c", 5, 4))
    for _ in range(3):
        run.step()
    assert steps(run) == [{"a": 10}, {"a": 1, "b": 40}, {"a": 1, "b": 1, "c": 5}, {"a": 1, "b": 1, "c": 1}]


def test_a_static_batch_admits_none_until_its_longest_has_ended() -> None:
    run = start("static")
    run.add(make("a", 10, 2))
    run.add(make("b", 4, 4))
    run.add(make("c", 8, 2))  # of the batch, but too long for its first step
    run.step()
    run.add(make("late", 3, 1))
    run.drain()
    assert steps(run) == [{"a": 10, "b": 4}, {"c": 8}, {"a": 1, "b": 1, "c": 1}, {"b": 1}, {"b": 1}, {"late": 3}]


def test_a_static_batch_has_slots_and_blocks_for_its_whole_output() -> None:
    run = start("static", num_blocks=10, max_num_seqs=2)
    for name, max_tokens in (("a", 9), ("b", 9), ("c", 9)):  # 4 blocks each
        run.add(make(name, 8, max_tokens))
    run.drain()
    assert run.scheduler.queue.num_preemptions == 0
    assert steps(run)[0] == {"a": 8, "b": 8} and steps(run)[-1] == {"c": 1}


def test_without_blocks_for_a_whole_prompt_it_waits() -> None:
    run = start("prefill-first", num_blocks=6)
    run.add(make("a", 12, 6))
    run.step()
    run.add(make("b", 12, 2))  # 3 blocks, as are left; but a needs one of them to go on
    run.drain()
    assert run.scheduler.queue.num_preemptions == 0
    assert steps(run)[:2] == [{"a": 12}, {"a": 1}] and steps(run)[-2:] == [{"b": 12}, {"b": 1}]


def test_unknown_policies_are_refused() -> None:
    assert make_baseline("splitfuse", SchedulerConfig()) is None
    with pytest.raises(ConfigError, match="no policy 'orka'; did you mean 'orca'"):
        make_baseline("orka", SchedulerConfig())


@pytest.mark.parametrize("policy", OTHERS)
def test_slo_settings_are_refused_for_baselines(policy: str) -> None:
    config = SchedulerConfig(ttft="2s")
    assert make_baseline("splitfuse", config) is None
    with pytest.raises(ConfigError, match=f"the policy {policy} meets no SLOs"):
        make_baseline(policy, config)
    with pytest.raises(ConfigError, match=f"the policy {policy} reserves nothing for the oldest request"):
        make_baseline(policy, SchedulerConfig(tail_share=0.5))


def test_plans_of_all_policies_say_the_same_budget() -> None:
    for policy in POLICIES:
        run = start(policy, budget=7)
        run.add(make("a", 3, 1))
        run.step()
        assert isinstance(run.plans[0], StepPlan) and run.plans[0].token_budget == 7
