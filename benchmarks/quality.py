"""Measure what quantization costs: perplexity of a held-out text in int8 and int4 against bf16, for some models.

`python benchmarks/quality.py [MODEL ...] [--text FILE] [--num-tokens N]`. A model is a folder or a Hub name; by default
the bundled one, which also answers questions about 100 held-out passages. The text is cut into windows, which are
scored separately by `prompt_logprobs`. The default text is stories with questions and answers from seeds that training
did not use; every precision scores the same tokens. Differences are per token of the same text, so their standard error
is far below that of the perplexity itself.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch

import splitfuse
from splitfuse.errors import ConfigError
from splitfuse.text.chat_template import ChatTemplate
from splitfuse.text.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parent.parent / "tools" / "bundled_model"))
from held_out import count_right, held_out_problems
from stories import make_story

PRECISIONS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "int8": {"quantization": "int8"},
    "int8, group 128": {"quantization": "int8", "quantization_group_size": 128},
    "int4, group 64": {"quantization": "int4", "quantization_group_size": 64},
    "int4, group 128": {"quantization": "int4", "quantization_group_size": 128},
}
WINDOW = 512  # tokens of a window of plain text
NUM_QUESTIONS = 12  # about each story
SHORTEST, LONGEST = 40, 600  # words of a story
NUM_PROBLEMS = 100


@dataclass(frozen=True)
class Score:
    """Negative log-likelihoods of all scored tokens, in one precision."""

    losses: torch.Tensor  # [tokens], fp64
    seconds: float
    right: int | None  # of NUM_PROBLEMS; None for a model that was not trained on them

    @property
    def perplexity(self) -> float:
        return float(self.losses.mean().exp())

    def change_from(self, other: Score) -> tuple[float, float]:
        """Return the relative change of perplexity and its standard error, both in percent."""
        difference = self.losses - other.losses
        ratio = float(difference.mean().exp())
        return 100 * (ratio - 1), 100 * ratio * float(difference.std()) / math.sqrt(len(difference))


def main() -> None:
    arguments = parse()
    for model in arguments.model or [None]:
        name = model or "the bundled model"
        print(f"\n{name}", flush=True)
        print(f"{'':16} {'perplexity':>10} {'against bf16':>18} {'tokens':>7} {'seconds':>7}  passages right")
        base: Score | None = None
        for precision, settings in PRECISIONS.items():
            try:
                score = measure(model, arguments.text, arguments.num_tokens, settings)
            except ConfigError as error:
                print(f"{precision:16} {error}")
                continue
            base = base or score
            change = "{:+8.3f} % ± {:.3f}".format(*score.change_from(base)) if score is not base else ""
            right = "" if score.right is None else f"{score.right} of {NUM_PROBLEMS}"
            figures = f"{score.perplexity:10.4f} {change:>18} {len(score.losses):7} {score.seconds:7.1f}"
            print(f"{precision:16} {figures}  {right}", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="*", help="folders or Hub names (default: the bundled model)")
    parser.add_argument("--text", type=Path, help="file of plain text to score, instead of stories")
    parser.add_argument(
        "--num-tokens", type=int, default=25_000, help="approximate number of tokens to score (default: %(default)s)"
    )
    return parser.parse_args()


def measure(model: str | None, text: Path | None, num_tokens: int, settings: dict[str, Any]) -> Score:
    """Load the model with these settings and score the text; ask the bundled model the held-out questions, too."""
    pipe = splitfuse.pipeline(model, dtype="bfloat16", max_num_batched_tokens=512, **settings)
    documents = stories(pipe.tokenizer) if text is None else windows(pipe.tokenizer, text.read_text("utf-8"))
    chosen: list[tuple[int, ...]] = []
    total = 0
    for document in documents:
        if total >= num_tokens:
            break
        chosen.append(document[: pipe.engine.max_model_len - 1])
        total += len(chosen[-1])
    started = time.perf_counter()
    losses: list[float] = []
    for response in pipe(chosen, max_new_tokens=1, prompt_logprobs=0):
        if response.prompt_logprobs is None or response.error is not None:
            raise RuntimeError(f"scoring a window failed: {response.error}")
        losses += [-token.logprob for token in response.prompt_logprobs]
    seconds = time.perf_counter() - started
    right = None
    if model is None:
        problems = list(held_out_problems(NUM_PROBLEMS, lambda sentence: len(pipe.tokenizer.encode(sentence)) - 1))
        right = count_right(pipe, problems)
    return Score(torch.tensor(losses, dtype=torch.float64), seconds, right)


def stories(tokenizer: Tokenizer) -> Iterator[tuple[int, ...]]:
    """Yield stories of all lengths with questions and answers, as conversations if the model has a chat template."""
    template = None
    if tokenizer.chat_template is not None:
        template = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens)
    for number in itertools.count():
        rng = Random(f"quality-{number}")
        story = make_story(rng, rng.randint(SHORTEST, LONGEST), lambda sentence: len(sentence.split()))
        questions = rng.sample(story.questions, min(NUM_QUESTIONS, len(story.questions)))
        turns = [turn for question in questions for turn in (question.text, question.answer)]
        turns[0] = f"{story.passage}\n\n{turns[0]}"
        if template is None:
            yield tokenizer.encode("\n".join(turns))
        else:
            roles = ("user", "assistant")
            messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
            rendered = template.render(messages, add_generation_prompt=False)
            yield tokenizer.encode(rendered, add_special_tokens=False)


def windows(tokenizer: Tokenizer, text: str) -> Iterator[tuple[int, ...]]:
    """Yield the text in windows of WINDOW tokens, each with the tokenizer's first token."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    first = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
    length = WINDOW - len(first)
    for begin in range(0, len(ids) - length + 1, length):
        yield first + ids[begin : begin + length]


if __name__ == "__main__":
    main()
