"""Promises over HTTP: the server's for everybody, a request's own, and what is told of whether they were kept."""

import re
from collections.abc import Iterator

import httpx
import pytest
from running_server import RunningServer, running_server

from splitfuse.config import EngineConfig
from splitfuse.core.cost_model import CostModel
from splitfuse.runtime.calibration import Calibration, identify, place, save

BODY = {"prompt": "Anna has", "max_tokens": 4, "ignore_eos": True, "splitfuse_timing": True}
PATIENT = {"ttft": 1000, "itl": 1000}
PASSES = ("pass_seconds", "predicted_pass_seconds", "pass_forecast_ratio")
SETTINGS = {"ttft": "1ms", "itl": "1min", "num_blocks": 200}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        cost = CostModel(floor=0.002, per_token=1e-4)  # as if it had been calibrated
        kept = Calibration(name="test", cost=cost, num_blocks=200, block_size=32, max_model_len=2048)
        save(kept, place(identify(EngineConfig.from_settings(SETTINGS))))
        with running_server(**SETTINGS) as running:
            yield running


@pytest.fixture
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with server.http() as client:
        yield client


def on_time(http: httpx.Client, **more: object) -> bool | None:
    answer = http.post("/v1/completions", json={**BODY, **more})
    assert answer.status_code == 200, answer.text
    kept: bool | None = answer.json()["splitfuse_timing"]["on_time"]
    return kept


def test_what_the_server_promises_to_all_and_what_a_request_asks_for(http: httpx.Client, server: RunningServer) -> None:
    assert on_time(http) is False  # no first token comes within a millisecond
    assert on_time(http, splitfuse_targets=PATIENT) is True
    assert on_time(http, splitfuse_targets={"ttft": 1000}, n=3) is True
    assert on_time(http, splitfuse_targets={"itl": 1e-3}, max_tokens=40) is False
    assert on_time(http, splitfuse_targets={"ttft": None}) is None
    server.wait_for_record(on_time=True)
    metrics = http.get("/metrics").text
    assert 'splitfuse:promises_total{kept="true",model_name="storyteller"} 2.0' in metrics
    assert 'splitfuse:promises_total{kept="false",model_name="storyteller"} 2.0' in metrics
    counted = [re.search(rf"^splitfuse:{name}_count.* (\S+)$", metrics, re.MULTILINE) for name in PASSES]
    assert len({each[1] for each in counted if each}) == 1 and None not in counted, "each pass was predicted"


@pytest.mark.parametrize("targets", [{"ttft": 0}, {"itl": -1}, {"ttft": "1s"}, {"other": 1}, 3])
def test_what_is_no_target_is_refused(http: httpx.Client, targets: object) -> None:
    answer = http.post("/v1/completions", json={**BODY, "splitfuse_targets": targets})
    assert answer.status_code == 400 and "splitfuse_targets" in answer.json()["error"]["param"]


def test_a_server_that_promises_nothing_says_so() -> None:
    with running_server(num_blocks=200) as plain, plain.http() as http:
        answer = http.post("/v1/completions", json={**BODY, "splitfuse_targets": PATIENT})
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["param"] == "splitfuse_targets" and "start it with --ttft or --itl" in error["message"]
        assert on_time(http, splitfuse_targets={}) is None
