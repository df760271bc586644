"""A request in the step in flight at two deaths of an engine is refused for ten minutes, and no other request is."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from patience import PATIENCE

from splitfuse.config.engine import EngineConfig
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.scheduling_options import SchedulingOptions
from splitfuse.engine.client import EngineState
from splitfuse.engine.messages import Add, StepReport
from splitfuse.engine.quarantine import MAX_REMEMBERED, MAX_TOKENS, NUM_COMPLETED, NUM_DEATHS, SECONDS, Quarantine
from splitfuse.engine.remote import supervisor
from splitfuse.engine.remote.in_flight import InFlightRecord
from splitfuse.engine.remote.launcher import SubprocessLauncher
from splitfuse.engine.remote.supervisor import SupervisedEngine
from splitfuse.errors import EngineUnavailableError, RequestQuarantinedError

PARAMS = SamplingParams(max_tokens=5, temperature=0.5, logit_bias={5: 1.0, 600: -1.0})
ADD = Add("a", (1, 2, 3), PARAMS)


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def quarantine(clock: Clock) -> Quarantine:
    return Quarantine(clock)


def refuses(quarantine: Quarantine, request: Add) -> bool:
    try:
        quarantine.check(request)
    except RequestQuarantinedError:
        return True
    return False


def with_other(**changes: object) -> Add:
    return Add("a", (1, 2, 3), replace(PARAMS, **changes))  # type: ignore[arg-type]


def test_two_deaths_refuse_a_request_for_ten_minutes(
    quarantine: Quarantine, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    assert not refuses(quarantine, ADD)
    quarantine.engine_died([ADD, Add("b", (4,), PARAMS)])
    clock.now += 100
    assert not refuses(quarantine, ADD)
    quarantine.engine_died([ADD])
    assert caplog.messages == [
        "request a was in the step in flight at 2 deaths of an engine: requests with these tokens and parameters are "
        "refused (422) for 600 s"
    ]
    with pytest.raises(
        RequestQuarantinedError, match=r"computed at 2 deaths of an engine, .* refused for another 600 s"
    ):
        quarantine.check(ADD)
    clock.now += 599
    assert refuses(quarantine, ADD) and not refuses(quarantine, Add("b", (4,), PARAMS))
    clock.now += 1
    assert not refuses(quarantine, ADD) and not quarantine._deaths
    quarantine.engine_died([ADD])
    assert not refuses(quarantine, ADD)  # it begins anew


def test_the_digest_is_of_tokens_and_parameters(quarantine: Quarantine) -> None:
    for _ in range(NUM_DEATHS):
        quarantine.engine_died([ADD])
    same = Add("other", (1, 2, 3), replace(PARAMS, logit_bias={600: -1.0, 5: 1.0}), 3, SchedulingOptions("salt"))
    assert refuses(quarantine, same)
    for other in (Add("a", (1, 2), PARAMS), Add("a", (1, 2, 4), PARAMS), with_other(seed=1), with_other(logit_bias={})):
        assert not refuses(quarantine, other)


def test_a_death_long_ago_is_forgotten(quarantine: Quarantine, clock: Clock) -> None:
    for _ in range(5):
        quarantine.engine_died([ADD])
        clock.now += SECONDS
    assert not refuses(quarantine, ADD)


def test_a_request_that_completes_is_cleared_but_not_released(quarantine: Quarantine) -> None:
    for _ in range(5):  # an engine killed again and again makes no popular request suspect
        quarantine.engine_died([ADD])
        quarantine.completed(Add("b", (1, 2, 3), PARAMS))
        quarantine.completed(with_other(seed=2))
    assert not refuses(quarantine, ADD) and not quarantine._deaths
    for _ in range(NUM_DEATHS):
        quarantine.engine_died([ADD])
    quarantine.completed(ADD)
    assert refuses(quarantine, ADD)


def test_what_completes_all_the_time_is_excused_from_one_death(quarantine: Quarantine, clock: Clock) -> None:
    poison = Add("poison", (4,), PARAMS)
    for _ in range(NUM_COMPLETED):
        quarantine.completed(ADD)  # a probe, which is in flight at both deaths that another request causes
    for _ in range(NUM_DEATHS):
        quarantine.engine_died([ADD, poison])
    assert refuses(quarantine, poison) and not refuses(quarantine, ADD)
    quarantine.engine_died([ADD])
    assert refuses(quarantine, ADD)  # it causes deaths itself
    clock.now += SECONDS
    for _ in range(NUM_COMPLETED):
        quarantine.completed(ADD)
    clock.now += SECONDS
    for _ in range(NUM_DEATHS):
        quarantine.engine_died([ADD])
    assert refuses(quarantine, ADD)  # it is long ago that it completed


def test_what_is_remembered_is_bounded(quarantine: Quarantine) -> None:
    for number in range(2 * MAX_REMEMBERED):
        quarantine.completed(Add("a", (number,), PARAMS))
    quarantine.completed(Add("a", (5,) * (MAX_TOKENS + 1), PARAMS))
    assert len(quarantine._completed) == MAX_REMEMBERED


def test_choices_of_a_request_count_a_death_once(quarantine: Quarantine) -> None:
    quarantine.engine_died([Add(f"a.{choice}", (1, 2, 3), PARAMS, choice) for choice in range(4)])
    assert not refuses(quarantine, ADD)


def test_choices_of_a_request_count_a_completion_once(quarantine: Quarantine) -> None:
    for choice in range(NUM_COMPLETED):
        quarantine.completed(Add(f"a.{choice}", (1, 2, 3), PARAMS, choice))
    for _ in range(NUM_DEATHS):
        quarantine.engine_died([ADD])
    assert refuses(quarantine, ADD)


def test_a_record_outlives_the_process_that_wrote_it() -> None:
    record = InFlightRecord()
    record.write([])
    assert record.read() == []
    ids = [f"request ü {number}" for number in range(2000)]
    program = f"""
