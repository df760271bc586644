"""The console's page in a browser: pause, follow, keys, themes, chat, and that its memory does not grow."""

import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs
from running_server import RunningServer, running_server

from splitfuse.config.server import ServerConfig
from splitfuse.core.latency.phases import LatencyBreakdown, LatencyPhase
from splitfuse.core.request_output import FinishReason
from splitfuse.core.slo.targets import SloTargets, SloViolation
from splitfuse.engine.trace import BlockMap, ChunkTrace, FinishTrace, PhaseTrace, RequestTrace, StepTrace, TraceRecord
from splitfuse.server.access_log import RequestRecord
from splitfuse.server.traces import EngineRecords, RequestEnd, TraceEvent

pytestmark = pytest.mark.extras


@pytest.fixture(scope="module")
def console() -> Iterator[RunningServer]:
    with running_server(ServerConfig(console=True)) as server:
        yield server


@pytest.fixture
def page(browser: Any, console: RunningServer) -> Iterator[Any]:
    """The open page; whatever a test does must leave no error in the browser's console."""
    errors: list[str] = []
    opened = browser.new_page(viewport={"width": 1440, "height": 1000}, color_scheme="light")
    opened.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("request", lambda request: errors.append(request.url) if console.url not in request.url else None)
    opened.goto(f"{console.url}/console")
    opened.wait_for_selector("#engines li[data-state=ready]")
    yield opened
    opened.close()
    assert errors == []


class Story:
    """Tells of made-up requests, as an engine would. Its clock runs ahead as the test wants."""

    def __init__(self, server: RunningServer) -> None:
        self.server = server
        self.now = time.monotonic()
        self.number = 1_000_000 + int(self.now * 100)  # no other story's

    def publish(self, *events: TraceEvent) -> None:
        async def publish() -> None:
            for event in events:
                self.server.traces.publish(event)

        self.server.call(publish())

    def request(self, slo_met: bool | None) -> tuple[list[TraceRecord], RequestEnd]:
        """A request that waits half a second, is prefilled in two steps and decoded in six, with its end."""
        number, self.number = self.number, self.number + 1
        unique, began = f"{number:032x}", self.now
        targets = None if slo_met is None else SloTargets(ttft=0.25, itl=0.1, itl_percentile=99.5, tpot=0.06)
        records: list[TraceRecord] = [
            RequestTrace(number, f"{unique}-0.0", began, began, 96, 16, 0, 0, targets),
            PhaseTrace(began + 0.01, ((number, LatencyPhase.NO_BUDGET),)),
            PhaseTrace(began + 0.5, ((number, LatencyPhase.PREFILL),)),
        ]
        for step in range(8):
            start = began + 0.5 + 0.05 * step
            chunk = ChunkTrace(number, 94 + step, 1, (7,))
            if step < 2:
                chunk = ChunkTrace(number, 48 * step, 48, (7,) * step)
            records.append(StepTrace(step, 64, start, start + 0.05, 0.04, 1, 2, 30, 10, (chunk,)))
            if step == 1:
                records.append(PhaseTrace(start + 0.05, ((number, LatencyPhase.DECODE),)))
        self.now = began + 1.0
        records.append(FinishTrace(number, began + 0.9, FinishReason.LENGTH, 7, slo_met, None))
        records.append(BlockMap(began + 0.9, 1, bytes([0, 1, 2, 3] * 64)))
        phases = {LatencyPhase.NO_BUDGET: 0.5, LatencyPhase.PREFILL: 0.1, LatencyPhase.DECODE: 0.3}
        violation = SloViolation(ttft=0.6, ttft_target=0.25) if slo_met is False else None
        record = RequestRecord(
            request_id=unique, route="/v1/completions", status=200, total_seconds=0.9, prompt_tokens=96,
            generated_tokens=7, finish_reasons={"length": 1}, time_to_first_token_seconds=0.6, slo_met=slo_met,
            inter_token_latency_seconds=(0.05,) * 6,
        )  # fmt: skip
        breakdown = LatencyBreakdown(began, began + 0.9, phases, slo_violation=violation)
        return records, RequestEnd(unique, record, breakdown, began + 0.9)

    def tell(self, slo_met: bool | None = None) -> None:
        records, end = self.request(slo_met)
        self.publish(EngineRecords(0, tuple(records)), end)


def picture(page: Any, canvas: str = "steps") -> str:
    found: str = page.evaluate(f"document.getElementById('{canvas}').toDataURL()")
    return found


def wait_for_text(page: Any, selector: str, text: str) -> None:
    page.wait_for_function("([s, t]) => document.querySelector(s)?.textContent.includes(t)", arg=[selector, text])


