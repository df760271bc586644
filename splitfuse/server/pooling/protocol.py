"""Defines the bodies and answers of the routes that generate nothing, as OpenAI, Cohere, Jina and vLLM write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from splitfuse.core.sampling_params import MAX_INT
from splitfuse.errors import InvalidRequestError
from splitfuse.server.slo_params import SloParams
from splitfuse.server.texts import Texts, texts_of, texts_schema
from splitfuse.server.validation import Body, SchemaBounds, accepts_neutral

MAX_TEXTS = 2048
"""Number of texts that one request may have, as OpenAI's. They run as many at once as max_prompts allows."""
MAX_QUESTIONS = 64
"""Number of questions that one request may ask."""

_NO_TRUNCATION = "texts are not cut: send shorter ones"

_Model = Annotated[str, Meta(max_length=512)] | None
_Text = Annotated[str, Meta(min_length=1)]
_Content = str | dict[str, Any] | list[Any]

Method = Literal["yes_no", "cosine"]
"""Way in which texts are compared."""

_METHOD = Annotated[
    Method, Meta(description="yes_no: the model judges; cosine: of embeddings; left out: what the model is for")
]
_INSTRUCTION = Annotated[str, Meta(min_length=1, description="Task in words, for the method yes_no")]


class EmbeddingRequest(SloParams, kw_only=True, frozen=True):
    """Asks for embeddings of texts or token ids, one or several: POST /v1/embeddings."""

    PATH: ClassVar[str] = "/v1/embeddings"
    REFUSED: ClassVar[Mapping[str, str]] = {
        "truncate_prompt_tokens": _NO_TRUNCATION,
        "input_type": "write the model's instruction in front of the text",
        "task": "write the model's instruction in front of the text",
        "messages": "send texts, as input",
    }

    input: Texts
    model: _Model = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1, le=MAX_INT, description="Keeps the first ones; left out: all")] | None = None
    user: Annotated[str, Meta(max_length=1024, description="Changes nothing")] | None = None

    @classmethod
    def refine_schema(cls, schema: dict[str, Any], bounds: SchemaBounds) -> dict[str, Any]:
        """See Body: a list has one kind of texts."""
        super().refine_schema(schema, bounds)["properties"]["input"] = texts_schema(bounds, MAX_TEXTS)
        return schema

    def texts(self) -> list[str | list[int]]:
        """Return one text or more, or their token ids. Raises InvalidRequestError for a list of mixed kinds."""
        texts = texts_of(self.input, "input")
        check_count(texts, "input")
        return texts

    @property
    def places(self) -> list[str]:
        """Return how errors name each of `texts`."""
        if isinstance(self.input, str) or isinstance(self.input[0], int):
            return ["input"]
        return [f"input[{index}]" for index in range(len(self.input))]


class Embedding(msgspec.Struct, frozen=True):
    """Holds the embedding of one text: numbers, or in base64 their bytes as little-endian fp32."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class PoolingUsage(msgspec.Struct, frozen=True):
    """Counts the tokens of the texts. Nothing is generated, so they are all."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(msgspec.Struct, frozen=True):
    """Answers POST /v1/embeddings."""

    data: list[Embedding]
    model: str
    usage: PoolingUsage
    object: Literal["list"] = "list"


class TextDocument(Body, kw_only=True, frozen=True):
    """Holds a document as an object."""

    text: _Text


class RerankRequest(SloParams, kw_only=True, frozen=True):
    """Asks how well documents answer a query: POST /v1/rerank."""

    PATH: ClassVar[str] = "/v1/rerank"
    REFUSED: ClassVar[Mapping[str, str]] = {
        "truncate_prompt_tokens": _NO_TRUNCATION,
        "truncation": _NO_TRUNCATION,
        "max_tokens_per_doc": _NO_TRUNCATION,
        "max_chunks_per_doc": _NO_TRUNCATION,
        "rank_fields": "write what counts into one text",
    }

    query: _Text
    documents: Annotated[list[_Text | TextDocument], Meta(min_length=1, max_length=MAX_TEXTS)]
    model: _Model = None
    top_n: Annotated[int, Meta(ge=1, le=MAX_INT, description="Best documents to return; left out: all")] | None = None
    return_documents: Annotated[bool, Meta(description="Adds the documents; left out: false")] | None = None
    splitfuse_instruction: _INSTRUCTION | None = None
    splitfuse_method: _METHOD | None = None

    def texts(self) -> list[str]:
        """Return the documents as texts."""
        return [each if isinstance(each, str) else each.text for each in self.documents]