import os, signal
from splitfuse.engine.remote.in_flight import InFlightRecord
record = InFlightRecord({record.fd})
record.write(["x" * 100_000])
record.write([f"request ü {{number}}" for number in range(2000)])
os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = subprocess.run([sys.executable, "-c", program], pass_fds=[record.fd], check=False)
    assert ended.returncode == -signal.SIGKILL and record.read() == ids
    record.clear()
    assert record.read() == []
    os.pwrite(record.fd, b"\xff\xff\xff\xff", 0)  # torn
    assert record.read() == []
    os.pwrite(record.fd, b"\0\0\0\5\x93", 0)
    assert record.read() == []
    record.close()


def test_a_request_that_kills_twice_is_refused_alone(
    clock: Clock, quarantine: Quarantine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervisor, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(supervisor, "STABLE_SECONDS", 0.0)
    config = EngineConfig.from_settings({"num_blocks": 256, "max_num_seqs": 1, "num_threads": 1})
    engine = SupervisedEngine(SubprocessLauncher(config), quarantine=quarantine)

    def fail(_: StepReport) -> None:
        raise KeyError("a bug in the listener")

    async def tokens(request: Add) -> int:
        """Return how many tokens come, at most three."""
        count = 0
        async with engine.open(request) as stream:
            while count < 3 and (output := await anext(stream, None)) is not None:
                count += len(output.token_ids)
        return count

    async def until_ready() -> None:
        while engine.state is not EngineState.READY:
            await asyncio.sleep(0.01)

    async def die(number: int, params: SamplingParams) -> bool:
        """Die with one request in the step in flight, one that waits in the engine, and one that has ended. Returns
        whether the first one was still running then.
        """
        await until_ready()
        assert await tokens(Add("ended", (7, 8), SamplingParams(max_tokens=1))) == 1
        running = engine.open(Add(f"running {number} {params.seed}", (5, 6), params))
        await anext(aiter(running))
        waiting = engine.open(Add(f"waiting {number} {params.seed}", (5, 6, 7), params))
        while not engine.stats[0].num_waiting and not running.is_over:
            await asyncio.sleep(0.01)
        assert engine.pid is not None and engine._link is not None
        if number:  # an engine that cannot read a command does not go on without it
            engine._link._writer.write(b"\0\0\0\2\xc1\xc1")
        else:
            os.kill(engine.pid, signal.SIGKILL)
        lost = []
        for stream in (running, waiting):
            try:
                async for _ in stream:
                    pass
            except EngineUnavailableError:
                lost.append(stream)
        return lost == [running, waiting]

    async def test() -> None:
        await engine.start()
        try:
            for seed in itertools.count():  # where the first request ended before, both begin anew with others
                long = SamplingParams(max_tokens=2000, ignore_eos=True, seed=seed)
                if all([await die(number, long) for number in range(2)]):
                    break
            with pytest.raises(RequestQuarantinedError):  # while it starts, too
                engine.open(Add("again", (5, 6), long))
            await until_ready()
            with pytest.raises(RequestQuarantinedError):
                engine.open(Add("again", (5, 6), long))
            engine.on_step = fail  # a listener of the steps harms no request
            for name, prompt, params in (
                ("waited", (5, 6, 7), long),
                ("ended", (7, 8), SamplingParams(max_tokens=1)),
                ("other", (5, 6), replace(long, max_tokens=3)),
            ):
                assert await tokens(Add(name, prompt, params)) == min(params.max_tokens, 3)
            clock.now += SECONDS
            assert await tokens(Add("again", (5, 6), long)) == 3
        finally:
            await engine.close()

    asyncio.run(asyncio.wait_for(test(), PATIENCE))
    pauses = re.findall("starting it again in (.*) s", caplog.text)
    assert len(pauses) >= 2 and set(pauses) == {"0.01"}  # no longer pause, for it had been ready
