"""Metrics for Prometheus: equal to a real engine's counts, summed over several, never going down, with known names."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import prometheus_client
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from patience import PATIENCE
from prometheus_client.parser import text_string_to_metric_families
from router_streams import held

from splitfuse.config.engine import EngineConfig
from splitfuse.config.values import EngineRole
from splitfuse.core.limits import EngineLimits
from splitfuse.core.request_output import FinishReason
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.slo.attainable import Attainable
from splitfuse.engine.client import EngineClient, EngineState
from splitfuse.engine.engine import Engine
from splitfuse.engine.messages import Add, EngineInfo, EngineStats, Failed, Loading, StepReport
from splitfuse.engine.stream import Stream
from splitfuse.engine.thread import AsyncEngine
from splitfuse.errors import EngineUnavailableError
from splitfuse.server.access_log import RequestRecord
from splitfuse.server.metrics import FAMILIES, Metrics

BUDGET = 32
COUNTERS = {
    "num_steps": "splitfuse:steps_total",
    "num_computed_tokens": "splitfuse:computed_tokens_total",
    "num_prompt_tokens": "splitfuse:prompt_tokens_total",
    "num_cached_tokens": "splitfuse:cached_tokens_total",
    "num_generated_tokens": "splitfuse:generated_tokens_total",
    "num_preemptions": "splitfuse:preemptions_total",
    "num_draft_tokens": "splitfuse:draft_tokens_total",
    "num_accepted_tokens": "splitfuse:accepted_tokens_total",
}
VLLM_NAMES = re.findall(
    r"\S+",
    """
