"""Draws what `splitfuse top` shows. Words and shapes tell everything; colours only stress it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from splitfuse.cli.top_state import LiveEngine, LiveRequest, LiveState
from splitfuse.engine.client import EngineState

LEVELS = "▁▂▃▄▅▆▇█"
"""Characters of a small bar chart, from 0 to 1."""
NARROW, WIDE = 90, 120
"""Numbers of columns below which less is shown, and bars are shorter."""
KEYS = "q quit   p pause   s sort"
WORDS = {"age": "oldest", "tokens": "most tokens", "phase": "phase", "slo": "missed SLO"}
"""Words for the orders of requests."""


class LiveView:
    """Draws a state, into the size that there is."""

    def __init__(
        self, state: LiveState, title: str, *, sort: str = "age", paused: bool = False, keys: bool = False
    ) -> None:
        self._state, self._title, self._sort, self._paused, self._keys = state, title, sort, paused, keys

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the lines; on a screen no more than it has, the last of them with the keys."""
        narrow = options.max_width < NARROW
        ordered = self._state.ordered(self._sort)
        above = Group(self._head(), self._engines(options.max_width), self._figures())
        lines = console.render_lines(above, options.update(height=None), pad=False)
        room = None if not self._keys else max(options.size.height - len(lines) - 3, 0)
        shown = ordered if room is None else ordered[:room]
        lines += console.render_lines(self._requests(shown, narrow), options.update(height=None), pad=False)
        if len(shown) < len(ordered):
            lines += console.render_lines(
                Text(f"and {len(ordered) - len(shown)} more", style="dim"), options, pad=False
            )
        if self._keys:
            lines = lines[: options.size.height - 1]
            keys = f"{KEYS}: {WORDS[self._sort]}"
            lines += console.render_lines(
                Text(keys, style="reverse", no_wrap=True), options.update(height=None), pad=False
            )
        for index, line in enumerate(lines):
            if index:
                yield Segment.line()
            yield from line
        if not self._keys:
            yield Segment.line()

    def _head(self) -> Text:
        state = self._state
        text = Text.assemble((self._title, "bold"), f"  {state.model}", no_wrap=True, overflow="ellipsis")
        for shown, words in (
            (self._paused, "paused"),
            (state.is_draining, "draining"),
            (state.dropped > 0, f"{state.dropped} events missing"),
        ):
            if shown:
                text.append(f"  [{words}]", style="bold yellow")
        return text

    def _engines(self, width: int) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        narrow, bar = width < NARROW, 12 if width < WIDE else 24
        heads = ["ENGINE", "STATE", "RUN", "WAIT", "BUDGET USED", f"KV (of {self._state.num_blocks})"]
        for head in [*heads, *([] if narrow else ["STEP"])]:
            justify: Literal["left", "right"] = "right" if head in ("RUN", "WAIT") else "left"
            table.add_column(head, justify=justify, no_wrap=head != "STEP")  # which is cut first
        for index, engine in enumerate(self._state.engines):
            cells: list[str | Text] = [
                str(index),
                Text(engine.state.value, style="" if engine.state is EngineState.READY else "bold yellow"),
                str(engine.num_running),
                str(engine.num_waiting),
                _budget(engine, bar),
                self._blocks(engine, bar),
            ]
            table.add_row(*cells, *([] if narrow else [Text(_step(engine), no_wrap=True, overflow="ellipsis")]))
        return table

    def _blocks(self, engine: LiveEngine, width: int) -> Text:
        """Draw the KV blocks that are held and cached, of all."""
        held, cached, total = self._state.num_held(engine), engine.num_cached or 0, max(self._state.num_blocks, 1)
        num_held = -(-width * held // total)
        num_cached = min(-(-width * cached // total), width - num_held)
        bar = "█" * num_held + "▒" * num_cached + "·" * (width - num_held - num_cached)
        return Text(f"{bar} {held} held {'?' if engine.num_cached is None else cached} cached")

    def _figures(self) -> Text:
        figures = self._state.figures()
        attainment, goodput = figures["slo_attainment"], figures["goodput"]
        parts = [
            f"{figures['generated_tokens_per_second']:.0f} tokens/s",
            f"{figures['prompt_tokens_per_second']:.0f} prompt tokens/s",
            f"{figures['requests_per_second']:.2f} requests/s",
            "no request with an SLO yet"
            if attainment is None
            else f"SLO met {attainment:.0%}, goodput {goodput:.2f}/s",
            f"TTFT {_times(figures['ttft'])}",
            f"ITL {_times(figures['itl'])}",
        ]
        return Text("\n" + "   ".join(parts) + "\n")

    def _requests(self, requests: Iterable[LiveRequest], narrow: bool) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        heads = ["REQUEST", "PHASE", "AGE", "TOKENS", "SLO"]
        for head in heads if narrow else [*heads, "PROMPT", "TTFT", "PREEMPTED", "ID"]:
            left = head in ("REQUEST", "PHASE", "SLO", "ID")
            justify: Literal["left", "right"] = "left" if left else "right"
            table.add_column(head, justify=justify, no_wrap=head != "ID", overflow="ellipsis")  # the id is cut first
        now = self._state.now
        for request in requests:
            trace, slo = request.trace, request.slo(now)
            cells: list[str | Text] = [
                f"{request.engine}:{trace.number}" if len(self._state.engines) > 1 else str(trace.number),
                "?" if request.phase is None else request.phase.meaning,
                f"{now - trace.sent_time:.1f} s",
                f"{request.num_tokens}/{trace.max_tokens}",
                Text(slo, style="bold yellow" if slo == "missed" else ""),
            ]
            if not narrow:
                ttft = "" if request.ttft is None else _time(request.ttft)
                cells += [str(trace.num_prompt_tokens), ttft, str(request.preemptions or ""), trace.request_id]
            table.add_row(*cells)
        return table


def _budget(engine: LiveEngine, width: int) -> str:
    """Draw how much of their budgets the last steps used."""
    uses = list(engine.budget_use)[-width:]
    if not uses:
        return "no step since"
    chart = "".join(LEVELS[min(int(use * len(LEVELS)), len(LEVELS) - 1)] for use in uses)
    return f"{chart.rjust(width)} {sum(uses) / len(uses):.0%}"


def _step(engine: LiveEngine) -> str:
    if engine.step is None:
        return ""
    step = engine.step
    predicted = f", predicted {_time(step.predicted_seconds)}" if step.predicted_seconds else ""
    return f"{_time(step.end_time - step.start_time)}{predicted}"


def _time(seconds: float) -> str:
    """Return a time, to three figures.

    >>> _time(0.01234), _time(1.234)
    ('12.3 ms', '1.23 s')
    """
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _times(percentiles: dict[str, float] | None) -> str:
    if percentiles is None:
        return "-"
    return " ".join(f"{name.upper()} {_time(value)}" for name, value in percentiles.items())
