"""Measures the time per token with a draft model and without, by how often its guesses are right.

    python -m benchmarks.draft_model --model MODEL (--draft-model DRAFT | --draft-layers N) [--right 0.6 0.8 1] [FLAGS]

MODEL answers questions (benchmarks/speculation.py), one after the other and several at a time in a closed loop, in
turns: without drafts, by prompt lookup, and by prompt lookup and the draft model; the tokens must be equal. The draft
model is another one, or the first N layers of MODEL, whose cost is that of a model so much smaller, and whose guesses
are mostly wrong. With --right guesses take the time that they take, and are then exchanged for ones of which that
fraction is right: so it says how good a draft model of that size must be. With --random prompts are random tokens, and
answers do not end: for a model with random weights. Engine FLAGS as --name=value.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from random import Random
from statistics import median
from typing import Any

from torch import Tensor

import splitfuse
from benchmarks.speculation import CLOCKS, QUESTIONS, Run, run
from splitfuse.core.events import StepRecord
from splitfuse.core.plan import Chunk
from splitfuse.core.speculation.drafting import Drafting
from splitfuse.core.speculation.model_drafts import DraftModel, Guess, Guesses
from splitfuse.kernels.quantized import QuantizedFormat, QuantizedWeight
from splitfuse.models.sources.hub import open_model
from splitfuse.models.sources.source import ModelSource, Piece, WeightSource
from splitfuse.runtime import draft_model
from splitfuse.text.prompts import PreparedRequest

CONFIDENCE = 0.9
"""Confidence of guesses that are exchanged."""


class Exchanged:
    """Takes the time of a draft model, and guesses what is known with a chance of being right."""

    def __init__(self, model: DraftModel, right: float) -> None:
        self.known: dict[str, Sequence[int]] = {}
        """What requests give, by their id."""
        self._model, self._right, self._rng = model, right, Random("right")

    def guess(self, chunks: Sequence[Chunk], drafts: Sequence[Sequence[int]]) -> Guesses:
        """See DraftModel."""
        found, seconds = self._model.guess(chunks, drafts)
        return Guesses([guess and self._exchanged(c) for c, guess in zip(chunks, found, strict=True)], seconds)

    def _exchanged(self, chunk: Chunk) -> Guess:
        known = self.known[chunk.request_id]
        token = known[chunk.end] if chunk.end < len(known) else 0
        return Guess(token if self._rng.random() < self._right else (token + 1) % 1000, CONFIDENCE)


class FirstWeights(WeightSource):
    """Gives the weights of a model to one that has only its first layers."""

    def __init__(self, whole: WeightSource) -> None:
        self._whole = whole

    def __contains__(self, name: str) -> bool:
        return name in self._whole

    def names(self) -> Collection[str]:
        return self._whole.names()

    def check(self, wanted: Collection[Piece], *, architecture: str, aside: Collection[str] = ()) -> None:
        self._whole.check(wanted, architecture=architecture, aside={*aside, *self.names()} - {p.name for p in wanted})

    def read(self, piece: Piece) -> AbstractContextManager[Tensor]:
        return self._whole.read(piece)

    def quantization(self, name: str) -> QuantizedFormat | None:
        return self._whole.quantization(name)

    def read_quantized(self, piece: Piece) -> AbstractContextManager[QuantizedWeight]:
        return self._whole.read_quantized(piece)

    def in_one_order(self, names: Collection[str]) -> bool:
        return self._whole.in_one_order(names)

    def stored_as(self, name: str) -> str:
        return self._whole.stored_as(name)


def open_first_layers(count: int, model: str) -> ModelSource:
    """Open a model as if it had only its first layers."""
    source = open_model(model)
    config, weights = source.config(), source.weights
    source.config = lambda: {**config, "num_hidden_layers": count}  # type: ignore[method-assign]
    source.weights = lambda: FirstWeights(weights())  # type: ignore[method-assign]
    source.name = f"{count} layers of {source.name}"
    return source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--draft-model")
    parser.add_argument("--draft-layers", type=int)
    parser.add_argument("--right", type=float, nargs="*", default=[], help="fractions of guesses that are right")
    parser.add_argument("--most", type=int, default=4, help="num_speculative_tokens")
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=80, help="most tokens of an answer")
    parser.add_argument("--questions", type=int, default=4, help="number of questions for one client")
    parser.add_argument("--kinds", nargs="*", choices=QUESTIONS, default=["free text"])
    parser.add_argument("--temperatures", type=float, nargs="*", default=[0.0, 0.7])
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="processor: seconds of all threads together")
    parser.add_argument("--random", action="store_true")
    arguments, flags = parser.parse_known_args()
    settings: dict[str, Any] = dict(flag.removeprefix("--").replace("-", "_").split("=", 1) for flag in flags)
    settings = {name: int(value) if value.isdigit() else value for name, value in settings.items()}
    draft = arguments.draft_model or arguments.model
    if arguments.draft_layers:
        draft_model.open_model = lambda model, *_, **__: (  # type: ignore[attr-defined]
            open_first_layers(arguments.draft_layers, model)
        )
    pipe = splitfuse.pipeline(
        arguments.model, **{"max_model_len": 1024, **settings}, draft_model=draft, num_speculative_tokens=arguments.most
    )
    both = pipe.engine.scheduler.drafting
    assert both is not None and both.model is not None
    print(pipe.engine.model.plan, settings, "\n", sep="\n")
    print("| clients | answers | right | tokens/step | guesses right | ms/token without | lookup | model | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    for clients in arguments.clients:
        for kind in ["random"] if arguments.random else arguments.kinds:
            requests = prepare(pipe, kind, max(arguments.questions, clients * 2), arguments)
            for right in arguments.right or [None]:
                compare(pipe, both, kind, requests, clients, right, arguments)


def prepare(pipe: splitfuse.Pipeline, kind: str, count: int, arguments: argparse.Namespace) -> list[PreparedRequest]:
    """Return the requests of one kind."""
    temperatures, rng = arguments.temperatures, Random(kind)
    if kind == "random":
        most = min(pipe.engine.model.spec.vocab_size, 30000)
        prompts: list[Any] = [[rng.randrange(1000, most) for _ in range(64)] for _ in range(count)]
    else:
        prompts = [QUESTIONS[kind][number % len(QUESTIONS[kind])] for number in range(count)]
    return [
        request
        for number, prompt in enumerate(prompts)
        for request in pipe.prepare(
            [prompt] if kind == "random" else prompt,
            chat=kind != "random",
            ignore_eos=kind == "random",
            max_new_tokens=arguments.tokens,
            temperature=temperatures[number % len(temperatures)],
            seed=number,
        )
    ]


def compare(
    pipe: splitfuse.Pipeline,
    both: Drafting,
    kind: str,
    requests: list[PreparedRequest],
    clients: int,
    right: float | None,
    arguments: argparse.Namespace,
) -> None:
    """Print a row: the same requests without drafts, by prompt lookup, and with the draft model too."""
    assert both.model is not None
    turns, clock = arguments.turns, CLOCKS[arguments.clock]
    engine, lookup, own = pipe.engine, Drafting(both.most), both.model._model
    unsubscribe = engine.events.subscribe(StepRecord, lookup.observe)
    engine.scheduler.drafting = None
    first = run(pipe, requests, clients)  # the prompts are in the prefix cache then
    if right is not None:
        exchanged = Exchanged(own, right)
        exchanged.known = {
            str(number): (*request.token_ids, *tokens)
            for number, (request, tokens) in enumerate(zip(requests, first.tokens, strict=True))
        }
        both.model._model = exchanged
    runs: dict[Drafting | None, list[Run]] = {None: [], lookup: [], both: []}
    before = both.model.seconds
    for _ in range(turns):
        for engine.scheduler.drafting, some in runs.items():
            some.append(run(pipe, requests, clients, clock))
    both.model._model = own
    unsubscribe()
    by_lookup, by_model = runs[lookup], runs[both]
    assert all(each.tokens == first.tokens for some in runs.values() for each in some), "the answers differ"
    without, looked_up, drafted = (median(each.token_seconds for each in some) * 1e3 for some in runs.values())
    ratio = median(a.token_seconds / b.token_seconds for a, b in zip(by_lookup, by_model, strict=True))
    last = by_model[-1]
    guessed = f"{last.num_accepted / last.num_drafted:.0%} of {last.num_drafted}" if last.num_drafted else "none"
    share = (both.model.seconds - before) / max(turns, 1)
    print(
        f"| {clients} | {kind} | {'its own' if right is None else right} | {last.num_decodes / last.num_steps:.2f} | "
        f"{guessed}, in {share:.1f} s | {without:.2f} | {looked_up:.2f} | {drafted:.2f} | {ratio:.2f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
