"""Where the time of a request went, over a real socket: the phases add up to the whole for every kind of request."""

import asyncio
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from command_line import Run
from running_server import RunningServer, running_server

from splitfuse.cli.explain import format_breakdown
from splitfuse.clients.sync import client
from splitfuse.config.engine import EngineConfig
from splitfuse.config.server import ServerConfig
from splitfuse.core.latency.phases import LatencyBreakdown, LatencyPhase
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.slo.cost_model import CostModel
from splitfuse.core.slo.targets import SloViolation
from splitfuse.engine.messages import Add
from splitfuse.engine.stream import Stream
from splitfuse.errors import InvalidRequestError
from splitfuse.models.sources.hub import open_model
from splitfuse.runtime.calibration import Calibration, cache_path, identify, save
from splitfuse.server.context import RequestContext
from splitfuse.server.explain import breakdown_of, describe_violation
from splitfuse.server.openai.dialect import OPENAI
from splitfuse.text.generation import Generation
from splitfuse.text.prompts import PreparedRequest
from splitfuse.text.tokenizer import Tokenizer

COMPLETIONS = "/v1/completions"
BODY = {"prompt": "Anna has", "max_tokens": 20, "ignore_eos": True}
PATIENT = {"ttft": 1000, "itl": 1000}
SETTINGS = {"ttft": "1ms", "itl": "1min", "num_blocks": 200}
FRONT = {
    LatencyPhase.READING,
    LatencyPhase.TOKENIZING,
    LatencyPhase.FROM_ENGINE,
    LatencyPhase.DETOKENIZING,
    LatencyPhase.CLIENT,
}
LONG = "Anna keeps a goose. " * 150


def explain(http: httpx.Client, request: str, headers: dict[str, str] | None = None) -> dict[str, Any]:
    answer = http.get(f"/v1/splitfuse/requests/{request}", headers=headers)
    assert answer.status_code == 200, answer.text
    explanation: dict[str, Any] = answer.json()
    assert set(explanation["phases"]) <= set(LatencyPhase) and all(
        seconds > 0 for seconds in explanation["phases"].values()
    )
    assert sum(explanation["phases"].values()) == pytest.approx(explanation["seconds"], abs=1e-6)
    return explanation


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"stream": True},
        {"n": 3, "temperature": 1.0},
        {"prompt": [LONG, "Erik"]},
        {"stop": ["a"]},
        {"stop": ["a"], "stream": True},
        {"max_tokens": 1},
        {"prompt": LONG, "echo": True, "logprobs": 1},
    ],
    ids=["plain", "stream", "choices", "prompts", "stop", "stop-stream", "one-token", "logprobs"],
)
def test_phases_add_up_to_the_whole(server: RunningServer, more: dict[str, Any]) -> None:
    with server.http() as http:
        answer = http.post(COMPLETIONS, json={**BODY, **more})
        assert answer.status_code == 200
        found = explain(http, answer.headers["x-request-id"])
    assert found["status"] == 200 and found["route"] == COMPLETIONS and found["slo_met"] is None
    expected = {*FRONT, LatencyPhase.PREFILL}
    if "stop" in more:  # the front finds the stop string, and the engine's time ends there
        expected -= {LatencyPhase.FROM_ENGINE}
    assert expected <= set(found["phases"])
    assert LatencyPhase.FAILED not in found["phases"]
    record = server.wait_for_record(request_id=answer.headers["x-request-id"])
    assert record["total_seconds"] == pytest.approx(found["seconds"], abs=1e-6)


def breakdown_with(
    engine: dict[LatencyPhase, float], *, closed: float, client_seconds: float = 0.0
) -> dict[str, float]:
    """The phases of a request that is read after 1 s, is sent after 3 s, ends in the engine after 10 s, and is answered
    after 14 s.
    """

    async def work() -> dict[str, float]:
        async def no_message(*_: Any) -> Any: ...

        stream = Stream(Add("a", (1,), SamplingParams()), lambda _: None)
        stream.close()
        generation = Generation("a", PreparedRequest((1,), SamplingParams()), Tokenizer.from_source(open_model(None)))
        generation.stream, end = stream, stream.ended_at
        context = RequestContext({"headers": []}, no_message, no_message, dialect=OPENAI, unique_id="a")
        context.generations = [generation]
        context.arrival, context.read_at, context.client_seconds = end - 10, end - 9, client_seconds
        reported = LatencyBreakdown(end - 7, end + closed, engine)
        whole = breakdown_of(context, reported, ended=end + 4)
        assert sum(whole.phases.values()) == pytest.approx(14) and whole.closed - whole.opened == pytest.approx(14)
        return {phase.value: round(seconds, 6) for phase, seconds in whole.phases.items()}

    return asyncio.run(work())


