"""Chooses tokens: the rows of one step, each under its own settings, vectorized over the batch.

The token of a row depends on nothing but that row, bit for bit: every reduction here is exact (max, count, compare) or
runs along one row in a fixed order (`cumsum`, in float64), never through `sum` or `softmax`, whose order of additions
may change with the shape of the batch. Rows are grouped by what they need, so that a plain row costs nothing extra.

The order of processing, and the rules of what is kept, are those of Hugging Face transformers (`generation/utils.py`,
`logits_process.py`): logit_bias, repetition penalty, presence and frequency penalty, min_tokens (adjust.py), then
temperature, top_k, top_p, min_p (draw.py). Among what these keep, the form of the answer restricts the choice
(choose.py). Where a thought must be closed (core/reasoning.py) there is no choice, whatever the settings say. This
package knows nothing of models, the cache or scheduling. Token ids in the settings are checked where a request enters,
and those of a model where it is loaded; one outside the vocabulary changes nothing here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from splitfuse.core.plan import ChunkResult, SamplingState, TokenLogprob
from splitfuse.errors import RequestFailedError
from splitfuse.kernels.drawing import exact_draw
from splitfuse.kernels.interface import exact_topk
from splitfuse.runtime.sampling.adjust import adjusted, is_adjusted
from splitfuse.runtime.sampling.choose import Choice, Drawn, Greedy, choose
from splitfuse.runtime.sampling.draw import Draw, Draws
from splitfuse.runtime.sampling.grammar import TRIES, Matcher
from splitfuse.runtime.sampling.logprobs import report_logprobs

TopK = Callable[[Tensor, int], tuple[list[list[int]], list[list[float]]]]
"""Type of `Backend.topk`, which gives the indices of each row's largest elements, and these elements."""


def sample(
    logits: Tensor,
    rows: Sequence[SamplingState],
    *,
    topk: TopK = exact_topk,
    draw: Draw = exact_draw,
    matchers: Sequence[Matcher | None] = (),
) -> list[ChunkResult]:
    """Choose one token for each row of `logits` [rows, vocab], under the settings of `rows`, among those that its
    matcher allows if it has one. The matcher has taken the token then, and is to be settled.

    A row without a finite maximum, before or after its own adjustments, gives a ChunkResult with `error`, and does not
    affect the others.
    """
    assert logits.dim() == 2 and len(logits) == len(rows)
    if not rows:
        return []
    followed = {i: matcher for i, matcher in enumerate(matchers) if matcher is not None}
    count = TRIES if any(matcher.is_loose for matcher in followed.values()) else 1
    best, peaks = topk(logits, count)
    faults = _faults([peak for peak, *_ in peaks])
    errors = {i: _unusable(fault) for i, fault in faults.items()}
    tokens = _forced(rows, faults)
    free = [(i, is_adjusted(row)) for i, row in enumerate(rows) if i not in errors and i not in tokens]
    for adjusting in (False, True):
        members = [i for i, changes in free if changes is adjusting]
        scores, places = logits, {i: i for i in members}
        if adjusting and members:
            places = {i: place for place, i in enumerate(members)}
            scores = adjusted(_take(logits, members), [rows[i] for i in members])
            best, peaks = exact_topk(scores, count)
            faults = _faults([peak for peak, *_ in peaks])
            errors |= {i: _nothing(rows[i], i in followed, faults[n]) for i, n in places.items() if n in faults}
            members = [i for i in members if i not in errors]
        choices: dict[int, Choice] = {}  # of the rows that must follow a form
        drawn = []
        for i in members:
            if rows[i].params.temperature > 0.0:
                drawn.append(i)
            elif i in followed:
                choices[i] = Greedy(scores, places[i], best[places[i]], peaks[places[i]])
            else:
                tokens[i] = best[places[i]][0]
        if drawn:
            draws = Draws(scores, [places[i] for i in drawn], [rows[i] for i in drawn], draw)
            for n, (i, token) in enumerate(zip(drawn, draws.first(), strict=True)):
                if i in followed:
                    choices[i] = Drawn(draws, n, token)
                else:
                    tokens[i] = token
        if choices:
            tokens |= choose(choices, followed)
            for i in choices:
                if i not in tokens:
                    errors[i] = followed[i].error or _nothing(rows[i], True, _fault(-math.inf))

    tokens |= _closing(rows, tokens)
    reported = [i for i in sorted(tokens) if rows[i].params.logprobs is not None]
    logprobs: dict[int, TokenLogprob] = {}
    if reported:
        counts = [rows[i].params.logprobs or 0 for i in reported]
        entries = report_logprobs(_take(logits, reported), [tokens[i] for i in reported], counts)
        logprobs = dict(zip(reported, entries, strict=True))
    return [
        ChunkResult(error=errors[i])
        if i in errors
        else ChunkResult((tokens[i],), (logprobs[i],) if i in logprobs else ())
        for i in range(len(rows))
    ]


def prompt_logprobs(logits: Tensor, target_ids: Sequence[int], count: int) -> tuple[TokenLogprob, ...]:
    """Return logprobs of `target_ids[i]`, the prompt token after the position of `logits[i]` [rows, vocab], each with
    those of the `count` most probable tokens.

    Raises RequestFailedError if a row has NaN or +inf, or nothing above -inf.
    """
    assert logits.dim() == 2 and len(logits) == len(target_ids)
    peaks: list[float] = logits.amax(-1).tolist()
    for fault in _faults(peaks).values():
        raise RequestFailedError(f"the model computed unusable logits for the prompt: {fault}")
    return tuple(report_logprobs(logits, target_ids, [count] * len(target_ids)))


def unusable(peak: float) -> str | None:
    """Return the error of a row whose largest logit is `peak`; None if a token can be chosen from it."""
    return None if math.isfinite(peak) else _unusable(_fault(peak))


def _unusable(fault: str) -> str:
    return f"the model computed unusable logits: {fault}"


def _forced(rows: Sequence[SamplingState], faults: Mapping[int, str]) -> dict[int, int]:
    """Return the tokens of the rows that have no choice."""
    thoughts = ((i, row.thought) for i, row in enumerate(rows) if row.thought is not None and i not in faults)
    return {i: thought.forced for i, thought in thoughts if thought.forced is not None}


def _closing(rows: Sequence[SamplingState], tokens: Mapping[int, int]) -> dict[int, int]:
    """Return the tokens that close a thought, for the rows within one that have chosen to end the request: an answer
    must follow.
    """
    ending = ((i, rows[i].thought) for i, token in tokens.items() if token in rows[i].eos_token_ids)
    return {i: thought.closing for i, thought in ending if thought is not None and thought.closing is not None}


def _nothing(row: SamplingState, has_form: bool, fault: str) -> str:
    """Return the error of a row whose settings leave it no token."""
    causes = ["structured_outputs"] * has_form + ["logit_bias, penalties and min_tokens"] * is_adjusted(row)
    return f"{' with '.join(causes)} leave nothing to choose: {fault}"


def _faults(peaks: Sequence[float]) -> dict[int, str]:
    """Return what is wrong with each row that no token can be chosen from. The maximum of a row with NaN is NaN."""
    return {i: _fault(peak) for i, peak in enumerate(peaks) if not math.isfinite(peak)}


def _fault(peak: float) -> str:
    if math.isnan(peak):
        return "NaN among them"
    return "+inf among them" if peak > 0 else "every one is -inf"


def _take(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """Return some rows of a tensor, in rising order, without a copy if all rows are wanted."""
    return tensor if len(rows) == len(tensor) else tensor[list(rows)]
