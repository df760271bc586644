"""Declares the sampling parameters of a request, as one table.

Each field of SamplingParams is a row: name, type, default, bounds, OpenAI's default, help. Everything else is derived
from it: validation here, the keywords of `pipeline()` and `client()` (text/kwargs.py), the flags of the command line
(cli/flags.py), the fields of OpenAI requests (server/sampling.py) and the table in docs/server.md. A new
parameter costs two edits: its row here and its effect in runtime/sampling/. `reasoning` alone is no row: it has the
tokens of a model.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from splitfuse.core.reasoning import Reasoning, Thought
from splitfuse.core.structured_outputs import StructuredOutputs
from splitfuse.errors import InvalidRequestError, brief

MAX_INT = 2**31 - 1
MAX_LOGPROBS = 128
MAX_STOP_STRINGS = 64
MAX_SEED = 2**64 - 1


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """Describes one sampling parameter to every interface that offers it. Name, type and `optional` are the field's."""

    help: str
    minimum: float = 0
    maximum: float = MAX_INT
    """Bounds of a number, of each element of `logit_bias`, or of the number of stop strings."""
    exclusive: bool = False
    """True if the minimum itself is refused."""
    keyword: str = ""
    """Name of the parameter in `pipeline()`, `client()` and on the command line; left out, that of the field."""
    default: Any
    openai_default: Any = None
    """Value of a parameter that an OpenAI request leaves out; left out, `default`."""
    samples: bool = False
    """True if giving it in a call asks for random choices, which are otherwise greedy (see `do_sample`)."""
    name: str = ""
    type: Any = None
    """Type of a value, without None."""
    optional: bool = False
    """True if None is a value of its own."""

    @property
    def is_collection(self) -> bool:
        """Return whether a value is a list or a mapping, so that None in a call means an empty one."""
        return typing.get_origin(self.type) is not None

    def check(self, value: Any) -> None:
        """Raise InvalidRequestError, naming the parameter, unless `value` is one of its values."""
        if value is None and self.optional:
            return
        if self.type is bool:
            if not isinstance(value, bool):
                raise _refused(self.name, value, "True or False")
        elif self.type is int:
            self._check_int(value)
        elif self.type is float:
            self._check_number(value)
        elif self.type is StructuredOutputs:
            if not isinstance(value, StructuredOutputs):
                raise _refused(self.name, value, "a StructuredOutputs")
        elif self.type == tuple[str, ...]:
            if not isinstance(value, tuple | list) or not all(isinstance(text, str) and text for text in value):
                raise _refused(self.name, value, "a list of non-empty strings")
            if len(value) > self.maximum:
                raise _refused(self.name, f"{len(value)} strings", f"at most {self.maximum} strings")
        elif self.type == tuple[int, ...]:
            if not isinstance(value, tuple | list):
                raise _refused(self.name, value, "a list of token ids")
            for token in value:
                self._check_token_id(token)
        else:
            if not isinstance(value, Mapping):
                raise _refused(self.name, value, "a mapping of token ids to numbers")
            for token, number in value.items():
                self._check_token_id(token)
                self._check_number(number)

    def _check_int(self, value: Any) -> None:
        if not _is_int(value, self.minimum, self.maximum):
            raise _refused(self.name, value, f"a whole number {self.range}")

    def _check_token_id(self, value: Any) -> None:
        if not _is_int(value, 0, MAX_INT):
            raise _refused(self.name, value, "token ids of the model, from 0 on")

    def _check_number(self, value: Any) -> None:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (is_number and self.minimum <= value <= self.maximum) or (self.exclusive and value == self.minimum):
            raise _refused(self.name, value, f"a number {self.range}")

    @property
    def description(self) -> str:
        """Return the help with the bounds of the value, where there are any to speak of."""
        bounded = self.type in (int, float) and (self.minimum, self.maximum) != (0, MAX_INT)
        return f"{self.help} {self.range[0].upper()}{self.range[1:]}." if bounded else self.help

    @property
    def range(self) -> str:
        """Return the bounds in words, such as `from 0 to 1` or `above 0 up to 100`."""
        low, high = (str(bound) if self.type is int else f"{bound:g}" for bound in (self.minimum, self.maximum))
        return f"above {low} up to {high}" if self.exclusive else f"from {low} to {high}"


