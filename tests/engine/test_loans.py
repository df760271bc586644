"""A request that no cache holds alone has the tokens and logprobs, bit for bit, of one engine that has the memory. A
creditor that is gone, stopped or slow ends in a clear outcome.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
import tiny_models
from backends import runnable
from patience import PATIENCE as LONG
from router_streams import held, until
from scheduler_checks import check_scheduler

import splitfuse
from splitfuse.config.engine import EngineConfig
from splitfuse.config.server import ServerConfig
from splitfuse.core.events import StepScheduled
from splitfuse.core.plan import Chunk, StepResult, TokenLogprob
from splitfuse.core.request_output import FinishReason
from splitfuse.core.request_table import LOAN_LOST
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.engine import loans as loans_of_engines
from splitfuse.engine.client import EngineState, LocalClient
from splitfuse.engine.engine import Engine
from splitfuse.engine.loans import close_channel
from splitfuse.engine.messages import Add, Loan
from splitfuse.engine.pending import NOT_LENT
from splitfuse.engine.ragged import RaggedEngine
from splitfuse.engine.remote.launcher import SubprocessLauncher
from splitfuse.engine.remote.supervisor import SupervisedEngine
from splitfuse.engine.replicas import make_replicas
from splitfuse.engine.router import Router
from splitfuse.engine.stream import Stream
from splitfuse.engine.thread import AsyncEngine
from splitfuse.errors import ConfigError, EngineUnavailableError, RequestTooLargeError
from splitfuse.kernels import loans as channels
from splitfuse.kernels.loans import TILE, make_channel
from splitfuse.runtime.executor import Executor
from splitfuse.server import lifecycle

pytestmark = runnable("avx2")
BLOCK = 32
SMALL, LARGE = 1024, 4096
"""Sizes of caches in tokens. The large one is that of a creditor, and of the engine that has the memory."""
LENGTH = 3 * SMALL - 20
Answer = tuple[list[int], list[TokenLogprob]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("loans")
    network = tiny_models.make("llama-gqa")
    network.config.max_position_embeddings = 2 * LARGE
    network.save_pretrained(path)
    return path


def config(folder: Path, num_tokens: int, **changes: Any) -> EngineConfig:
    settings = {"model": str(folder), "dtype": "bfloat16", "kernels": "avx2", "num_threads": 1, "kv_loans": True}
    sizes = {"num_blocks": num_tokens // BLOCK, "max_num_batched_tokens": 400, "max_num_seqs": 4}
    return EngineConfig.from_settings(settings | sizes | {"max_model_len": LARGE} | changes)


def long_request(name: str = "long", *, length: int = LENGTH, max_tokens: int = 20, **how: Any) -> Add:
    rng = Random(length)
    prompt = tuple(rng.randrange(5, tiny_models.VOCAB_SIZE) for _ in range(length))
    return Add(name, prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True, logprobs=2, **how)).settled


GREEDY: dict[str, Any] = {"temperature": 0.0}
SEEDED: dict[str, Any] = {"temperature": 0.9, "seed": 7}


def answer_of(engine: Engine, *requests: Add, others: tuple[Engine, ...] = ()) -> list[Answer]:
    """Run requests to their ends, and other engines meanwhile."""
    answers: dict[str, Answer] = {request.request_id: ([], []) for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_unfinished:
        for output in engine.step():
            assert output.error is None, output.error
            answers[output.request_id][0].extend(output.token_ids)
            answers[output.request_id][1].extend(output.logprobs or ())
        for other in others:
            other.step()
    return list(answers.values())


@contextmanager
def lending(creditor: Engine, request: Add, num_tokens: int) -> Iterator[Add]:
    """The request with a loan, which the creditor has been asked for."""
    fd = make_channel(9, creditor.channel_bytes)
    loan = Loan(9, f"/proc/self/fd/{fd}", num_tokens // BLOCK)
    assert creditor.lender is not None
    creditor.lend(loan)
    try:
        yield msgspec.structs.replace(request, loan=loan)
    finally:
        os.close(fd)
        creditor.lender.close()
        assert creditor.allocator.num_lent == 0
        check_scheduler(creditor.scheduler)


@pytest.mark.parametrize("dtype", ["auto", pytest.param("int8", marks=pytest.mark.slow)])
def test_context_of_three_caches_has_the_bits_of_one_engine(folder: Path, dtype: str) -> None:
    """Greedy and seeded, beside other requests of debtor and creditor; with drafts too, which are taken back."""
    small, large = (config(folder, size, kv_cache_dtype=dtype) for size in (SMALL, LARGE))
    whole, creditor, debtor = Engine.load(large), Engine.load(large), Engine.load(small)
    drafting = Engine.load(config(folder, SMALL, kv_cache_dtype=dtype, num_speculative_tokens=4))
    for how, engine in ((GREEDY, drafting), (SEEDED, debtor)):
        wanted = [long_request(**how), long_request("short", length=90, max_tokens=40, **how)]
        expected = answer_of(whole, *wanted)
        with lending(creditor, wanted[0], 4 * TILE) as request:
            creditor.add(long_request("its own", length=300, max_tokens=10))
            assert answer_of(engine, request, wanted[1], others=(creditor,)) == expected
        check_scheduler(engine.scheduler)
        assert engine.allocator.num_held == 0


@pytest.mark.slow
def test_preempted_request_keeps_what_its_creditor_holds(folder: Path) -> None:
    whole, creditor = Engine.load(config(folder, LARGE)), Engine.load(config(folder, LARGE))
    debtor = Engine.load(config(folder, SMALL))
    wanted = long_request(max_tokens=8)
    (expected,) = answer_of(whole, wanted)
    with lending(creditor, wanted, 4 * TILE) as request:
        debtor.add(request)
        got: Answer = ([], [])
        starts, held = list[int](), list[int]()
        debtor.executor.keeps_plans = False  # type: ignore[union-attr]
        debtor.events.subscribe(StepScheduled, lambda step: starts.append(step.plan.chunks[0].start))
        while debtor.has_unfinished:
            for output in debtor.step():
                got[0].extend(output.token_ids)
                got[1].extend(output.logprobs or ())
            running = debtor.scheduler.get("long")
            if len(starts) == 7 and running is not None and not running.num_plans_in_flight and not held:
                debtor.scheduler.queue.preempt(running, 0.0)
                assert running.kv.loan is not None
                held.append(running.kv.loan.num_held * BLOCK)
    assert got == expected
    assert held[0] >= 2 * TILE and starts[7] == held[0]


def test_lost_creditor_ends_the_request_and_no_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels.Channel.__init__, "__kwdefaults__", {"patience": 0.05})
    whole, creditor, debtor = (Engine.load(config(folder, size)) for size in (LARGE, LARGE, SMALL))
    short = long_request("short", length=90, max_tokens=60, **GREEDY)
    (expected,) = answer_of(whole, short)
    with lending(creditor, long_request(), 4 * TILE) as request:
        assert creditor.lender is not None
        for each in (request, short):
            debtor.add(each)
        tokens: list[int] = []
        ended = None
        while debtor.has_unfinished:
            for output in debtor.step(isolate=True):
                if output.request_id == "short":
                    tokens += output.token_ids
                elif output.finish_reason is not None:
                    ended = output
            running = debtor.scheduler.get("long")
            if running is not None and running.num_scheduled > 2 * TILE:
                creditor.lender.close()
        assert ended is not None and (ended.finish_reason, ended.error) == (FinishReason.MOVED, LOAN_LOST)
        assert tokens == expected[0]
    check_scheduler(debtor.scheduler)
    assert debtor.allocator.num_held == 0


def test_creditor_lends_only_what_its_own_requests_do_not_need(folder: Path) -> None:
    creditor, debtor = Engine.load(config(folder, LARGE)), Engine.load(config(folder, SMALL))
    creditor.add(long_request("own", length=LARGE - 2 * TILE, max_tokens=1))
    with lending(creditor, long_request(), 4 * TILE) as request:  # it refuses
        assert creditor.allocator.num_lent == 0
        debtor.add(request)
        (output,) = debtor.step()
        assert (output.finish_reason, output.error) == (FinishReason.MOVED, NOT_LENT)
    assert not debtor.has_unfinished and not debtor.executor.channels  # type: ignore[union-attr]
    creditor.abort("own")
    with lending(creditor, long_request(), 4 * TILE):
        assert creditor.allocator.num_lent == 4 * TILE // BLOCK
        creditor.add(long_request("too large now", length=LARGE - 2 * TILE, max_tokens=1))
        assert creditor.num_pending == 1 and not creditor.step()
        assert creditor.lender is not None
        assert not creditor.lend(Loan(10, "/proc/self/fd/none", BLOCK)), "a request waits for room"
        creditor.lender.close()  # the loan has ended
        while creditor.has_unfinished:
            (output, *_) = creditor.step() or (output,)
        assert output.finish_reason is FinishReason.LENGTH


def test_all_are_aborted_that_wait_for_a_loan_or_its_end(folder: Path) -> None:
    creditor, debtor = Engine.load(config(folder, LARGE)), Engine.load(config(folder, SMALL))
    with lending(creditor, long_request(), 4 * TILE) as request:
        debtor.add(request)
        creditor.add(long_request("too large now", length=LARGE - 2 * TILE, max_tokens=1))
        for engine in (debtor, creditor):
            assert engine.has_unfinished
            steps = list[StepScheduled]()
            engine.events.subscribe(StepScheduled, steps.append)
            engine.abort_all()
            assert not engine.has_unfinished and not steps


def test_channel_that_cannot_be_opened_lets_the_request_go_on_elsewhere(folder: Path) -> None:
    debtor = Engine.load(config(folder, SMALL))
    debtor.add(msgspec.structs.replace(long_request(), loan=Loan(4, "/proc/self/fd/none", 64)))
    (output,) = debtor.step()
    assert (output.finish_reason, output.error) == (FinishReason.MOVED, NOT_LENT) and not debtor.has_unfinished


def test_silent_creditor_is_given_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loans_of_engines, "GRANT_SECONDS", 0.05)
    debtor = Engine.load(config(folder, SMALL))
    fd = make_channel(4, debtor.channel_bytes)
    debtor.add(msgspec.structs.replace(long_request(), loan=Loan(4, f"/proc/self/fd/{fd}", 64)))
    outputs = []
    while debtor.has_unfinished:
        outputs += debtor.step()
    os.close(fd)
    assert [(output.finish_reason, output.error) for output in outputs] == [(FinishReason.MOVED, NOT_LENT)]


# Behind a router ------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def routed(*engines: LocalClient) -> AsyncIterator[Router]:
    router = Router(engines, lends=True)
    await router.start()
    try:
        yield router
    finally:
        await router.close()


async def read(stream: Stream) -> Answer:
    tokens: list[int] = []
    logprobs: list[TokenLogprob] = []
    async with stream:
        async for output in stream:
            assert output.error is None, output.error
            tokens += output.token_ids
            logprobs += output.logprobs or ()
    return tokens, logprobs


def run(test: Any) -> None:
    asyncio.run(asyncio.wait_for(test, LONG))


def test_front_finds_a_creditor(folder: Path) -> None:
    sizes = 3 * TILE, 4 * TILE
    wanted = [long_request(length=5 * TILE - 30, **GREEDY), long_request("short", length=90, **SEEDED)]
    expected = answer_of(Engine.load(config(folder, LARGE)), *wanted)

    async def test() -> None:
        engines = [AsyncEngine(Engine.load(config(folder, size))) for size in sizes]
        async with routed(*engines) as router:
            limits = router.info.limits
            assert (limits.num_blocks + limits.lent_blocks) * BLOCK == 5 * TILE
            assert router.open_limits.room == 4 * TILE + 1, "an answer without max_tokens ends where no loan is needed"
            with pytest.raises(RequestTooLargeError):
                limits.check(long_request(length=5 * TILE).prompt_token_ids, SamplingParams(max_tokens=2))
            assert router._loans is not None
            streams = [router.open(each) for each in wanted]
            assert [stream.on_loan for stream in streams] == [True, False] and len(router._loans) == 1
            assert await asyncio.gather(*map(read, streams)) == expected
            assert len(router._loans) == 0
            await until(lambda: engines[1].stats[0].num_lent_blocks == 0)
            # A second loan while there is no room for one is refused at once.
            first, second = router.open(wanted[0]), None
            with pytest.raises(EngineUnavailableError, match="room now to lend"):
                second = router.open(long_request("another", length=5 * TILE - 30))
            assert second is None
            first.close()

    run(test())


def test_request_that_lost_its_loan_goes_on_once_there_is_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of another request is what gives room."""
    wanted, other = long_request(length=4 * TILE, max_tokens=30), long_request("short", length=40, max_tokens=900)

    async def test() -> None:
        engines = [Engine.load(config(folder, size)) for size in (3 * TILE, 4 * TILE)]
        async with routed(*map(AsyncEngine, engines)) as router:
            debtor, creditor = router.replicas
            with held(engines[0], wanted, 5) as go_on, held(engines[1], other, 5):
                stream, short = router.open(wanted), router.open(other)
                assert stream.on_loan and debtor.has(stream) and creditor.has(short) and router._loans is not None
                await until(lambda: stream.num_tokens and creditor.stats[0].num_lent_blocks)
                with monkeypatch.context() as patched:
                    patched.setattr(router._loans, "plan", lambda *_: None)  # as without room
                    router._loans.end_lent(creditor)
                    go_on.set()
                    await until(lambda: router._recovery._waiting)
                short.close()
            assert len((await read(stream))[0]) == 30 and router.num_resumed["loan"] == 1

    run(test())


