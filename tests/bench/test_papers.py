"""The published figures, and the simulations of papers that rest on them."""

from pathlib import Path
from statistics import mean, median

import pytest

from benchmarks.papers import kept, pensieve, splitwise
from benchmarks.papers.data import (
    BLOCK_SIZE,
    BLOOM,
    LARGE,
    distserve_engine,
    splitwise_calibration,
    splitwise_times,
    token_line_times,
    turns_of_conversations,
    workload,
)
from benchmarks.papers.distserve import WORKLOADS, split
from benchmarks.papers.kept import Kept
from splitfuse.bench.results import MeasuredRequest
from splitfuse.config.values import EngineRole
from splitfuse.core.slo.cost_model import StepFeatures
from splitfuse.core.slo.targets import SloTargets
from splitfuse.errors import ConfigError
from splitfuse.simulator.deployment import Deployment
from splitfuse.simulator.rates import Goal, sustains
from splitfuse.simulator.simulate import Bytes


def step(*chunks: tuple[int, int]) -> StepFeatures:
    made = StepFeatures()
    for start, count in chunks:
        made = made.plus(start=start, count=count, rows=1)
    return made


def test_figures_are_kept_for_the_same_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, computed = tmp_path / "figures.jsonl", []

    def compute() -> list[float]:
        computed.append(None)
        return [1.5, 2.0]

    for _ in range(2):
        for _ in range(2):
            assert Kept(path).find("distserve", 200, "rates", compute=compute) == [1.5, 2.0]
        assert Kept(path).find("distserve", 100, "rates", compute=lambda: 0.25) == 0.25
    assert len(computed) == 1 and len(path.read_text().splitlines()) == 2
    monkeypatch.setattr(kept, "sources", lambda _: "others")
    assert Kept(path).find("distserve", 200, "rates", compute=compute) == [1.5, 2.0]
    assert len(computed) == 2, "figures of other sources are not used"
    assert Kept().find("distserve", 200, "rates", compute=compute) == [1.5, 2.0]
    path.write_text(path.read_text() + "{}\n")
    with pytest.raises(ConfigError, match=r"line 4 of .* is not a figure"):
        Kept(path)


def test_least_number_of_machines_is_searched_from_a_guess() -> None:
    machine, asked = splitwise.Kind.of("DGX-H100").machine(EngineRole.MIXED, "orca", 2048), []

    class Counted(splitwise.Count):
        def is_enough(self, deployment: Deployment, *_: object) -> bool:
            asked.append(len(deployment.machines))
            return len(deployment.machines) >= 37

    count = Counted(splitwise.CASES["llama"], 1.0, splitwise.OURS, Kept())
    for guess in (5, 36, 37, 51, 80):
        assert count.least(splitwise.mixed(machine), guess=guess, low=10, high=71) == 37
    assert count.least(splitwise.mixed(machine), guess=20, low=10, high=30) == 31, "more than are tried"
    assert all(10 < each <= 71 for each in asked)


def test_measured_points_are_met() -> None:
    times = splitwise_times("DGX-A100")
    assert times.seconds(step((0, 2048))) == pytest.approx((274.22 + 292.28) / 2e3), "one prompt, or four of 512"
    assert times.seconds(step((0, 8192))) == pytest.approx((1549.82 + 2084.41) / 2e3)
    assert times.seconds(step((511, 1))) == pytest.approx(45.03e-3)
    assert times.seconds(step(*[(511, 1)] * 32)) == pytest.approx(53.02e-3)
    assert times.seconds(step((0, 2047), (511, 1))) == pytest.approx(1.1 * times.seconds(step((0, 2048))))
    assert splitwise_times("DGX-H100").seconds(step((0, 1024))) == pytest.approx((77.91 + 76.89) / 2e3)


