"""The boundary of an engine: in a thread, in a process of its own, and several behind a router, by the same tests."""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import os
import random
import re
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from engine_process import make_key
from patience import PATIENCE

import splitfuse
from splitfuse.config.engine import EngineConfig
from splitfuse.config.values import EngineRole
from splitfuse.core.events import RequestAdded, StepRecord
from splitfuse.core.plan import Logprobs, TokenLogprob
from splitfuse.core.request_output import FinishReason, RequestOutput
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.scheduling_options import SchedulingOptions
from splitfuse.core.slo.targets import SloTargets
from splitfuse.engine.client import EngineClient, EngineState, LocalClient
from splitfuse.engine.engine import Engine
from splitfuse.engine.messages import (
    Add,
    EngineStats,
    Failed,
    Finish,
    Loading,
    StepReport,
    Stop,
    decode_command,
    decode_report,
    encode,
)
from splitfuse.engine.remote import launcher
from splitfuse.engine.remote.launcher import SubprocessLauncher
from splitfuse.engine.remote.supervisor import SupervisedEngine
from splitfuse.engine.remote.transport import MAX_MESSAGE, frame, receive
from splitfuse.engine.replicas import divide, make_replicas
from splitfuse.engine.router import Router
from splitfuse.engine.thread import AsyncEngine
from splitfuse.errors import (
    ConfigError,
    EngineUnavailableError,
    InvalidRequestError,
    ModelNotFoundError,
    PromptTooLongError,
    RequestQuarantinedError,
    RequestTooLargeError,
)

SETTINGS = {"num_blocks": 256, "max_num_seqs": 16, "num_threads": 1}
CONFIG = EngineConfig.from_settings(SETTINGS)
PROMPT = tuple(range(10, 60))
LONG = SamplingParams(max_tokens=900, ignore_eos=True)


def in_thread() -> AsyncEngine:
    return AsyncEngine(Engine.load(CONFIG))


def in_process() -> EngineClient:
    return SupervisedEngine(SubprocessLauncher(CONFIG))


def behind_router() -> EngineClient:
    return Router([in_thread(), in_thread()])


CLIENTS = [pytest.param(make, id=make.__name__) for make in (in_thread, in_process, behind_router)]


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """The event loop of the clients that tests share."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module", params=CLIENTS)
def shared(request: pytest.FixtureRequest, runner: asyncio.Runner) -> Iterator[EngineClient]:
    """A client that every test leaves as it found it."""
    client: EngineClient = request.param()
    runner.run(client.start())
    yield client
    runner.run(client.close())


@asynccontextmanager
async def running(client: EngineClient) -> AsyncIterator[EngineClient]:
    await client.start()
    try:
        yield client
    finally:
        await client.close()


async def answer(client: EngineClient, name: str, prompt: tuple[int, ...], params: SamplingParams) -> tuple[int, ...]:
    tokens: list[int] = []
    async with client.open(Add(name, prompt, params)) as stream:
        async for output in stream:
            tokens += output.token_ids
    return tuple(tokens)


async def endless(client: EngineClient, name: str) -> None:
    """Send one long request after the other: it ends by an error alone."""
    for number in itertools.count():
        await answer(client, f"{name}.{number}", PROMPT, LONG)


async def until(condition: Callable[[], Any]) -> None:
    """Wait for a condition; the test's own time limit ends it."""
    while not condition():
        await asyncio.sleep(0.01)


def run(test: Awaitable[None], runner: asyncio.Runner | None = None) -> None:
    async def limited() -> None:
        await asyncio.wait_for(test, PATIENCE)

    (asyncio.run if runner is None else runner.run)(limited())


def requests(count: int) -> list[tuple[tuple[int, ...], SamplingParams]]:
    rng = random.Random(count)
    made = []
    for number in range(count):
        prompt = tuple(rng.randrange(5, 700) for _ in range(rng.randrange(1, 120)))
        temperature = rng.choice([0.0, 0.9])
        made.append((prompt, SamplingParams(max_tokens=rng.randrange(1, 30), temperature=temperature, seed=number)))
    return made


