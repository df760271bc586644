"""Drafts of what requests are known to give, with some tokens wrong: most are right, so runs of them are accepted."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from random import Random

from splitfuse.core.request import Request
from splitfuse.core.speculation.drafting import Drafting
from splitfuse.engine.engine import Engine
from splitfuse.runtime.executor import Executor
from splitfuse.text.prompts import PreparedRequest


class Guesses(Drafting):
    """Drafts the tokens that `known` gives for a request, each with a chance of being wrong."""

    def __init__(self, known: Callable[[Request], Sequence[int]]) -> None:
        super().__init__(most=7)
        self._known, self._rng = known, Random("guesses")
        self._requests: set[Request] = set()

    @property
    def accepted(self) -> int:
        """Return the number of drafts that were right."""
        return sum(request.drafts.num_accepted for request in self._requests)

    @staticmethod
    def _update(request: Request) -> bool:
        return Drafting._update(request) or bool(request.output_token_ids)

    def _ahead(self, request: Request, most: int, least: float) -> list[tuple[int, float]]:  # type: ignore[override]
        rng, count = self._rng, len(request.output_token_ids)
        self._requests.add(request)
        if request.drafts.forced and rng.random() < 0.5:
            return super()._ahead(request, most, least)
        most = min(rng.randint(0, most), request.max_tokens - count - 1)
        tokens = self._known(request)[count : count + most]
        guessed = [token if rng.random() < 0.8 else rng.randrange(50) for token in tokens]
        ends = {*request.eos_token_ids, *request.params.stop_token_ids}
        count = next((n for n, token in enumerate(guessed) if token in ends), most)
        return [(token, 0.99**n) for n, token in enumerate(guessed[:count], start=1)]


def guess(engine: Engine, known: Callable[[Request], Sequence[int]]) -> Guesses:
    """Let an engine draft what its requests are known to give."""
    assert isinstance(engine.executor, Executor)
    drafting = engine.scheduler.drafting = Guesses(known)
    engine.executor.num_forced = drafting.most
    return drafting


def guess_answers(engine: Engine, requests: Sequence[PreparedRequest], answers: Sequence[Sequence[int]]) -> Guesses:
    """Let it draft the tokens of the choices of `requests`, in their order."""
    keys: list[Hashable] = [(id(each.params), choice) for each in requests for choice in range(each.params.n)]
    outputs: Mapping[Hashable, Sequence[int]] = dict(zip(keys, answers, strict=True))
    return guess(engine, lambda request: outputs[id(request.params), request.choice])