def test_fits_are_those_published() -> None:
    engine = distserve_engine("DistServe", "OPT-13B", 1)
    times, cost = engine.times, engine.times.cost_model
    assert times.seconds(step((0, 700), (0, 300))) == pytest.approx(
        (18.103 + 0.10191 * 1000 + 7.1223e-6 * (700**2 + 300**2)) / 1e3
    )
    assert times.seconds(step((699, 1), (499, 1))) == pytest.approx((19.935 + 0.00062694 * 1200 + 0.038507 * 2) / 1e3)
    many = step(*[(99, 1)] * LARGE)
    assert times.seconds(many) == pytest.approx((7.1662 + 0.0005798 * 100 * LARGE + 0.15831 * LARGE) / 1e3)
    for fused in (step((0, 512)), step((512, 256), (99, 1)), step((0, 100), (700, 1), (800, 1))):
        assert cost.seconds(fused) == pytest.approx(times.seconds(fused))
    assert cost.seconds(step((699, 1))) <= times.seconds(step((699, 1))) < 1.15 * cost.seconds(step((699, 1)))
    assert engine.calibration.num_blocks == 66144 // BLOCK_SIZE


def test_lengths_have_the_published_medians_and_means() -> None:
    code, chat, problems = (workload(name, longest=2047) for name in ("azure_code", "sharegpt", "humaneval"))
    assert median(code.prompts) == pytest.approx(1469, rel=0.01) and median(code.answers) == 13
    assert mean(problems.prompts) == pytest.approx(171.3, rel=0.01) and mean(problems.answers) == pytest.approx(
        98.2, 0.01
    )
    assert mean(chat.prompts) == pytest.approx(687, rel=0.01)
    for number in range(200):
        request = chat.first("", number)
        assert request.prompt and len(request.prompt) + request.max_tokens <= 2047
        assert request == chat.first("", number)


def test_bloom_s_machines_have_its_times_and_cache() -> None:
    times, calibration = splitwise_times("DGX-A100", BLOOM), splitwise_calibration("DGX-A100", BLOOM)
    assert times.seconds(step((0, 2048))) == pytest.approx((540.41 + 528.63) / 2e3)
    assert times.seconds(step(*[(511, 1)] * 32)) == pytest.approx(65.38e-3)
    for length in (512, 1024, 2048, 8192):
        assert calibration.cost.seconds(step((0, length))) == pytest.approx(times.seconds(step((0, length))), rel=0.15)
    held = calibration.num_blocks * calibration.block_size * calibration.kv_bytes_per_token
    assert held == pytest.approx(0.9 * 640e9 - 352e9, rel=0.001)


def test_lone_request_has_no_slowdown() -> None:
    lone = splitwise_times("DGX-A100")
    first, gap = lone.prompt_ms(1500) / 1e3, lone.decode_ms(1, 1500) / 1e3
    record = MeasuredRequest(0, 1.0, 1500, tuple(1.0 + first + gap * number for number in range(10)))
    assert splitwise.slowdown(record, lone) == pytest.approx((1.0, 1.0, 1.0))


def test_their_reading_divides_by_tokens_and_extends_lines() -> None:
    lone = token_line_times("DGX-A100")
    assert lone.seconds(step((0, 128))) == pytest.approx(65.35e-3)
    a, b = lone.decode_ms(1, 128), lone.decode_ms(1, 256)
    assert lone.seconds(step(*[(511, 1)] * 4)) == pytest.approx((a + (b - a) * (4 - 128) / 128) / 1e3)
    first, gap = lone.prompt_ms(1500) / 1e3, lone.decode_ms(1, 1500) / 1e3
    record = MeasuredRequest(0, 1.0, 1500, tuple(1.0 + first + gap * number for number in range(10)))
    assert splitwise.slowdown(record, lone, splitwise.THEIRS) == pytest.approx((1.0, 0.9, 1.0))