def test_page_says_which_request_missed_its_slo_and_why(page: Any, console: RunningServer) -> None:
    story = Story(console)
    story.tell(slo_met=True)
    story.tell(slo_met=False)
    wait_for_text(page, "#requests", "SLO missed")
    why = page.text_content("#requests")
    assert "first token after 0.6 s (target 0.25 s)" in why and "Mostly queued: steps were full (56%)" in why
    page.keyboard.press("m")
    page.wait_for_selector("#detail:not([hidden])")
    detail = page.text_content("#detail")
    assert "queued: steps were full" in detail and "600 ms (SLO 250 ms)" in detail and "Where its 900 ms went" in detail
    assert "50 ms median, 50 ms longest (SLO 100 ms for 99.5 %, 60 ms in the mean)" in detail
    assert re.search(r"The token budget until its first token.*2 steps in 600 ms.*75 % its own prompt", detail)
    page.keyboard.press("Escape")
    page.wait_for_selector("#detail[hidden]", state="attached")
    page.click("[data-list=ended]")
    wait_for_text(page, "#requests", "SLO met")
    page.click("#requests li:first-child button")
    page.wait_for_selector("#detail:not([hidden])")


def test_requests_are_found_by_letters_and_by_ids(page: Any, console: RunningServer) -> None:
    story = Story(console)
    story.tell(slo_met=False)
    story.tell(slo_met=True)
    page.keyboard.press("/")
    page.keyboard.type(f"cmpl-{story.number - 1:032x}")
    page.wait_for_function("() => document.querySelectorAll('#requests button').length === 1")
    assert "SLO met" in page.text_content("#requests")
    letters = page.text_content("#requests .name")
    page.fill("#find", letters.lower())
    page.wait_for_function("() => document.querySelectorAll('#requests button').length === 1")
    page.fill("#find", "no such id")
    wait_for_text(page, "#requests", "No request of the last minutes has these letters")
    page.fill("#find", "")
    wait_for_text(page, "#requests", "SLO missed")


def test_mixed_targets_are_shown_as_a_range(page: Any, console: RunningServer) -> None:
    Story(console).tell(slo_met=True)
    wait_for_text(page, "#figures", "SLO 250 ms")
    story = Story(console)
    records, end = story.request(slo_met=True)
    records[0] = structs.replace(records[0], targets=SloTargets(ttft=0.1), arrival_time=story.now - 1.5)
    story.publish(EngineRecords(0, tuple(records)), end)
    wait_for_text(page, "#figures", "SLO 100 ms to 250 ms")
    page.fill("#find", f"{story.number - 1:032x}")
    page.click("#requests button")
    wait_for_text(page, "#detail", "(SLO 100 ms)")
    assert "first token1.10 s" in page.text_content("#detail")  # from when the front began to read it


def test_pause_holds_the_picture_and_end_goes_on(page: Any, console: RunningServer) -> None:
    story = Story(console)
    story.tell()
    page.wait_for_timeout(700)
    page.keyboard.press("Space")
    assert page.get_attribute("#pause", "aria-pressed") == "true"
    page.wait_for_timeout(300)
    held = picture(page)
    story.now += 10  # behind what is held
    for _ in range(3):
        story.tell()
        page.wait_for_timeout(200)
    assert picture(page) == held
    page.keyboard.press("ArrowLeft")
    page.wait_for_timeout(300)
    assert picture(page) != held
    page.keyboard.press("End")
    assert page.get_attribute("#pause", "aria-pressed") == "false"
    page.wait_for_timeout(300)
    assert picture(page) != held


def test_keys_follow_requests_and_zoom(page: Any, console: RunningServer) -> None:
    story = Story(console)
    for _ in range(3):
        story.tell()
    page.wait_for_timeout(700)
    page.keyboard.press("ArrowDown")
    page.wait_for_selector("#detail:not([hidden])")
    first = page.text_content("#detail .mono")
    page.keyboard.press("ArrowDown")
    page.wait_for_function("(t) => document.querySelector('#detail .mono').textContent !== t", arg=first)
    page.keyboard.press("ArrowUp")
    page.wait_for_function("(t) => document.querySelector('#detail .mono').textContent === t", arg=first)
    before = picture(page, "axis")
    page.keyboard.press("-")
    page.wait_for_timeout(300)
    assert picture(page, "axis") != before
    page.keyboard.press("?")
    assert page.is_visible("#keys")
    page.keyboard.press("Escape")
    page.focus("#prompt")
    page.keyboard.press("Space")
    assert page.get_attribute("#pause", "aria-pressed") == "false", "keys write where there is text"


def test_pointing_shows_what_a_request_and_a_step_are(page: Any, console: RunningServer) -> None:
    Story(console).tell(slo_met=False)
    wait_for_text(page, "#requests", "SLO missed")
    page.keyboard.press("m")  # the request fills the view
    page.wait_for_timeout(600)
    box = page.locator("#steps").bounding_box()
    wanted, shown = {"Step", "predicted 40 ms", "48 tokens of its 96 prompt tokens", "1 decode"}, set()
    for part in range(20, 90, 2):
        page.mouse.move(box["x"] + box["width"] * part / 100, box["y"] + box["height"] - 8)
        if page.is_visible("#tip"):
            shown |= {words for words in wanted if words in page.text_content("#tip")}
    assert shown == wanted


