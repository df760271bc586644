"""What a caller may ask of one request's sampling, checked where it is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from splitfuse.errors import InvalidRequestError

MAX_LOGPROBS = 128
MAX_STOP_STRINGS = 64
MAX_SEED = 2**64 - 1


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request's tokens are chosen, and when it ends. Temperature 0 is greedy.

    The order of processing is that of Hugging Face transformers: logit_bias, penalties, min_tokens, temperature, top_k,
    top_p, min_p. Raises InvalidRequestError, naming the parameter, for any value out of range.
    """

    max_tokens: int | None = None  # None: as many as the model and the cache allow
    min_tokens: int = 0  # generated ones; the prompt does not count
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    seed: int | None = None  # None: drawn at the edge and stored, so that a preempted request continues its stream
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # how many alternatives to report beside the chosen token; 0: the chosen one only
    prompt_logprobs: int | None = None
    n: int = 1

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1)
        _integer("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _refused("min_tokens", self.min_tokens, f"at most max_tokens ({self.max_tokens})")
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0, open_below=True)
        _integer("top_k", self.top_k, 0)
        _number("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _integer("seed", self.seed, 0, MAX_SEED)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_below=True)
        if not isinstance(self.logit_bias, Mapping):
            raise _refused("logit_bias", self.logit_bias, "a mapping of token ids to numbers")
        for token, bias in self.logit_bias.items():
            _integer("logit_bias", token, 0)
            _number("logit_bias", bias, -100.0, 100.0)
        if not isinstance(self.stop, tuple | list) or not all(isinstance(s, str) and s for s in self.stop):
            raise _refused("stop", self.stop, "a list of non-empty strings")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise _refused("stop", f"{len(self.stop)} strings", f"at most {MAX_STOP_STRINGS} strings")
        if not isinstance(self.stop_token_ids, tuple | list):
            raise _refused("stop_token_ids", self.stop_token_ids, "a list of token ids")
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0)
        if not isinstance(self.ignore_eos, bool):
            raise _refused("ignore_eos", self.ignore_eos, "True or False")
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if count is not None:
                _integer(name, count, 0, MAX_LOGPROBS)
        _integer("n", self.n, 1, 128)


def _refused(name: str, value: object, wanted: str) -> InvalidRequestError:
    return InvalidRequestError(f"{name} must be {wanted}, not {value!r:.80}", parameter=name)


def _integer(name: str, value: object, least: int, most: int = 2**31 - 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise _refused(name, value, f"a whole number from {least} to {most}")


def _number(name: str, value: object, least: float, most: float, *, open_below: bool = False) -> None:
    valid = isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most  # NaN is not
    if not valid or (open_below and value == least):
        raise _refused(
            name,
            value,
            f"a number {'above' if open_below else 'from'} {least:g} {'up ' if open_below else ''}to {most:g}",
        )
