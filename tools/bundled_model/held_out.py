"""Accuracy of the bundled model on held-out passages, with a question each, with and without the passage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from stories import Question, make_story

from splitfuse import Pipeline

SHORTEST, LONGEST = 50, 1000  # tokens of a passage
MAX_NEW_TOKENS = 24


@dataclass(frozen=True)
class Problem:
    """A passage and a question about it."""

    passage: str
    question: Question

    @property
    def prompt(self) -> str:
        return f"{self.passage}\n\n{self.question.text}"


def held_out_problems(count: int, length: Callable[[str], int]) -> Iterator[Problem]:
    """Yield problems with passages of SHORTEST to LONGEST tokens, evenly spread; `length` counts a text's tokens.

    Training draws its stories from seeds of the form `train-...`; these come from others.
    """
    for number in range(count):
        rng = Random(f"exam-{number}")
        most = SHORTEST + (LONGEST - SHORTEST) * (number + 1) // count
        story = make_story(rng, most, length)
        yield Problem(story.passage, rng.choice(story.questions))


def count_right(pipe: Pipeline, problems: list[Problem], *, with_passage: bool = True, progress: bool = False) -> int:
    """Return how many questions are answered with exactly the right sentence, all together and greedily."""
    prompts = [problem.prompt if with_passage else problem.question.text for problem in problems]
    responses = pipe(prompts, chat=True, max_new_tokens=MAX_NEW_TOKENS, progress=progress)
    return sum(r.generated_text.strip() == p.question.answer for r, p in zip(responses, problems, strict=True))
