"""Replicas that are told by hand what they would report, for tests of the router alone."""

import asyncio
from typing import Any

from splitfuse.core.limits import EngineLimits
from splitfuse.core.request import SchedulingOptions
from splitfuse.core.request_output import FinishReason, RequestOutput
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.slo.cost_model import CostModel, StepTimes
from splitfuse.core.slo.targets import SloTargets
from splitfuse.engine.client import EngineState, LocalClient
from splitfuse.engine.messages import (
    Add,
    Command,
    EngineInfo,
    EngineStats,
    Finish,
    Report,
    StepReport,
    decode_report,
    encode,
)
from splitfuse.engine.router import Router

TIMES = StepTimes(CostModel(floor=1.0, per_token=0.1))  # so slow that the time of a test is nothing
INFO = EngineInfo(
    model="test",
    limits=EngineLimits(max_model_len=4096, vocab_size=256, num_blocks=500, block_size=16),
    max_num_batched_tokens=100,
    memory_plan="",
    slo_enabled=True,
    targets=SloTargets(ttft=100.0, itl=50.0),
    max_num_seqs=16,
    step_times=TIMES,
)


class Told(LocalClient):
    """Stands for a replica that computes nothing: it notes what it is sent, and takes what it is told."""

    def __init__(self, info: EngineInfo = INFO, name: str = "") -> None:
        super().__init__()
        self.told_info, self.told_name = info, name
        self.sent: list[str] = []

    def _send(self, command: Command) -> None:
        if isinstance(command, Add):
            self.sent.append(command.request_id)

    def tell(self, report: Report) -> None:
        self._take(decode_report(encode(report)))

    async def start(self) -> None:
        self.tell(self.told_info)

    async def close(self) -> None:
        self._die("it was closed")


def add(name: str, prompt: int, **scheduling: Any) -> Add:
    options = SchedulingOptions(**scheduling)
    return Add(name, tuple(ord(name[-1]) for _ in range(prompt)), SamplingParams(max_tokens=10), scheduling=options)


def step(*outputs: RequestOutput, times: StepTimes | None = TIMES) -> StepReport:
    return StepReport(outputs, EngineStats(num_steps=1, num_available_blocks=400, step_times=times))


class Stoppable(Told):
    """Stands for a replica that lets requests go when it is told to, and can be stopped."""

    restarts = True

    def __init__(self, name: str = "") -> None:
        super().__init__(name=name)
        self.starts: list[str] = []
        self.prevented: Exception | None = None
        self.may_start = asyncio.Event()
        self.may_start.set()
        self.lets_go = True

    def _send(self, command: Command) -> None:
        super()._send(command)
        if isinstance(command, Finish) and command.reason is FinishReason.MOVED and self.lets_go:
            output = RequestOutput(command.request_id, finish_reason=FinishReason.MOVED)
            asyncio.get_running_loop().call_soon(self.tell, step(output))

    async def start(self) -> None:
        self._enter(EngineState.STARTING)
        await asyncio.sleep(0)
        await self.may_start.wait()
        if self.prevented is not None:
            self._enter(EngineState.DEAD)
            raise self.prevented
        self.starts.append(self.state)
        await super().start()

    async def restart(self) -> None:
        self._die("it is restarted")
        await self.wait_until(lambda: self.state is EngineState.READY)

    async def stop(self) -> None:
        assert not self.num_open
        self._die("it was stopped")
        self._note_stopped()


async def router_of(running: int, spare: int) -> tuple[Router, list[Stoppable]]:
    made = [Stoppable(str(index)) for index in range(running + spare)]
    router = Router(made[:running], num_scaled=running, spare=made[running:], why_no_more="there is no room")
    await router.start()
    return router, made
