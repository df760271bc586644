"""What the server hands to consoles, traces and recorders: records of engines, ends of requests, and states."""

from collections.abc import Callable

from running_server import RunningServer

from splitfuse.engine.trace import FinishTrace, PhaseTrace, RequestTrace, StepTrace, TraceLevel
from splitfuse.server.traces import EngineRecords, RequestEnd, TraceEvent


def test_subscriber_gets_records_and_ends_of_requests(server: RunningServer) -> None:
    events: list[TraceEvent] = []

    async def subscribe() -> list[Callable[[], None]]:
        def failing(_: TraceEvent) -> None:
            raise ValueError("a subscriber that fails harms nothing else")

        hub = server.traces
        return [hub.subscribe(failing, TraceLevel.OFF), hub.subscribe(events.append, TraceLevel.STEPS)]

    unsubscribe = server.call(subscribe())
    with server.http() as http:
        answer = http.post("/v1/completions", json={"prompt": "One day", "max_tokens": 4, "n": 2, "ignore_eos": True})
        refused = http.post("/v1/completions", json={"prompt": "One day", "max_tokens": -1})
    assert (answer.status_code, refused.status_code) == (200, 400)
    server.wait_until(lambda: sum(isinstance(event, RequestEnd) for event in events) == 2)

    records = [record for event in events if isinstance(event, EngineRecords) for record in event.records]
    requests = [record for record in records if isinstance(record, RequestTrace)]
    ends = {event.record.status: event for event in events if isinstance(event, RequestEnd)}
    assert [request.choice for request in requests] == [0, 1]
    assert all(request.request_id.startswith(ends[200].unique_id) for request in requests)
    assert sum(isinstance(record, FinishTrace) for record in records) == 2
    assert sum(len(chunk.token_ids) for r in records if isinstance(r, StepTrace) for chunk in r.chunks) == 8
    assert ends[200].breakdown is not None and ends[400].breakdown is None

    async def end() -> None:
        for each in unsubscribe:
            each()

    server.call(end())
    count = len(events)
    with server.http() as http:
        assert http.post("/v1/completions", json={"prompt": "One day", "max_tokens": 1}).status_code == 200
    assert len(events) == count and not server.traces.is_watched


def test_late_subscriber_is_told_of_unfinished_requests_alone(server: RunningServer) -> None:
    first: list[TraceEvent] = []
    late: list[TraceEvent] = []
    ends: list[Callable[[], None]] = []
    body = {"prompt": "One day", "max_tokens": 800, "ignore_eos": True}

    def requests(events: list[TraceEvent]) -> list[RequestTrace]:
        records = (record for event in events if isinstance(event, EngineRecords) for record in event.records)
        return [record for record in records if isinstance(record, RequestTrace)]

    def subscribe_late(event: TraceEvent) -> None:
        first.append(event)
        if len(ends) == 1 and requests([event]):  # at once: the request is still unfinished
            ends.append(server.traces.subscribe(late.append, TraceLevel.STEPS))

    async def subscribe() -> None:
        ends.append(server.traces.subscribe(subscribe_late, TraceLevel.STEPS))

    server.call(subscribe())
    with server.http() as http:
        assert http.post("/v1/completions", json=body).status_code == 200
    assert isinstance(late[0], EngineRecords)
    assert [type(record) for record in late[0].records] == [RequestTrace, PhaseTrace]
    assert requests(late) == requests(first)
    server.assert_idle()

    async def end() -> None:
        for each in ends:
            each()

    server.call(end())