def test_concurrent_requests_equal_those_of_pipeline(shared: EngineClient, runner: asyncio.Runner) -> None:
    asked = requests(32)
    pipe = splitfuse.pipeline(**SETTINGS)
    wanted = [
        pipe(
            list(prompt),
            max_new_tokens=params.max_tokens,
            seed=params.seed,
            temperature=params.temperature or None,
        )[0].token_ids
        for prompt, params in asked
    ]

    async def test() -> None:
        together = await asyncio.gather(*(answer(shared, str(i), *request) for i, request in enumerate(asked)))
        alone = await answer(shared, "alone", *asked[3])
        assert together == wanted
        assert alone == wanted[3]

    run(test(), runner)


def test_closing_a_stream_frees_its_blocks(shared: EngineClient, runner: asyncio.Runner) -> None:
    async def test() -> None:
        streams = [shared.open(Add(str(i), PROMPT, LONG)) for i in range(20)]
        for stream in streams[:5]:
            await anext(aiter(stream))
        for stream in streams:
            stream.close()
        await until(lambda: all(not s.num_running + s.num_waiting for s in shared.stats))
        await answer(shared, "0", PROMPT, SamplingParams(max_tokens=2))  # the id is free again
        free = [s.num_available_blocks for s in shared.stats if s.num_steps]
        assert free and set(free) == {SETTINGS["num_blocks"]}
        assert shared.outstanding_tokens == 0
        async for _ in streams[7]:
            pytest.fail("a closed stream gave something")

    run(test(), runner)


def test_a_stop_string_ends_the_request(shared: EngineClient, runner: asyncio.Runner) -> None:
    async def test() -> None:
        async with shared.open(Add("stopped", PROMPT, LONG)) as stream:
            read = 0
            async for output in stream:
                read += len(output.token_ids)
                if read == 3:
                    stream.stop(2)
        await until(lambda: all(not s.num_running for s in shared.stats))
        assert read == 3  # nothing is read behind the stop
        assert stream.num_tokens < LONG.max_tokens

    run(test(), runner)


def test_a_client_has_limits(shared: EngineClient) -> None:
    limits = shared.info.limits
    refused = [
        ((), InvalidRequestError, "the prompt is empty"),
        ((1,) * limits.max_model_len, PromptTooLongError, "the model takes at most"),
        ((limits.vocab_size,), InvalidRequestError, "token id"),
    ]
    for prompt, error, message in refused:
        with pytest.raises(error, match=message):
            limits.check(prompt, SamplingParams())
    with pytest.raises(AssertionError, match="before submitting"):
        shared.open(Add("a", (), SamplingParams()))


def test_a_request_arrives_when_it_is_opened_though_a_step_is_in_flight() -> None:
    engine = Engine.load(CONFIG)
    is_computing, go_on = threading.Event(), threading.Event()
    arrivals: dict[str, float] = {}

    def hold(_: StepRecord) -> None:
        is_computing.set()
        assert go_on.wait(PATIENCE)

    def note(added: RequestAdded) -> None:
        arrivals[added.request.request_id] = added.request.slo.arrival_time

    async def scenario() -> None:
        engine.events.subscribe(StepRecord, hold)
        engine.events.subscribe(RequestAdded, note)
        async with running(AsyncEngine(engine)) as client:
            first = asyncio.create_task(answer(client, "first", PROMPT, SamplingParams(max_tokens=1)))
            await until(is_computing.is_set)
            second = asyncio.create_task(answer(client, "second", PROMPT, SamplingParams(max_tokens=1)))
            await asyncio.sleep(0)  # it is opened
            opened = time.monotonic()
            go_on.set()
            await asyncio.gather(first, second)
            assert arrivals["second"] <= opened, "what it waits for the step in flight counts to its SLO"

    run(scenario())


def test_an_id_in_use_and_a_request_larger_than_the_cache() -> None:
    async def test() -> None:
        async with running(in_thread()) as client:
            limits = replace(client.info.limits, num_blocks=2)
            with pytest.raises(RequestTooLargeError, match="whole cache has 2 blocks of 32 tokens"):
                limits.check(PROMPT, SamplingParams(max_tokens=50))
            async with client.open(Add("a", PROMPT, SamplingParams(max_tokens=50))):
                with pytest.raises(InvalidRequestError, match="'a' is still running"):
                    client.open(Add("a", PROMPT, SamplingParams(max_tokens=5)))

    run(test())


