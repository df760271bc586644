"""The workload of every engine, and the loop of a driver. Standard library only: it runs in other environments.

A driver is a process with one loaded model. It reads one order a line, `{"workload": "crowd", "round": 3}`, and answers
each with one line of figures; what its engine prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

VOCAB_SIZE = 32_000
FIRST_TOKEN = 3  # those before it are special
SECONDS = "seconds"
FIRST_SECONDS = "first_token_seconds"
MS_PER_TOKEN = "ms_per_token"
"""Milliseconds per token after the first."""

Tokens: TypeAlias = list[int]
Figures: TypeAlias = dict[str, float]


@dataclass(frozen=True)
class Workload:
    """Prompts of random token ids, sent together; greedy, without EOS token."""

    name: str
    num_prompts: int
    prompt_tokens: int
    output_tokens: int

    @property
    def headline(self) -> str:
        """Figure by which engines are compared: total time of many prompts, time per token of one."""
        return SECONDS if self.num_prompts > 1 else MS_PER_TOKEN

    @property
    def num_output_tokens(self) -> int:
        """Number of output tokens of all prompts together."""
        return self.num_prompts * self.output_tokens

    def prompts(self, round_number: int) -> list[Tokens]:
        """Return prompts that are equal for every engine, and differ between rounds, so that no cache helps."""
        rng = random.Random(f"{self.name} {round_number}")
        return [
            [rng.randrange(FIRST_TOKEN, VOCAB_SIZE) for _ in range(self.prompt_tokens)] for _ in range(self.num_prompts)
        ]


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("crowd", 32, 512, 64),
        Workload("alone", 1, 512, 64),
        Workload("alone-short", 1, 16, 128),
    )
}

Run: TypeAlias = Callable[[Workload, int], Figures]
"""Runs a workload in a round."""


def figures(workload: Workload, *, seconds: float, first_token_seconds: float | None, num_tokens: int) -> Figures:
    """Return the figures of one run; a lone prompt needs `first_token_seconds`.

    Raises RuntimeError if not every token asked for was generated.
    """
    if num_tokens != workload.num_output_tokens:
        raise RuntimeError(f"{workload.name}: {num_tokens} tokens were generated, not {workload.num_output_tokens}")
    if workload.num_prompts > 1 or first_token_seconds is None:
        return {SECONDS: seconds}
    pace = 1e3 * (seconds - first_token_seconds) / (workload.output_tokens - 1)
    return {SECONDS: seconds, FIRST_SECONDS: first_token_seconds, MS_PER_TOKEN: pace}


def take_orders(load: Callable[[Mapping[str, Any]], tuple[Run, Mapping[str, Any]]]) -> None:
    """Run a driver: load the model of the arguments, then run the workloads that standard input names.

    The one argument is a JSON object, which `load` gets; it returns what runs a workload, and facts to report.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever an engine or its children print is no answer
    run, facts = load(json.loads(sys.argv[1]))
    answers.write(json.dumps(dict(facts)) + "\n")
    for line in sys.stdin:
        order = json.loads(line)
        answers.write(json.dumps(run(WORKLOADS[order["workload"]], order["round"])) + "\n")
