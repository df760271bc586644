"""Logits -> tokens: the rows of one step, each under its own settings, vectorized over the batch.

What a row chooses depends on nothing but that row, bit for bit: every reduction here is exact (max, count, compare) or
runs along one row in a fixed order (`cumsum`, in float64), never through `sum` or `softmax`, whose order of additions
may change with the shape of the batch. Rows are grouped by what they need, so that a plain row costs nothing extra.

The order of processing, and the rules of what is kept, are those of Hugging Face transformers (`generation/utils.py`,
`logits_process.py`): logit_bias, repetition penalty, presence and frequency penalty, min_tokens, temperature, top_k,
top_p, min_p. Logprobs are of the distribution as the model gave it, before any of that. It must not know of models,
the cache or scheduling. Token ids in the settings are inside the vocabulary: that is checked where a request enters.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from splitfuse.core.plan import ChunkResult, NewRequest, TokenLogprob
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.errors import RequestFailedError
from splitfuse.kernels.reference import ReferenceBackend

REFERENCE = ReferenceBackend()
_LOGPROB_ROWS = 32  # rows of logprobs computed at once: float64 copies of the logits stay small beside the logits
_MASK = 2**64 - 1


@dataclass(frozen=True)
class SamplingRow:
    """One row of logits to choose from: whose it is, and the tokens that its request has generated so far."""

    request: NewRequest
    output_token_ids: Sequence[int]

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def adjusts(self) -> bool:
        """Whether any logit is to be changed before choosing."""
        params = self.params
        return bool(
            params.logit_bias
            or params.repetition_penalty != 1.0
            or ((params.presence_penalty or params.frequency_penalty) and self.output_token_ids)
            or len(self.output_token_ids) < params.min_tokens
        )

    @property
    def is_plain(self) -> bool:
        """Greedy and nothing else, as most requests are."""
        return self.params.temperature == 0.0 and self.params.logprobs is None and not self.adjusts

    @property
    def uniform(self) -> float:
        """The random number in [0, 1) that decides this row's token."""
        position = len(self.request.prompt_token_ids) + len(self.output_token_ids)
        return uniform(self.request.seed, self.request.choice, position)


Argmax = Callable[[Tensor], tuple[list[int], list[float]]]
"""`Backend.argmax`: the lowest index of each row's largest element, and that element."""


def sample(logits: Tensor, rows: Sequence[SamplingRow], *, argmax: Argmax = REFERENCE.argmax) -> list[ChunkResult]:
    """Choose one token for each row of `logits` [rows, vocab]; `rows[i]` says how for `logits[i]`.

    A row without a finite maximum, before or after its own adjustments, gives a ChunkResult with `error`; the other
    rows are not touched by it.
    """
    assert logits.dim() == 2 and len(logits) == len(rows)
    if not rows:
        return []
    best, peaks = argmax(logits)
    faults = _faults(peaks)
    if not faults and all(row.is_plain for row in rows):
        return [ChunkResult((token,)) for token in best]
    errors = {i: f"the model computed unusable logits: {fault}" for i, fault in faults.items()}
    tokens: dict[int, int] = {}
    for adjusts in (False, True):
        members = [i for i, row in enumerate(rows) if i not in errors and row.adjusts is adjusts]
        if not members:
            continue
        scores = _take(logits, members)
        if adjusts:
            scores = _adjusted(scores, [rows[i] for i in members])
            adjusted_best, adjusted_peaks = REFERENCE.argmax(scores)
            for index, token in zip(members, adjusted_best, strict=True):
                best[index] = token
            for index, fault in _faults(adjusted_peaks).items():
                errors[members[index]] = f"logit_bias, penalties and min_tokens leave nothing to choose: {fault}"
        tokens.update((i, best[i]) for i in members if i not in errors and rows[i].params.temperature == 0.0)
        for choose in (_draw, _draw_filtered):
            part = [n for n, i in enumerate(members) if i not in errors and _chooser(rows[i].params) is choose]
            if part:
                owners = [members[n] for n in part]
                tokens.update(zip(owners, choose(_take(scores, part), [rows[i] for i in owners]), strict=True))

    reported = [i for i in sorted(tokens) if rows[i].params.logprobs is not None]
    counts = [rows[i].params.logprobs or 0 for i in reported]
    logprobs = dict(
        zip(reported, _logprobs(_take(logits, reported), [tokens[i] for i in reported], counts), strict=True)
    )
    return [
        ChunkResult(error=errors[i])
        if i in errors
        else ChunkResult((tokens[i],), (logprobs[i],) if i in logprobs else ())
        for i in range(len(rows))
    ]


