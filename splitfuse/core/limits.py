"""Checks requests against the limits of the model and the KV cache of an engine.

A request is checked once, where it enters (a pipeline, a server, `Engine.add_request`): the sender gets the error, also
of an engine in another process. From there on, tokens are not read again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from splitfuse.core.pooling_params import PoolingParams
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.errors import InvalidRequestError, PromptTooLongError, RequestTooLargeError, brief

ONE_LEFT = ", with one left to generate"
"""End of errors about prompts that are too long."""
ENCODER = "this model is an encoder: it gives embeddings, and generates no text"
"""Message of the error for a request that an encoder cannot serve."""


@dataclass(frozen=True)
class EngineLimits:
    """Holds the sizes of a loaded model and its KV cache, in tokens and blocks.

    >>> limits = EngineLimits(max_model_len=2048, vocab_size=32000, num_blocks=512, block_size=32)
    >>> limits.check([1, 15, 7], SamplingParams(max_tokens=16))
    """

    max_model_len: int
    vocab_size: int
    num_blocks: int
    block_size: int
    lent_blocks: int = 0
    """Blocks that other engines may hold of a request besides."""
    generates: bool = True
    """False for an encoder, which gives embeddings only."""

    @property
    def longest_prompt(self) -> int:
        """Return the most tokens of a prompt: one is left to generate, but by an encoder."""
        return self.max_model_len - self.generates

    @property
    def room(self) -> int:
        """Return the most tokens that a prompt and its answer can have together."""
        return min(self.max_model_len, (self.num_blocks + self.lent_blocks) * self.block_size + 1)

    def max_new_tokens(self, num_prompt: int, params: SamplingParams) -> int:
        """Return the most tokens to generate after a prompt of `num_prompt` tokens."""
        return self.max_model_len - num_prompt if params.max_tokens is None else params.max_tokens

    def fits(self, num_prompt: int, params: SamplingParams) -> bool:
        """Return whether a request of this size keeps to the limits, for assertions behind `check`."""
        most = self.max_new_tokens(num_prompt, params)
        blocks = blocks_needed(num_prompt, most, self.block_size)
        has_room = blocks <= self.num_blocks + self.lent_blocks
        return num_prompt > 0 and num_prompt + max(most, 1) <= self.longest_prompt + 1 and has_room

    def check(
        self, prompt_token_ids: Sequence[int], params: SamplingParams, pooling: PoolingParams | None = None
    ) -> None:
        """Raise InvalidRequestError if the model cannot serve the request, RequestTooLargeError if the KV cache could
        not hold it even alone.
        """
        if not self.generates and (pooling is None or pooling.token_ids):
            raise InvalidRequestError(ENCODER)
        limit, length = self.max_model_len, len(prompt_token_ids)
        if not prompt_token_ids:
            raise InvalidRequestError("the prompt is empty: it must have at least one token", parameter="prompt")
        if length > self.longest_prompt:
            raise prompt_too_long(str(length), limit, generates=self.generates)
        for name, count in (("max_tokens", params.max_tokens or 0), ("min_tokens", params.min_tokens)):
            if length + count > self.longest_prompt + 1:
                raise PromptTooLongError(
                    f"{_context_length(limit)}. However, the prompt is too long for {name} {count}: with its {length} "
                    f"tokens, {name} can be at most {limit - length}",
                    parameter=name,
                )
        for name, ids in (
            ("prompt", prompt_token_ids),
            ("logit_bias", params.logit_bias),
            ("stop_token_ids", params.stop_token_ids),
            ("pooling", () if pooling is None else pooling.token_ids),
            ("reasoning", params.reasoning.token_ids if params.reasoning is not None else ()),
        ):
            check_token_ids(name, ids, self.vocab_size, parameter=name)
        if params.structured_outputs is not None and not params.structured_outputs.compiled:
            raise InvalidRequestError(
                "structured_outputs has no grammar: compile it first, with compile_structured_outputs",
                parameter="structured_outputs",
            )
        num_blocks, most = self.num_blocks + self.lent_blocks, self.max_new_tokens(length, params)
        check_blocks(length, most, num_blocks=num_blocks, block_size=self.block_size)


def prompt_too_long(length: str, limit: int, *, generates: bool = True) -> PromptTooLongError:
    """Return the error for a prompt of `length` tokens, such as `5000` or `more than 5000`, and a model of `limit`."""
    return PromptTooLongError(
        f"{_context_length(limit)}. However, the prompt has {length} tokens: the prompt is too long, the model takes "
        f"at most {limit - generates}{ONE_LEFT if generates else ''}",
        parameter="prompt",
    )


def _context_length(limit: int) -> str:
    """Return how errors about lengths begin: clients look for these words of OpenAI's, and for `prompt is too long`, to
    shorten a conversation or to take another model.
    """
    return f"This model's maximum context length is {limit} tokens"


def check_token_ids(owner: str, ids: Iterable[int], vocab_size: int, *, parameter: str | None = None) -> None:
    """Raise InvalidRequestError, naming `owner`, unless all ids are whole numbers below `vocab_size`."""
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise InvalidRequestError(
                f"{owner} has the token id {brief(token)}, but the model's are from 0 to {vocab_size - 1}",
                parameter=parameter,
            )


def ceil_div(amount: int, size: int) -> int:
    """Return `amount / size`, rounded up."""
    return -(-amount // size)


def blocks_needed(num_prompt: int, most: int, block_size: int) -> int:
    """Return the KV blocks for a prompt and the `most` tokens it may generate, of which the last's KV is never read."""
    return ceil_div(num_prompt + most - 1, block_size)


def check_blocks(num_prompt: int, most: int, *, num_blocks: int, block_size: int) -> None:
    """Raise RequestTooLargeError unless a prompt and the `most` tokens it may generate fit the whole KV cache."""
    need = blocks_needed(num_prompt, most, block_size)
    if need > num_blocks:
        raise RequestTooLargeError(
            f"the request needs {need} KV blocks for {num_prompt} prompt and up to {most} generated tokens, but the "
            f"whole cache has {num_blocks} blocks of {block_size} tokens: the prompt is too long for this cache; "
            f"shorten it, lower max_tokens to at most {max(num_blocks * block_size + 1 - num_prompt, 0)}, or give the "
            "cache more memory",
            parameter="max_tokens",
        )
