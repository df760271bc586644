"""Choose tokens: the rows of one step, each under its own settings, vectorized over the batch.

The token of a row depends on nothing but that row, bit for bit: every reduction here is exact (max, count, compare) or
runs along one row in a fixed order (`cumsum`, in float64), never through `sum` or `softmax`, whose order of additions
may change with the shape of the batch. Rows are grouped by what they need, so that a plain row costs nothing extra.

The order of processing, and the rules of what is kept, are those of Hugging Face transformers (`generation/utils.py`,
`logits_process.py`): logit_bias, repetition penalty, presence and frequency penalty, min_tokens (adjust.py), then
temperature, top_k, top_p, min_p (draw.py). Tokens that a grammar forbids (grammar.py) have no score. Where a thought
must be closed (core/reasoning.py) there is no choice, whatever the settings say. This package knows nothing of models,
the cache or scheduling. Token ids in the settings are checked where a request enters, and those of a model where it is
loaded; one outside the vocabulary changes nothing here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from splitfuse.core.plan import ChunkResult, SamplingState, TokenLogprob
from splitfuse.errors import RequestFailedError
from splitfuse.kernels.interface import exact_argmax
from splitfuse.runtime.sampling.adjust import adjusted, is_adjusted
from splitfuse.runtime.sampling.draw import draw, draw_filtered, is_filtered
from splitfuse.runtime.sampling.grammar import Mask, best_permitted, forbid, permits
from splitfuse.runtime.sampling.logprobs import report_logprobs

Argmax = Callable[[Tensor], tuple[list[int], list[float]]]
"""Type of `Backend.argmax`, which gives the lowest index of each row's largest element, and that element."""


def sample(
    logits: Tensor,
    rows: Sequence[SamplingState],
    *,
    argmax: Argmax = exact_argmax,
    masks: Sequence[Mask | None] = (),
) -> list[ChunkResult]:
    """Choose one token for each row of `logits` [rows, vocab], under the settings of `rows`, among those that its mask
    allows if there are `masks`.

    A row without a finite maximum, before or after its own adjustments, gives a ChunkResult with `error`, and does not
    affect the others.
    """
    assert logits.dim() == 2 and len(logits) == len(rows)
    if not rows:
        return []
    best, peaks = argmax(logits)
    faults = _faults(peaks)
    adjusts = [is_adjusted(row) for row in rows]
    forced = _forced(rows, faults)
    for i, token in forced.items():
        best[i], peaks[i], adjusts[i] = token, 0.0, False
    for i, mask in enumerate(masks):
        if mask is None or i in faults or i in forced:
            continue
        if rows[i].params.temperature:
            adjusts[i] = True
        elif not adjusts[i] and not permits(mask, best[i]):  # mostly the best token is allowed, and there is no more
            best[i], peaks[i] = best_permitted(logits[i], mask)
    unchosen = _faults(peaks)
    if not unchosen and not any(adjusts) and all(_is_plain(row) for row in rows):
        return [ChunkResult((token,)) for token in best]
    errors = {i: f"structured_outputs leave nothing to choose: {fault}" for i, fault in unchosen.items()}
    errors |= {i: f"the model computed unusable logits: {fault}" for i, fault in faults.items()}
    tokens: dict[int, int] = {}
    for adjusting in (False, True):
        members = [i for i in range(len(rows)) if i not in errors and adjusts[i] is adjusting]
        if not members:
            continue
        scores = _take(logits, members)
        if adjusting:
            scores = adjusted(scores, [rows[i] for i in members])
            if masks:
                forbid(scores, [masks[i] for i in members])
            adjusted_best, adjusted_peaks = exact_argmax(scores)
            for index, token in zip(members, adjusted_best, strict=True):
                best[index] = token
            for index, fault in _faults(adjusted_peaks).items():
                errors[members[index]] = f"{_causes(masks, members[index])} leave nothing to choose: {fault}"
        chosen = [i for i in members if i not in errors and (rows[i].params.temperature == 0.0 or i in forced)]
        tokens.update((i, best[i]) for i in chosen)
        drawing = [n for n, i in enumerate(members) if i not in errors and i not in tokens]
        for filtering in (False, True):
            part = [n for n in drawing if is_filtered(rows[members[n]].params) is filtering]
            if part:
                owners = [members[n] for n in part]
                choose = draw_filtered if filtering else draw
                tokens.update(zip(owners, choose(_take(scores, part), [rows[i] for i in owners]), strict=True))

    tokens |= _closing(rows, tokens)
    reported = [i for i in sorted(tokens) if rows[i].params.logprobs is not None]
    counts = [rows[i].params.logprobs or 0 for i in reported]
    logprobs = dict(
        zip(reported, report_logprobs(_take(logits, reported), [tokens[i] for i in reported], counts), strict=True)
    )
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


def _is_plain(row: SamplingState) -> bool:
    """Return whether a row that is not adjusted is greedy and nothing else, as most are."""
    closes = row.thought is not None and row.thought.closing is not None
    return row.params.temperature == 0.0 and row.params.logprobs is None and not closes


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


def _causes(masks: Sequence[Mask | None], row: int) -> str:
    causes = "logit_bias, penalties and min_tokens"
    return f"structured_outputs with {causes}" if masks and masks[row] is not None else causes


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
