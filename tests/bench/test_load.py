"""Loads: when requests are sent and which count, on a target with known latencies and on the real engine."""

import asyncio
import itertools

import pytest

from splitfuse.bench import metrics
from splitfuse.bench.load import MAX_FAILURES, closed_loop, open_loop
from splitfuse.bench.results import Point
from splitfuse.bench.target import Answer, EngineTarget, Target
from splitfuse.bench.workload import Chat, Independent, Lengths, LoadRequest, TokenIds
from splitfuse.config.engine import EngineConfig
from splitfuse.engine.engine import Engine
from splitfuse.errors import ServerError
from splitfuse.simulator import virtual_time

IDS = TokenIds(3072)
WORKLOAD = Independent(Lengths(20, 5), IDS)


class Ticking(Target):
    """Answers everybody a token a tick; each `fails`-th request fails."""

    def __init__(self, *, fails: int | None = None, tick: float = 0.001) -> None:
        self.asked: list[LoadRequest] = []
        self.most_at_once = self._at_once = 0
        self._fails, self._tick = fails, tick
        self.vocabulary = self.answer_vocabulary = IDS
        self.about = {}

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def ask(self, request: LoadRequest) -> Answer:
        self.asked.append(request)
        if self._fails is not None and len(self.asked) % self._fails == 0:
            return Answer(len(request.prompt), error="status 500")
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        times, tick = [], self._tick * (1 + len(self.asked) / 10_000)  # no two answers end at the same time
        for _ in range(request.max_tokens):
            await asyncio.sleep(tick)
            times.append(asyncio.get_running_loop().time())
        self._at_once -= 1
        return Answer(len(request.prompt), tuple(times), tuple(range(request.max_tokens)))


def check(point: Point, requests: int) -> None:
    """What holds of every closed loop."""
    assert len(metrics.counted(point)) == requests
    start, end = point.window
    clients = range(point.clients or 0)
    before = {record.client for record in point.records[1:] if record.done <= start}
    assert before == set(clients)  # each was answered before the window opened
    for client in clients:
        own = [record for record in point.records if record.client == client]
        assert all(a.done <= b.sent for a, b in itertools.pairwise(own) if a.error is None)
    last = max(record.done for record in metrics.counted(point))
    if point.clients != 1:  # the load stays on until the last that counts is done
        assert {r.client for r in point.records if r.sent >= end or r.done >= last} >= set(clients) - {
            max(metrics.counted(point), key=lambda record: record.done).client
        }


@pytest.mark.parametrize(("clients", "requests"), [(1, 1), (1, 5), (4, 1), (4, 30), (16, 40)])
def test_closed_loop(clients: int, requests: int) -> None:
    target = Ticking()
    point = virtual_time.run(closed_loop(target, WORKLOAD, clients=clients, requests=requests))
    check(point, requests)
    assert target.most_at_once == clients
    assert len({request.prompt for request in target.asked}) == len(target.asked) == len(point.records)


def test_clients_start_one_after_the_other() -> None:
    point = virtual_time.run(closed_loop(Ticking(), WORKLOAD, clients=8, requests=5, spacing=0.02))
    alone, *others = point.records
    starts = [min(record.sent for record in others if record.client == client) for client in range(8)]
    assert all(b - a > 0.01 for a, b in itertools.pairwise(starts))
    assert alone.done <= starts[0]


def test_failed_requests_count_and_do_not_end_the_load() -> None:
    point = virtual_time.run(closed_loop(Ticking(fails=5), WORKLOAD, clients=3, requests=20))
    assert len(metrics.counted(point)) == 20 and 0 < len(metrics.answered(point)) < 20
    with pytest.raises(ServerError, match="the first request failed: status 500"):
        virtual_time.run(closed_loop(Ticking(fails=1), WORKLOAD, clients=3, requests=20))


def test_conversations_in_a_closed_loop() -> None:
    target = Ticking()
    chat = Chat(Lengths(10, 3), IDS, turns=3)
    check(virtual_time.run(closed_loop(target, chat, clients=3, requests=20)), 20)
    asked = {(request.number, request.turn): request for request in target.asked}
    assert len(asked) == len(target.asked) and {turn for _, turn in asked} == {0, 1, 2}
    for (number, turn), request in asked.items():
        if turn:
            before = asked[number, turn - 1]
            assert request.prompt[: len(before.prompt)] == before.prompt


def test_an_open_loop_does_not_wait_for_answers() -> None:
    arrivals = [0.002 * i for i in range(10_000)]
    target = Ticking(tick=0.01)
    point = virtual_time.run(open_loop(target, WORKLOAD, rate=500.0, arrivals=iter(arrivals), requests=40))
    assert point.window == (arrivals[10], arrivals[50])  # a quarter came before
    assert [record.sent for record in metrics.counted(point)] == arrivals[10:50]  # due, whenever they could be sent
    assert target.most_at_once > 5
    last = max(record.done for record in metrics.counted(point))
    assert max(record.sent for record in point.records) > last - 0.1  # the load stayed on
    assert len(point.records) < 1000


def test_all_requests_count_if_arrivals_end() -> None:
    point = virtual_time.run(open_loop(Ticking(), WORKLOAD, rate=None, arrivals=iter([0.0, 0.01, 0.02]), requests=None))
    assert len(metrics.counted(point)) == len(metrics.answered(point)) == 3
    assert point.window[0] == 0.0 and point.window[1] >= max(record.done for record in point.records)
    assert metrics.throughput(point) == pytest.approx(3 / point.window[1])


def test_late_arrivals_are_pending_before_the_window_closes() -> None:
    """All are overdue when the load begins; the last two open and close the window."""
    arrivals = iter([0.0] * 4 + [1e-9 * i for i in range(1, 18)])
    point = virtual_time.run(open_loop(Ticking(), WORKLOAD, rate=None, arrivals=arrivals, requests=16))
    assert len(metrics.answered(point)) == 16


def test_load_of_failures_is_given_up() -> None:
    target = Ticking(fails=1)
    with pytest.raises(ServerError, match="all requests failed, the last with: status 500"):
        virtual_time.run(open_loop(target, WORKLOAD, rate=1.0, arrivals=itertools.count(0.0, 0.001), requests=100))
    assert MAX_FAILURES <= len(target.asked) < 1000


def test_our_engine_in_this_process() -> None:
    async def run() -> Point:
        target = EngineTarget(EngineConfig.from_settings({"num_blocks": 400}))
        await target.start()
        try:
            assert target.room == 2048 and target.vocabulary.size == 3072  # type: ignore[union-attr]
            assert target.about["startup_seconds"] > 0 and target.resident_bytes()
            workload = Chat(Lengths(40, 6, room=target.room), target.vocabulary, turns=2)
            return await closed_loop(target, workload, clients=4, requests=12)
        finally:
            await target.close()

    point = asyncio.run(run())
    check(point, 12)
    assert all(record.error is None and len(record.token_times) >= 1 for record in point.records)


def test_dead_engine_ends_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        target = EngineTarget(EngineConfig.from_settings({"num_blocks": 400}))
        await target.start()
        steps = itertools.count()
        step = Engine.step

        def dying(self: Engine, **options: bool) -> object:
            if next(steps) > 40:
                raise RuntimeError("the machine is on fire")
            return step(self, **options)

        monkeypatch.setattr(Engine, "step", dying)
        try:
            await closed_loop(target, WORKLOAD, clients=2, requests=1000)
        finally:
            await target.close()

    with pytest.raises(ServerError, match=r"the engine has died: .* on fire"):
        asyncio.run(run())