def test_the_times_of_the_front_make_its_phases() -> None:
    assert breakdown_with({LatencyPhase.DECODE: 5.0}, closed=-2, client_seconds=3) == {
        "reading": 1.0,
        "tokenizing": 2.0,
        "decode": 5.0,
        "from_engine": 2.0,
        "detokenizing": 1.0,
        "client": 3.0,
    }


def test_work_of_the_engine_after_the_end_does_not_count() -> None:
    found = breakdown_with({LatencyPhase.DECODE: 6.0, LatencyPhase.CO_SCHEDULED: 8.0}, closed=7)
    assert found == {"reading": 1.0, "tokenizing": 2.0, "decode": 3.0, "co_scheduled": 4.0, "detokenizing": 4.0}


def test_only_sending_after_the_end_in_the_engine_counts_for_the_client() -> None:
    async def work() -> None:
        async def ends_in_the_second(_: Any) -> None:
            if len(seconds) == 1:
                stream.close()

        async def no_message() -> Any: ...

        stream, seconds = Stream(Add("a", (1,), SamplingParams()), lambda _: None), list[float]()
        generation = Generation("a", PreparedRequest((1,), SamplingParams()), Tokenizer.from_source(open_model(None)))
        generation.stream = stream
        context = RequestContext({"headers": []}, no_message, ends_in_the_second, dialect=OPENAI, unique_id="a")
        context.generations = [generation]
        for _ in range(3):
            await context.send_events([{}])
            seconds.append(context.client_seconds)
        assert 0 == seconds[0] < seconds[1] < seconds[2] < time.monotonic() - stream.ended_at

    asyncio.run(work())


def test_a_send_looks_at_all_choices_only_when_one_has_ended() -> None:
    class Counted(list[Any]):
        walks = 0

        def __iter__(self) -> Any:
            self.walks += 1
            return super().__iter__()

    async def work() -> None:
        async def nothing(*_: Any) -> Any: ...

        context = RequestContext({"headers": []}, nothing, nothing, dialect=OPENAI, unique_id="a")
        streams = [Stream(Add(str(i), (1,), SamplingParams()), lambda _: None) for i in range(3)]
        context.generations = choices = Counted(SimpleNamespace(stream=stream) for stream in streams)
        for number, stream in enumerate(streams, 1):
            for _ in range(100):
                await context.send_events([{}])
            assert choices.walks == number and context.client_seconds == 0
            stream.close()
        assert context.last is streams[-1]

    asyncio.run(work())


def test_a_chat_is_found_by_answer_id_and_request_id(server: RunningServer) -> None:
    body = {"messages": [{"role": "user", "content": "Anna has"}], "max_tokens": 3}
    with server.http() as http:
        answer = http.post("/v1/chat/completions", json=body, headers={"x-request-id": "cmpl-mine-1"})
        by_answer, by_mine = explain(http, answer.json()["id"]), explain(http, "cmpl-mine-1")
    assert by_answer == by_mine and by_mine["request_id"] == "cmpl-mine-1"


@pytest.mark.parametrize("more", [{}, {"stop": ["\n\n", "a"]}, {"n": 2}], ids=["plain", "stop", "choices"])
@pytest.mark.parametrize("stream", [False, True])
def test_phases_in_an_answer_equal_the_explanation(server: RunningServer, stream: bool, more: dict[str, Any]) -> None:
    body = {**BODY, "stream": stream, "splitfuse_timing": True, **more}
    with client(server.url) as asked, server.http() as http:
        answer = http.post(COMPLETIONS, json=body)
        lines = [line for line in answer.text.splitlines() if "splitfuse_timing" in line]
        parts = json.loads(lines[-1].removeprefix("data: "))["splitfuse_timing"]["phases"]
        later = asked.explain(answer.headers["x-request-id"])["phases"]
    for part in LatencyPhase:
        if part not in (LatencyPhase.DETOKENIZING, LatencyPhase.CLIENT):
            assert parts.get(part) == later.get(part)
    assert parts[LatencyPhase.PREFILL] > 0


def test_phases_of_a_request_whose_client_disconnects(server: RunningServer) -> None:
    with server.http() as http:
        body = {**BODY, "max_tokens": 1500, "stream": True}
        with server.held(server.nothing_runs):
            with http.stream("POST", COMPLETIONS, json=body, headers={"x-request-id": "gone"}) as response:
                next(response.iter_lines())
            server.wait_until(server.nothing_runs)
        record = server.wait_for_record(request_id="gone")
        found = explain(http, "gone")
    assert record["status"] == found["status"] == 499 and found["finish_reasons"] == {"abort": 1}


