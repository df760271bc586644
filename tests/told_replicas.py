"""Replicas that are told by hand what they would report, for tests of the router alone."""

from typing import Any

from splitfuse.core.limits import EngineLimits
from splitfuse.core.request import SchedulingOptions
from splitfuse.core.request_output import RequestOutput
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.slo.cost_model import CostModel, StepTimes
from splitfuse.core.slo.targets import SloTargets
from splitfuse.engine.client import LocalClient
from splitfuse.engine.messages import Add, Command, EngineInfo, EngineStats, Report, StepReport, decode_report, encode

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
    """A replica that computes nothing: it notes what it is sent, and takes what it is told."""

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
