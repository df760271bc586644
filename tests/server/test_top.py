"""`splitfuse top`: its figures, its view in any width, and its keys in a real terminal."""

import fcntl
import importlib
import io
import json
import os
import re
import select
import struct
import subprocess
import sys
import termios
import threading
from typing import Any, Self

import pytest
from patience import PATIENCE
from rich.console import Console
from running_server import RunningServer

from splitfuse.cli.top import ORDERS
from splitfuse.cli.top_state import SORTS, LiveState
from splitfuse.cli.top_view import LiveView
from splitfuse.core.latency.phases import LatencyPhase
from splitfuse.core.request_output import FinishReason
from splitfuse.core.slo.targets import SloTargets
from splitfuse.engine.client import EngineState
from splitfuse.engine.trace import ChunkTrace, FinishTrace, PhaseTrace, PreemptTrace, RequestTrace, StepTrace
from splitfuse.server.trace_feed import TraceBegin, TracedChange, TracedRecords, TracedRequest, TraceEnd

commands = importlib.import_module("splitfuse.cli.top")  # the package has the command by this name


def ended(time: float, *, slo_met: bool | None, ttft: float) -> TracedRequest:
    return TracedRequest(
        id="id", request_id="mine", route="/v1/completions", status=200, arrival=time - 1, ended=time,
        engine_opened=time - 1, phases={}, prompt_tokens=4, cached_tokens=0, generated_tokens=2,
        finish_reasons={"length": 1}, ttft=ttft, preemptions=0, slo_met=slo_met,
    )  # fmt: skip


def followed() -> LiveState:
    """Two requests: one decodes and has missed its SLO, the other waits; two more have ended."""
    state = LiveState()
    state.take(TraceBegin("1", "storyteller", 100.0, 0.0, 100, True, (EngineState.READY, EngineState.READY)))
    requests = (
        RequestTrace(1, "first-0.0", 100.0, 100.1, 4, 8, 0, 0, SloTargets(ttft=0.5)),
        RequestTrace(2, "second-0.0", 101.0, 101.1, 400, 16, 0, 0, SloTargets(ttft=9.0)),
        RequestTrace(3, "third-0.0", 101.0, 101.1, 4, 8, 0, 0, None),
    )
    phases = PhaseTrace(101.2, ((1, LatencyPhase.PREFILL), (2, LatencyPhase.NO_BLOCKS)))
    steps = [
        StepTrace(
            *(number, 64, 100.0 + number, 101.0 + number, 0.9, 1, 1, 60, 15),
            (ChunkTrace(1, start, count, (7,)), ChunkTrace(3, start, count, (7,))),
        )
        for number, (start, count) in enumerate([(0, 4), (4, 1), (5, 1)])
    ]
    finish = FinishTrace(3, 103.0, FinishReason.LENGTH, 3, None, None)
    state.take(TracedRecords(0, (*requests, phases, *steps, PreemptTrace(2, 103.0), finish)))
    state.take(ended(103.5, slo_met=True, ttft=0.2))
    state.take(ended(104.0, slo_met=False, ttft=0.6))
    return state


def test_figures_are_counted_from_the_records() -> None:
    state = followed()
    figures = state.figures()
    assert figures["generated_tokens_per_second"] == 6 / 4
    assert figures["prompt_tokens_per_second"] == 8 / 4
    assert (figures["slo_attainment"], figures["goodput"]) == (0.5, 1 / 4)
    assert figures["ttft"] == {"p50": 0.6, "p90": 0.6}
    assert figures["itl"] == {"p50": 1.0, "p90": 1.0, "p99": 1.0}
    shown = state.as_dict("age")
    assert json.loads(json.dumps(shown)) == shown
    assert [(each["id"], each["phase"], each["tokens"], each["slo"]) for each in shown["requests"]] == [
        ("first-0.0", "prefill", 3, "missed"),
        ("second-0.0", "preempted", 0, "ok"),
    ]
    assert shown["engines"][0]["kv_blocks_held"] == 25


@pytest.mark.parametrize(
    ("targets", "shown"),
    [  # gaps of 1, 1 and 4 s
        (SloTargets(tpot=2.0), ["ok", "ok", "ok", "ok"]),
        (SloTargets(tpot=1.5), ["ok", "ok", "ok", "missed"]),
        (SloTargets(tpot=0.9), ["ok", "missed", "missed", "missed"]),
        (SloTargets(itl=2.0, itl_percentile=60), ["ok", "ok", "ok", "ok"]),
        (SloTargets(itl=2.0, itl_percentile=70), ["ok", "ok", "ok", "missed"]),
        (SloTargets(itl=2.0), ["ok", "ok", "ok", "missed"]),
        (SloTargets(ttft=0.5, tpot=9.0), ["missed", "missed", "missed", "missed"]),
    ],
)
@pytest.mark.parametrize("joined", [False, True], ids=["from its start", "after its first token"])
def test_a_running_request_is_judged_by_its_targets(targets: SloTargets, shown: list[str], joined: bool) -> None:
    state = LiveState()
    state.take(TraceBegin("1", "storyteller", 100.0, 0.0, 100, True, (EngineState.READY,)))
    state.take(TracedRecords(0, (RequestTrace(1, "first-0.0", 100.0, 100.1, 4, 8, 0, 0, targets),)))
    found = []
    for number, time in enumerate((101.0, 102.0, 103.0, 107.0)):
        start, count = (4 + number, 1) if joined or number else (0, 4)
        chunk = ChunkTrace(1, start, count, (7,))
        state.take(TracedRecords(0, (StepTrace(number, 64, time - 0.5, time, 0.5, 1, 0, 60, 15, (chunk,)),)))
        found.append(state.as_dict("age")["requests"][0]["slo"])
    assert found == (["ok"] * 4 if joined and targets.ttft is not None else shown)


