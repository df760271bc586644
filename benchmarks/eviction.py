"""Compare orders of eviction for conversations: `python -m benchmarks.eviction`. Results: results/eviction.md.

Pensieve (Yu et al., EuroSys 2025) forgets the chunk with the least recompute cost per time since its last use, and so
the leading tokens of a conversation first: the hole is computed again, beside what is still cached. This counts, for a
store of KV blocks alone, the seconds of prompts that each order leaves to compute. What is cached costs nothing here,
and no step is simulated: so the differences are upper bounds of what a server could gain.

    LRU                  least recently used first; of a conversation its end. What the prefix cache and the tiers do
    worth                least recompute cost per idle time, of the ends of conversations: needs no hole
    island, LRU          least recently used first; of a conversation its beginning
    island, worth        Pensieve
    foreseen             farthest next use first, of a conversation its end; and its beginning: no server can know
"""

from __future__ import annotations

import argparse
import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from random import Random

import numpy as np
import numpy.typing as npt

from benchmarks.papers.data import turns_of_conversations
from benchmarks.papers.tables import Table
from splitfuse.core.slo.cost_model import CostModel
from splitfuse.simulator.machines import MACHINES

BLOCK_SIZE = 32
WARM_UP = 0.25
"""Fraction of the conversations, the first ones, whose turns do not count."""
SECONDS_PER_TOKEN = 0.03
"""Time of a token of an answer, while the blocks of the conversation are held."""

Turns = tuple[tuple[int, int], ...]
"""New tokens of a prompt and tokens of its answer, turn by turn."""


def sharegpt(random: Random) -> Turns:
    """Return the turns of a conversation of ShareGPT."""
    return random.choice(turns_of_conversations())


def short(random: Random) -> Turns:
    """Return six short turns."""
    return tuple((max(1, round(random.gauss(100, 30))), max(1, round(random.gauss(100, 30)))) for _ in range(6))


def documents(random: Random) -> Turns:
    """Return questions on a document of 8,000 to 32,000 tokens."""
    rest = tuple((random.randrange(20, 200), random.randrange(50, 400)) for _ in range(random.randrange(2, 8)))
    return ((random.randrange(8_000, 32_000), 300), *rest)


def agents(random: Random) -> Turns:
    """Return the steps of an agent: long results of tools, short calls, contexts of up to 60,000 tokens."""
    return tuple((random.randrange(200, 4000), random.randrange(30, 300)) for _ in range(random.randrange(5, 30)))


WORKLOADS: dict[str, tuple[Callable[[Random], Turns], float]] = {
    "ShareGPT": (sharegpt, 60.0),
    "ShareGPT, think 10 s": (sharegpt, 10.0),
    "ShareGPT, think 300 s": (sharegpt, 300.0),
    "short turns": (short, 60.0),
    "documents": (documents, 60.0),
    "agents": (agents, 10.0),
}
"""Conversations, and the mean time between turns."""
ATTENTION = 0.68 * 2 * 103e9
"""Operations/s of attention on two cores of Zen 3: chunks reach 67 to 70 % of dot products in bf16, 103e9 a core
(results/cpu-kernels.md).
"""


def on_cpu(name: str, *, layers: int, heads: int, head_dim: int) -> CostModel:
    """Return the cost model of two cores, with the time of attention."""
    return replace(MACHINES[name].cost, per_pair=4 * layers * heads * head_dim / ATTENTION)


MODELS = {
    "OPT-13B, A100": MACHINES["opt-13b"].cost,
    "Llama-2 70B, 4 A100": MACHINES["a100-70b"].cost,
    "Llama-2 70B, 8 H100": MACHINES["splitwise-h100"].cost,
    "0.5B int8, 2 cores": on_cpu("0.5b-int8-avx2", layers=24, heads=14, head_dim=64),
    "7B int8, 2 cores": on_cpu("7b-int8-avx2", layers=32, heads=32, head_dim=128),
}
"""Cost models. At position 30,000 a token takes 5.2, 1.9, 2.0, 6.4 and 2.8 times as long as the first."""
SIZES = (0.25, 0.5, 0.75)
"""Sizes of the store, as fractions of what conversations that go on hold on average."""


