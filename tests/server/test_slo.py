"""SLOs over HTTP: the server's, a key's, a request's own, and the reports of whether they were met."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from running_server import RunningServer, running_server

from splitfuse.config.engine import EngineConfig, SchedulerConfig
from splitfuse.config.server import ServerConfig
from splitfuse.core.slo.cost_model import CostModel
from splitfuse.engine.engine import ESTIMATED_STEPS
from splitfuse.engine.loop import REFRESH_STEPS
from splitfuse.errors import ConfigError
from splitfuse.runtime.calibration import Calibration, cache_path, identify, save
from splitfuse.server.auth import ApiKeys
from splitfuse.server.lifecycle import _log_slo

BODY = {"prompt": "Anna has", "max_tokens": 4, "ignore_eos": True, "splitfuse_timing": True}
PATIENT = {"ttft": 1000, "itl": 1000}
EACH_MEASURE = {"itl": 1000, "itl_percentile": 99.5, "tpot": 1000}
STEPS = ("step_seconds", "predicted_step_seconds", "step_prediction_ratio")
SETTINGS = {"ttft": "0.01ms", "itl": "1min", "num_blocks": 200}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        cost = CostModel(floor=0.002, per_token=1e-4)  # as if it had been calibrated
        kept = Calibration(name="test", cost=cost, num_blocks=200, block_size=32, max_model_len=2048)
        save(kept, cache_path(identify(EngineConfig.from_settings(SETTINGS))))
        with running_server(**SETTINGS) as running:
            yield running


@pytest.fixture
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with server.http() as client:
        yield client


def slo_met(http: httpx.Client, **more: object) -> bool | None:
    answer = http.post("/v1/completions", json={**BODY, **more})
    assert answer.status_code == 200, answer.text
    met: bool | None = answer.json()["splitfuse_timing"]["slo_met"]
    return met


def test_the_slo_of_the_server_and_of_a_request(http: httpx.Client, server: RunningServer) -> None:
    assert slo_met(http) is False  # no first token comes within 10 µs
    assert slo_met(http, splitfuse_slo=PATIENT) is True
    assert slo_met(http, splitfuse_slo={"ttft": 1000}, n=3) is True
    assert slo_met(http, splitfuse_slo={"itl": 1e-5}, max_tokens=40) is False
    assert slo_met(http, splitfuse_slo={"ttft": None}) is None
    assert slo_met(http, splitfuse_slo={"tpot": 1000}) is slo_met(http, splitfuse_slo=EACH_MEASURE) is True
    assert slo_met(http, splitfuse_slo={"tpot": 1e-5}, max_tokens=40) is False
    assert slo_met(http, splitfuse_slo={"itl": 1e-5, "itl_percentile": 1, "tpot": 1000}, max_tokens=40) is False
    server.wait_for_record(slo_met=True)
    metrics = http.get("/metrics").text
    assert 'splitfuse:slo_total{met="true",model_name="storyteller"} 4.0' in metrics
    assert 'splitfuse:slo_total{met="false",model_name="storyteller"} 4.0' in metrics
    assert 'splitfuse:replicas_needed{model_name="storyteller"} 1.0\n' in metrics
    counted = [re.search(rf"^splitfuse:{name}_count.* (\S+)$", metrics, re.MULTILINE) for name in STEPS]
    assert len({each[1] for each in counted if each}) == 1 and None not in counted, "each step was predicted"


def test_what_the_machine_keeps_is_said(
    server: RunningServer, http: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    """The cost model says 2 ms and 0.1 ms a token: 53 ms for a prompt of 512 tokens."""
    _log_slo(EngineConfig.from_settings(SETTINGS).scheduler, server.client)
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]  # others may have set INFO
    said = warning.getMessage()
    assert said.startswith("what this machine keeps of the SLO (estimated), out of ")
    metrics = http.get("/metrics").text
    for name in ("lone_prompt_ratio", "lone_decode_ratio", "longest_prompt_tokens", "max_decodes", "estimated"):
        assert re.search(rf"^splitfuse:slo_{name}{{.*}} [0-9.e+-]+$", metrics, re.MULTILINE), name
    assert slo_met(http, max_tokens=ESTIMATED_STEPS + REFRESH_STEPS) is False
    assert 'splitfuse:slo_estimated{model_name="storyteller"} 0.0\n' in http.get("/metrics").text


def test_on_time_only_refuses_what_would_miss_its_slo(http: httpx.Client) -> None:
    """The cost model says 2 ms and 0.1 ms a token."""
    body = {**BODY, "splitfuse_on_time_only": True}
    assert slo_met(http, splitfuse_on_time_only=True, splitfuse_slo=PATIENT) is True
    never = http.post("/v1/completions", json={**body, "splitfuse_slo": {"ttft": 1e-5}})
    assert never.status_code == 400, never.text
    assert never.json()["error"]["param"] == "splitfuse_on_time_only"
    assert "its first token may take" in never.json()["error"]["message"]
    neither = http.post("/v1/completions", json={**body, "splitfuse_slo": {}})
    assert neither.status_code == 400
    assert neither.json()["error"]["param"] == "splitfuse_on_time_only"
    assert neither.json()["error"]["message"] == (
        "on_time_only requires an SLO: a ttft, itl or tpot of the request (splitfuse_slo) or of the server (--ttft, "
        "--itl, --tpot)"
    )
    long = {**BODY, "prompt": [5] * 1500, "max_tokens": 2, "n": 8, "splitfuse_slo": {"ttft": 1000}, "stream": True}
    with http.stream("POST", "/v1/completions", json=long) as crowd:  # 12,000 tokens: 1.2 s and more
        # By the cost model, each takes 0.1 s and all 100 s. Corrected by at most 32, one alone is still in time
        prompts = {"prompt": [[6] * 1000] * 8, "n": 125, "splitfuse_slo": {"ttft": 10}}
        with http.stream("POST", "/v1/completions", json={**body, **prompts, "stream": True}) as refused:
            assert refused.status_code == 429, refused.read()
            error = json.loads(refused.read())["error"]
        assert f"try again in {refused.headers['retry-after']} s" in error["message"]
        assert crowd.status_code == 200


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory, server: RunningServer) -> Iterator[httpx.Client]:
    """Keys: with a TTFT that cannot be met, with low priority, and with a TPOT that cannot be met."""
    del server  # its cost model is used
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(
        "# who is who\nk1 name=alice weight=2 priority=high ttft=1ms\n\nk2 priority=low\nk3 itl=1min/p99 tpot=0.001ms\n"
    )
    file.chmod(0o600)
    settings = {"enable_slo": True, "num_blocks": 200}
    with running_server(ServerConfig(api_key_file=str(file)), **settings) as running, running.http() as http:
        yield http


def test_the_slo_and_priority_of_a_key(keyed: httpx.Client) -> None:
    def ask(key: str, **more: object) -> httpx.Response:
        return keyed.post("/v1/completions", json={**BODY, **more}, headers={"authorization": f"Bearer {key}"})

    def met(key: str, **more: object) -> bool | None:
        answer: bool | None = ask(key, **more).json()["splitfuse_timing"]["slo_met"]
        return answer

    assert met("k1") is met("k3") is False and met("k2") is None and met("k3", max_tokens=1) is True
    assert met("k1", splitfuse_slo=PATIENT) is True and met("k2", splitfuse_slo=PATIENT) is True
    assert ask("k1", splitfuse_priority="high").status_code == ask("k1", splitfuse_priority="low").status_code == 200
    refused = ask("k2", splitfuse_priority="normal")
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "priority_not_allowed")
    assert ask("k1", splitfuse_priority="urgent").status_code == 400


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("k wieght=2", "unknown option 'wieght=2' after a key; did you mean 'weight'"),
        ("k weight=0", "weight must be a number from 0.001 to 1000, not '0'"),
        ("k weight=x", "weight must be a number from 0.001 to 1000, not 'x'"),
        ("k name = a", "'name' after a key has no value: write name=VALUE, without spaces"),
        ("good name=a", "this key is already in line 1"),
        ("given", "this key is already among those of api_key"),
        ("k priority=top", "priority must be high, normal or low, not 'top'"),
        ("k name=a name=b", "name is given twice"),
        ("k itl=3", "itl must be a time with its unit"),
        ("k itl=3ms/99", "itl '3ms/99' must end with a percentile above p0 and below p100, such as 3ms/p99"),
        ("k tpot=0s", "tpot must be a time from 0.001ms to 86400s, such as 250ms, not '0s'"),
        ("k ttft", "'ttft' after a key has no value: write ttft=VALUE"),
    ],
)
def test_malformed_key_lines_are_named(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"good\n{line}\n")
    (tmp_path / "keys").chmod(0o600)
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        ApiKeys(ServerConfig(api_key=("given",), api_key_file=str(tmp_path / "keys")))
    assert "line 2" in str(error.value)


def test_an_slo_of_a_key_needs_slo_scheduling(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("k name=bob itl=100ms\n")
    (tmp_path / "keys").chmod(0o600)
    keys = ApiKeys(ServerConfig(api_key_file=str(tmp_path / "keys")))
    with pytest.raises(ConfigError, match="gives 'bob' an SLO, but SLO scheduling is disabled"):
        keys.check(SchedulerConfig())
    keys.check(SchedulerConfig(enable_slo=True))


@pytest.mark.parametrize(
    ("targets", "place"),
    [
        ({"ttft": 0}, ".ttft"),
        ({"itl": -1}, ".itl"),
        ({"ttft": "1s"}, ".ttft"),
        ({"tpot": 0}, ".tpot"),
        ({"itl": 1, "itl_percentile": 0}, ".itl_percentile"),
        ({"itl": 1, "itl_percentile": 100}, ".itl_percentile"),
        ({"itl": 1, "itl_percentile": "p99"}, ".itl_percentile"),
        ({"tpot": 1, "itl_percentile": 99}, ".itl_percentile"),
        ({"other": 1}, ".other"),
        (3, ""),
    ],
)
def test_malformed_targets_are_refused(http: httpx.Client, targets: object, place: str) -> None:
    answer = http.post("/v1/completions", json={**BODY, "splitfuse_slo": targets})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == f"splitfuse_slo{place}" and error["param"] in error["message"]


EXTREMES = [  # as JSON writes them
    *("0", "-0.0", "5e-324", "2.2250738585072014e-308", "1e-300", "1e-30", "1e-6", "0.001", "0.5", "1", "3.0"),
    *("100", "2147483647", "2147483648", "9223372036854775807", "9223372036854775808", "18446744073709551615"),
    *("18446744073709551616", "1e30", "1e300", "1.7976931348623157e308", "1e999", "NaN", "Infinity", "-Infinity"),
    *("-1", "-5e-324", "-1e300", "-9223372036854775809", "1" + 400 * "0", "1" + 5000 * "0"),
]
"""Numbers at the ends of every range that a body, a scheduler or a sampler may have in mind."""
NUMBERS = [
    *("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "top_k", "seed"),
    *("max_tokens", "min_tokens", "logprobs", "n", "best_of", "splitfuse_deadline", "splitfuse_priority", "stop"),
]
PLACES = {  # what surrounds the number, and the number
    **{name: f'"{name}": %s' for name in NUMBERS},
    **{f"{name}, drawn": f'"temperature": 0.7, "{name}": %s' for name in ("top_p", "min_p", "top_k", "seed")},
    **{name: f'"splitfuse_slo": {{"{name}": %s}}' for name in ("ttft", "itl", "ttft_per_token", "tpot")},
    "percentile": '"splitfuse_slo": {"itl": 1, "itl_percentile": %s}',
    "on time": '"splitfuse_on_time_only": true, "splitfuse_slo": {"ttft": 1000, "itl": %s}',
    "bias": '"logit_bias": {"7": %s}',
    "biased id": '"logit_bias": {"%s": 1}',
    "stop id": '"min_tokens": 1, "stop_token_ids": [%s]',
    "prompt": '"prompt": [5, %s]',
}


@pytest.mark.parametrize("place", PLACES)
def test_extreme_numbers_fail_alone_or_do_no_harm(http: httpx.Client, server: RunningServer, place: str) -> None:
    common = '"ignore_eos": true' + ("" if place == "prompt" else ', "prompt": [5, 6]')
    common += "" if place in ("max_tokens", "min_tokens") else ', "max_tokens": 2'
    targets = "" if "splitfuse_slo" in PLACES[place] else ', "splitfuse_slo": {"ttft": 0.001, "itl": 1e-6}'
    headers = {"content-type": "application/json"}
    for number in EXTREMES:
        body = f"{{{common}{targets}, {PLACES[place] % number}}}"
        answer = http.post("/v1/completions", content=body, headers=headers)
        expected = {"on time": (200, 400, 429), "splitfuse_deadline": (200, 400, 408)}.get(place, (200, 400))
        assert answer.status_code in expected, f"{number}: {answer.text}"
        assert answer.status_code == 200 or len(answer.json()["error"]["message"]) < 400
    assert server.client.state == "ready"
    server.assert_idle()


def test_an_slo_is_refused_where_slo_scheduling_is_disabled() -> None:
    with running_server(num_blocks=200) as plain, plain.http() as http:
        answer = http.post("/v1/completions", json={**BODY, "splitfuse_slo": PATIENT})
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["param"] == "splitfuse_slo"
        assert error["message"] == (
            "SLO scheduling is disabled: start the engine with ttft, itl, tpot or enable_slo (--ttft, --itl, --tpot, "
            "--enable-slo), or leave splitfuse_slo out"
        )
        assert slo_met(http, splitfuse_slo={}) is None