def parameter(default: Any, help: str, **attributes: Any) -> Any:  # noqa: A002 - the word every command line uses
    """Declare a parameter as a dataclass field: see Parameter for what the arguments mean."""
    metadata = {"parameter": Parameter(default=default, help=help, **attributes)}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Says how the tokens of one request are chosen, and when it ends. Temperature 0 is greedy.

    The order of processing is that of Hugging Face transformers: logit_bias, penalties, min_tokens, temperature, top_k,
    top_p, min_p; tokens that structured_outputs forbid have no part in it. Raises InvalidRequestError, naming the
    parameter, for any value out of range.

    >>> SamplingParams(max_tokens=64, temperature=0.8, top_p=0.95, seed=1)
    """

    # None in SamplingParams itself: as many as the model and the cache allow
    max_tokens: int | None = parameter(
        None, "Most tokens to generate; left out, 1024.", minimum=1, keyword="max_new_tokens"
    )
    min_tokens: int = parameter(
        0, "Generated tokens before which the answer does not end; the prompt does not count.", keyword="min_new_tokens"
    )
    temperature: float = parameter(
        0.0,
        "Randomness of the choice; 0 is greedy.",
        maximum=100.0,
        openai_default=1.0,
        samples=True,
    )
    top_p: float = parameter(
        1.0,
        "Choose among the most probable tokens that together have this probability.",
        maximum=1.0,
        exclusive=True,
        samples=True,
    )
    top_k: int = parameter(0, "Choose among this many most probable tokens; 0 is all.", samples=True)
    min_p: float = parameter(
        0.0, "Choose among tokens at least this fraction as probable as the best.", maximum=1.0, samples=True
    )
    seed: int | None = parameter(
        None, "Makes random choices repeatable; left out, a new one each time.", maximum=MAX_SEED
    )
    presence_penalty: float = parameter(
        0.0, "Subtracted from the score of every token already generated.", minimum=-2.0, maximum=2.0
    )
    frequency_penalty: float = parameter(
        0.0, "Subtracted from the score of a token for each time it was generated.", minimum=-2.0, maximum=2.0
    )
    repetition_penalty: float = parameter(
        1.0, "Divides the score of tokens already in the text.", maximum=100.0, exclusive=True
    )
    logit_bias: Mapping[int, float] = parameter(
        {}, "Added to the scores of tokens by id.", minimum=-100.0, maximum=100.0
    )
    stop: tuple[str, ...] = parameter(
        (), "Text that ends the answer; may be given several times.", maximum=MAX_STOP_STRINGS
    )
    stop_token_ids: tuple[int, ...] = parameter((), "Token ids that end the answer.")
    ignore_eos: bool = parameter(False, "Continue after the model's EOS token.")
    logprobs: int | None = parameter(
        None, "Report log-probabilities with this many alternatives; 0 is the token alone.", maximum=MAX_LOGPROBS
    )
    prompt_logprobs: int | None = parameter(
        None, "Report log-probabilities of the prompt, with this many alternatives.", maximum=MAX_LOGPROBS
    )
    structured_outputs: StructuredOutputs | None = parameter(  # noqa: RUF009 - it declares a field
        None, "Form of the answer: one of json (a schema), json_object, regex, choice, grammar."
    )
    n: int = parameter(1, "Answers to each prompt.", minimum=1, maximum=128)
    reasoning: Reasoning | None = None
    """Tokens around the model's thought, and its budget (text/reasoning.py)."""

    def __post_init__(self) -> None:
        for each in PARAMETERS.values():
            each.check(getattr(self, each.name))
        if not isinstance(self.reasoning, Reasoning | None):
            raise _refused("reasoning", self.reasoning, "a Reasoning")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _refused("min_tokens", self.min_tokens, f"at most max_tokens ({self.max_tokens})")

    def thought(self) -> Thought | None:
        """Return what follows the thought of an answer from its first token on; None without `reasoning`."""
        if self.reasoning is None:
            return None
        return Thought(self.reasoning, has_form=self.structured_outputs is not None)


def _table() -> dict[str, Parameter]:
    hints, table = typing.get_type_hints(SamplingParams), {}
    rows = {each.name: each.metadata["parameter"] for each in fields(SamplingParams) if each.metadata}
    for name, row in rows.items():
        kinds = typing.get_args(hints[name]) if isinstance(hints[name], types.UnionType) else ()
        table[name] = replace(
            row,
            name=name,
            type=kinds[0] if kinds else hints[name],
            optional=types.NoneType in kinds,
            keyword=row.keyword or name,
            openai_default=row.default if row.openai_default is None else row.openai_default,
        )
    return table


def _is_int(value: Any, minimum: float, maximum: float) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= maximum


def _refused(name: str, value: object, valid: str) -> InvalidRequestError:
    return InvalidRequestError(f"{name} must be {valid}, not {brief(value)}", parameter=name)


PARAMETERS: Mapping[str, Parameter] = _table()
"""Table of all sampling parameters by their names in SamplingParams."""
