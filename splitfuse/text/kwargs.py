"""The keywords of `pipeline()` and of `client()`, which are DeepSpeed-MII's, as SamplingParams.

It decides what a keyword that was left out means, and that errors speak of the names used here. It must not know of
models: what depends on one (lengths, token ids) is checked elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any

from splitfuse.core.sampling_params import SamplingParams
from splitfuse.errors import InvalidRequestError, did_you_mean

DEFAULT_MAX_NEW_TOKENS = 1024


def sampling_params(
    *,
    max_new_tokens: int | None = None,
    min_new_tokens: int = 0,
    do_sample: bool | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    seed: int | None = None,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    repetition_penalty: float = 1.0,
    logit_bias: Mapping[int, float] | None = None,
    stop: str | Sequence[str] | None = None,
    stop_token_ids: Sequence[int] | None = None,
    ignore_eos: bool = False,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    n: int = 1,
) -> SamplingParams:
    """Raises InvalidRequestError, naming the keyword, for a value that cannot be honoured.

    do_sample    False is greedy; left out, choosing at random follows from temperature, top_p, top_k or min_p
    logprobs     alternatives to report with each token: 0 for the token alone
    """
    check_flag("do_sample", do_sample)
    with spelled_as_keywords():
        return SamplingParams(
            max_tokens=max_new_tokens,
            min_tokens=min_new_tokens,
            stop=(stop,) if isinstance(stop, str) else _as_tuple(stop),
            stop_token_ids=_as_tuple(stop_token_ids),
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            repetition_penalty=repetition_penalty,
            logit_bias={} if logit_bias is None else copy(logit_bias),
            ignore_eos=ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            n=n,
            seed=seed,
            **_randomness(do_sample, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p),
        )


def check_flag(name: str, value: object) -> None:
    """Raises InvalidRequestError unless it is True, False or None."""
    if not isinstance(value, bool | None):
        raise InvalidRequestError(f"{name} must be True or False, not {value!r}", parameter=name)


def refuse_unknown(unknown: Iterable[str], known: Iterable[str]) -> None:
    """Raises InvalidRequestError for the first name, if there is one."""
    for name in unknown:
        raise InvalidRequestError(f"unknown keyword {name!r}{did_you_mean(name, known)}", parameter=name)


def _randomness(do_sample: bool | None, **given: float | None) -> dict[str, Any]:
    """temperature, top_p, top_k and min_p as SamplingParams wants them; greedy is temperature 0."""
    set_ones = {name: value for name, value in given.items() if value is not None}
    if do_sample is False:
        for name, value in set_ones.items():
            if (name, value) != ("temperature", 0):
                raise InvalidRequestError(
                    f"{name} {value} has no effect with do_sample=False: leave one out", parameter=name
                )
        return {}
    if do_sample and set_ones.get("temperature") == 0:
        raise InvalidRequestError(
            "temperature 0 is greedy, do_sample=True is not: leave one out", parameter="temperature"
        )
    if do_sample or set_ones:
        return {"temperature": 1.0, **set_ones}
    return {}


@contextmanager
def spelled_as_keywords() -> Iterator[None]:
    """Errors about `max_tokens` and `min_tokens` by the names that they have in a call."""
    try:
        yield
    except InvalidRequestError as error:
        respell(error)
        raise


def respell(error: InvalidRequestError) -> None:
    """Change the message and the parameter's name to those of our keywords."""
    error.args = (re.sub(r"\b(max|min)_tokens\b", r"\1_new_tokens", str(error)),)
    names = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens", "splitfuse_deadline": "deadline"}
    error.parameter = names.get(error.parameter or "", error.parameter)


def _as_tuple(value: Any) -> Any:
    """None is empty, a list becomes a tuple; anything else is left for SamplingParams to refuse."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def as_list(prompts: Any, chat: bool) -> list[Any]:
    """The prompts of a call, one or many, as a list. Raises InvalidRequestError for what is neither."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise InvalidRequestError(f"prompts must be a text or a list, not {prompts!r:.80}", parameter="prompts")
    if not prompts:
        raise InvalidRequestError("there is no prompt: the list is empty", parameter="prompts")
    is_single = isinstance(prompts[0], Mapping) if chat else isinstance(prompts[0], int)
    return [prompts] if is_single else list(prompts)
