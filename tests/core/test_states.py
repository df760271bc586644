"""States live in slots: a chunk reads one and writes one, and a snapshot is a slot that is not overwritten."""

from itertools import pairwise

import pytest
from scheduler_checks import check_scheduler
from scheduler_harness import Run, reference

from splitfuse.core.kv.block_allocator import BlockAllocator
from splitfuse.core.kv.names import BlockNamer
from splitfuse.core.kv.state_allocator import StateAllocator
from splitfuse.core.plan import ZERO_STATE, Chunk, ChunkResult, StateSlots
from splitfuse.core.policy import PlanningError
from splitfuse.core.request import Request
from splitfuse.core.request_output import FinishReason
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.scheduling_options import SchedulingOptions

INTERVAL = 4  # blocks


def make_run(**sizes: int) -> Run:
    """A run with blocks of 4 tokens and a snapshot every 16 tokens of a prompt."""
    return Run.make(
        **{"num_blocks": 200, "block_size": 4, "budget": 64, "max_num_seqs": 4, "spare_states": 40} | sizes,
        interval=INTERVAL,
    )


def request(name: str, prompt: tuple[int, ...], max_tokens: int = 4, salt: str = "") -> Request:
    options = SchedulingOptions(cache_salt=salt)
    return Request(name, prompt, SamplingParams(), max_tokens, seed=0, scheduling=options)


def chunks_of(run: Run, name: str) -> list[Chunk]:
    return [chunk for plan in run.plans for chunk in plan.chunks if chunk.request_id == name]


def drain(run: Run, *requests: Request) -> None:
    for each in requests:
        run.add(each)
    run.drain()
    for each in requests:
        outcome = run.outcomes[each.request_id]
        assert (outcome.tokens, outcome.finish_reason) == reference(each, recurrent=True)


def snapshots(run: Run) -> set[bytes]:
    assert run.allocator.states is not None
    return set(run.allocator.states.names)


# --- what a conversation computes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reasoning", [0, 9], ids=["whole history", "reasoning dropped"])
def test_six_turns_compute_new_tokens_and_one_interval_at_most(reasoning: int) -> None:
    run = make_run()
    history: tuple[int, ...] = (1,) * 70
    for turn in range(6):
        message = tuple((turn * 5 + i * i) % 16 for i in range(3 + 11 * turn))
        drain(run, request(f"turn {turn}", history + message, max_tokens=21))
        answer = tuple(run.outcomes[f"turn {turn}"].tokens)
        computed = sum(len(chunk.token_ids) for chunk in chunks_of(run, f"turn {turn}"))
        if turn:
            fresh = len(message) + 21 + (21 - reasoning if reasoning else 0)
            assert computed <= fresh + INTERVAL * 4
        history += message + answer[reasoning:]


def test_an_answer_leaves_one_snapshot_besides_those_of_intervals() -> None:
    run = make_run()
    drain(run, request("a", (1,) * 10, max_tokens=60))
    names: list[bytes] = []
    BlockNamer(4, key=b"test").extend(names, (*(1,) * 10, *run.outcomes["a"].tokens))
    kept = [4 * index + 4 for index, name in enumerate(names) if name in snapshots(run)]
    assert kept == [8, 16, 32, 48, 64, 68], "end of the prompt, intervals, end of the answer"


def kept(chunk: Chunk) -> list[int]:
    """The positions on the way through a chunk at which its state is kept."""
    assert chunk.state is not None
    return [position for position, _ in chunk.state.kept]


def test_a_prompt_is_kept_at_intervals_and_at_its_last_block() -> None:
    run = make_run()
    drain(run, request("a", (1,) * 43, max_tokens=1))
    (chunk,) = chunks_of(run, "a")
    assert (chunk.end, kept(chunk)) == (43, [16, 32, 40])
    drain(run, request("again", (1,) * 43, max_tokens=1))
    assert [(chunk.start, chunk.end) for chunk in chunks_of(run, "again")] == [(40, 43)]


def test_the_end_of_a_common_prefix_is_kept_the_second_time() -> None:
    run = make_run()
    system = (5,) * 31
    starts = []
    for number in range(3):
        drain(run, request(f"{number}", (*system, *(number,) * 20), max_tokens=1))
        starts.append(chunks_of(run, f"{number}")[0].start)
    assert starts == [0, 16, 28], "an interval, then the last common block"


def test_what_follows_a_common_prefix_is_published_behind_it() -> None:
    run = make_run()
    system = (5,) * 14
    drain(run, request("a", (*system, 1), max_tokens=1), request("b", (*system, *(2,) * 20), max_tokens=1))
    drain(run, request("c", (*system, *(2,) * 20), max_tokens=1))
    assert chunks_of(run, "c")[0].start == 32


def test_choices_of_one_prompt_read_one_snapshot() -> None:
    run = make_run()
    prompt = (7,) * 23
    drain(run, request("0", prompt))
    choices = [request(f"{number}", prompt) for number in (1, 2)]
    for each in choices:
        run.add(each)
    run.step()
    first, second = run.plans[-1].chunks
    assert first.state is not None and second.state is not None
    assert first.start == second.start == 20
    assert first.state.read == second.state.read and first.state.write != second.state.write
    run.drain()


def test_nothing_is_shared_between_salts() -> None:
    run = make_run()
    for salt in ("", "other"):
        drain(run, request(f"salt {salt}", (1,) * 43, salt=salt))
        assert chunks_of(run, f"salt {salt}")[0].start == 0


def test_no_state_is_kept_where_running_requests_may_need_the_slots() -> None:
    run = make_run(max_num_seqs=2, spare_states=0)
    run.add(request("a", (1,) * 43))
    run.step()
    assert kept(run.plans[-1].chunks[0]) == [16], "of 4 slots it writes one, and two are for what runs"
    run.drain()