def test_phases_of_a_request_past_its_deadline(server: RunningServer) -> None:
    with server.http() as http:
        body = {**BODY, "max_tokens": 2000, "splitfuse_deadline": 0.05}
        with server.held(server.nothing_runs):
            answer = http.post(COMPLETIONS, json=body, headers={"x-request-id": "too-late"})
        assert answer.status_code == 408
        assert explain(http, "too-late")["status"] == 408


def test_co_scheduled_prompts_are_named(server: RunningServer) -> None:
    with server.http() as http:
        request = http.build_request("POST", COMPLETIONS, json={**BODY, "max_tokens": 100, "stream": True})
        is_answered = threading.Event()
        with server.held(lambda: is_answered.is_set() or server.client.num_open == 2):
            stream = http.send(request, stream=True)
            lines = stream.iter_lines()
            next(lines)
            other = http.post(COMPLETIONS, json={**BODY, "prompt": "Erik " + LONG}).headers["x-request-id"]
            is_answered.set()
            assert list(lines)
        found = explain(http, stream.headers["x-request-id"])
    assert found["phases"][LatencyPhase.CO_SCHEDULED] > 0
    assert other in [each["id"] for each in found["co_scheduled"]]


def test_an_unknown_request_is_a_404(server: RunningServer) -> None:
    with server.http() as http:
        answer = http.get("/v1/splitfuse/requests/nobody")
        refused = http.post(COMPLETIONS, json={"prompt": ""}, headers={"x-request-id": "refused"})
        assert refused.status_code == 400 and http.get("/v1/splitfuse/requests/refused").status_code == 404
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert error["code"] == "request_not_found" and "'nobody' among the last 1024" in error["message"]
    with client(server.url) as asked, pytest.raises(InvalidRequestError, match="there is no request 'nobody'"):
        asked.explain("nobody")


def test_a_key_sees_only_its_own_requests() -> None:
    with running_server(ServerConfig(api_key=("one", "two")), num_blocks=200) as server, server.http() as http:
        mine, other = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))
        name = http.post(COMPLETIONS, json=BODY, headers=mine).headers["x-request-id"]
        path = f"/v1/splitfuse/requests/{name}"
        assert [http.get(path, headers=who).status_code for who in (mine, other, {})] == [200, 404, 401]
        prompts = {"one": 5, "two": 9}
        for key, tokens in prompts.items():  # both count their requests alike
            headers = {"authorization": f"Bearer {key}", "x-request-id": "req-1"}
            http.post(COMPLETIONS, json={**BODY, "prompt": [7] * tokens}, headers=headers)
        for who, tokens in ((mine, 5), (other, 9)):
            assert http.get("/v1/splitfuse/requests/req-1", headers=who).json()["prompt_tokens"] == tokens


def test_co_scheduled_prompts_of_other_keys_are_anonymous() -> None:
    with running_server(ServerConfig(api_key=("one", "two")), num_blocks=200) as server, server.http() as http:
        mine, other = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))
        request = http.build_request(
            "POST", COMPLETIONS, json={**BODY, "max_tokens": 300, "stream": True}, headers=mine
        )
        stream = http.send(request, stream=True)
        lines = stream.iter_lines()
        next(lines)
        own = http.post(COMPLETIONS, json={**BODY, "prompt": "Erik " + LONG}, headers=mine).headers["x-request-id"]
        http.post(COMPLETIONS, json={**BODY, "prompt": "Olga " + LONG}, headers=other)
        assert list(lines)
        others = explain(http, stream.headers["x-request-id"], mine)["co_scheduled"]
    assert {each["id"] for each in others} == {own, None}


def test_the_explain_command(server: RunningServer, run: Run) -> None:
    with server.http() as http:
        answer = http.post(COMPLETIONS, json=BODY).json()
    status, shown, _ = run("explain", answer["id"], "--url", server.url)
    assert status == 0 and LatencyPhase.DECODE.meaning in shown and "100.0%  from its arrival" in shown
    assert "20 generated; preemptions: 0" in shown and "█" in shown
    run("explain", "nobody", "--url", server.url).assert_mistake("there is no request 'nobody'")
    assert run("explain", "nobody", "--url", server.url, "--name", "x").status == 1


