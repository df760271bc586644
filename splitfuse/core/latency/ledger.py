"""Where a request's time went, in parts that add up to it.

A request is in exactly one state from one moment to the next, so every second of it belongs to one part, and the sum is
right by construction. In a step that computes a chunk of it, its own share is what the chunk costs of the whole step;
the rest it waited beside others.

It costs little because nothing is added up step by step. The `LatencyLedger` counts, for all requests at once, the
seconds of steps, those between them, and the seconds for each unit of cost; a `RequestLatency` remembers where these
counters stood when its state last changed. A stream that gets its token in every step is not touched until it ends.

The times are the caller's; nothing here reads a clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from splitfuse.core.latency.phases import COMPUTING, LatencyBreakdown, LatencyPhase
from splitfuse.core.slo.targets import SloViolation

NAMED = 3
"""Requests that an account names of those whose prompts it waited beside: those with the most tokens."""
REMEMBERED = 512
"""Runs of prompt chunks, of one request each, that are remembered to name them."""


class RequestLatency:
    """One request's. `planned` is its state in the newest step that was composed."""

    __slots__ = (
        "_at_between",
        "_at_prompt_tokens",
        "_at_shares",
        "_at_steps",
        "_part",
        "_weight",
        "beside",
        "missed",
        "name",
        "num_preemptions",
        "opened",
        "parts",
        "planned",
    )

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.planned = LatencyPhase.JOINING
        self.opened: float = 0
        self.parts: dict[LatencyPhase, float] = {}
        self.beside: dict[str, int] = {}
        self.num_preemptions = 0
        self.missed: SloViolation | None = None
        self._part = LatencyPhase.JOINING
        self._weight: float = 0
        self._at_steps: float = 0
        self._at_between: float = 0
        self._at_shares: float = 0
        self._at_prompt_tokens = 0

    def _add(self, part: LatencyPhase, seconds: float) -> None:
        if seconds:
            self.parts[part] = self.parts.get(part, 0) + seconds


class Transition(NamedTuple):
    """From a pass on, an account is in another state. `weight` is what its chunk costs, in the unit of the whole."""

    account: RequestLatency
    part: LatencyPhase
    weight: float = 0


@dataclass(frozen=True)
class StepTransitions:
    """What a step is for all accounts: who changes state, whose prompts have chunks of how many tokens, and what all
    chunks cost together.
    """

    moves: Sequence[Transition]
    prompts: Sequence[tuple[str, int]]
    whole: float


class LatencyLedger:
    """The counters that all accounts are read from. All times are on one clock and never go back."""

    def __init__(self) -> None:
        self._now: float = 0
        self._steps: float = 0  # seconds in steps
        self._between: float = 0  # seconds in none
        self._shares: float = 0  # seconds of steps for each unit of what they cost
        self._prompt_tokens = 0
        self._prompts: deque[tuple[int, str]] = deque(maxlen=REMEMBERED)  # ends on the line of all prompt tokens, whose
        self._scenes: deque[StepTransitions] = deque()  # of steps in flight; the first one runs
        self._began: float = 0  # the step that runs, or the last one
        self._ended: float = 0

    def open(self, account: RequestLatency, *, sent: float, now: float) -> None:
        """A request that was sent to the engine at `sent` is accepted now."""
        self._advance(now)
        account.opened = sent = min(sent, now)
        joining = max(min(now, now if self._scenes else self._ended) - max(sent, self._began), 0)
        account._add(LatencyPhase.JOINING, joining)
        account._add(LatencyPhase.TO_ENGINE, now - sent - joining)
        self._mark(account)

    def begin(self, scene: StepTransitions, now: float) -> None:
        """A step has been planned. It begins now, or when those in flight have ended."""
        self._advance(now)
        self._scenes.append(scene)
        if len(self._scenes) == 1:
            self._enter(scene)

    def end(self, now: float) -> None:
        """The oldest pass in flight is over."""
        self._advance(now)
        self._scenes.popleft()
        self._ended = now
        if self._scenes:
            self._enter(self._scenes[0])

    def close(self, account: RequestLatency, now: float, ended: float | None = None) -> LatencyBreakdown:
        """The account of a request that ends now; or that nobody has wanted since `ended`, whose last seconds count no
        more.
        """
        self._advance(now)
        closed = now if ended is None else min(max(ended, account.opened), now)
        self._settle(account, unwanted=now - closed)
        largest = sorted(account.beside.items(), key=lambda item: -item[1])[:NAMED]
        return LatencyBreakdown(
            account.opened, closed, account.parts, tuple(largest), account.num_preemptions, account.missed
        )

    def _advance(self, now: float) -> None:
        seconds = max(now - self._now, 0)
        self._now += seconds
        if self._scenes:
            self._steps += seconds
            self._shares += seconds / self._scenes[0].whole
        else:
            self._between += seconds

    def _enter(self, scene: StepTransitions) -> None:
        self._began = self._now
        for account, part, weight in scene.moves:
            self._settle(account)
            account._part, account._weight = part, weight
        for name, count in scene.prompts:
            self._prompt_tokens += count
            if self._prompts and self._prompts[-1][1] == name:
                self._prompts.pop()
            self._prompts.append((self._prompt_tokens, name))

    def _settle(self, account: RequestLatency, unwanted: float = 0) -> None:
        """Charge what has passed since the account was last marked, but for the last seconds of it."""
        between, steps = self._between - account._at_between, self._steps - account._at_steps
        own = steps
        if account._part in COMPUTING:
            own = min(account._weight * (self._shares - account._at_shares), steps)
            self._name_others(account)
        if unwanted and (stretch := between + steps):
            kept = max(1 - unwanted / stretch, 0)
            unwanted = max(unwanted - stretch, 0)
            between, steps, own = between * kept, steps * kept, own * kept
        account._add(LatencyPhase.BETWEEN_STEPS, between)
        account._add(account._part, own)
        account._add(LatencyPhase.CO_SCHEDULED, steps - own)
        if unwanted and (total := sum(account.parts.values())):  # longer than this state: it is all the same to nobody
            for part in account.parts:
                account.parts[part] *= max(1 - unwanted / total, 0)
        self._mark(account)

    def _mark(self, account: RequestLatency) -> None:
        account._at_steps, account._at_between = self._steps, self._between
        account._at_shares, account._at_prompt_tokens = self._shares, self._prompt_tokens

    def _name_others(self, account: RequestLatency) -> None:
        """Add up whose prompts were computed since the account was marked, from the newest back."""
        end = self._prompt_tokens
        for earlier, name in _with_starts(self._prompts):
            if end <= account._at_prompt_tokens:
                break
            if name != account.name:
                count = end - max(earlier, account._at_prompt_tokens)
                account.beside[name] = account.beside.get(name, 0) + count
            end = earlier


def _with_starts(runs: deque[tuple[int, str]]) -> Iterable[tuple[int, str]]:
    """Where each run began, and whose it is, newest first; the start of the oldest is not known any more."""
    newest_first = reversed(runs)
    _, name = next(newest_first, (0, ""))
    for end, before in newest_first:
        yield end, name
        name = before
    yield runs[0][0] if len(runs) == REMEMBERED else 0, name
