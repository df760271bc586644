"""benchmarks/measured_slos.py: SLOs in multiples of a lone request, and the table of goodputs."""

import pytest

from benchmarks import measured_slos
from benchmarks.measured_slos import System, absolute, goodput
from splitfuse.bench.results import MeasuredRequest, Point
from splitfuse.config.engine import SchedulerConfig
from splitfuse.core.slo.cost_model import CostModel
from splitfuse.core.slo.targets import SloTargets

COST = CostModel(floor=0.01, per_token=0.001)
"""A prompt of 512 tokens takes 0.522 s alone, a decode 11 ms."""


def test_multiples_are_of_a_lone_request() -> None:
    slo = absolute("ttft=2x,itl=10x/p95,tpot=50ms", COST)
    assert slo == {"ttft": "2.039ms/token", "itl": "110ms/p95", "tpot": "50ms"}
    for each in measured_slos.SLOS:
        SchedulerConfig(**absolute(each, COST))  # type: ignore[arg-type]


def test_the_table_has_both_goodputs_and_their_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    def load(*first_tokens: float) -> Point:
        records = tuple(MeasuredRequest(0, 1.0, 100, (1.0 + each, 1.1 + each)) for each in first_tokens)
        return Point(2, None, (0.0, 2.0), records)

    slo = {"ttft": "500ms"}
    ours = System("ours, 500ms", slo=slo, measured=[load(0.3, 0.4), load(0.3, 0.9)], simulated=[load(0.3, 0.3)] * 2)
    age = System("by age", measured=[load(0.6, 0.4), load(0.3, 0.9)], simulated=[load(0.6, 0.4)] * 2)
    assert goodput(ours.measured, SloTargets(ttft=0.5)) == 0.75
    measured_slos.show([ours, age], [slo])
    printed = capsys.readouterr().out
    assert "| 500ms | 0.75 (1.00) | 0.50 (0.50) | 1.50 | 0.75 |" in printed
    assert "| by age | 0.75 | 0.5, 0.855, 0.9 | 100, 100, 100 |" in printed
