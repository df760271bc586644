"""Does the bundled model read? Passages that training never saw, each with one question, with and without the
passage.
"""

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
    """Problems whose passages have from SHORTEST to LONGEST tokens, evenly spread; `length` counts the tokens of a
    text.

    Training draws its stories from seeds of the form `train-...`; these come from others.
    """
    for number in range(count):
        rng = Random(f"exam-{number}")
        most = SHORTEST + (LONGEST - SHORTEST) * (number + 1) // count
        story = make_story(rng, most, length)
        yield Problem(story.passage, rng.choice(story.questions))


def count_right(pipe: Pipeline, problems: list[Problem], *, with_passage: bool = True, progress: bool = False) -> int:
    """How many of the questions are answered with exactly the right sentence. All are asked at once, and greedily."""
    prompts = [problem.prompt if with_passage else problem.question.text for problem in problems]
    responses = pipe(prompts, chat=True, max_new_tokens=MAX_NEW_TOKENS, progress=progress)
    return sum(r.generated_text.strip() == p.question.answer for r, p in zip(responses, problems, strict=True))