def test_dark_and_light(browser: Any, page: Any, console: RunningServer) -> None:
    def background(of: Any) -> str:
        colour: str = of.evaluate("getComputedStyle(document.body).backgroundColor")
        return colour

    light = background(page)
    page.keyboard.press("d")
    assert page.get_attribute("html", "data-theme") == "dark" and background(page) != light
    page.reload()
    assert page.get_attribute("html", "data-theme") == "dark", "the choice is kept"
    page.click("#theme")
    assert background(page) == light
    other = browser.new_page(color_scheme="dark")
    other.goto(f"{console.url}/console")
    assert other.get_attribute("html", "data-theme") == "dark"
    other.close()


@pytest.mark.parametrize("width", [320, 390, 768, 1440])
def test_nothing_is_wider_than_the_page(page: Any, console: RunningServer, width: int) -> None:
    Story(console).tell(slo_met=False)
    page.set_viewport_size({"width": width, "height": 800})
    page.wait_for_timeout(700)
    page.keyboard.press("m")
    page.wait_for_timeout(700)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_message_is_answered_and_its_cost_shown(page: Any) -> None:
    page.click("#send")
    wait_for_text(page, "#answer", "Anna keeps a goose.")
    wait_for_text(page, "#cost", "Where its")
    cost = page.text_content("#cost")
    assert "prompt tokens in 1 chunk" in cost and "checking and tokenizing" in cost and "decode" in cost


def test_page_asks_for_an_administrators_key(browser: Any, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("boß admin=yes\nclerk\n", "utf-8")
    keys.chmod(0o600)
    with running_server(ServerConfig(console=True, api_key_file=str(keys))) as server:
        page = browser.new_page()
        page.goto(f"{server.url}/console")
        page.wait_for_selector("#key-form:not([hidden])")
        for key, message in (("unknown", "not valid"), ("“boß”", "not valid"), ("clerk", "administrator")):
            page.fill("#key", key)
            page.keyboard.press("Enter")
            wait_for_text(page, "#notice", message)
            page.wait_for_selector("#key-form:not([hidden])")
        page.fill("#key", "boß\x01")
        page.keyboard.press("Enter")
        page.wait_for_selector("#engines li[data-state=ready]")
        page.click("#send")
        wait_for_text(page, "#answer", "Anna keeps a goose.")
        assert page.url == f"{server.url}/console"
        page.reload()
        page.wait_for_selector("#engines li[data-state=ready]")  # the tab keeps the key
        page.close()


def test_memory_does_not_grow(page: Any, console: RunningServer) -> None:
    """Twenty minutes in a few seconds: what is older than five is forgotten."""
    session = page.context.new_cdp_session(page)
    story = Story(console)

    def heap() -> float:
        page.wait_for_timeout(600)
        session.send("HeapProfiler.collectGarbage")
        used: float = session.send("Runtime.getHeapUsage")["usedSize"]
        return used / 2**20

    def minutes(count: int) -> None:
        for _ in range(6 * count):
            batch = [story.request(slo_met=False) for _ in range(10)]
            story.publish(*(event for records, end in batch for event in (EngineRecords(0, tuple(records)), end)))
            page.wait_for_timeout(40)

    minutes(6)
    half = heap()
    nodes = session.send("Memory.getDOMCounters")["nodes"]
    minutes(14)
    full = heap()
    print(f"{half:.2f} MiB after 6 minutes, {full:.2f} after 20")
    assert full < 1.15 * half + 0.5
    assert session.send("Memory.getDOMCounters")["nodes"] < 1.5 * nodes + 200


def test_a_choice_that_is_forgotten_takes_no_other_with_it(page: Any, console: RunningServer) -> None:
    story = Story(console)
    story.now += 3600  # after those of the other tests
    records, end = story.request(slo_met=False)
    number, story.number = story.number, story.number + 1
    other = RequestTrace(number, f"{end.unique_id}-1.0", story.now, story.now, 96, 16, 1, 0, SloTargets(ttft=0.25))
    story.publish(EngineRecords(0, (*records, other)))
    wait_for_text(page, "[data-list=missed]", "Missed SLO 1")
    story.now += 400
    story.tell()  # more than five minutes later
    wait_for_text(page, "[data-list=missed]", "Missed SLO 0")
    finish = FinishTrace(number, story.now, FinishReason.LENGTH, 7, False, None)
    assert end.breakdown is not None
    late = replace(end.breakdown, slo_violation=SloViolation(ttft=123.0, ttft_target=0.25))
    story.publish(EngineRecords(0, (finish,)), end._replace(breakdown=late, ended=story.now))
    wait_for_text(page, "#requests", "first token after 123 s")