def test_without_a_prefix_cache_nothing_is_kept_or_copied() -> None:
    run = make_run(prefix=False)
    drain(run, request("a", (1,) * 43, max_tokens=20))
    first, *others = chunks_of(run, "a")
    assert len(first.token_ids) == 43 and first.state == StateSlots(ZERO_STATE, first.state.write)
    assert {chunk.state for chunk in others} == {StateSlots(first.state.write, first.state.write)}
    assert not snapshots(run)


# --- preemption, failures ---------------------------------------------------------------------------------------------


def test_a_preempted_request_goes_on_from_a_snapshot() -> None:
    run = make_run(num_blocks=16, max_num_seqs=2)
    old, new = request("old", (1,) * 17, 30), request("new", (2,) * 17, 30)
    drain(run, old, new)
    assert new.kv.num_preemptions
    starts = [chunk.start for chunk in chunks_of(run, "new")]
    resumed = [start for before, start in pairwise(starts) if start <= before]
    assert resumed[0] == 16, "it does not begin anew"


def test_a_state_lost_in_a_failed_step_is_computed_again() -> None:
    run = make_run()
    run.add(request("a", (1,) * 22, max_tokens=9))
    run.add(request("b", (2,) * 22, max_tokens=9))
    while len(run.outcomes["a"].tokens) < 2:
        run.step()
    plan = run.scheduler.schedule()
    assert plan is not None and not any(chunk.is_repeatable for chunk in plan.chunks)
    outputs = run.scheduler.update(plan, {c.request_id: ChunkResult(state_lost=True) for c in plan.chunks})
    assert [(output.token_ids, output.finish_reason) for output in outputs] == [((), None)] * 2
    check_scheduler(run.scheduler)
    before = len(run.plans)
    run.drain()
    for name, token in (("a", 1), ("b", 2)):
        assert run.outcomes[name].tokens == reference(request(name, (token,) * 22, 9), recurrent=True)[0]
    later = [chunk for plan in run.plans[before:] for chunk in plan.chunks]
    assert later[0].start == 20, "from the last snapshot"
    assert all(chunk.is_repeatable for chunk in later), "a second failure of its step finds its cause"


@pytest.mark.interpreted
def test_a_step_that_cannot_be_planned_loses_no_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    run.add(request("a", (1,) * 43))
    with monkeypatch.context() as patch:
        patch.setattr(Request, "sampling_state", lambda _: 1 // 0)
        with pytest.raises(PlanningError):
            run.scheduler.schedule()
    check_scheduler(run.scheduler)
    run.drain()
    assert run.outcomes["a"].tokens == reference(request("a", (1,) * 43), recurrent=True)[0]


def test_an_aborted_request_gives_its_slots_back_when_its_plan_is_back() -> None:
    run = make_run(depth=2)
    run.add(request("a", (1,) * 40, max_tokens=10))
    run.step()
    run.finish("a", FinishReason.ABORT)
    assert run.allocator.states is not None and run.allocator.states.num_held
    run.drain()


# --- the allocator ----------------------------------------------------------------------------------------------------


def test_the_least_recently_used_snapshot_goes_first() -> None:
    states = StateAllocator(3, interval=2)
    slots = [states.allocate() for _ in range(3)]
    for slot, name in zip(slots, (b"a", b"b", b"c"), strict=True):
        assert states.publish(slot, name)
        states.release(slot)
    count, used = states.match([b"a"])
    assert (count, used) == (1, slots[0])
    states.release(used)
    assert states.allocate() == slots[1], "a was used again, so b is the oldest"
    states.check([slots[1]])
    assert set(states.names) == {b"a", b"c"}


def test_the_longest_prefix_with_a_snapshot_is_found() -> None:
    states = StateAllocator(3, interval=2)
    slot = states.allocate()
    states.publish(slot, b"second")
    assert states.match([b"first", b"second", b"third"]) == (2, slot)
    assert states.match([b"first"]) == (0, ZERO_STATE)
    states.check([slot, slot])


def test_a_slot_that_two_hold_is_not_overwritten() -> None:
    states = StateAllocator(2, interval=2)
    slot = states.allocate()
    assert states.is_overwritable(slot)
    states.publish(slot, b"a")
    assert not states.is_overwritable(slot), "a snapshot"
    states.match([b"a"])
    states.forget(b"a")
    assert not states.is_overwritable(slot), "no snapshot any more, but another reads it"
    states.release(slot)
    assert states.is_overwritable(slot)


def test_a_name_has_one_snapshot() -> None:
    states = StateAllocator(2, interval=2)
    first, second = states.allocate(), states.allocate()
    assert states.publish(first, b"a") and not states.publish(second, b"a")
    states.release(second)
    states.check([first])


def test_a_snapshot_goes_with_its_block() -> None:
    states = StateAllocator(2, interval=2)
    blocks = BlockAllocator(2, 2, namer=BlockNamer(2, key=b"test"), states=states)
    names: list[bytes] = []
    held = blocks.allocate(2)
    blocks.publish(held, [1, 2, 3, 4], names)
    slot = states.allocate()
    states.publish(slot, names[1])
    states.release(slot)
    blocks.release(held)
    blocks.check([])
    taken = blocks.allocate(1)
    assert not states.names, "the last block went, and with it the snapshot"
    blocks.check([taken])


def test_check_sees_a_lost_slot_and_a_double_release() -> None:
    states = StateAllocator(2, interval=2)
    slot = states.allocate()
    with pytest.raises(AssertionError, match="references"):
        states.check([])
    states.release(slot)
    with pytest.raises(AssertionError, match="released too often"):
        states.release(slot)
