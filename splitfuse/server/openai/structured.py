"""Reads how OpenAI's and vLLM's requests ask for the form of an answer: response_format, structured_outputs, guided_*.

Each of them becomes a `StructuredOutputs`. The text layer compiles it, and refuses what cannot be enforced.
"""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, field

from splitfuse.core.structured_outputs import KINDS, MAX_CHARACTERS, OPTIONS, StructuredOutputs
from splitfuse.errors import InvalidRequestError
from splitfuse.server.errors import RefusedError
from splitfuse.server.generate import FORM, errors_named
from splitfuse.server.sampling import SamplingFields
from splitfuse.server.validation import Body, accepts_neutral

_TEXT = Annotated[str, Meta(min_length=1, max_length=MAX_CHARACTERS)]
_CHOICES = Annotated[list[_TEXT], Meta(min_length=1)]
_SCHEMA = dict[str, Any]


class JsonSchema(Body, kw_only=True, frozen=True):
    """Holds the schema of a response_format. Answers keep to it, strict or not."""

    name: Annotated[str, Meta(max_length=512)]
    schema_: _SCHEMA | None = field(default=None, name="schema")
    description: Annotated[str, Meta(max_length=65536, description="Changes nothing")] | None = None
    strict: Annotated[bool, Meta(description="Changes nothing: every schema is kept to")] | None = None


class ResponseFormat(Body, kw_only=True, frozen=True):
    """Says that an answer is text, any JSON object, or JSON of a schema."""

    type: Annotated[str, Meta(extra_json_schema={"enum": ["text", "json_object", "json_schema"]})]
    json_schema: JsonSchema | None = None

    def form(self) -> dict[str, Any] | None:
        """Return the form as StructuredOutputs takes it; None for text. Raises InvalidRequestError."""
        if self.type not in ("text", "json_object", "json_schema"):
            message = f"response_format.type must be text, json_object or json_schema, not {self.type!r:.80}"
            raise InvalidRequestError(message, parameter="response_format.type")
        if (self.json_schema is not None) != (self.type == "json_schema"):
            place = "response_format.json_schema"
            if self.json_schema is None:
                raise RefusedError(400, f"{place} is missing", code="missing_parameter", parameter=place)
            raise InvalidRequestError(f"{place} needs the type json_schema, not {self.type}", parameter=place)
        if self.json_schema is None:
            return None if self.type == "text" else {"json_object": True}
        if self.json_schema.schema_ is None:
            return {"json_object": True}
        return {"json": self.json_schema.schema_}


@accepts_neutral(
    disable_additional_properties=[False],
    disable_fallback=[False, True],  # there is one library, and nothing to fall back on
    structural_tag=[],
    whitespace_pattern=[],
)
class StructuredOutputsBody(Body, kw_only=True, frozen=True):
    """Holds the form of an answer, one of json, json_object, regex, choice and grammar (Lark or GBNF)."""

    json: Annotated[_SCHEMA, Meta(description="A JSON schema, as an object or as text")] | _TEXT | None = None
    json_object: bool | None = None
    regex: _TEXT | None = None
    choice: _CHOICES | None = None
    grammar: _TEXT | None = None
    disable_any_whitespace: Annotated[bool, Meta(description="Writes JSON without white space")] | None = None

    def asked(self) -> dict[str, Any]:
        """Return the form as StructuredOutputs takes it. Raises RefusedError for what is not supported."""
        self.check_neutral("structured_outputs.")
        return {name: getattr(self, name) for name in (*KINDS, *OPTIONS)}


@accepts_neutral(guided_decoding_backend=["auto", "guidance"], guided_whitespace_pattern=[], structural_tag=[])
class StructuredFields(SamplingFields, kw_only=True, frozen=True):
    """Declares every field of a request that says which form the answer must have. At most one of them is given."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputsBody | None = None
    guided_json: _SCHEMA | _TEXT | None = None
    guided_regex: _TEXT | None = None
    guided_choice: _CHOICES | None = None
    guided_grammar: _TEXT | None = None

    def form(self) -> tuple[str, StructuredOutputs] | None:
        """Return the form, with the name by which the request gives it. Raises InvalidRequestError for several, and for
        one that is not possible.
        """
        given: dict[str, dict[str, Any]] = {}
        if self.response_format is not None and (asked := self.response_format.form()) is not None:
            given["response_format.json_schema.schema" if "json" in asked else "response_format"] = asked
        if (fields := self.structured_outputs) is not None:
            given["structured_outputs"] = fields.asked()
        for kind in ("json", "regex", "choice", "grammar"):
            if (value := getattr(self, f"guided_{kind}")) is not None:
                given[f"guided_{kind}"] = {kind: value}
        if not given:
            return None
        (name, asked), *others = given.items()
        if others:
            first, second = name.partition(".")[0], others[0][0]
            message = f"{first} and {second} both say which form the answer must have: give one"
            raise InvalidRequestError(message, parameter=second)
        with errors_named({FORM: name} if name != FORM else {}):
            return name, StructuredOutputs.of(asked)
