"""Compare the token budget that an engine chooses for itself with fixed ones: saturated throughput and ITL.

    python -m benchmarks.step_budget --model DIR [--quantization int8] [--budgets 64,128,256] [--turns 2] [--seconds 12]

Closed loops of clients without SLOs on the engine itself, in turns, on one model that is loaded once; the choice is
`auto`. Prompts and answers are Normal; the first request of each client is a part of one, so that they do not begin
together. Prints the budgets that auto had, and for each budget the tokens computed per second and the gaps between
tokens.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from random import Random
from statistics import mean, median

from splitfuse.config.engine import EngineConfig
from splitfuse.core.events import StepRecord
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.engine.engine import Engine
from splitfuse.runtime.loading import LoadedModel, load_model
from splitfuse.runtime.step_estimate import estimate_cost


@dataclass
class Figures:
    """What the turns of one budget gave."""

    tokens_per_second: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    budgets: list[int] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or name (default: the bundled model)")
    parser.add_argument("--quantization")
    parser.add_argument("--budgets", default="64,128,256,512,1024,2048")
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--prompt", type=float, default=256)
    parser.add_argument("--generate", type=float, default=32)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--first", type=int, help="budget that auto begins with (default: the estimate)")
    parser.add_argument("--seconds", type=float, default=12.0, help="of each run, and a quarter before to warm up")
    arguments = parser.parse_args()
    settings = {"model": arguments.model, "quantization": arguments.quantization, "enable_prefix_caching": False}
    config = EngineConfig.from_settings(settings)
    model = load_model(config)
    began = time.perf_counter()
    estimate = estimate_cost(model)
    print(f"estimate, {1e3 * (time.perf_counter() - began):.0f} ms: {estimate}", flush=True)
    choices = [None, *(int(budget) for budget in arguments.budgets.split(","))]
    figures = {budget: Figures() for budget in choices}
    engines = {
        budget: Engine(
            EngineConfig.from_settings({**settings, "max_num_batched_tokens": budget}),
            model,
        )
        for budget in choices
    }
    engines[None].estimate_budget()
    if arguments.first is not None:
        engines[None].scheduler.budget.tokens = arguments.first
    for turn in range(arguments.turns):
        for budget in choices if turn % 2 == 0 else choices[::-1]:
            run(engines[budget], model, arguments, Random(turn), figures[budget])
            name = "auto" if budget is None else budget
            rate = figures[budget].tokens_per_second[-1]
            print(f"turn {turn}, {name}: {rate:.0f} tokens/s, budgets {figures[budget].budgets}", flush=True)
    print("\n| budget | tokens/s | of the best | ITL mean | P50 | P95 | P99, ms |\n|---|---|---|---|---|---|---|")
    best = max(mean(each.tokens_per_second) for each in figures.values())
    for budget, each in figures.items():
        rate, gaps = mean(each.tokens_per_second), sorted(each.gaps)
        cells = [mean(gaps), median(gaps), *(gaps[int(share * len(gaps))] for share in (0.95, 0.99))]
        name = f"auto ({each.budgets[-1]})" if budget is None else str(budget)
        itl = " | ".join(f"{1e3 * cell:.0f}" for cell in cells)
        print(f"| {name} | {rate:.0f} | {rate / best:.3f} | {itl} |")


def run(engine: Engine, model: LoadedModel, arguments: argparse.Namespace, random: Random, figures: Figures) -> None:
    """Drive an engine for some seconds."""
    vocab_size, computed, numbers = model.spec.vocab_size, 0, iter(range(10**9))
    last: dict[str, float] = {}

    def count(step: StepRecord) -> None:
        nonlocal computed
        computed += step.plan.num_tokens

    def send(share: float = 1.0) -> None:
        prompt, answer = (
            max(2, round(share * min(max(random.gauss(each, 0.3 * each), 0.1 * each), 2 * each)))
            for each in (arguments.prompt, arguments.generate)
        )
        tokens = tuple(random.randrange(vocab_size) for _ in range(prompt))
        engine.add_request(f"{next(numbers)}", tokens, SamplingParams(max_tokens=answer, ignore_eos=True))

    unsubscribe = engine.events.subscribe(StepRecord, count)
    for _ in range(arguments.clients):
        send(random.random())
    warm = time.perf_counter() + arguments.seconds / 4
    began = computed_before = 0.0
    while not began or time.perf_counter() - began < arguments.seconds:
        outputs, now = engine.step(), time.perf_counter()
        if not figures.budgets or figures.budgets[-1] != engine.scheduler.budget.tokens:
            figures.budgets.append(engine.scheduler.budget.tokens)
        if not began and now >= warm:
            began, computed_before = now, computed
        for output in outputs:
            if output.token_ids:
                if began and (before := last.get(output.request_id)) is not None:
                    figures.gaps.append(now - before)
                last[output.request_id] = now
            if output.finish_reason is not None:
                send()
    figures.tokens_per_second.append((computed - computed_before) / (time.perf_counter() - began))
    unsubscribe()
    for request_id in list(last):
        engine.abort(request_id)
    while engine.has_unfinished:
        for request in (*engine.scheduler.queue.running, *engine.scheduler.queue.waiting):
            engine.abort(request.request_id)


if __name__ == "__main__":
    main()
