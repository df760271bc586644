"""benchmarks/measured_slos.py: SLOs in multiples of a lone request, runs and their simulations, and the table."""

from dataclasses import replace
from random import Random

import msgspec
import pytest

from benchmarks import measured_slos
from benchmarks.measured_slos import Load, Run, System, absolute, drive, goodput
from splitfuse.bench import metrics
from splitfuse.bench.results import MeasuredRequest, Point
from splitfuse.config.engine import SchedulerConfig
from splitfuse.core.events import StepRecord
from splitfuse.core.slo.cost_model import CostModel, Sample, features_of
from splitfuse.core.slo.targets import SloTargets
from splitfuse.runtime.calibration import Calibration
from splitfuse.simulator import virtual_time
from splitfuse.simulator.deployment import Deployment, Machine, SimulationConfig
from splitfuse.simulator.pace import MeasuredPace
from splitfuse.simulator.simulate import SimulatedTarget

COST = CostModel(floor=0.01, per_token=0.001)
"""A prompt of 512 tokens takes 0.522 s alone, a decode 11 ms."""


def test_multiples_are_of_a_lone_request() -> None:
    slo = absolute("ttft=2x,itl=10x/p95,tpot=50ms", COST)
    assert slo == {"ttft": "2.039ms/token", "itl": "110ms/p95", "tpot": "50ms"}
    for each in measured_slos.SLOS:
        SchedulerConfig(**absolute(each, COST))  # type: ignore[arg-type]


def test_a_run_is_simulated_with_the_steps_that_it_had(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is simulated, too, on a machine that is held up for three times as long in a quarter of its time."""
    monkeypatch.setattr(measured_slos, "SIMULATIONS", 4)
    system = System(Load(prompt=64, generate=8, clients=4, requests=32), slo={"ttft": "5ms/token", "itl": "100ms"})
    settings = {"enable_prefix_caching": False}
    calibration = Calibration(name="a machine", cost=COST, num_blocks=512, block_size=32, max_model_len=1024)
    config = SimulationConfig.of(calibration, system.config(settings))
    random = Random(1)
    pace = MeasuredPace([0.2] * 400, [0.2 * random.choice((1.0, 1.0, 1.0, 3.0)) for _ in range(400)])
    target = SimulatedTarget(Deployment(machines=(Machine(engine=config, pace=pace),)))
    steps: list[Sample] = []

    def note(step: StepRecord) -> None:
        steps.append(Sample(features_of(step.plan), step.measured_seconds))

    target._replicas[0].scheduler.events.subscribe(StepRecord, note)
    point = virtual_time.run(drive(target, system.load, 0))
    run = Run(system, settings, calibration, 0, point, steps)
    run = msgspec.json.decode(msgspec.json.encode(run), type=Run)
    run.simulate()
    assert len(run.simulated) == 4
    slo = SloTargets.parse(**system.slo)
    simulated = goodput(run.simulated, slo)
    assert abs(metrics.slo_goodput(point, slo) - simulated.mean) < 3 * simulated.deviation
    assert metrics.mean([metrics.throughput(each) for each in run.simulated]) == pytest.approx(
        metrics.throughput(point), rel=0.1
    )
    unhurried = SimulatedTarget(replace(config, calibration=calibration))
    undisturbed = virtual_time.run(drive(unhurried, system.load, 0))
    assert metrics.throughput(undisturbed) > 1.2 * metrics.throughput(point)
    assert "steps took 1." in capsys.readouterr().out


def test_the_table_has_both_goodputs_and_their_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    def load(*first_tokens: float) -> Point:
        records = tuple(MeasuredRequest(0, 1.0, 100, (1.0 + each, 1.1 + each)) for each in first_tokens)
        return Point(2, None, (0.0, 2.0), records)

    slo = {"ttft": "500ms"}
    loop = Load(prompt=100, generate=2, clients=2, requests=2)
    calibration = Calibration(name="a machine", cost=COST, num_blocks=8, block_size=32, max_model_len=128)
    runs = [
        Run(system, {}, calibration, turn, measured, [], simulated=[simulated])
        for system, turn, measured, simulated in (
            (System(loop, slo=slo), 0, load(0.3, 0.4), load(0.3, 0.3)),
            (System(loop, other="by age"), 0, load(0.6, 0.4), load(0.6, 0.4)),
            (System(loop, other="by age"), 1, load(0.3, 0.9), load(0.6, 0.4)),
            (System(loop, slo=slo), 1, load(0.3, 0.9), load(0.3, 0.3)),
        )
    ]
    measured_slos.show(runs)
    printed = capsys.readouterr().out
    assert "| 500ms | 0.75 +- 0.35 (1.00) | 0.50 (0.50) | 1.50 | 0.75 |" in printed
    assert "| by age | 0.75 (1.00) | 0.5, 0.855, 0.9 (0.5, 0.6, 0.6) | 100, 100, 100 (100, 100, 100) |" in printed