class RankedDocument(msgspec.Struct, frozen=True):
    """Holds the place of a document in the request, and how well it answers."""

    index: int
    relevance_score: float
    document: dict[str, str] | UnsetType = UNSET


class Ranking(msgspec.Struct, frozen=True):
    """Answers POST /v1/rerank, the best document first."""

    id: str
    model: str
    results: list[RankedDocument]
    usage: PoolingUsage
    splitfuse_method: Method


class ScoreRequest(SloParams, kw_only=True, frozen=True):
    """Asks how well texts go together, one with each of several or pair by pair: POST /v1/score."""

    PATH: ClassVar[str] = "/v1/score"
    REFUSED: ClassVar[Mapping[str, str]] = {"truncate_prompt_tokens": _NO_TRUNCATION}

    text_1: _Text | Annotated[list[_Text], Meta(min_length=1, max_length=MAX_TEXTS)]
    text_2: _Text | Annotated[list[_Text], Meta(min_length=1, max_length=MAX_TEXTS)]
    model: _Model = None
    splitfuse_instruction: _INSTRUCTION | None = None
    splitfuse_method: _METHOD | None = None

    def pairs(self) -> list[tuple[str, str]]:
        """Return the pairs. Raises InvalidRequestError for lists of different lengths."""
        first, second = ([each] if isinstance(each, str) else each for each in (self.text_1, self.text_2))
        if len(first) == 1:
            first = first * len(second)
        if len(first) != len(second):
            raise InvalidRequestError(
                f"text_1 has {len(first)} texts and text_2 {len(second)}: give as many, or a single text_1",
                parameter="text_1",
            )
        return list(zip(first, second, strict=True))

    def places(self, count: int) -> list[tuple[str, str]]:
        """Return how errors name the texts of each of `count` pairs."""
        first, second = (
            [f"{name}[{index}]" if isinstance(texts, list) and len(texts) > 1 else name for index in range(count)]
            for name, texts in (("text_1", self.text_1), ("text_2", self.text_2))
        )
        return list(zip(first, second, strict=True))


class Score(msgspec.Struct, frozen=True):
    """Holds how well a pair goes together."""

    index: int
    score: float
    object: Literal["score"] = "score"


class ScoreList(msgspec.Struct, frozen=True):
    """Answers POST /v1/score."""

    id: str
    created: int
    model: str
    data: list[Score]
    usage: PoolingUsage
    splitfuse_method: Method
    object: Literal["list"] = "list"


class DecisionQuestion(Body, kw_only=True, frozen=True):
    """Asks one question. Criteria are, of a choice, an object with a description or null for each option; of a score,
    an array that describes its levels, the lowest first; of a noul, descriptions of `true` and `false`, if any.
    """

    type: Literal["choice", "score", "noul"]
    instructions: _Content | None = None
    criteria: dict[str, Any] | list[Any] | None = None


@accepts_neutral(assets=[{}])
class DecisionRequest(SloParams, kw_only=True, frozen=True):
    """Asks typed questions about a state: POST /v1/systemone."""

    PATH: ClassVar[str] = "/v1/systemone"
    REFUSED: ClassVar[Mapping[str, str]] = {"assets": "this server reads no images"}

    state: _Content
    questions: Annotated[dict[str, DecisionQuestion], Meta(min_length=1, max_length=MAX_QUESTIONS)]
    model: _Model = None


class DecisionUsage(msgspec.Struct, frozen=True):
    """Counts the tokens of all prompts, and those of them that were found in the prefix cache."""

    input_tokens: int
    output_tokens: int
    cached_tokens: int


class DecisionList(msgspec.Struct, frozen=True):
    """Answers POST /v1/systemone: an answer to each question, by its name."""

    model: str
    answers: dict[str, dict[str, Any]]
    usage: DecisionUsage


def check_count(texts: list[Any], parameter: str) -> None:
    """Raise InvalidRequestError for more than MAX_TEXTS texts."""
    if len(texts) > MAX_TEXTS:
        message = f"{parameter} has {len(texts)} texts; at most {MAX_TEXTS} are taken in one request"
        raise InvalidRequestError(message, parameter=parameter)