@pytest.mark.parametrize("make", CLIENTS)
def test_closing_ends_what_runs_with_an_error_and_leaves_nothing(make: Callable[[], EngineClient]) -> None:
    async def test() -> None:
        client = make()
        files, num_tasks = set(Path("/proc/self/fd").iterdir()), len(asyncio.all_tasks())
        with pytest.raises(EngineUnavailableError):
            client.open(Add("early", PROMPT, LONG))
        await client.start()
        tasks = [asyncio.create_task(endless(client, str(i))) for i in range(4)]
        await until(lambda: any(s.num_steps for s in client.stats))
        pid = client.pid if isinstance(client, SupervisedEngine) else None
        await client.close()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(outcome, EngineUnavailableError)
        assert client.state is EngineState.DEAD
        with pytest.raises(EngineUnavailableError):
            client.open(Add("late", PROMPT, LONG))
        assert len(asyncio.all_tasks()) == num_tasks
        await asyncio.sleep(0)  # what was closed is closed in the next turn of the loop
        assert len(set(Path("/proc/self/fd").iterdir()) - files) <= 1  # the listing itself
        assert pid is None or not Path(f"/proc/{pid}").exists()

    run(test())


# --- a process --------------------------------------------------------------------------------------------------------


async def die_and_come_back(client: SupervisedEngine, harm: Callable[[int], None]) -> None:
    tasks = [asyncio.create_task(endless(client, str(i))) for i in range(8)]
    await until(lambda: client.stats[0].num_running > 1)
    pid = client.pid
    assert pid is not None
    harm(pid)
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(outcome, EngineUnavailableError)
    with pytest.raises(EngineUnavailableError):
        client.open(Add("x", PROMPT, LONG))
    await until(lambda: client.state is EngineState.READY)
    assert client.pid != pid
    assert len(await answer(client, "after", PROMPT, SamplingParams(max_tokens=3, ignore_eos=True))) == 3


def test_a_killed_process_fails_its_requests_and_comes_back(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "splitfuse")
    monkeypatch.chdir(tmp_path)

    def kill(pid: int) -> None:
        tmp_path.rmdir()  # it comes back without its working directory too
        os.kill(pid, signal.SIGKILL)

    async def test() -> None:
        async with running(SupervisedEngine(SubprocessLauncher(CONFIG))) as client:
            assert isinstance(client, SupervisedEngine)
            await die_and_come_back(client, kill)

    run(test())
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "the engine died: its process ended with signal 9 (SIGKILL); starting it again in 0.5 s"
    assert re.fullmatch(r"the engine is ready again after \d+\.\d s", lines[1]) and len(lines) == 2


def test_a_process_or_a_step_that_hangs_is_found_and_its_stacks_logged(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    send, shown = launcher.send_signal, ""

    def kill_once_it_has_written(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
        nonlocal shown
        while number == signal.SIGKILL and "engine/loop.py" not in shown:  # its stacks
            shown += capfd.readouterr().err
        send(process, number)

    monkeypatch.setattr(launcher, "send_signal", kill_once_it_has_written)

    async def test() -> None:
        async with running(SupervisedEngine(SubprocessLauncher(CONFIG), silence_timeout=PATIENCE)) as client:
            assert isinstance(client, SupervisedEngine)
            live = client._live

            async def live_patiently() -> str:  # a process that imports PyTorch is silent for long
                client._silence_timeout = PATIENCE
                return await live()

            client._live = live_patiently  # type: ignore[method-assign]

            def stop(pid: int) -> None:
                os.kill(pid, signal.SIGSTOP)
                client._silence_timeout = 0.0

            await die_and_come_back(client, stop)
            client._step_timeout = 1e-9  # any step is too long
            with pytest.raises(EngineUnavailableError, match="a step has taken"):
                await endless(client, "stepping")  # a heartbeat must fall into a step

    run(test())
    assert "the engine hangs: it has been silent for" in caplog.text


def test_start_raises_what_prevents_it() -> None:
    async def test() -> None:
        client = SupervisedEngine(SubprocessLauncher(EngineConfig.from_settings({"model": "/nowhere/at/all"})))
        with pytest.raises(ModelNotFoundError, match="there is no folder /nowhere/at/all"):
            await client.start()
        assert client.state is EngineState.DEAD
        await client.close()

    run(test())


def test_closing_a_starting_process_logs_nothing() -> None:
    async def start_and_close() -> None:
        client = SupervisedEngine(SubprocessLauncher(CONFIG))
        starting = asyncio.create_task(client.start())
        await until(lambda: client.pid is not None)
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await client.close()

    async def test() -> None:
        complaints: list[str] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context["message"]))
        await start_and_close()
        gc.collect()  # asyncio complains of a failure that was not looked at when it is thrown away
        assert not complaints

    run(test())


