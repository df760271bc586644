"""Reports log-probabilities: of the distribution as the model gave it, before bias, penalties and filters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from splitfuse.core.plan import TokenLogprob
from splitfuse.kernels.interface import exact_topk

ROWS = 32
"""Number of rows that are computed at once: float64 copies of the logits stay small next to the logits."""


def report_logprobs(logits: Tensor, token_ids: Sequence[int], counts: Sequence[int]) -> list[TokenLogprob]:
    """Return logprobs of `token_ids[i]` and of the `counts[i]` most probable tokens, for each row of logits."""
    reported: list[TokenLogprob] = []
    for start in range(0, len(token_ids), ROWS):
        block = slice(start, start + ROWS)
        logprobs = log_probabilities(logits[block])
        index = torch.tensor(token_ids[block], device=logits.device).unsqueeze(1)
        chosen: list[float] = logprobs.gather(1, index).flatten().tolist()
        tops = _best(logprobs, counts[block])
        reported += [TokenLogprob(*entry) for entry in zip(token_ids[block], chosen, tops, strict=True)]
    return reported


def log_probabilities(logits: Tensor) -> Tensor:
    """Return the log-probabilities of all tokens in fp64, each row of logits by itself."""
    shifted = logits.double()
    shifted -= shifted.amax(-1, keepdim=True)
    return shifted - shifted.exp().cumsum(-1)[:, -1:].log()


def _best(logprobs: Tensor, counts: Sequence[int]) -> list[tuple[tuple[int, float], ...]]:
    """Return the `counts[i]` most probable (token, logprob) of row i, best first, equal ones by id."""
    if not any(counts):
        return [()] * len(counts)
    ids, values = exact_topk(logprobs, max(counts))
    return [tuple(zip(ids[row][:count], values[row][:count], strict=True)) for row, count in enumerate(counts)]