@dataclass(frozen=True)
class Order:
    """Is an order of eviction: which idle conversation loses a block, that with the least score, and at which end."""

    name: str
    is_island: bool
    """True if a conversation loses its beginning first."""
    by: str


ORDERS = (
    Order("LRU", is_island=False, by="use"),
    Order("worth", is_island=False, by="worth"),
    Order("island, LRU", is_island=True, by="use"),
    Order("island, worth", is_island=True, by="worth"),
    Order("foreseen", is_island=False, by="next"),
    Order("island, foreseen", is_island=True, by="next"),
)


def block_seconds(cost: CostModel, most: int) -> npt.NDArray[np.float64]:
    """Return how much longer a full step takes for each block of a prompt, by the place of the block."""
    places = np.arange(most)
    pairs = BLOCK_SIZE * (BLOCK_SIZE * places) + BLOCK_SIZE * (BLOCK_SIZE + 1) / 2
    per_token = cost.per_token + cost.per_token_beyond
    seconds: npt.NDArray[np.float64] = BLOCK_SIZE * per_token + cost.per_pair * pairs
    return seconds


@dataclass
class Event:
    """Is the coming of a turn, or the end of its answer."""

    time: float
    conversation: int
    turn: int
    ends: bool

    def __lt__(self, other: Event) -> bool:
        return (self.time, self.conversation, self.ends) < (other.time, other.conversation, other.ends)


@dataclass
class Load:
    """Holds the conversations of a load: when each begins, its turns, and the pauses before them."""

    begins: list[float]
    turns: list[Turns]
    pauses: list[list[float]]

    @classmethod
    def draw(cls, make: Callable[[Random], Turns], think: float, *, count: int, live: int, seed: int) -> Load:
        """Return `count` conversations of which about `live` go on at a time."""
        random = Random(seed)
        turns = [make(random) for _ in range(count)]
        pauses = [[0.0, *(random.expovariate(1 / think) for _ in each[1:])] for each in turns]
        lengths = [
            sum(between) + SECONDS_PER_TOKEN * sum(answer for _, answer in each)
            for between, each in zip(pauses, turns, strict=True)
        ]
        rate, time, begins = live * count / sum(lengths), 0.0, []
        for _ in range(count):
            time += random.expovariate(rate)
            begins.append(time)
        return cls(begins, turns, pauses)

    def events(self) -> Iterator[Event]:
        """Yield the events in their order."""
        queue = [Event(at, number, 0, ends=False) for number, at in enumerate(self.begins)]
        heapq.heapify(queue)
        while queue:
            event = heapq.heappop(queue)
            yield event
            turns = self.turns[event.conversation]
            if not event.ends:
                at = event.time + SECONDS_PER_TOKEN * turns[event.turn][1]
                heapq.heappush(queue, Event(at, event.conversation, event.turn, ends=True))
            elif event.turn + 1 < len(turns):
                at = event.time + self.pauses[event.conversation][event.turn + 1]
                heapq.heappush(queue, Event(at, event.conversation, event.turn + 1, ends=False))

    @property
    def held(self) -> float:
        """Return how many blocks conversations that go on hold on average, if nothing is forgotten."""
        area = end = 0.0
        for begin, turns, pauses in zip(self.begins, self.turns, self.pauses, strict=True):
            time, tokens = begin, 0
            for pause, (new, answer) in zip(pauses, turns, strict=True):
                area += pause * tokens
                tokens += new + answer
                area += SECONDS_PER_TOKEN * answer * tokens
                time += pause + SECONDS_PER_TOKEN * answer
            end = max(end, time)
        return area / end / BLOCK_SIZE


@dataclass
class Count:
    """Counts what was computed of prompts, and what could have been cached."""

    seconds: float = 0.0
    again: int = 0
    """Blocks that had been computed before."""
    seconds_new: float = 0.0
    history: int = field(default=0)
    """Blocks of all histories."""