# --- a router ---------------------------------------------------------------------------------------------------------


def test_a_router_tells_the_stage_of_those_not_ready() -> None:
    first, second = (SupervisedEngine(SubprocessLauncher(CONFIG)) for _ in range(2))
    router = Router([first, second])
    first.stage, second.stage = Loading("loading", 0.98), Loading("starting")
    assert router.stage == first.stage
    first.stage, second.stage = Loading("ready", 1.0), Loading("loading", 0.5)
    assert router.stage == second.stage
    second.stage = Loading("ready", 1.0)
    assert router.stage == second.stage


def test_a_silent_replica_gets_no_requests() -> None:
    async def test() -> None:
        stopped, other = SupervisedEngine(SubprocessLauncher(CONFIG), silence_timeout=PATIENCE), in_thread()
        async with running(Router([stopped, other])) as router:
            assert stopped.pid is not None
            os.kill(stopped.pid, signal.SIGSTOP)
            try:
                await until(lambda: stopped.silent)
                assert stopped.state is EngineState.READY  # it has not been given up yet
                params = SamplingParams(max_tokens=3, ignore_eos=True)
                for number in range(3):
                    assert len(await answer(router, str(number), PROMPT, params)) == 3
            finally:
                os.kill(stopped.pid, signal.SIGCONT)
            await until(lambda: not stopped.silent)

    run(test())


def test_equal_prefixes_go_to_the_replica_that_cached_them() -> None:
    async def test() -> None:
        async with running(behind_router()) as router:
            params = SamplingParams(max_tokens=1)
            for number in range(6):
                await answer(router, f"warm{number}", tuple(range(100, 300)), params)
            begun = [stats.num_steps > 0 for stats in router.stats]
            assert begun == [True, False]
            assert router.stats[0].num_cached_tokens >= 5 * 192

    run(test())


def access_to_weights(pid: int) -> str:
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return next(line.split()[1] for line in lines if "splitfuse-weights" in line)


async def dies_with(client: LocalClient, request: Add) -> bool:
    """Kill an engine that computes a request; return whether it was still running then."""
    assert isinstance(client, SupervisedEngine)
    await until(lambda: client.state is EngineState.READY)
    stream = client.open(request)
    await anext(aiter(stream))
    assert client.pid is not None
    os.kill(client.pid, signal.SIGKILL)
    await until(lambda: client.state is not EngineState.READY)
    try:
        async for _ in stream:
            pass
    except EngineUnavailableError:
        return True
    return False


def test_replicas_share_their_weights() -> None:
    async def test() -> None:
        cores = os.sched_getaffinity(0)
        if len(cores) < 2:
            pytest.skip("two replicas need two cores")
        async with running(
            make_replicas(EngineConfig.from_settings({**SETTINGS, "quantization": "int8"}), replicas=2)
        ) as router:
            assert isinstance(router, Router)
            pids = [replica.pid for replica in router.replicas if isinstance(replica, SupervisedEngine) and replica.pid]
            assert len(pids) == 2
            assert set.union(*(os.sched_getaffinity(pid) for pid in pids)) == cores
            asked = requests(8)
            first = await asyncio.gather(*(answer(router.replicas[0], str(i), *r) for i, r in enumerate(asked)))
            second = await asyncio.gather(*(answer(router.replicas[1], str(i), *r) for i, r in enumerate(asked)))
            assert first == second
            mapped = [Path(f"/proc/{pid}/maps").read_text() for pid in pids]
            access = [
                next(line.split()[1] for line in text.splitlines() if "splitfuse-weights" in line) for text in mapped
            ]
            assert access == ["rw-s", "r--s"]
            for replica in router.replicas:
                replica.rescue = None  # no request shall go on
            for seed in itertools.count():  # one that ended before the engine was killed is no suspect: another is sent
                suspect = Add(f"suspect {seed}", PROMPT, replace(LONG, seed=seed))
                if all([await dies_with(replica, suspect) for replica in router.replicas]):
                    break
            await until(lambda: router.replicas[0].state is EngineState.READY)  # the one that packed them finds them
            with pytest.raises(RequestQuarantinedError):  # all replicas know what killed the others
                router.open(suspect)
            assert await answer(router, "again", *asked[0]) == first[0]

    run(test())