def test_every_phase_has_a_description() -> None:
    assert all(phase.meaning for phase in LatencyPhase)
    shown = format_breakdown(
        {
            "request_id": "r",
            "route": "/x",
            "status": 200,
            "finish_reasons": {},
            "slo_met": False,
            "prompt_tokens": 5,
            "cached_tokens": 0,
            "generated_tokens": 0,
            "preemptions": 0,
            "seconds": 2.0,
            "phases": dict.fromkeys(map(str, LatencyPhase), 2.0 / len(LatencyPhase)),
            "co_scheduled": [{"id": "other", "tokens": 7}, {"id": None, "tokens": 8}],
            "slo_violation": {
                "ttft": 0.5,
                "ttft_target": 0.25,
                "average_gap": 0.06,
                "longest_gap": 0.1,
                "itl_target": 0.05,
            },
        }
    )
    assert "first token after 0.5 s (target 0.25 s); tokens every 0.06 s (moving average; target 0.05 s)" in shown
    assert "longest gap 0.1 s" in shown
    assert "another key (8 tokens)" in shown
    assert (
        all(phase.meaning in shown for phase in LatencyPhase) and "other (7 tokens)" in shown and "SLO missed" in shown
    )


@pytest.mark.parametrize(
    ("violation", "words"),
    [
        (SloViolation(ttft=1.5, ttft_target=1.0), "first token after 1.5 s (target 1 s)"),
        (
            SloViolation(longest_gap=0.7, itl_target=0.25, percent_in_time=97.5, itl_percentile=99.9),
            "97.5 % of the gaps within 0.25 s (target 99.9 %), longest gap 0.7 s",
        ),
        (SloViolation(mean_gap=0.12, tpot_target=0.1), "tokens every 0.12 s (mean; target 0.1 s)"),
        (
            SloViolation(2.0, 1.0, 0.3, 0.9, 0.25, mean_gap=0.12, tpot_target=0.1),
            "first token after 2 s (target 1 s); tokens every 0.3 s (moving average; target 0.25 s), longest gap "
            "0.9 s; tokens every 0.12 s (mean; target 0.1 s)",
        ),
    ],
)
def test_a_violation_is_described_by_its_measures(violation: SloViolation, words: str) -> None:
    assert describe_violation(violation) == words


@pytest.fixture(scope="module")
def slo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder: Path = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        cost = CostModel(floor=0.002, per_token=1e-4)  # as if it had been calibrated
        kept = Calibration(name="test", cost=cost, num_blocks=200, block_size=32, max_model_len=2048)
        save(kept, cache_path(identify(EngineConfig.from_settings(SETTINGS))))
        with running_server(**SETTINGS) as running:
            yield running


@pytest.mark.parametrize("more", [{}, {"stop": ["a"]}], ids=["plain", "stop"])
def test_the_log_describes_an_slo_violation(slo_server: RunningServer, more: dict[str, Any]) -> None:
    with slo_server.http() as http:
        late = http.post(COMPLETIONS, json={**BODY, **more}).headers["x-request-id"]  # target: a millisecond
        kept = http.post(COMPLETIONS, json={**BODY, "splitfuse_slo": PATIENT}).headers["x-request-id"]
        why = slo_server.wait_for_record(request_id=late)["slo_violation"]
        assert re.match(r"first token after [\d.]+ s \(target 0\.001 s\); of [\d.]+ s: .*%", why)
        assert slo_server.wait_for_record(request_id=kept)["slo_violation"] is None
        found = explain(http, late)
        assert found["slo_met"] is False and found["slo_violation"]["ttft"] > found["slo_violation"]["ttft_target"]
        assert found["slo_violation"]["average_gap"] is None and explain(http, kept)["slo_violation"] is None


def test_a_missed_tpot_and_percentile_are_explained(slo_server: RunningServer) -> None:
    targets = {"itl": 1e-6, "itl_percentile": 60, "tpot": 2e-6}  # no token comes as fast
    with slo_server.http() as http:
        answer = http.post(COMPLETIONS, json={**BODY, "splitfuse_slo": targets, "splitfuse_timing": True})
        assert answer.json()["splitfuse_timing"]["slo_met"] is False
        found = explain(http, answer.headers["x-request-id"])
        missed = found["slo_violation"]
        assert (missed["percent_in_time"], missed["itl_percentile"], missed["itl_target"]) == (0.0, 60.0, 1e-6)
        assert missed["mean_gap"] > missed["tpot_target"] == 2e-6 and missed["ttft"] is missed["average_gap"] is None
        words = (
            r"0 % of the gaps within 1e-06 s \(target 60 %\), longest gap \S+ s; "
            r"tokens every \S+ s \(mean; target 2e-06 s\)"
        )
        assert re.search(words, format_breakdown(found))
        why = slo_server.wait_for_record(request_id=answer.headers["x-request-id"])["slo_violation"]
        assert re.match(words, why)