def test_dead_engine_has_no_requests() -> None:
    state = followed()
    state.take(TracedChange(0, EngineState.DEAD, "killed", 105.0))
    assert not state.requests and state.engines[0].state is EngineState.DEAD
    state.take(TraceEnd(200.0, 3))
    assert state.figures()["slo_attainment"] is None and state.dropped == 3, "a minute is forgotten"


def test_orders_of_requests() -> None:
    state = followed()
    assert set(ORDERS) == set(SORTS)
    first = {order: state.ordered(order)[0].trace.number for order in ORDERS}
    assert first == {"age": 1, "tokens": 1, "phase": 1, "slo": 1}
    assert [each.trace.number for each in state.ordered("slo")] == [1, 2]


@pytest.mark.parametrize("width", [20, 40, 79, 80, 92, 120, 200])
def test_view_fits_any_width_and_height(width: int) -> None:
    screen = Console(file=io.StringIO(), width=width, height=16, force_terminal=True, no_color=True)
    screen.print(LiveView(followed(), "http://127.0.0.1:8000", keys=True))
    lines = re.sub(r"\x1b\[[0-9;]*m", "", screen.file.getvalue()).splitlines()  # type: ignore[attr-defined]
    assert len(lines) <= 16 and max(map(len, lines)) <= width
    if width >= 80:
        text = "\n".join(lines)
        assert "missed" in text and "ready" in text and "25 held" in text


def test_long_ids_are_cut_before_other_columns() -> None:
    state = LiveState()
    state.take(TraceBegin("1", "storyteller", 100.0, 0.0, 100, True, (EngineState.READY,)))
    state.take(TracedRecords(0, (RequestTrace(1, f"{7:032x}-0.0", 100.0, 100.1, 4, 8, 0, 0, SloTargets(ttft=9.0)),)))
    screen = Console(file=io.StringIO(), width=92)
    screen.print(LiveView(state, "http://127.0.0.1:8000"))
    head, row = screen.file.getvalue().splitlines()[-2:]  # type: ignore[attr-defined]
    assert head.split()[2:8] == ["AGE", "TOKENS", "SLO", "PROMPT", "TTFT", "PREEMPTED"]
    assert re.search(r" 0/8 +ok +4 +0+…$", row.rstrip())


def command(server: RunningServer, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "splitfuse.cli", "top", "--url", server.url, *arguments]


def test_one_view_is_printed_where_there_is_no_terminal(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands, "ONCE_SECONDS", 0.2)
    commands.top(url=server.url, sort="age", once=False, as_json=False)
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "ENGINE" in printed and "storyteller" in printed
    commands.top(url=server.url, sort="age", once=False, as_json=True)
    assert json.loads(capsys.readouterr().out)["engines"][0]["state"] == "ready"


class Terminal:
    """A terminal with the command in it."""

    def __init__(self, arguments: list[str], *, columns: int, lines: int) -> None:
        self._fd, end = os.openpty()
        self.resize(columns, lines)
        environment = {**os.environ, "TERM": "xterm-256color", "NO_COLOR": "1"}
        self._process = subprocess.Popen(arguments, stdin=end, stdout=end, stderr=end, env=environment)
        os.close(end)
        self.shown = ""

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def press(self, key: str) -> None:
        os.write(self._fd, key.encode())

    def wait_for(self, text: str) -> str:
        """Read until a text is shown, and return what was shown up to there, without codes of terminals."""
        while text not in (plain := re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.shown)):
            assert select.select([self._fd], [], [], PATIENCE)[0], f"{text!r} was not shown, but {plain[-2000:]!r}"
            try:
                self.shown += os.read(self._fd, 65536).decode(errors="replace")
            except OSError:  # Linux says so when the other end is closed
                raise AssertionError(f"ended without {text!r}: {plain[-2000:]!r}") from None
        self.shown = ""
        return plain

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def end(self) -> int:
        """Read all, and return the status of the command."""
        try:
            while piece := os.read(self._fd, 65536):
                self.shown += piece.decode(errors="replace")
        except OSError:
            pass
        os.close(self._fd)
        return self._process.wait(PATIENCE)


def test_keys_in_a_terminal(server: RunningServer) -> None:
    with Terminal(command(server), columns=100, lines=20) as terminal:
        terminal.wait_for("sort: oldest")
        with server.http() as http:
            body: dict[str, Any] = {"prompt": "One day", "max_tokens": 1000, "ignore_eos": True}
            asking = threading.Thread(target=lambda: http.post("/v1/completions", json=body))
            asking.start()
            terminal.wait_for("decode")
            terminal.press("s")
            terminal.wait_for("sort: most tokens")
            terminal.press("p")
            terminal.wait_for("[paused]")
            terminal.press("p")
            asking.join()
        terminal.resize(60, 10)
        terminal.press("s")
        terminal.wait_for("sort: phase")
        assert "PROMPT" not in terminal.wait_for("sort: phase")
        terminal.press("q")
        assert terminal.end() == 0
        assert "\x1b[?1049l" in terminal.shown and "\x1b[?25h" in terminal.shown, "the screen and the cursor are back"
        assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", terminal.shown), "NO_COLOR"
    server.wait_until(lambda: not server.traces.is_watched)
