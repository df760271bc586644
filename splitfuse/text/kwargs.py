"""Turns the keywords of `pipeline()` and `client()`, which are DeepSpeed-MII's, into SamplingParams.

It decides what a keyword that was left out means, and that errors use the names of the keywords. What depends on a
model (lengths, token ids) is checked elsewhere.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from typing import Any, TypeVar

from splitfuse.core.sampling_params import PARAMETERS, Parameter, SamplingParams
from splitfuse.core.structured_outputs import StructuredOutputs
from splitfuse.errors import InvalidRequestError, PromptTooLongError, did_you_mean

DEFAULT_MAX_NEW_TOKENS = 1024

SAMPLING_KEYWORDS: Mapping[str, Parameter] = {each.keyword: each for each in PARAMETERS.values()}
"""Sampling parameters by their names in a call; `do_sample` is another keyword of `sampling_params`."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


def sampling_params(*, do_sample: bool | None = None, **keywords: Any) -> SamplingParams:
    """Return the parameters that `do_sample` and SAMPLING_KEYWORDS ask for.

    `do_sample` False is greedy; left out, random choices follow from temperature, top_p, top_k or min_p. Raises
    InvalidRequestError, naming the keyword, for a value that cannot be honoured or a keyword that does not exist.

    >>> sampling_params(max_new_tokens=20, top_p=0.9)
    """
    refuse_unknown(keywords, SAMPLING_KEYWORDS)
    check_flags(do_sample=do_sample)
    values = {}
    for keyword, value in keywords.items():
        parameter = SAMPLING_KEYWORDS[keyword]
        if value is not None:
            values[parameter.name] = _immutable(parameter, value)
        elif not (parameter.samples or parameter.is_collection):  # of those, None is as if left out
            values[parameter.name] = None
    with spelled_as_keywords():
        return SamplingParams(**_randomness(do_sample, values))


def sampling_signature(function: _Function) -> _Function:
    """Show SAMPLING_KEYWORDS in the signature and the docstring of a function that takes them as `**keywords`."""
    signature = inspect.signature(function)
    shown = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    shown.append(inspect.Parameter("do_sample", inspect.Parameter.KEYWORD_ONLY, default=None))
    for keyword, parameter in SAMPLING_KEYWORDS.items():
        default = None if parameter.samples or parameter.is_collection else parameter.default
        shown.append(inspect.Parameter(keyword, inspect.Parameter.KEYWORD_ONLY, default=default))
    function.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    lines = (f"    {keyword:<20}{parameter.description}" for keyword, parameter in SAMPLING_KEYWORDS.items())
    function.__doc__ = "\n".join((inspect.cleandoc(function.__doc__ or ""), "\nSampling keywords:", *lines))
    return function


def check_flags(**flags: object) -> None:
    """Raise InvalidRequestError unless all are True, False or None."""
    for name, value in flags.items():
        if not isinstance(value, bool | None):
            raise InvalidRequestError(f"{name} must be True or False, not {value!r}", parameter=name)


def check_max_length(max_length: object, num_prompt: int = 0, limit: int | None = None) -> None:
    """Raise InvalidRequestError unless `max_length` is a whole number above `num_prompt`, within `limit`."""
    if not isinstance(max_length, int) or isinstance(max_length, bool) or max_length < 1:
        raise InvalidRequestError(
            f"max_length must be a whole number of at least 1, not {max_length!r}", parameter="max_length"
        )
    if max_length <= num_prompt:
        raise PromptTooLongError(
            f"max_length {max_length} leaves nothing to generate after a prompt of {num_prompt} tokens",
            parameter="max_length",
        )
    if limit is not None and max_length > limit:
        raise InvalidRequestError(f"max_length {max_length} exceeds the model's {limit}", parameter="max_length")