def test_engine_that_is_dead_for_now_makes_no_request_too_long(folder: Path) -> None:
    async def test() -> None:
        engines = [AsyncEngine(Engine.load(config(folder, size))) for size in (3 * TILE, 4 * TILE)]
        async with routed(*engines) as router:
            wanted = long_request(length=4 * TILE + 90)
            engines[0]._die("it is restarted")
            router.info.limits.check(wanted.prompt_token_ids, wanted.params)
            with pytest.raises(EngineUnavailableError, match="send it again"):
                router.open(wanted)

    run(test())


def test_request_that_cannot_be_added_behind_its_loan_ends_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    creditor, debtor = Engine.load(config(folder, LARGE)), Engine.load(config(folder, SMALL))
    short = long_request("short", length=40, max_tokens=9)
    with lending(creditor, long_request(), 4 * TILE) as request:
        debtor.add(request)
        debtor.add(short)
        monkeypatch.setattr(debtor._pending, "_accept", lambda *_: 1 / 0)
        ended = []
        while debtor.has_unfinished:
            ended += [output for output in debtor.step() if output.finish_reason is not None]
        assert [each.finish_reason for each in ended] == [FinishReason.ERROR, FinishReason.LENGTH]
        assert "ZeroDivisionError" in str(ended[0].error) and not debtor.executor.channels  # type: ignore[union-attr]


