"""Blocks are fetched where that is sooner than computing them, and what has arrived takes no more than its place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from random import Random

import pytest
from scheduler_harness import FakeTier, Run, reference

from splitfuse.core.kv.fetching import LONGEST_FETCH, Fetch, Fetching, Found, Frame, Inbox, Part
from splitfuse.core.plan import ChunkResult
from splitfuse.core.request import Request
from splitfuse.core.request_output import FinishReason
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.slo.cost_model import CostModel
from splitfuse.core.slo.deadline_policy import DeadlinePolicy
from splitfuse.core.slo.latency_predictor import LatencyPredictor

NAMES = [bytes([number]) * 16 for number in range(6)]
TOKENS = [(number, number + 1) for number in range(6)]


class Source:
    """Has the first blocks of any text."""

    def __init__(self, num_blocks: int, seconds: float = 0.5) -> None:
        self.found = Found(num_blocks, seconds)
        self.asked: list[int] = []

    def find(self, names: Sequence[bytes], _: Sequence[str] = ()) -> Found:
        self.asked.append(len(names))
        return self.found

    def find_one(self, _: Iterable[bytes]) -> tuple[bytes, float] | None:
        return None

    def forget(self, number: int) -> None: ...


def ask(source: Source, capacity: int = 10, *, per_block: float | None = None) -> Fetch | None:
    compute = None if per_block is None else lambda count: per_block * count / 2  # tokens of a block
    return Fetching(source, Inbox(capacity, 4)).ask("a", 3, NAMES, TOKENS, compute)


def test_without_a_cost_model_two_blocks_are_fetched() -> None:
    assert ask(Source(0)) is None and ask(Source(1)) is None
    fetch = ask(Source(2))
    assert fetch is not None
    assert (fetch.first, fetch.names, fetch.token_ids) == (3, tuple(NAMES[:2]), tuple(TOKENS[:2]))
    assert fetch.seconds == LONGEST_FETCH


def test_with_a_cost_model_what_is_there_sooner_is_fetched() -> None:
    assert ask(Source(1, 0.5), per_block=0.4) is None
    fetch = ask(Source(1, 0.5), per_block=0.6)
    assert fetch is not None and len(fetch.names) == 1 and fetch.seconds == 0.6, "not longer than computing them"
    fetch = ask(Source(4, 0.5), per_block=60.0)
    assert fetch is not None and len(fetch.names) == 4 and fetch.seconds == LONGEST_FETCH


@pytest.mark.parametrize(("seconds", "num_blocks"), [(0.0, 2), (0.1, 2), (0.4, 1)])
def test_a_part_is_fetched_only_if_that_takes_less_time_than_computing_it(seconds: float, num_blocks: int) -> None:
    """A token takes 0.3 s: a full block of two is there sooner, whatever its part of one token takes."""
    fetch = Fetching(Source(1, 0.5), Inbox(10, 4)).ask(
        *("a", 3, NAMES, TOKENS, lambda count: 0.3 * count),
        part_behind=lambda _: Part(b"part", (9,), seconds),
    )
    assert fetch is not None and len(fetch.names) == num_blocks


def test_no_more_is_asked_for_than_the_inbox_has_places() -> None:
    source = Source(6)
    fetch = ask(source, capacity=3)
    assert fetch is not None and len(fetch.names) == 3 and source.asked == [3]


def test_an_answer_is_taken_as_far_as_it_is_what_was_asked_for() -> None:
    fetch = ask(Source(4))
    assert fetch is not None
    frames = [Frame.of(name, tokens, bytes(4)) for name, tokens in zip(NAMES, TOKENS, strict=True)]
    assert fetch.matching(frames) == frames[:4]
    assert fetch.matching([frames[0], frames[2]]) == frames[:1]
    assert fetch.matching([frames[0], frames[1]._replace(token_ids=(7, 7))]) == frames[:1]
    assert fetch.matching([]) == []


@pytest.mark.parametrize("field", ["name", "token_ids", "data"])
def test_a_checksum_is_of_everything(field: str) -> None:
    frame = Frame.of(NAMES[1], TOKENS[1], b"data")
    assert frame.is_intact
    assert not frame._replace(**{field: {"name": NAMES[2], "token_ids": (1, 3), "data": b"date"}[field]}).is_intact


def test_the_inbox_gives_places_back() -> None:
    inbox = Inbox(5, 4)
    inbox.num_free -= 4
    frames = [Frame.of(name, (1, 2), bytes(4 if number != 2 else 3)) for number, name in enumerate(NAMES[:4])]
    numbers = inbox.put(frames, reserved=4)
    assert len(numbers) == 2, "the third is too short"
    inbox.check(numbers, num_awaited=0)
    inbox.discard(numbers[:1])
    inbox.check(numbers[1:], num_awaited=0)
    with pytest.raises(KeyError):
        inbox[numbers[0]]


def request(name: str, prompt: tuple[int, ...]) -> Request:
    return Request(name, prompt, SamplingParams(), max_tokens=3, seed=0)


def test_others_go_on_while_one_waits_and_it_is_the_oldest_again() -> None:
    tier = FakeTier(Random(0), 4)
    old, new = request("old", (1,) * 30), request("new", (2,) * 30)
    tier.ANSWERS = ("late",)  # type: ignore[misc]
    tier.find = lambda names, _: Found(sum(name in tier.frames for name in names), 0.0)  # type: ignore[method-assign]
    run = Run.make(num_blocks=16, block_size=4, budget=8, max_num_seqs=2, tier=tier, inbox_blocks=10)
    tokens = [*old.prompt_token_ids, *reference(old)[0]]
    names: list[bytes] = []
    run.allocator.name_blocks(tokens, names, 7)
    for index, name in enumerate(names):
        block = tokens[4 * index : 4 * index + 4]
        tier.save(name, tuple(block), block)
    run.add(old)
    run.add(new)
    tier._deadlines, tier._rng = {}, Random(3)
    run.step()
    assert run.fetching == [old] and run.running == [new]
    run.drain()
    for each in (old, new):
        assert (run.outcomes[each.request_id].tokens, run.outcomes[each.request_id].finish_reason) == reference(each)


@pytest.mark.parametrize("where", ["another engine", "the same engine", "the same engine, which predicts its steps"])
def test_the_next_turn_begins_where_the_last_one_ended(where: str) -> None:
    """Blocks of 4 tokens; of the first turn 9 + 3 - 1 are computed, its last token was not fed back."""
    tier = FakeTier(Random(0), 4)
    tier.ANSWERS = ("at once",)  # type: ignore[misc]
    tier.find = lambda names, _: Found(sum(name in tier.frames for name in names), 0.0)  # type: ignore[method-assign]
    first, other = (Run.make(num_blocks=16, block_size=4, budget=64, tier=tier, inbox_blocks=10) for _ in range(2))
    old = request("old", (1,) * 9)
    first.add(old)
    first.drain()
    first.step()  # which saves what was computed last
    run = other if where == "another engine" else first
    assert run.scheduler.fetches is not None
    if where.endswith("steps"):
        run.scheduler.fetches.seconds_of = lambda step: float(step.tokens)
    turn = request("turn", (*old.prompt_token_ids, *reference(old)[0], 7, 7, 7))
    run.add(turn)
    run.drain()
    chunk = next(chunk for plan in run.plans for chunk in plan.chunks if chunk.request_id == "turn")
    assert chunk.start == (8 if where == "the same engine" else 11), "two full blocks, and three tokens of the last"
    assert (run.outcomes["turn"].tokens, run.outcomes["turn"].finish_reason) == reference(turn)


@pytest.mark.parametrize("how", ["it ends before its step is computed", "its step fails"])
def test_what_has_not_landed_is_not_saved(how: str) -> None:
    """Another text may be in the blocks where it should have landed, the last of which is not full."""
    tier = FakeTier(Random(0), 4)
    tier.find = lambda names, _: Found(sum(name in tier.frames for name in names), 0.0)  # type: ignore[method-assign]
    first, second = (Run.make(num_blocks=16, block_size=4, budget=64, tier=tier, inbox_blocks=10) for _ in range(2))
    old = request("old", (1,) * 9)
    first.add(old)
    first.drain()
    first.step()  # which saves what was computed last
    scheduler = second.scheduler
    assert scheduler.fetches is not None
    scheduler.add(request("turn", (*old.prompt_token_ids, *reference(old)[0], 7, 7, 7)))
    (fetch,) = scheduler.fetches.take()
    assert scheduler.fetches.arrived(fetch.number, [tier.frames[name] for name in fetch.names])
    plan = scheduler.schedule()
    assert plan is not None and len(plan.chunks[0].lands) == 3 and plan.chunks[0].start == 11
    assert not scheduler.requests.save_blocks("turn", 2, 2), "none of them is there"
    if how == "its step fails":
        scheduler.update(plan, {"turn": ChunkResult(error="the forward step failed")})
    else:
        scheduler.finish("turn", FinishReason.ABORT)
        scheduler.update(plan, {"turn": ChunkResult()})
    assert not scheduler.has_unfinished and not second.allocator.take_saves()


def test_fetches_follow_the_cost_model_of_the_policy() -> None:
    """A block of 4 tokens takes 4 s to compute: 7 blocks are not fetched in 100 s, and are in 1 s."""
    for seconds, is_fetched in ((100.0, False), (1.0, True)):
        tier = FakeTier(Random(0), 4)
        policy = DeadlinePolicy(LatencyPredictor(CostModel(floor=1.0, per_token=1.0)), token_budget=64)
        run = Run.make(num_blocks=16, block_size=4, budget=64, policy=policy, tier=tier, inbox_blocks=10)
        tier.find = lambda names, _, seconds=seconds: Found(len(names), seconds)  # type: ignore[method-assign, misc]
        run.scheduler.add(request("a", (1,) * 30), 0.0)
        assert run.scheduler.fetches is not None
        fetches = run.scheduler.fetches.take()
        assert [len(fetch.names) for fetch in fetches] == [7] * is_fetched
        assert all(fetch.seconds == 2.0 for fetch in fetches)
