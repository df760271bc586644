"""Says what is read of a prompt by a request that generates nothing."""

from __future__ import annotations

from dataclasses import dataclass

from splitfuse.core.sampling_params import SamplingParams


@dataclass(frozen=True)
class PoolingParams:
    """Asks for numbers of a prompt's last position instead of tokens: its hidden state after the final norm, for an
    embedding, or the log-probabilities of some tokens to follow, for a choice among them.

    >>> PoolingParams()
    PoolingParams(token_ids=())
    >>> PoolingParams(token_ids=(9693, 2152))
    PoolingParams(token_ids=(9693, 2152))
    """

    token_ids: tuple[int, ...] = ()
    """Tokens whose log-probabilities are wanted; none: the hidden state is."""


NOTHING_GENERATED = SamplingParams(max_tokens=1)
"""Sampling parameters of a request with PoolingParams: its last step gives numbers in place of the one token."""