def test_step_goes_on_with_a_channel_that_is_closed_meanwhile(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client leaves between the deposits of a step and its first layer."""
    monkeypatch.setattr(channels.Channel.__init__, "__kwdefaults__", {"patience": 0.05})
    creditor, debtor = Engine.load(config(folder, LARGE)), Engine.load(config(folder, SMALL))
    executor = debtor.executor
    assert isinstance(executor, Executor)
    compute = executor._compute

    def closing(chunks: Sequence[Chunk]) -> StepResult:
        for number in [chunk.loan.number for chunk in chunks if chunk.loan is not None and chunk.loan.num_tokens]:
            close_channel(executor.channels, number)
        return compute(chunks)

    monkeypatch.setattr(executor, "_compute", closing)
    with lending(creditor, long_request(), 4 * TILE) as request:
        debtor.add(request)
        ended = []
        while debtor.has_unfinished:  # without `isolate` a step that fails raises
            ended += [output for output in debtor.step() if output.finish_reason is not None]
        assert [(output.finish_reason, output.error) for output in ended] == [(FinishReason.MOVED, LOAN_LOST)]
    check_scheduler(debtor.scheduler)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["auto", "int8"])
def test_two_processes_have_the_bits_of_one_engine(folder: Path, dtype: str) -> None:
    """Greedy and seeded, with three times the tokens of the debtor's cache, which the creditor does not hold alone."""
    size = 4 * TILE
    wanted = [long_request(str(how), length=3 * size - 60, **how) for how in (GREEDY, SEEDED)]
    whole = Engine.load(config(folder, 3 * size, max_model_len=3 * size, kv_cache_dtype=dtype))
    expected = [answer_of(whole, each)[0] for each in wanted]

    async def test() -> None:
        small, large = (
            SupervisedEngine(SubprocessLauncher(config(folder, each, max_model_len=3 * size, kv_cache_dtype=dtype)))
            for each in (size, 10 * TILE)
        )
        async with routed(small, large) as router:
            for request, answer in zip(wanted, expected, strict=True):
                stream = router.open(request)
                assert stream.on_loan
                assert await read(stream) == answer

    run(test())


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_request_goes_on_when_its_creditor_is_gone(folder: Path, how: signal.Signals) -> None:
    """Of three processes the third lends then, and what was lent is computed again."""
    wanted = long_request(length=5 * TILE - 100, max_tokens=60, **SEEDED)
    (expected,) = answer_of(Engine.load(config(folder, LARGE)), wanted)

    async def test() -> None:
        engines = [SupervisedEngine(SubprocessLauncher(config(folder, tiles * TILE))) for tiles in (3, 4, 4)]
        async with routed(*engines) as router:
            while not router.num_resumed["loan"]:  # it had ended before its creditor
                await until(lambda: all(engine.state is EngineState.READY for engine in engines))
                stream = router.open(wanted)
                reading = asyncio.create_task(read(stream))
                await until(lambda stream=stream: stream.num_tokens > 5)  # type: ignore[misc]
                assert router._loans is not None
                ((_, planned),) = router._loans._loans.items()
                assert isinstance(planned.creditor, SupervisedEngine) and planned.creditor.pid is not None
                os.kill(planned.creditor.pid, how)
                assert await reading == expected
            assert stream.num_resumed >= 1

    run(test())


# What is refused ------------------------------------------------------------------------------------------------------


def test_loans_are_refused_where_they_cannot_work(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    make_replicas(config(folder, SMALL), replicas=2, roles=ServerConfig(replicas=2).engine_roles)  # all are mixed
    for how in (
        {"replicas": 1},
        {"replicas": 2, "engines": ("127.0.0.1:1",)},
        {"replicas": 2, "roles": ServerConfig(replicas=2, roles="prompt:1,generation:1").engine_roles},
    ):
        with pytest.raises(ConfigError, match="set replicas to 2 or more"):
            make_replicas(config(folder, SMALL), **how)
    with pytest.raises(ConfigError, match="needs the C\\+\\+ kernels"):
        Engine.load(config(folder, SMALL, kernels="reference", num_threads=None))
    with pytest.raises(ConfigError, match="do not divide"):
        Engine.load(config(folder, SMALL, block_size=96))
    with pytest.raises(ConfigError, match="which RaggedEngine has not"):
        RaggedEngine.load(config(folder, SMALL))
    with pytest.raises(ConfigError, match="which a pipeline has not"):
        splitfuse.pipeline(folder, kv_loans=True)
    server = ServerConfig(record=str(folder / "server.rec"))
    with pytest.raises(ConfigError, match="cannot be replayed"), lifecycle._recorder(config(folder, SMALL), server):
        pass
    hybrid = tmp_path_factory.mktemp("hybrid")
    tiny_models.make("qwen3-next").save_pretrained(hybrid)
    with pytest.raises(ConfigError, match="recurrent state"):
        Engine.load(config(hybrid, SMALL, max_model_len=None))