def resolve_max_tokens(params: SamplingParams, num_prompt: int, limit: int, max_length: int | None) -> SamplingParams:
    """Return the parameters with max_tokens resolved: `max_length` counts the prompt, `max_new_tokens` does not.

    Raises InvalidRequestError for a `max_length` that cannot be honoured.
    """
    if max_length is None:
        return params if params.max_tokens else clamp_max_tokens(params, DEFAULT_MAX_NEW_TOKENS, limit - num_prompt)
    check_max_length(max_length, num_prompt, limit)
    room = max_length - num_prompt
    if params.min_tokens > room:
        left = f"max_length {max_length} leaves {room} after a prompt of {num_prompt} tokens"
        message = f"min_new_tokens {params.min_tokens} does not fit: {left}"
        raise InvalidRequestError(message, parameter="min_new_tokens")
    return clamp_max_tokens(params, params.max_tokens or room, room)


def clamp_max_tokens(params: SamplingParams, max_tokens: int, room: int) -> SamplingParams:
    """Return the parameters with `max_tokens`, or `room` if that is less, but at least min_tokens.

    >>> clamp_max_tokens(SamplingParams(), 1024, room=97).max_tokens
    97
    """
    return replace(params, max_tokens=max(min(max_tokens, room), params.min_tokens, 1))


def refuse_unknown(names: Iterable[str], known: Iterable[str]) -> None:
    """Raise InvalidRequestError for the first of `names` that is not known."""
    known = set(known)
    for name in names:
        if name not in known:
            raise InvalidRequestError(f"unknown keyword {name!r}{did_you_mean(name, known)}", parameter=name)


def _randomness(do_sample: bool | None, values: dict[str, Any]) -> dict[str, Any]:
    """Return `values` with the temperature that random choices take, if they were asked for."""
    random = {name: value for name, value in values.items() if PARAMETERS[name].samples}
    if do_sample is False:
        for name, value in random.items():
            if (name, value) != ("temperature", 0):
                raise InvalidRequestError(
                    f"{name} {value} has no effect with do_sample=False: remove one of the two", parameter=name
                )
        return values
    if do_sample and random.get("temperature") == 0:
        raise InvalidRequestError(
            "temperature 0 is greedy and contradicts do_sample=True: remove one of the two", parameter="temperature"
        )
    return {"temperature": 1.0, **values} if do_sample or random else values


@contextmanager
def spelled_as_keywords() -> Iterator[None]:
    """Make errors raised inside name parameters as a call does: `max_new_tokens`, not `max_tokens`."""
    try:
        yield
    except InvalidRequestError as error:
        respell(error)
        raise


def respell(error: InvalidRequestError) -> None:
    """Change the parameter names in an error to those of the keywords."""
    names = {each.name: keyword for keyword, each in SAMPLING_KEYWORDS.items() if each.name != keyword}
    error.args = (re.sub(rf"\b({'|'.join(names)})\b", lambda match: names[match[0]], str(error)),)
    names["splitfuse_deadline"] = "deadline"
    error.parameter = names.get(error.parameter or "", error.parameter)


def _immutable(parameter: Parameter, value: Any) -> Any:
    """Return a mapping as a copy or as StructuredOutputs, a list as a tuple and a single stop string as a tuple of it;
    others as they are.
    """
    if parameter.type is StructuredOutputs:
        return StructuredOutputs.of(value)
    if isinstance(value, Mapping) and parameter.is_collection:
        return copy(value)
    if isinstance(value, str) and parameter.type == tuple[str, ...]:
        return (value,)
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return tuple(value) if is_list and parameter.is_collection else value


def as_list(prompts: Any, chat: bool) -> list[Any]:
    """Return the prompts of a call, one or many, as a list. Raises InvalidRequestError for anything else."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise InvalidRequestError(f"prompts must be a text or a list, not {prompts!r:.80}", parameter="prompts")
    if not prompts:
        raise InvalidRequestError("the list of prompts is empty: pass at least one prompt", parameter="prompts")
    is_single = isinstance(prompts[0], Mapping) if chat else isinstance(prompts[0], int)
    return [prompts] if is_single else list(prompts)
