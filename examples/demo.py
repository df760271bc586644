"""Dynamic SplitFuse on the bundled model: ten stories and questions, short and long mixed, answered together.

Prints the answers while they are generated, the composition of every forward step, and the accuracy of the model on
held-out stories. `python examples/demo.py`, or `make demo`. `--picture steps.png` also draws the steps with their
measured times and those that a cost model predicts (steps are timed for it once, for some seconds); that needs
matplotlib.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

import splitfuse
from splitfuse.bench.report.style import require_matplotlib
from splitfuse.core.events import StepRecord
from splitfuse.core.plan import Chunk, StepPlan
from splitfuse.errors import ConfigError

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools" / "bundled_model"))
from held_out import count_right, held_out_problems  # noqa: E402
from step_timeline import Piece, StepShown, draw_steps, save_picture  # noqa: E402

BUDGET = 64  # tokens of a step, each a column of the output
NUM_HELD_OUT = 100
COLOURS = ("red", "green", "yellow", "blue", "magenta", "cyan")

console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)


def main(picture: Path | None) -> None:
    if picture is not None:
        require_matplotlib()
    problems = [json.loads(line) for line in (ROOT / "examples" / "passages.jsonl").read_text("utf-8").splitlines()]
    console.rule("[bold]splitfuse: Dynamic SplitFuse on the bundled model")
    # Engines with SLO scheduling predict step times; the first start times some steps
    steps: list[StepRecord] = []
    pipe = splitfuse.pipeline(
        progress=True, observer=steps.append, max_num_batched_tokens=BUDGET, enable_slo=picture is not None
    )
    seconds, right = answer(pipe, problems)
    plans = [each.plan for each in steps]
    draw(plans)
    tokens = sum(plan.num_tokens for plan in plans)
    full = sum(plan.num_tokens == BUDGET for plan in plans)
    console.print(
        f"{right} of {len(problems)} right.  {tokens} tokens in {len(steps)} steps and {seconds:.2f} s: "
        f"{tokens / seconds:.0f} tokens/s.\n"
        f"The token budget was full in {full} steps; in the others nothing was left to compute.\n"
    )
    if picture is not None:
        save(steps, picture)
    print_accuracy()


def answer(pipe: splitfuse.Pipeline, problems: list[dict[str, str]]) -> tuple[float, int]:
    """Generate all answers together; return the seconds taken, and how many were right."""
    answers = [""] * len(problems)
    prompts = [f"{problem['passage']}\n\n{problem['question']}" for problem in problems]
    requests = pipe.prepare(prompts, chat=True, max_new_tokens=32)
    lengths = [len(request.token_ids) for request in requests]

    def table() -> Table:
        shown = Table("", "prompt tokens", "question", "answer", title="Ten stories, ten questions, answered together")
        for i, problem in enumerate(problems):
            mark = " ✓" if answers[i].strip() == problem["answer"] else ""
            shown.add_row(Text(letter(i), colour(i)), str(lengths[i]), problem["question"], answers[i] + mark)
        return shown

    started = time.perf_counter()
    if console.is_terminal:
        with Live(table(), console=console, auto_refresh=False) as live:
            for piece in pipe.run(requests):
                answers[piece.index] += piece.text
                live.update(table(), refresh=True)
        seconds = time.perf_counter() - started
    else:
        for piece in pipe.run(requests):
            answers[piece.index] += piece.text
        seconds = time.perf_counter() - started
        console.print(table())
    return seconds, sum(a.strip() == problem["answer"] for a, problem in zip(answers, problems, strict=True))


def draw(plans: list[StepPlan]) -> None:
    """Print a line for each step, a character for each token: capitals are prefill, small letters decodes."""
    console.print(
        "\nTokens of each step: [bold]A[/] a prompt token of request A, [bold]a[/] its newest generated token"
    )
    console.print("step", style="dim")
    indices: dict[str, int] = {}  # requests start in their order
    for number, plan in enumerate(plans, start=1):
        line = Text(f"{number:4} ")
        for chunk in plan.chunks:
            index = indices.setdefault(chunk.request_id, len(indices))
            decodes = is_decode(chunk)
            mark = letter(index).lower() if decodes else letter(index)
            line.append(mark * len(chunk.token_ids), f"{colour(index)} bold" if decodes else colour(index))
        line.append("·" * (plan.token_budget - plan.num_tokens), "dim")
        line.append(f" {plan.num_tokens}/{plan.token_budget}", "dim")
        console.print(line)
    console.print()


def save(steps: list[StepRecord], file: Path) -> None:
    """Draw the steps with their times and predictions into a file."""
    names: dict[str, str] = {}
    shown = [
        StepShown(
            [
                Piece(names.setdefault(c.request_id, letter(len(names))), len(c.token_ids), is_decode(c))
                for c in each.plan.chunks
            ],
            each.measured_seconds,
            each.predicted_seconds or None,
        )
        for each in steps
    ]
    save_picture(draw_steps(shown, budget=BUDGET), file)
    console.print(f"{file} shows the steps with their measured and predicted times\n")


def is_decode(chunk: Chunk) -> bool:
    return len(chunk.token_ids) == 1 and chunk.samples


def print_accuracy() -> None:
    """Print the accuracy on held-out passages of up to 1,000 tokens, and on the same questions without them."""
    pipe = splitfuse.pipeline(max_num_batched_tokens=512)
    problems = list(held_out_problems(NUM_HELD_OUT, lambda text: len(pipe.tokenizer.encode(text)) - 1))
    longest = max(len(pipe.tokenizer.encode(problem.passage)) for problem in problems)
    console.print(
        f"{len(problems)} held-out passages of up to {longest} tokens, a question about each; this takes some seconds:"
    )
    started = time.perf_counter()
    with_passage = count_right(pipe, problems, progress=sys.stderr.isatty())
    seconds = time.perf_counter() - started
    without = count_right(pipe, problems, with_passage=False)
    console.print(f"[bold]{with_passage}[/] right with the passage ({seconds:.1f} s), {without} without it")


def letter(index: int) -> str:
    return chr(ord("A") + index % 26)


def colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path, help="draw the steps into this .png, .svg or .pdf file")
    try:
        main(parser.parse_args().picture)
    except KeyboardInterrupt:
        sys.exit(130)
    except ConfigError as error:
        sys.exit(f"demo: {error}")
