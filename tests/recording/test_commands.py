"""`serve --record` and what reads its file: a real server's load, replayed by the command line."""

import json
import math
import re
import shutil
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from command_line import Run
from hostile_forms import HOSTILE
from patience import PATIENCE
from server_process import server_process

from splitfuse.bench.recorded import step_ratios
from splitfuse.bench.resend import Figures
from splitfuse.bench.workload import TokenIds, Trace
from splitfuse.cli.replay import live_table
from splitfuse.core.request_output import FinishReason
from splitfuse.core.slo.cost_model import CostModel
from splitfuse.engine.trace import FinishTrace, RequestTrace, StepTrace
from splitfuse.recording.format import MAGIC, EngineStart, Recording, Records, encode_frame


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording of a server with a load of many kinds."""
    folder = tmp_path_factory.mktemp("server")
    path = folder / "server.rec"
    flags = ("--record", str(path), "--max-num-batched-tokens", "64")
    with server_process(folder, "recorded", *flags) as server:
        url = server.client().url
        with httpx.Client(base_url=f"{url}/v1", timeout=PATIENCE, trust_env=False) as http:
            bodies: list[dict[str, Any]] = [
                {"prompt": f"Anna keeps a goose. Number {number}", "max_tokens": 12 + number, "n": 1 + number % 2}
                for number in range(8)
            ]
            bodies[1]["structured_outputs"] = {"regex": "(secret[a-d]){1,2}"}
            bodies[2] |= {"logprobs": 2, "temperature": 0}
            bodies[3]["stop"] = ["e", "a"]
            with ThreadPoolExecutor(4) as pool:
                answers = list(pool.map(lambda body: http.post("/completions", json=body), bodies))
            assert [answer.status_code for answer in answers] == [200] * 8
            long = {"prompt": "Once", "max_tokens": 800, "ignore_eos": True, "stream": True}
            with http.stream("POST", "/completions", json=long) as stream:
                next(stream.iter_lines())
            metrics = httpx.get(f"{url}/metrics").text
            assert "splitfuse:recording{" in metrics and "splitfuse:recording_dropped_events_total{" in metrics
        server.terminate()
        assert server.process.wait(PATIENCE) == 0
    return path


def test_a_server_is_replayed_to_the_last_bit(run: Run, path: Path) -> None:
    status, out, err = run("replay", path, "--quiet")
    assert (status, err) == (0, "")
    first, last, seconds = out.splitlines()
    assert first.startswith(f"{path}: ") and "13 requests" in first and "1 engine(s)" in first
    assert last.startswith("equal to the last bit: ") and seconds.startswith("replayed in ")


def test_a_server_writes_aborts_and_no_texts(path: Path) -> None:
    frames = Recording.open(path).frames()
    records = [record for frame in frames if isinstance(frame, Records) for record in frame.records]
    assert FinishReason.ABORT in {record.reason for record in records if isinstance(record, FinishTrace)}
    params = [each.detail.params for each in records if isinstance(each, RequestTrace) and each.detail is not None]
    assert all(not each.stop for each in params)
    assert {each.structured_outputs.source for each in params if each.structured_outputs is not None} == {""}


def test_a_replay_that_differs_ends_with_status_one(run: Run, path: Path, tmp_path: Path) -> None:
    frames, changed = list(Recording.open(path).frames()), tmp_path / "changed.rec"
    head = path.read_bytes()[: -sum(len(encode_frame(frame)) for frame in frames)]
    index, step = next(
        (index, record)
        for index, frame in enumerate(frames)
        if isinstance(frame, Records)
        for record in frame.records
        if isinstance(record, StepTrace) and record.chunks[0].token_ids
    )
    chunk = msgspec.structs.replace(step.chunks[0], token_ids=(7,))
    frame, new = frames[index], msgspec.structs.replace(step, chunks=(chunk, *step.chunks[1:]))
    assert isinstance(frame, Records)
    frames[index] = Records(0, tuple(new if each is step else each for each in frame.records))
    changed.write_bytes(head + b"".join(map(encode_frame, frames)))
    status, out, err = run("replay", changed, "--json")
    difference = json.loads(out)["difference"]
    assert (status, err) == (1, "") and (difference["step"], difference["expected"]) == (step.step, 7)
    assert difference["what"] == "token" and difference["position"] == chunk.start + chunk.num_tokens
    status, out, err = run("replay", changed, "--keep-going", "--quiet")
    assert status == 1 and f"the first that is different: step {step.step} of engine 0" in out
    assert [line[:11] for line in out.splitlines()[2:]] == ["different: ", "replayed in"]
    status, out, err = run("replay", path, "--dtype", "float32", "--num-blocks", 100, "--kernels", "reference")
    assert status == 1 and "was recorded with another dtype: recorded 'auto', here 'float32'; --force replays" in err
    status, out, err = run("replay", path.with_name("absent"))
    assert (status, out) == (1, "") and "absent cannot be read: No such file or directory" in err


def test_the_example_of_the_documentation_runs(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "recording.md").read_text(encoding="utf-8")
    _, found, after = page.partition("```python\n")
    example = after.partition("```")[0].replace("server.rec", str(path))
    assert found and str(path) in example
    exec(compile(example, "example", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 13


@pytest.mark.slow
def test_live_replay_gives_the_same_tokens_with_other_settings(run: Run, path: Path) -> None:
    status, out, err = run("replay", path, "--live", "--max-num-batched-tokens", 32, "--json")
    assert (status, err) == (0, "")
    report = json.loads(out)
    recorded, now = report["recorded"], report["now"]
    assert recorded["requests"] == now["requests"] == 13 and report["equal_tokens"] == report["compared"] >= 12
    assert recorded["ended"]["length"] == now["ended"]["length"] and now["tokens"] > 150
    assert recorded["ttft"].keys() == now["ttft"].keys() == {"50", "95"}


def test_flags_that_live_replay_does_not_have_are_refused(run: Run, path: Path) -> None:
    for flags, message in (
        (("--live", "--replicas", -1), "--replicas -1 must be at least 1"),
        (("--live", "--replicas", 0), "--replicas 0 must be at least 1"),
        (("--live", "--force"), "--force is not for --live"),
        (("--live", "--keep-going"), "--keep-going is not for --live"),
    ):
        status, out, err = run("replay", path, *flags)
        assert (status, out) == (1, "") and message in err
    simulated = ("simulate", "--trace", path, "--machine", "a100-70b", "--quiet")
    assert "--replicas 0 must be at least 1" in run(*simulated, "--replicas", 0)[2]
    assert "num_blocks must be at most 16777216 in a simulation" in run(*simulated, "--num-blocks", 2**40)[2]
    assert run(*simulated, "--kv-cache-memory-gib", 1)[0] == 0


def test_a_grammar_that_takes_long_to_compile_is_refused(run: Run, path: Path, tmp_path: Path) -> None:
    hostile, frames = tmp_path / "hostile.rec", list(Recording.open(path).frames())
    head = path.read_bytes()[: -sum(len(encode_frame(frame)) for frame in frames)]
    index, request = next(
        (index, record)
        for index, frame in enumerate(frames)
        if isinstance(frame, Records)
        for record in frame.records
        if isinstance(record, RequestTrace) and record.detail and record.detail.params.structured_outputs
    )
    assert request.detail is not None and request.detail.params.structured_outputs is not None
    schema = HOSTILE["products of patterns"]["structured_outputs"]["json"]
    compiled = json.dumps({"grammars": [{"json_schema": schema}]})
    form = replace(request.detail.params.structured_outputs, compiled=compiled)
    params = replace(request.detail.params, structured_outputs=form)
    detail = msgspec.structs.replace(request.detail, params=params)
    frames[index] = Records(0, (msgspec.structs.replace(request, detail=detail),))
    hostile.write_bytes(head + b"".join(map(encode_frame, frames[: index + 1])))
    for flags in ((), ("--live",)):
        status, _, err = run("replay", hostile, *flags)
        assert status == 1
        assert "hostile.rec has a request whose structured_outputs.regex could not be compiled: it ran for more" in err


def test_names_in_a_file_do_not_control_the_terminal(run: Run, path: Path, tmp_path: Path) -> None:
    hostile = tmp_path / "hostile.rec"
    recording = Recording.open(path)
    frames = list(recording.frames())
    start = next(frame for frame in frames if isinstance(frame, EngineStart))
    start = msgspec.structs.replace(start, model="\x1b[2Jfree\r\n", identity={"\x1b]0;a": "\x9b"})
    machine = {"cpu": "\x1b[31m"}
    for time in (0.0, 1e300, math.nan, -1.0):
        header = msgspec.structs.replace(recording.header, machine=machine)
        content = msgspec.msgpack.encode({**msgspec.to_builtins(header), "time": time})
        prefix = struct.pack("<II", len(content), zlib.crc32(content))
        hostile.write_bytes(MAGIC + prefix + content + encode_frame(start))
        status, out, err = run("replay", hostile)
        assert status == 1 and all(c.isprintable() or c == "\n" for c in out + err)
        if time == 0.0:
            assert r"\x1b[2Jfree\r\n, 1970-01-01" in out and "another \\x1b]0;a: recorded" in err
        else:
            assert out == "" and f"has no valid header: time {time} is no Unix time" in err


def test_a_recording_is_a_load_of_simulations(run: Run, path: Path) -> None:
    flags = ("--machine", "a100-70b", "--quiet", "--max-num-batched-tokens", 32, "--replicas", 2)
    status, out, err = run("simulate", "--trace", path, *flags)
    assert status == 0
    assert re.fullmatch(r"splitfuse: the recorded steps took \d+\.\d\d times as long as .*\)\n", err)
    assert "budget 32, 2 replicas" in out and f"{path.name}, recorded" in out
    assert out.count("as recorded") == 2
    assert "at SLO" not in out and run("simulate", "--trace", path, *flags, "--tpot", "1min")[1].count("at SLO") == 2
    status, out, err = run("replay", path, "--replicas", 2)
    assert (status, out) == (1, "") and "--replicas needs --live" in err


def test_a_recording_is_read_as_it_was_when_it_was_opened(path: Path, tmp_path: Path) -> None:
    growing = tmp_path / "growing.rec"
    shutil.copy(path, growing)
    recording = Recording.open(growing)
    growing.unlink()  # as a server's rotation may
    assert len(Trace.read(recording, TokenIds(2)).lines) == 13
    steps = [
        record
        for frame in recording.frames()
        if isinstance(frame, Records)
        for record in frame.records
        if isinstance(record, StepTrace)
    ]
    ratios = step_ratios(recording, CostModel(floor=0.001, per_token=1e-6, per_row=1e-6))
    num_rows = sum(chunk.detail.num_logits if chunk.detail else 1 for chunk in steps[0].chunks)
    num_tokens = sum(chunk.num_tokens for chunk in steps[0].chunks)
    assert ratios[0] == pytest.approx(
        (steps[0].end_time - steps[0].start_time) / (0.001 + 1e-6 * (num_tokens + num_rows))
    )
    assert len(ratios) == len(steps)


def test_figures_are_those_of_the_requests() -> None:
    table = live_table(figures(ttft={50: 0.1}, itl={50: 0.02}, met_slo=4), figures(ttft={50: 0.2}, itl={50: 0.01}))
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert ("TTFT P50, ms", "100", "200", "+100.0%") in rows and ("ITL P50, ms", "20", "10", "-50.0%") in rows
    assert ("goodput, requests/s that met their SLO", "2", "0", "-100.0%") in rows
    assert ("requests", "5", "5", "") in rows


def figures(**changes: Any) -> Figures:
    values: dict[str, Any] = {"requests": 5, "ended": {}, "tokens": 9, "seconds": 2.0, "with_slo": 4, "met_slo": 0}
    return Figures(**{**values, "preemptions": 0, "cached_tokens": 0, **changes})