def prompt_logprobs(logits: Tensor, target_ids: Sequence[int], count: int) -> tuple[TokenLogprob, ...]:
    """Logprobs of `target_ids[i]`, the prompt token that follows the position of `logits[i]` [rows, vocab].

    `count` most probable tokens are reported with each. Raises RequestFailedError if a row is NaN, +inf or all -inf.
    """
    assert logits.dim() == 2 and len(logits) == len(target_ids)
    for fault in _faults(_floats(logits.amax(-1))).values():
        raise RequestFailedError(f"the model computed unusable logits for the prompt: {fault}")
    return tuple(_logprobs(logits, target_ids, [count] * len(target_ids)))


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) that is a pure function of its three keys.

    Counter-based: each key is a jump ahead in the SplitMix64 sequence that starts where the one before led (Steele,
    Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014). 53 bits, all a float64 can hold.
    """
    state = 0
    for key in (seed, choice, position):
        state = (state + (key + 1) * 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return (state >> 11) * 2.0**-53


_Chooser = Callable[[Tensor, Sequence[SamplingRow]], list[int]]


def _chooser(params: SamplingParams) -> _Chooser | None:
    if params.temperature == 0.0:
        return None
    return _draw_filtered if params.top_k or params.top_p < 1.0 or params.min_p else _draw


def _draw(scores: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """Inverse of the cumulative distribution, tokens in the order of their ids."""
    cumulative = _weights(scores, rows).cumsum(-1)
    return _ints(_invert(cumulative, cumulative[:, -1:], rows))


def _draw_filtered(scores: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """The same over what top_k, top_p and min_p keep, tokens in falling order of weight, equal ones by id.

    In that order every filter keeps a beginning: top_k what weighs no less than the k-th, top_p what comes before
    the threshold is crossed and the token that crosses it, min_p what weighs min_p times the first.
    """
    weights = _weights(scores, rows)
    vocab = weights.shape[1]
    top_k = [min(row.params.top_k, vocab) for row in rows]
    limited = _column(top_k, weights) > 0
    top_p = _column([row.params.top_p if row.params.top_p < 1.0 else math.inf for row in rows], weights)
    min_p = _column([row.params.min_p for row in rows], weights)

    total = weights.cumsum(-1)[:, -1:]
    # Only what may be kept is sorted. Tokens below (1 - top_p) / vocab weigh less than 1 - top_p together, so top_p
    # drops them all; half of that is on the safe side of rounding. With top_k, the k-th weight is the bound.
    floor = torch.maximum((1.0 - top_p) * total / (2 * vocab), min_p)
    kth = torch.full_like(total, -1.0)
    if any(top_k):
        largest = weights.topk(max(top_k)).values
        kth = torch.where(limited, largest.gather(1, _column([max(k - 1, 0) for k in top_k], weights).long()), kth)
        floor = torch.where(limited, kth, floor)
    width = int((weights >= floor).count_nonzero(-1).amax())

    # [rows, width], by id first, so that the stable sort leaves equal ones in that order
    ids = weights.topk(width, sorted=False).indices.sort().values
    weights, order = weights.gather(1, ids).sort(descending=True, stable=True)
    cumulative = weights.cumsum(-1)
    kept = (weights >= kth).count_nonzero(-1).unsqueeze(1)
    total = torch.where(limited, cumulative.gather(1, kept - 1), total)
    kept = kept.minimum(torch.searchsorted(cumulative, top_p * total) + 1)
    kept = kept.minimum((weights >= min_p).count_nonzero(-1).unsqueeze(1))
    drawn = _invert(cumulative, cumulative.gather(1, kept - 1), rows)
    return _ints(ids.gather(1, order.gather(1, drawn)))


def _weights(scores: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Unnormalized probabilities [rows, vocab] in float64, the largest exactly 1, at any positive temperature."""
    scores = scores.double()
    temperature = _column([row.params.temperature for row in rows], scores)
    return ((scores - scores.amax(-1, keepdim=True)) / temperature).exp()


