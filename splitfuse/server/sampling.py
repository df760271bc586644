"""Derives the sampling parameters of a body from the table in core/sampling_params.py.

It decides how a parameter is written in JSON where that differs from SamplingParams, and what one left out means.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import Meta

from splitfuse.core.sampling_params import MAX_INT, MAX_SEED, MAX_STOP_STRINGS, PARAMETERS, Parameter, SamplingParams
from splitfuse.errors import InvalidRequestError
from splitfuse.server.slo_params import SloParams
from splitfuse.server.validation import SchemaBounds

MAX_STOP_CHARACTERS = 8192
"""Number of characters that all stop strings of a request may have together."""

_STOP = Annotated[str, Meta(min_length=1, max_length=1024)]
_BIAS = Annotated[float, Meta(ge=PARAMETERS["logit_bias"].minimum, le=PARAMETERS["logit_bias"].maximum)]

_JSON_TYPES: dict[str, Any] = {
    "seed": Annotated[int, Meta(ge=-1, description="-1: a new one each time", extra_json_schema={"maximum": MAX_SEED})],
    "top_k": Annotated[int, Meta(ge=-1, le=MAX_INT, description="0 and -1: all tokens")],
    "repetition_penalty": Annotated[float, Meta(ge=0.01, le=PARAMETERS["repetition_penalty"].maximum)],
    "stop": _STOP | Annotated[list[_STOP], Meta(max_length=MAX_STOP_STRINGS)],
    "stop_token_ids": Annotated[list[int], Meta(max_length=1024)],
    "logit_bias": Annotated[dict[int, _BIAS], Meta(max_length=1024)],
}
"""Types of parameters that are written in another way, or within narrower bounds, than SamplingParams takes them. Token
ids have no bounds here: an error names those of the model."""

FIELDS = tuple(name for name in PARAMETERS if name not in ("max_tokens", "logprobs", "structured_outputs"))
"""Names of the parameters that all routes for generating text share."""


LENGTHS = {"max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens"}
"""Names of fields that are numbers of tokens to generate."""


def _json_type(parameter: Parameter) -> Any:
    if parameter.name in _JSON_TYPES:
        return _JSON_TYPES[parameter.name]
    if parameter.type is bool:
        return bool
    low, high = parameter.type(parameter.minimum), parameter.type(parameter.maximum)
    bounds: dict[str, Any] = {"gt" if parameter.exclusive else "ge": low}
    if high < 2**63:
        bounds["le"] = high
    else:  # beyond what msgspec compares with; SamplingParams checks it
        bounds["extra_json_schema"] = {"maximum": high}
    return Annotated[parameter.type, Meta(**bounds)]


if TYPE_CHECKING:

    class SamplingFields(SloParams, kw_only=True, frozen=True):
        """Stands in for the derived class, of whose fields a type checker cannot know."""

        def __getattr__(self, name: str) -> Any: ...

else:
    SamplingFields = msgspec.defstruct(
        "SamplingFields",
        [(name, _json_type(PARAMETERS[name]) | None, None) for name in FIELDS],
        bases=(SloParams,),
        module=__name__,
        kw_only=True,
        forbid_unknown_fields=True,
        frozen=True,
    )
    """Base of the bodies that generate text, with a field for each of FIELDS; null is a parameter left out."""


def refine_sampling(schema: dict[str, Any], bounds: SchemaBounds) -> None:
    """Add to the schema of a body with SamplingFields: lengths within the model's, token ids within its vocabulary."""
    properties = schema["properties"]
    properties["logit_bias"]["anyOf"][0]["propertyNames"] = {"pattern": "^(0|[1-9][0-9]*)$"}
    properties["stop_token_ids"]["anyOf"][0]["items"] = bounds.token
    if bounds.max_model_len is not None:
        for name in LENGTHS & properties.keys():
            properties[name]["anyOf"][0]["maximum"] = bounds.max_model_len - 1


def sampling_params(body: SamplingFields, **others: Any) -> SamplingParams:
    """Return the parameters in the SamplingFields of a body and `others`, with OpenAI's defaults.

    Raises InvalidRequestError for a value that cannot be honoured.
    """
    values = {}
    for name in FIELDS:
        value = getattr(body, name)
        values[name] = PARAMETERS[name].openai_default if value is None else value
    stop = values["stop"] = (body.stop,) if isinstance(body.stop, str) else tuple(values["stop"])
    if (length := sum(map(len, stop))) > MAX_STOP_CHARACTERS:
        raise InvalidRequestError(
            f"stop has {length} characters in all; at most {MAX_STOP_CHARACTERS} are accepted", parameter="stop"
        )
    values["stop_token_ids"] = tuple(values["stop_token_ids"])
    values["top_k"] = max(values["top_k"], 0)
    values["seed"] = None if values["seed"] == -1 else values["seed"]
    return SamplingParams(**values | others)