def replay(load: Load, order: Order, cost: CostModel, capacity: int, *, counted_from: int) -> Count:
    """Return what is computed with a store of `capacity` blocks, of the conversations from `counted_from` on."""
    longest = max(sum(new + answer for new, answer in turns) for turns in load.turns) // BLOCK_SIZE + 2
    seconds = block_seconds(cost, longest)
    until = np.concatenate([[0.0], np.cumsum(seconds)])  # seconds of the blocks before a place
    rows = len(load.turns)
    first, last = np.zeros(rows, np.int64), np.zeros(rows, np.int64)  # of the blocks that are there, and behind them
    used, coming = np.zeros(rows), np.full(rows, math.inf)
    idle: list[int] = []
    known = [0] * rows  # tokens so far
    stored, count = 0, Count()

    def evict(now: float, wanted: int) -> None:
        """Forget blocks of idle conversations until `wanted` fit."""
        nonlocal stored
        while stored + wanted > capacity and idle:
            among = np.array(idle)
            if order.by == "use":
                scores = used[among]
            elif order.by == "next":
                scores = -coming[among]
            else:
                at = first[among] if order.is_island else last[among] - 1
                scores = seconds[at] / np.maximum(now - used[among], 1e-9)
            best = np.argpartition(scores, 1)[:2] if len(idle) > 1 else np.array([0])
            best = best[np.argsort(scores[best])]
            number = idle[int(best[0])]
            lost = min(int(last[number] - first[number]), stored + wanted - capacity)
            if order.by == "worth" and order.is_island and len(best) > 1:  # while it is the least
                highest = scores[best[1]] * max(now - used[number], 1e-9)
                until_there = int(np.searchsorted(seconds, highest, side="right"))
                lost = min(lost, max(until_there - int(first[number]), 1))
            if order.is_island:
                first[number] += lost
            else:
                last[number] -= lost
            stored -= lost
            if first[number] == last[number]:
                idle.remove(number)

    for event in load.events():
        number, turns, now = event.conversation, load.turns[event.conversation], event.time
        new, answer = turns[event.turn]
        if event.ends:
            used[number] = now
            goes_on = event.turn + 1 < len(turns)
            coming[number] = now + load.pauses[number][event.turn + 1] if goes_on else math.inf
            if last[number] > first[number]:
                idle.append(number)
            continue
        if number in idle:
            idle.remove(number)
        history, known[number] = known[number] // BLOCK_SIZE, known[number] + new
        prompt = known[number] / BLOCK_SIZE
        begin, end = int(first[number]), int(last[number])
        if number >= counted_from:
            whole = int(prompt)
            count.seconds += until[begin] + until[whole] - until[end] + (prompt - whole) * seconds[whole]
            count.seconds_new += until[whole] - until[history] + (prompt - whole) * seconds[whole]
            count.again += begin + history - end
            count.history += history
        known[number] += answer
        total = known[number] // BLOCK_SIZE
        evict(now, begin + total - end)
        stored += begin + total - end
        first[number], last[number] = 0, total
    return count


def run(models: Sequence[str], workloads: Sequence[str], sizes: Sequence[float], *, count: int, live: int) -> Table:
    """Replay all loads in all orders and return the table."""
    table = Table(
        "Seconds of prompts to compute, to those with LRU",
        ("workload", "model", "store", "computed again with LRU", *(order.name for order in ORDERS[1:]), "all cached"),
    )
    for name in workloads:
        make, think = WORKLOADS[name]
        load = Load.draw(make, think, count=count, live=live, seed=0)
        held = load.held
        for model in models:
            for size in sizes:
                first, capacity = int(WARM_UP * len(load.turns)), int(size * held)
                found = [replay(load, order, MODELS[model], capacity, counted_from=first) for order in ORDERS]
                lru = found[0]
                row = [f"{each.seconds / lru.seconds:.3f}" for each in (*found[1:], Count(seconds=lru.seconds_new))]
                table.add(name, model, f"{size:g}", f"{lru.again / max(lru.history, 1):.0%} of history", *row)
                print(table.rows[-1], flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=";".join(MODELS), help="separated by semicolons")
    parser.add_argument("--workloads", default=";".join(WORKLOADS), help="separated by semicolons")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="of the store")
    parser.add_argument("--conversations", type=int, default=1500)
    parser.add_argument("--live", type=int, default=150, help="conversations that go on at a time")
    arguments = parser.parse_args()
    sizes = [float(each) for each in arguments.sizes.split(",")]
    names = arguments.models.split(";"), arguments.workloads.split(";")
    print(run(*names, sizes, count=arguments.conversations, live=arguments.live))


if __name__ == "__main__":
    main()