def _invert(cumulative: Tensor, total: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Index [rows, 1] of the first entry above uniform * total: one of positive weight, as uniform < 1."""
    threshold = _column([row.uniform for row in rows], total) * total
    return torch.searchsorted(cumulative, threshold, right=True)


def _adjusted(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """A float64 copy of logits [rows, vocab] with bias, penalties and forbidden ends applied, in that order."""
    scores = logits.to(torch.float64, copy=True)
    flat = scores.view(-1)
    starts = range(0, flat.numel(), scores.shape[1])  # where each row begins in `flat`
    owners = list(zip(starts, rows, strict=True))

    bias = {start + token: value for start, row in owners for token, value in row.params.logit_bias.items()}
    _update(flat, bias, lambda old, value: old + value)

    repetition = {
        start + token: row.params.repetition_penalty
        for start, row in owners
        if row.params.repetition_penalty != 1.0
        for token in {*row.request.prompt_token_ids, *row.output_token_ids}
    }
    _update(flat, repetition, lambda old, value: torch.where(old < 0, old * value, old / value))

    penalty = {
        start + token: row.params.presence_penalty + row.params.frequency_penalty * count
        for start, row in owners
        if row.params.presence_penalty or row.params.frequency_penalty
        for token, count in Counter(row.output_token_ids).items()
    }
    _update(flat, penalty, lambda old, value: old - value)

    forbidden = {
        start + token: -math.inf
        for start, row in owners
        if len(row.output_token_ids) < row.params.min_tokens
        for token in (*row.request.eos_token_ids, *row.params.stop_token_ids)
    }
    _update(flat, forbidden, lambda _, value: value)
    return scores


def _update(flat: Tensor, values: Mapping[int, float], change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Replace the entries of `flat` that `values` names by change(entry, value), all at once."""
    if values:
        index = torch.tensor(list(values), device=flat.device)
        flat[index] = change(flat[index], torch.tensor(list(values.values()), dtype=flat.dtype, device=flat.device))


def _logprobs(logits: Tensor, token_ids: Sequence[int], counts: Sequence[int]) -> list[TokenLogprob]:
    """Logprob of `token_ids[i]` and of the `counts[i]` most probable tokens, for each row of logits [rows, vocab]."""
    reported: list[TokenLogprob] = []
    for start in range(0, len(token_ids), _LOGPROB_ROWS):
        block = slice(start, start + _LOGPROB_ROWS)
        shifted = logits[block].double()
        shifted -= shifted.amax(-1, keepdim=True)
        logprobs = shifted - shifted.exp().cumsum(-1)[:, -1:].log()
        chosen = _floats(logprobs.gather(1, torch.tensor(token_ids[block], device=logits.device).unsqueeze(1)))
        tops = _best(logprobs, counts[block])
        reported += [TokenLogprob(*entry) for entry in zip(token_ids[block], chosen, tops, strict=True)]
    return reported


def _best(logprobs: Tensor, counts: Sequence[int]) -> list[tuple[tuple[int, float], ...]]:
    """The `counts[i]` most probable (token, logprob) of row i, best first, equal ones by id."""
    found: list[list[tuple[float, int]]] = [[] for _ in counts]
    if any(counts):
        vocab = logprobs.shape[1]
        largest = logprobs.topk(min(max(counts), vocab)).values
        last = largest.gather(1, torch.tensor([[min(max(n, 1), vocab) - 1] for n in counts], device=logprobs.device))
        candidates = logprobs >= last  # topk alone may take any of those equal to the last
        for (row, token), value in zip(candidates.nonzero().tolist(), logprobs[candidates].tolist(), strict=True):
            found[row].append((-value, token))
    return [
        tuple((token, -negated) for negated, token in sorted(row)[:count])
        for row, count in zip(found, counts, strict=True)
    ]


def _faults(peaks: Sequence[float]) -> dict[int, str]:
    """Row -> what is wrong, for the rows that nothing can be chosen from. The maximum of a row with NaN is NaN."""
    return {i: _fault(peak) for i, peak in enumerate(peaks) if not math.isfinite(peak)}


def _fault(peak: float) -> str:
    if math.isnan(peak):
        return "NaN among them"
    return "+inf among them" if peak > 0 else "every one is -inf"


def _take(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """The named rows, in rising order; all of them are no copy."""
    return tensor if len(rows) == len(tensor) else tensor[list(rows)]


def _column(values: Iterable[float], like: Tensor) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64, device=like.device).unsqueeze(1)


def _ints(tensor: Tensor) -> list[int]:
    values: list[int] = tensor.flatten().tolist()
    return values


def _floats(tensor: Tensor) -> list[float]:
    values: list[float] = tensor.flatten().tolist()
    return values