def test_their_routing_prefers_idle_machines() -> None:
    machine = splitwise.Kind.of("DGX-H100", reading=splitwise.THEIRS).machine(EngineRole.MIXED, "orca", 2048)
    requests, goal = (
        workload("azure_code", longest=splitwise.LONGEST - 1),
        splitwise.goal(token_line_times("DGX-A100"), 40, splitwise.THEIRS),
    )
    met = [
        sustains(splitwise.mixed(machine)(count), lambda _: requests, 15.0, goal, make_target=splitwise.THEIRS.target)
        for count in (3, 12)
    ]
    assert met == [False, True]


def test_splitwise_machines_are_counted() -> None:
    """A few machines at a small rate: enough of them meet the SLOs, split or not, and too few do not."""
    kind, requests = splitwise.Kind.of("DGX-H100"), workload("azure_code", longest=splitwise.LONGEST - 1)
    parts = [kind.machine(role, "orca", 2048) for role in (EngineRole.PROMPT, EngineRole.GENERATION)]
    met, goal = {}, splitwise.goal(splitwise_times("DGX-A100"), 100)
    for count in (3, 12):
        for name, make in (
            ("mixed", splitwise.mixed(kind.machine(EngineRole.MIXED, "orca", 2048))),
            ("split", splitwise.split(parts[0], parts[1], count // 3)),
        ):
            met[name, count] = sustains(make(count), lambda _: requests, 15.0, goal)
    assert met == {("mixed", 3): False, ("split", 3): False, ("mixed", 12): True, ("split", 12): True}


def test_distserve_placement_has_a_rate() -> None:
    case = WORKLOADS["chat-13b"]
    goal, requests = Goal.of(SloTargets(ttft=case.ttft, tpot=case.tpot), 0.9, 40), workload(case.lengths, longest=2047)
    assert split(case).gpus == 3
    met = [sustains(split(case), lambda _: requests, 3 * per_gpu, goal) for per_gpu in (0.2, 8.0)]
    assert met == [True, False]


def test_conversations_follow_their_turns() -> None:
    vocabulary = Bytes(256)
    made = pensieve.Conversations(vocabulary, room=8192)
    for number in range(20):
        request, turns = made.first("", number), 1
        while (following := made.successor(request, (0,) * request.max_tokens)) is not None:
            assert following.prompt[: following.prefix] == (*request.prompt, *(0,) * request.max_tokens)
            assert following.pause > 0 and following.turn == turns
            assert len(following.prompt) + following.max_tokens <= 8192
            request, turns = following, turns + 1
        assert turns <= max(map(len, turns_of_conversations()))
        assert made.first("", number) == made.first("", number)


def test_turns_are_as_long_as_the_paper_s() -> None:
    turns = [turn for turns in pensieve.scaled_turns() for turn in turns]
    assert mean(new for new, _ in turns) == pytest.approx(pensieve.NEW, rel=0.02)
    assert mean(answer for _, answer in turns) == pytest.approx(pensieve.ANSWER, rel=0.02)
    assert mean(map(len, pensieve.scaled_turns())) == pytest.approx(5.56, rel=0.05)


def test_pensieve_s_systems_are_simulated() -> None:
    """With a tier the conversations of a small load are within the limit, and without time for a token they are not."""
    model, system = pensieve.models()["OPT-13B, 1 x A100"], pensieve.SYSTEMS["pensieve"]
    met = [pensieve.sustains(system.deployment(model), 0.01, limit, 3) for limit in (0.2, 0.001)]
    assert met == [True, False]
    engine = system.deployment(model).machines[0].engine
    assert engine.kv_memory_tier == 220e9
    assert engine.calibration.num_blocks * engine.block_bytes == pytest.approx(40e9, rel=0.001)
    vllm = pensieve.SYSTEMS["vllm"].deployment(model).machines[0]
    prompt = step((0, 1000))
    assert vllm.step_times is not None and model.engine.times is not None
    assert vllm.step_times.seconds(prompt) > 1.2 * model.engine.times.seconds(prompt)