def test_cores_are_divided_into_runs_of_neighbours() -> None:
    assert divide([0, 1, 4, 5, 6], 2) == [(0, 1), (4, 5, 6)]
    assert divide([3], 1) == [(3,)]
    assert divide([0, 1, 2, 3, 4, 5, 6, 7], 2, paid=5) == [(0, 1), (4, 5)]
    assert divide([0, 1, 2, 3], 2, paid=1) == [(0,), (2,)]
    with pytest.raises(ConfigError, match="replicas is 3, but this process may use 2 cores"):
        divide([0, 1], 3)


def test_what_replicas_on_ray_need(monkeypatch: pytest.MonkeyPatch) -> None:
    is_there = False
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object() if is_there else None)
    with pytest.raises(ConfigError, match=re.escape("ray needs the package ray: pip install splitfuse[ray]")):
        make_replicas(EngineConfig(), ray="local")
    is_there = True
    with pytest.raises(ConfigError, match="ray needs num_threads: the threads of each engine"):
        make_replicas(EngineConfig(), ray="local")
    with pytest.raises(ConfigError, match="kv_loans needs another engine to lend, all on this machine"):
        make_replicas(EngineConfig.from_settings({"kv_loans": True}), replicas=2, ray="local")


def test_places_for_replicas_that_could_never_come_are_refused() -> None:
    ranks = {"rank": ("10.0.0.2:9100",), "tensor_parallel_size": 2, "rank_key_file": "key"}
    for settings, how, message in (
        ({"kv_loans": True}, {"replicas": 2}, "max_replicas is 4, and with kv_loans there are 2 replicas from the"),
        ({}, {"replicas": 2, "roles": (EngineRole.PROMPT, EngineRole.GENERATION)}, "leave out max_replicas or roles"),
        (ranks, {"replicas": 2}, "with one engine at a time, and there could be 4: set replicas to 1"),
        (ranks, {}, "with one engine at a time, and there could be 4: set max_replicas to 1, and leave out autoscale"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_replicas(EngineConfig.from_settings(settings), max_replicas=4, **how)


def test_without_replicas_there_is_nothing_to_scale(tmp_path: Path) -> None:
    router = make_replicas(EngineConfig(), replicas=0, engines=["127.0.0.1:1"], key_file=make_key(tmp_path))
    with pytest.raises(InvalidRequestError, match="no replicas whose number could change: all engines run elsewhere"):
        asyncio.run(router.scale(1))


# --- messages ---------------------------------------------------------------------------------------------------------


LOGPROBS = Logprobs.of([TokenLogprob(7, -0.1, ((7, -0.1), (8, -3.7)))])


def test_messages_survive_the_wire() -> None:
    params = SamplingParams(max_tokens=3, stop=("a", "\ud7ff"), logit_bias={5: -1.5}, seed=2**64 - 1)
    for command in (
        Add("x", (1, 2), params, 1, SchedulingOptions("salt", SloTargets(1.0, 0.25, 0.1, 0.2, 99.0), 3.5)),
        Finish("x", FinishReason.STOP, 4),
        Stop(),
    ):
        assert decode_command(encode(command)) == command
    for report in (
        StepReport(
            (RequestOutput("x", (1,), LOGPROBS, LOGPROBS, (0.5,), FinishReason.LENGTH),), EngineStats(num_steps=3)
        ),
        Failed("why"),
    ):
        assert decode_report(encode(report)) == report


def test_anything_else_is_no_message() -> None:
    rng = random.Random(7)
    for _ in range(300):
        for decode in (decode_command, decode_report):
            with pytest.raises((msgspec.DecodeError, InvalidRequestError, UnicodeDecodeError)):
                decode(bytes(rng.randrange(256) for _ in range(rng.randrange(40))))
    with pytest.raises(msgspec.DecodeError):
        decode_command(encode(Failed("a report is no command")))


def test_messages_are_framed_by_their_length() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for message in (b"", b"abc", bytes(100_000)):
            ours.sendall(frame(message))
            assert receive(theirs) == message
        ours.sendall((MAX_MESSAGE + 1).to_bytes(4, "big"))
        with pytest.raises(ValueError, match="the message has"):
            receive(theirs)
        ours.close()
        assert receive(theirs) is None
