"""`splitfuse bench`: flags, table, results file, report and error messages."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from running_server import running_server
from typer.testing import CliRunner, Result

from splitfuse.bench.results import load
from splitfuse.cli.commands import app
from splitfuse.runtime.environment import without_keys

Run = Callable[..., Result]
FEW = ("--requests", "8")
SMALL = ("--prompt", "40", "--generate", "6", *FEW)


@pytest.fixture
def run() -> Run:
    return lambda *flags: CliRunner().invoke(app, ["bench", *map(str, flags)])


def test_engine_in_this_process_and_report(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    flags = ("--num-blocks", 400, "--max-num-batched-tokens", 128, "--about", "price=3")
    ended = run("run", "--clients", "1,3", *SMALL, "--slo", "2", *flags, "--out", out)
    assert ended.exit_code == 0, ended.output
    assert re.search(r"goodput.*\n.*requests/s .* at 2 ", ended.stdout) and "at 4 " not in ended.stdout
    results = load(out)
    assert (results.system, results.simulated, results.replicas) == ("splitfuse, budget 128", False, 1)
    assert [(point.clients, point.repetition) for point in results.points] == [(1, 0), (3, 0), (1, 1), (3, 1)]
    assert results.workload["prompt"] == 40 and results.about["price"] == 3.0
    assert results.about["engine"]["max_num_batched_tokens"] == 128
    assert {"command", "machine", "versions", "date", "startup_seconds", "resident_bytes"} <= results.about.keys()
    prompts = [record.num_prompt_tokens for point in results.points for record in point.records]
    assert len(set(prompts)) > 5
    pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install splitfuse[bench]")
    page = tmp_path / "page.html"
    ended = run("report", out, "--out", page, "--title", "Twice", "--tpot", "1h")
    assert ended.exit_code == 1 and "tpot must be a time with its unit" in ended.stderr
    ended = run("report", out, "--out", page, "--title", "Twice", "--ttft", "1s", "--tpot", "50ms")
    assert ended.exit_code == 0, ended.output
    text = page.read_text(encoding="utf-8")
    assert "<h1>Twice</h1>" in text and "The given SLO is ttft 1s, tpot 50ms." in text and "at SLO</th>" in text


def test_server_with_each_workload(run: Run, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [{"at": 10 + i / 50, "prompt_tokens": 20 + i, "generate": 3} for i in range(6)]
    trace.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    out = tmp_path / "results.json"
    with running_server(num_blocks=400) as server:
        for flags, kind in (
            (("--clients", 2, "--turns", 2, *SMALL), "chat"),
            (("--clients", 2, "--prefix", 100, *SMALL), "prefix"),
            (("--rate", 50, *SMALL, "--tpot", "1min", "--itl", "1min/p99"), "independent"),
            (("--trace", trace), "trace"),
            (("--clients", 2, "--trace", trace, *FEW), "trace"),
        ):
            ended = run("run", "--url", server.url, "--repeat", 1, "--label", "it", *flags, "--out", out)
            assert ended.exit_code == 0, ended.output
            assert ("at SLO" in ended.stdout) == ("--tpot" in flags)
            results = load(out)
            assert (results.system, results.workload["kind"], len(results.points)) == ("it", kind, 1)
            (point,) = results.points
            assert all(record.error is None for record in point.records)
            assert (point.clients is None) == ("--clients" not in flags)
            if "--clients" not in flags and kind == "trace":
                assert [record.sent for record in point.records] == pytest.approx([i / 50 for i in range(6)])
        server.assert_idle()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--url", "http://127.0.0.1:1"), "no server answers at 127.0.0.1:1"),
        (("--url", "http://127.0.0.1:1", "--block-size", 64), "--block-size and --url are mutually exclusive"),
        (("--url", "http://127.0.0.1:1", "--replicas", 2), "--replicas and --url are mutually exclusive"),
        (("--clients", "1,x"), "--clients '1,x' must be comma-separated numbers"),
        (("--clients", "0"), "positive integers"),
        (("--clients", "1", "--rate", "1"), "--clients (closed loop) and --rate (open loop) are mutually exclusive"),
        (("--rate", "0"), "positive numbers"),
        (("--turns", 2, "--prefix", 3), "--turns and --prefix are mutually exclusive workloads"),
        (("--prompt", 0), "at least 1"),
        (("--slo", "0"), "must be positive speeds"),
        (("--itl", "250ms/p100"), "itl '250ms/p100' must end with a percentile above p0 and below p100"),
        (("--url", "http://127.0.0.1:1", "--tpot", "0s"), "tpot must be a time from 0.001ms to 86400s"),
        (("--policy", "orca", "--tpot", "1s"), "meets no SLOs: leave ttft, itl, tpot and enable_slo out"),
        (("--about", "price"), "NAME=VALUE"),
        (("--vocab-size", 10), "--vocab-size requires --url"),
        (("--trace", "none.jsonl"), "none.jsonl cannot be read"),
        (("--out", "none/x.json"), "none/x.json cannot be written"),
        (("--repeat", 0), "at least 1"),
        (("--prefixes", 2), "--prefixes requires --prefix"),
        (("--trace", __file__, "--clients", 1, "--generate", 5), "--generate and --trace are mutually exclusive"),
        (("--rate", 1, "--spacing", 1), "--spacing applies to --clients only"),
        (("--dtype", "int3"), "dtype must be one of"),
        (("--prefix", 3000, "--num-blocks", 400), "--prefix 3000 must be between 1 and 2046"),
    ],
)
def test_errors_have_a_message(run: Run, flags: tuple[object, ...], sentence: str) -> None:
    ended = run("run", *flags)
    assert ended.exit_code == 1 and ended.stdout == ""
    assert ended.stderr.splitlines()[-1].startswith("splitfuse: ") and sentence in ended.stderr


def test_api_keys_are_not_stored() -> None:
    shown = without_keys(["bench", "run", "--api-key", "secret", "--api-key=secret", "--url", "http://a"])
    assert shown == ["bench", "run", "--api-key", "...", "--api-key=...", "--url", "http://a"]


def test_report_rejects_files_without_results(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text("{}", encoding="utf-8")
    for flags, sentence in (
        ((file,), "is not a file of benchmark results"),
        ((tmp_path / "none",), "cannot be read: No such file"),
    ):
        ended = run("report", *flags)
        assert ended.exit_code == 1 and sentence in ended.stderr
