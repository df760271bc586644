"""Checks what must hold of a scheduler between any two calls."""

from splitfuse.core.kv.request_kv import check_held
from splitfuse.core.request import RequestStatus
from splitfuse.core.scheduler import Scheduler
from splitfuse.core.step_builder import by_sequence_number


def check_scheduler(scheduler: Scheduler) -> None:
    allocator, unfinished = scheduler._allocator, scheduler.requests.by_id
    landing = [] if scheduler.fetches is None else scheduler.fetches.ahead.blocks
    check_held(allocator, [request.kv for request in unfinished.values()], landing)
    queue = scheduler.queue
    waiting, running = RequestStatus.WAITING, RequestStatus.RUNNING
    for requests, status in ((queue.waiting, waiting), (queue.running, running), (queue.fetching, waiting)):
        assert requests == sorted(requests, key=by_sequence_number)
        assert all(request.status is status for request in requests)
    assert len(queue.running) <= queue.max_num_seqs
    for request in (*queue.waiting, *queue.fetching):
        assert not request.kv.blocks and not request.num_scheduled and not request.num_plans_in_flight
        assert request.kv.state is None
    assert all((request.kv.fetch is not None) == (request in queue.fetching) for request in queue.unfinished)
    if scheduler.fetches is not None:
        inbox, ahead = scheduler.fetches.fetching.inbox, scheduler.fetches.ahead._wanted.values()
        held = [each.number for request in queue.unfinished for each in request.kv.arrived]
        held += [each.number for wanted in ahead for each in wanted.arrived]
        in_flight = set(inbox._held) - set(held)  # of chunks that are not back
        assert not in_flight or scheduler._in_flight
        num_awaited = sum(len(request.kv.fetch.names) for request in queue.fetching if request.kv.fetch is not None)
        num_awaited += sum(len(each.fetch.names) for each in ahead if each.fetch is not None)
        inbox.check([*held, *in_flight], num_awaited=num_awaited)
    for request in unfinished.values():
        num_slots = request.kv.num_blocks * allocator.block_size
        assert request.kv.num_computed <= request.num_scheduled <= num_slots
        is_to_be_computed = request.num_plans_in_flight or request.kv.landing
        assert is_to_be_computed or request.kv.num_computed == request.num_scheduled
        assert 0 <= request.num_output_placeholders <= request.num_plans_in_flight
        assert len(request.output_token_ids) <= request.max_tokens
