"""Makes embeddings of hidden states, and compares them."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from operator import mul

from splitfuse.core.pooling_params import NOTHING_GENERATED, PoolingParams
from splitfuse.errors import InvalidRequestError
from splitfuse.text.prompts import PreparedRequest


def embedding(hidden: Sequence[float], dimensions: int | None = None) -> array[float]:
    """Return the first `dimensions` numbers of a hidden state, or all, scaled to length 1, in fp32.

    >>> list(embedding((3.0, 0.0, 4.0, 12.0), 2))
    [1.0, 0.0]
    """
    kept = hidden[:dimensions]
    length = math.hypot(*kept) or 1.0  # zeros have no direction, and stay
    return array("f", [number / length for number in kept])


def check_dimensions(dimensions: int | None, size: int) -> None:
    """Raise InvalidRequestError unless a model whose embeddings have `size` numbers can give so many."""
    if dimensions is not None and (not isinstance(dimensions, int) or not 1 <= dimensions <= size):
        message = (
            f"dimensions must be a whole number from 1 to {size}, as many as the model has, not {dimensions!r:.80}"
        )
        raise InvalidRequestError(message, parameter="dimensions")


def cosine(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the cosine of the angle between two hidden states: 1 for the same direction, 0 for texts that have nothing
    in common, at least -1.
    """
    lengths = math.hypot(*first) * math.hypot(*second) or 1.0
    return max(-1.0, min(math.fsum(map(mul, first, second)) / lengths, 1.0))


def for_pooling(token_ids: Sequence[int], params: PoolingParams | None = None) -> PreparedRequest:
    """Return the request for numbers of a prompt: its embedding, unless `params` ask for others."""
    return PreparedRequest(tuple(token_ids), NOTHING_GENERATED, continues=False, pooling=params or PoolingParams())