num_requests_running num_requests_waiting kv_cache_usage_perc prefix_cache_queries_total prefix_cache_hits_total
prompt_tokens_total generation_tokens_total num_preemptions_total request_success_total
spec_decode_num_draft_tokens_total spec_decode_num_accepted_tokens_total
iteration_tokens_total_bucket time_to_first_token_seconds_bucket inter_token_latency_seconds_bucket
time_per_output_token_seconds_bucket request_time_per_output_token_seconds_bucket e2e_request_latency_seconds_bucket
request_queue_time_seconds_bucket request_prompt_tokens_bucket request_generation_tokens_bucket
""",
)
RECORD = RequestRecord(
    request_id="r",
    route="/v1/completions",
    status=200,
    total_seconds=2.0,
    prompt_tokens=30,
    generated_tokens=7,
    finish_reasons={"stop": 1, "length": 1},
    queue_seconds=0.02,
    time_to_first_token_seconds=0.5,
    inter_token_latency_seconds=(0.25, 0.25, 1.0),
    slo_met=False,
)


class Figures:
    """What was rendered, by sample and labels other than the model's name. `collected`: before it became text, which is
    faster.
    """

    def __init__(self, metrics: Metrics, *, collected: bool = False) -> None:
        self.values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self.model_names: set[str] = set()
        text = "" if collected else metrics.render().decode()
        for family in metrics.collect() if collected else text_string_to_metric_families(text):
            for sample in family.samples:
                labels = dict(sample.labels)
                self.model_names.add(labels.pop("model_name"))
                key = (sample.name, tuple(sorted(labels.items())))
                assert key not in self.values, f"{key} twice"
                self.values[key] = sample.value

    def get(self, name: str, **labels: str) -> float:
        return self.values[name, tuple(sorted(labels.items()))]

    def bounds(self, name: str) -> set[float]:
        return {float(labels["le"]) for key, pairs in self.values if key == name for labels in [dict(pairs)]}


class StatedEngine:
    """One of the engines of a client that says what it is told."""

    address = "10.0.0.2:9000"
    role = EngineRole.MIXED

    def __init__(self, client: "Stated", number: int) -> None:
        self._client, self.is_drained = client, number == 0

    @property
    def state(self) -> EngineState:
        return self._client.state

    @property
    def info(self) -> EngineInfo:
        return self._client.info


class Stated(EngineClient):
    """Engines that stand as the test says."""

    def __init__(self, num_engines: int, *, num_blocks: int = 100) -> None:
        self.counted = [EngineStats()] * num_engines
        self.known = EngineInfo("stated", EngineLimits(64, 512, num_blocks, 4), BUDGET, "", num_speculative_tokens=7)
        self.is_ready = True

    @property
    def state(self) -> EngineState:
        return EngineState.READY if self.is_ready else EngineState.STARTING

    @property
    def engines(self) -> list[Any]:
        return [StatedEngine(self, number) for number in range(len(self.counted))]

    @property
    def num_resumed(self) -> Mapping[str, int]:
        return {"death": 2}

    @property
    def stage(self) -> Loading:
        return Loading("stated")

    @property
    def info(self) -> EngineInfo:
        if not self.is_ready:
            raise EngineUnavailableError("the engine is not ready yet")
        return self.known

    @property
    def stats(self) -> list[EngineStats]:
        return list(self.counted)

    @property
    def outstanding_tokens(self) -> int:
        return self.info.limits.max_model_len

    def open(self, request: Add) -> Stream:
        raise NotImplementedError

    async def start(self) -> None:
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError


def step_of(client: Stated, metrics: Metrics, place: int, stats: EngineStats) -> None:
    """Report as a client does: first its stats, then the listener."""
    client.counted[place] = stats
    metrics.step_ended(stats)


# A real engine -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(
        EngineConfig.from_settings({"num_threads": 1, "max_num_batched_tokens": BUDGET, "num_blocks": 64})
    )


def drive(engine: Engine, body: Callable[[AsyncEngine, Metrics, list[EngineStats]], Awaitable[None]]) -> None:
    """Run `body` in an event loop, with metrics that see every step of a started client."""

    async def run() -> None:
        client = AsyncEngine(engine)
        metrics, steps = Metrics(client), []

        def on_step(stats: EngineStats) -> None:
            steps.append(stats)
            metrics.step_ended(stats)

        client.on_step = on_step
        await client.start()
        try:
            await asyncio.wait_for(body(client, metrics, steps), PATIENCE)
        finally:
            await client.close()

    asyncio.run(run())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def request(name: str, num_prompt: int, max_tokens: int, *, first: int = 20) -> Add:
    tokens = tuple(range(first, first + num_prompt))
    return Add(name, tokens, SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0.0))


async def read(client: AsyncEngine, add: Add) -> int:
    """To its end: how many tokens came."""
    async with client.open(add) as stream:
        return sum([len(output.token_ids) async for output in stream])


async def first_token(stream: Stream) -> None:
    """Those before it are of steps that computed a part of the prompt."""
    while not (await anext(stream)).token_ids:
        pass


def test_metrics_equal_the_engines_counts(engine: Engine) -> None:
    async def body(client: AsyncEngine, metrics: Metrics, steps: list[EngineStats]) -> None:
        adds = [request(f"r{i}", 10 + 40 * i, 5 + i, first=20 + 100 * i) for i in range(3)]
        received = sum(await asyncio.gather(*(read(client, add) for add in adds)))
        async with client.open(request("gone", 8, 1000, first=400)) as stream:  # ends by a command, not by a step
            await first_token(stream)
        await until(lambda: client.stats[0].num_running == 0)
        figures, stats = Figures(metrics), client.stats[0]
        assert received == 5 + 6 + 7
        assert figures.model_names == {client.info.model}
        for counter, name in COUNTERS.items():
            assert figures.get(name) == getattr(stats, counter), name
        assert figures.get("splitfuse:prompt_tokens_total") == 10 + 50 + 90 + 8
        assert figures.get("splitfuse:generated_tokens_total") >= received + 1
        assert figures.get("splitfuse:ready") == 1
        for idle in ("num_requests_running", "num_requests_waiting", "outstanding_tokens", "kv_blocks_used"):
            assert figures.get(f"splitfuse:{idle}") == 0, idle
        assert figures.get("splitfuse:kv_blocks") == 64

        assert [step.num_steps for step in steps] == list(range(1, stats.num_steps + 1))  # each once, and no command
        for name in ("step_tokens", "step_seconds", "step_budget_ratio"):
            assert figures.get(f"splitfuse:{name}_count") == len(steps), name
        tokens = sum(step.step_tokens for step in steps)
        assert figures.get("splitfuse:step_tokens_sum") == tokens
        assert figures.get("splitfuse:step_budget_ratio_sum") == pytest.approx(tokens / BUDGET)
        full = sum(step.step_tokens == BUDGET for step in steps)
        assert full > 0
        almost = figures.get("splitfuse:step_budget_ratio_bucket", le="0.99")
        assert figures.get("splitfuse:step_budget_ratio_bucket", le="1.0") - almost == full

    drive(engine, body)


def test_gauges_are_read_when_rendered(engine: Engine) -> None:
    async def body(client: AsyncEngine, metrics: Metrics, _: list[EngineStats]) -> None:
        long = request("long", 70, 1500)
        with held(engine, long, 5):
            async with client.open(long) as stream:
                await first_token(stream)
                figures = Figures(metrics)
                assert figures.get("splitfuse:num_requests_running") == 1
                assert figures.get("splitfuse:kv_blocks_used") >= 3  # of 32 tokens, for a prompt of 70
                assert figures.get("splitfuse:kv_cache_usage_ratio") == figures.get("splitfuse:kv_blocks_used") / 64
                assert figures.get("vllm:kv_cache_usage_perc") == figures.get("splitfuse:kv_cache_usage_ratio")
                assert 0 < figures.get("splitfuse:outstanding_tokens") < 1570
        await until(lambda: Figures(metrics).get("splitfuse:num_requests_running") == 0)
        assert Figures(metrics).get("splitfuse:kv_blocks_used") == 0
        await client.close()
        assert Figures(metrics).get("splitfuse:ready") == 0

    drive(engine, body)


def test_a_repeated_prompt_counts_as_prefix_hits(engine: Engine) -> None:
    async def body(client: AsyncEngine, metrics: Metrics, _: list[EngineStats]) -> None:
        await read(client, request("first", 100, 2, first=300))
        before = Figures(metrics)
        await read(client, request("again", 100, 2, first=300))
        after = Figures(metrics)
        assert after.get("vllm:prefix_cache_hits_total") - before.get("vllm:prefix_cache_hits_total") == 96
        assert after.get("vllm:prefix_cache_queries_total") - before.get("vllm:prefix_cache_queries_total") == 100

    drive(engine, body)


def test_metrics_before_the_engine_is_ready(engine: Engine) -> None:
    metrics = Metrics(AsyncEngine(engine))
    metrics.request_refused("overloaded")
    figures = Figures(metrics)
    assert figures.get("splitfuse:ready") == figures.get("splitfuse:kv_cache_usage_ratio") == 0
    assert figures.get("splitfuse:refused_total", kind="overloaded") == 1
    assert figures.get("splitfuse:text_process_restarts_total") == 0
    assert figures.model_names == {""}
    assert Figures(Metrics(AsyncEngine(engine), model_name='a "name"\n')).model_names == {'a "name"\n'}


# Several engines, and those that begin again -------------------------------------------------------------------------


def test_engines_are_summed() -> None:
    client = Stated(3)
    metrics = Metrics(client)
    step_of(client, metrics, 0, EngineStats(5, 2, 7, 90, 30, 10, 4, 34, 1, 12, 0.5, num_draft_tokens=9))
    step_of(client, metrics, 2, EngineStats(1, 1, 0, 60, 3, 0, 1, 3, 0, 3, 0.25))
    figures = Figures(metrics)
    assert figures.get("splitfuse:num_requests_running") == 3
    assert figures.get("splitfuse:num_requests_waiting") == 7
    assert figures.get("splitfuse:kv_blocks") == 300
    assert figures.get("splitfuse:kv_blocks_used") == 50  # the second engine has held nothing yet
    assert figures.get("splitfuse:kv_cache_usage_ratio") == pytest.approx(50 / 300)
    expected = dict(zip(COUNTERS, (6, 37, 33, 10, 5, 1, 9, 0), strict=True))
    assert {counter: figures.get(name) for counter, name in COUNTERS.items()} == expected
    assert figures.get("splitfuse:step_seconds_sum") == 0.75
    assert figures.get("splitfuse:step_seconds_count") == 2


EVENTS = st.lists(
    st.tuples(
        st.integers(0, 2),  # which engine
        st.sampled_from(["pass", "command", "death", "quick restart", "unseen pass"]),
        st.lists(st.integers(0, 50), min_size=7, max_size=7),
        st.booleans(),  # whether metrics are rendered
    ),
    max_size=40,
)


@given(EVENTS)
def test_counters_never_go_down_and_lose_nothing_reported(
    events: list[tuple[int, str, list[int], bool]],
) -> None:
    client = Stated(3)
    metrics = Metrics(client)
    truth = dict.fromkeys(COUNTERS, 0)
    num_steps = 0
    last = Figures(metrics, collected=True)
    for place, what, more, look in events:
        now = client.counted[place]
        if what == "death":
            client.counted[place] = EngineStats()
        elif what == "command":
            client.counted[place] = structs.replace(now, num_available_blocks=more[0])
        else:
            # One that is back before its death was reported has made fewer steps than it had, or it is another
            # engine with the same past, which looks the same.
            quick = what == "quick restart" and now.num_steps > 1
            base = EngineStats() if quick else now
            steps = dict(zip(COUNTERS, (1, *more), strict=True))
            new = structs.replace(base, **{counter: getattr(base, counter) + steps[counter] for counter in COUNTERS})
            if what == "unseen pass":  # the client has it, but no listener was called
                client.counted[place] = new
            else:
                step_of(client, metrics, place, new)
                num_steps += 1
            truth = {counter: truth[counter] + steps[counter] for counter in COUNTERS}
        if look or what in ("death", "unseen pass"):
            figures = Figures(metrics, collected=True)
            for counter, name in COUNTERS.items():
                assert last.get(name) <= figures.get(name) == truth[counter], name
            assert figures.get("splitfuse:step_seconds_count") == num_steps
            last = figures


def test_only_a_step_is_told_to_listeners(engine: Engine) -> None:
    client, told = AsyncEngine(engine), list[int]()
    client.on_step = lambda stats: told.append(stats.num_steps)
    for num_steps, num_available_blocks in ((0, 9), (3, 8), (3, 9), (4, 9)):  # a command repeats the steps
        client._take(StepReport((), EngineStats(num_steps, num_available_blocks=num_available_blocks)))
    client._take(Failed("it broke"))
    client._take(StepReport((), EngineStats(1)))
    assert told == [3, 4, 1]


def test_a_removed_engine_still_counts() -> None:
    client = Stated(2)
    metrics = Metrics(client)
    step_of(client, metrics, 0, EngineStats(num_steps=3, num_computed_tokens=30))
    step_of(client, metrics, 1, EngineStats(num_steps=4, num_computed_tokens=40))
    del client.counted[1]
    assert Figures(metrics).get("splitfuse:computed_tokens_total") == 70
    client.counted.append(EngineStats(num_steps=1, num_computed_tokens=5))
    assert Figures(metrics).get("splitfuse:computed_tokens_total") == 75


# Requests ------------------------------------------------------------------------------------------------------------


def test_metrics_of_a_finished_request() -> None:
    metrics = Metrics(Stated(1))
    metrics.request_ended(RECORD)
    metrics.request_ended(replace(RECORD, finish_reasons={"abort": 1}, error="EngineUnavailableError", status=503))
    metrics.request_ended(RequestRecord(request_id="x", route="/v1/completions", status=400, total_seconds=0.1))
    metrics.request_refused("overloaded")
    metrics.request_refused("overloaded")
    metrics.request_refused("draining")
    figures = Figures(metrics)
    for status in ("200", "503", "400"):
        assert figures.get("splitfuse:requests_total", route="/v1/completions", status=status) == 1
    for reason, count in {"stop": 1, "length": 1, "abort": 1, "error": 0}.items():
        assert figures.get("splitfuse:choices_total", finish_reason=reason) == count
        assert figures.get("vllm:request_success_total", finished_reason=reason) == count
    assert figures.get("splitfuse:slo_total", met="false") == 2
    assert figures.get("splitfuse:slo_total", met="true") == 0
    assert figures.get("splitfuse:errors_total", kind="EngineUnavailableError") == 1
    assert figures.get("splitfuse:refused_total", kind="overloaded") == 2
    assert figures.get("splitfuse:refused_total", kind="draining") == 1
    sums = {
        "splitfuse:queue_seconds": (2, 0.04),
        "splitfuse:time_to_first_token_seconds": (2, 1.0),
        "splitfuse:inter_token_latency_seconds": (6, 3.0),
        "splitfuse:request_seconds": (2, 4.0),
        "splitfuse:request_prompt_tokens": (2, 60),
        "splitfuse:request_generated_tokens": (2, 14),
        "vllm:request_time_per_output_token_seconds": (2, 1.0),
    }
    for name, (count, total) in sums.items():
        assert (figures.get(f"{name}_count"), figures.get(f"{name}_sum")) == (count, pytest.approx(total)), name


def test_any_model_name_can_be_a_label() -> None:
    metrics = Metrics(Stated(1))
    kinds = ['a "quoted"\nline', "back\\slash", "\u00fcn\u00efcode {}=,", ""]
    for kind in kinds:
        metrics.request_refused(kind)
    figures = Figures(metrics)
    assert all(figures.get("splitfuse:refused_total", kind=kind) == 1 for kind in kinds)


TIMES = {
    "splitfuse:request_seconds": "total_seconds",
    "splitfuse:time_to_first_token_seconds": "time_to_first_token_seconds",
    "splitfuse:queue_seconds": "queue_seconds",
}


VALUES = st.lists(st.floats(0, 1e5) | st.sampled_from([0.01, 0.1, 0.5, 1.0, 5.0, 480.0, 7680.0]), max_size=20)


@pytest.mark.parametrize(("name", "field"), TIMES.items())
@settings(max_examples=50, deadline=None)
@given(values=VALUES)
def test_histograms_equal_the_librarys(name: str, field: str, values: list[float]) -> None:
    metrics = Metrics(Stated(1))
    for value in values:
        metrics.request_ended(replace(RECORD, **{field: value}))
    check_with_library(metrics, name, values)


@settings(max_examples=50, deadline=None)
@given(parts=st.lists(VALUES, max_size=3))
def test_gaps_of_a_request_are_counted_together(parts: list[list[float]]) -> None:
    metrics = Metrics(Stated(1))
    for values in parts:
        metrics.request_ended(replace(RECORD, inter_token_latency_seconds=tuple(sorted(values))))
    check_with_library(
        metrics, "splitfuse:inter_token_latency_seconds", [value for values in parts for value in values]
    )


def check_with_library(metrics: Metrics, name: str, values: list[float]) -> None:
    figures = Figures(metrics, collected=True)
    bounds = figures.bounds(f"{name}_bucket")
    oracle = prometheus_client.Histogram(
        "oracle", "The library's.", buckets=sorted(bounds), registry=prometheus_client.CollectorRegistry()
    )
    for value in values:
        oracle.observe(value)
    for sample in next(iter(oracle.collect())).samples:
        if sample.name != "oracle_created":
            ours = figures.get(sample.name.replace("oracle", name), **sample.labels)
            assert ours == pytest.approx(sample.value)


# Names ---------------------------------------------------------------------------------------------------------------


def test_vllm_names_are_present() -> None:
    names = {name for name, _ in Figures(Metrics(Stated(1))).values}
    assert {f"vllm:{name}" for name in VLLM_NAMES} <= names


def test_bucket_bounds_include_vllms() -> None:
    figures = Figures(Metrics(Stated(1)))
    known = {
        "time_to_first_token_seconds": (0.001, 0.06, 0.25, 0.75, 1, 2.5, 5, 7.5, 10, 160, 640, 2560),
        "inter_token_latency_seconds": (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.75, 1, 40, 80),
        "e2e_request_latency_seconds": (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 30, 60, 960, 1920, 7680),
        "request_prompt_tokens": (1, 2, 5, 10, 100, 1000, 10000, 100000),
        "iteration_tokens_total": (1, 8, 256, 512, 8192, 16384),
    }
    for name, bounds in known.items():
        assert set(bounds) <= figures.bounds(f"vllm:{name}_bucket"), name


def test_families_have_unique_names_and_a_source() -> None:
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    client = Stated(1)
    metrics = Metrics(client)
    metrics.request_ended(replace(RECORD, error="ServerError"))
    metrics.num_text_restarts = lambda: 3
    metrics.connections = lambda: (4, 5)
    metrics.num_front_restarts = lambda: 1
    metrics.consoles = lambda: (2, 5)
    metrics.num_dropped_spans = lambda: 3
    metrics.replicas_needed = 2
    metrics.recorder = SimpleNamespace(ended=False, num_bytes=7, num_dropped=1)  # type: ignore[assignment]
    metrics.request_refused("overloaded")
    kept = Attainable(
        estimated=True, prompt_tokens=512, answer_tokens=64, gap_target="ITL", ttft_share=0.5, longest_prompt=9,
        max_prompt=9, gap_share=0.2, max_decodes=3, most_decodes=4, requests_per_second=1.5,
    )  # fmt: skip
    step_of(client, metrics, 0, EngineStats(1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1.0, 0.9, 2, 2, kept, None, *[1] * 15))
    values = Figures(metrics).values
    ending = {"gauge": "", "counter": "_total", "histogram": "_count"}
    for family in FAMILIES:
        numbers = [value for (name, _), value in values.items() if name == family.name + ending[family.kind]]
        assert any(numbers), f"{family.name} shows nothing"


def test_what_engines_keep_of_an_slo_together() -> None:
    def kept(share: float, decodes: int) -> EngineStats:
        found = Attainable(
            estimated=share > 0.5, prompt_tokens=512, answer_tokens=64, gap_share=share, max_decodes=decodes,
            requests_per_second=decodes / 4, longest_prompt=100,
        )  # fmt: skip
        return EngineStats(num_steps=1, attainable=found)

    client = Stated(3)
    client.counted[:2] = [kept(0.5, 8), kept(0.75, 4)]  # the third has not said it yet
    text = Metrics(client, model_name="m").render().decode()
    for name, value in (("lone_decode_ratio", 0.75), ("max_decodes", 12.0), ("max_requests_per_second", 3.0)):
        assert f'splitfuse:slo_{name}{{model_name="m"}} {value}\n' in text
    assert 'splitfuse:slo_estimated{model_name="m"} 1.0\n' in text
    assert "splitfuse:slo_lone_prompt_ratio{" not in text, "there is no TTFT target"
    assert "splitfuse:slo_max_decodes{" not in Metrics(Stated(1), model_name="m").render().decode()


def test_the_metrics_page_lists_every_family() -> None:
    page = (Path(__file__).parents[2] / "docs" / "server-metrics.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`]+)` \| (\w+) \| ([^|]*) \| (.+) \|$", page, re.MULTILINE)
    described = {name: (kind, re.findall(r"`(\w+)`", labels)) for name, kind, labels, _ in rows}
    assert len(described) == len(rows), "a metric has two lines"
    ending = {"gauge": "", "counter": "_total", "histogram": ""}
    assert described == {family.name + ending[family.kind]: (family.kind, list(family.labels)) for family in FAMILIES}
    assert all(f"`{reason}`" in page for reason in FinishReason if reason is not FinishReason.MOVED)


def test_requests_at_once_share_one_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics, renderings = Metrics(Stated(1)), []
    render = metrics.render
    monkeypatch.setattr(metrics, "render", lambda: renderings.append(1) or render())  # type: ignore[func-returns-value]

    async def ask() -> None:
        texts = await asyncio.gather(*(metrics.text() for _ in range(1000)))
        assert len(renderings) == 1 and set(texts) == {render()}
        metrics.request_refused("overloaded")
        assert await metrics.text() == render() != texts[0]

    asyncio.run(ask())
