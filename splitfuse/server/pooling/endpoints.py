"""Defines the routes that generate nothing."""

from __future__ import annotations

import base64
import functools
import sys
import time
from array import array
from functools import partial
from itertools import chain

from splitfuse.core.limits import ENCODER
from splitfuse.core.pooling_params import PoolingParams
from splitfuse.errors import InvalidRequestError, entry
from splitfuse.server.context import RequestContext
from splitfuse.server.dialect import Route, lazy_list
from splitfuse.server.openai.dialect import OPENAI
from splitfuse.server.pooling.protocol import (
    DecisionList,
    DecisionRequest,
    DecisionUsage,
    Embedding,
    EmbeddingList,
    EmbeddingRequest,
    Method,
    PoolingUsage,
    RankedDocument,
    Ranking,
    RerankRequest,
    Score,
    ScoreList,
    ScoreRequest,
)
from splitfuse.server.pooling.run import pooled
from splitfuse.server.state import AppState
from splitfuse.text.chat_formats.parser import Start
from splitfuse.text.pooling import rerank
from splitfuse.text.pooling.decisions import YES_NO, Question, as_text
from splitfuse.text.pooling.embeddings import check_dimensions, cosine, embedding, for_pooling
from splitfuse.text.pooling.labels import has_labels, label_ids, probabilities, without_controls
from splitfuse.text.prompts import ChatOptions, PreparedRequest
from splitfuse.text.service import TextService
from splitfuse.text.variables import SWITCHES

MANY_NUMBERS = 65536
"""Number of numbers from which on an answer is written off the event loop, which it would hold up."""

_UNTHOUGHT = ChatOptions(wishes=dict.fromkeys(SWITCHES, False), reads_parts=True)


async def embeddings(state: AppState, context: RequestContext, body: EmbeddingRequest) -> None:
    """Answer POST /v1/embeddings."""
    texts, service = body.texts(), state.service
    context.prompt = body.input

    sources = [(place, partial(_embeddable, service, text)) for place, text in zip(body.places, texts, strict=True)]
    size = service.client.info.embedding_size
    check_dimensions(body.dimensions, size)
    values = await pooled(state, context, body, sources)

    def item(index: int) -> Embedding:
        numbers = embedding(values[index], body.dimensions)
        return Embedding(index, _base64(numbers) if body.encoding_format == "base64" else numbers.tolist())

    answer = EmbeddingList(lazy_list(map(item, range(len(values)))), body.model or state.model, _usage(context))
    if len(values) * size > MANY_NUMBERS:
        await context.answer_in_pieces(answer, service.off_loop)
    else:
        await context.answer(answer)


async def reranking(state: AppState, context: RequestContext, body: RerankRequest) -> None:
    """Answer POST /v1/rerank and its other names."""
    documents = body.texts()
    context.prompt = {"query": body.query, "documents": documents}
    places = [("query", f"documents[{index}]") for index in range(len(documents))]
    method, scores = await _scores(state, context, body, [(body.query, each) for each in documents], places)
    best = sorted(range(len(documents)), key=lambda index: (-scores[index], index))[: body.top_n]
    results = [
        RankedDocument(index, scores[index], {"text": documents[index]})
        if body.return_documents
        else RankedDocument(index, scores[index])
        for index in best
    ]
    await context.answer(
        Ranking(f"rerank-{context.unique_id}", body.model or state.model, results, _usage(context), method)
    )


async def scores(state: AppState, context: RequestContext, body: ScoreRequest) -> None:
    """Answer POST /v1/score."""
    context.prompt = pairs = body.pairs()
    method, values = await _scores(state, context, body, pairs, body.places(len(pairs)))
    data = [Score(index, value) for index, value in enumerate(values)]
    name, now = f"score-{context.unique_id}", int(time.time())
    await context.answer(ScoreList(name, now, body.model or state.model, data, _usage(context), method))


async def decisions(state: AppState, context: RequestContext, body: DecisionRequest) -> None:
    """Answer POST /v1/systemone."""
    service = state.service
    tokenizer = service.tokenizer
    if not service.client.info.limits.generates:
        raise InvalidRequestError(ENCODER)
    if tokenizer.chat_template is None:
        raise InvalidRequestError("the model has no chat template, in which questions are asked: use another model")
    settings = tokenizer.decisions
    settings.check()
    has_yes_no = has_labels(tokenizer, YES_NO)
    questions = {
        name: Question.parse(asked.type, asked.instructions, asked.criteria, entry("questions", name), settings)
        for name, asked in body.questions.items()
    }
    context.prompt = body.state

    said = as_text(body.state)

    async def encode(question: Question) -> PreparedRequest:
        labels = question.labels(settings, has_yes_no=has_yes_no)
        wanted = PoolingParams(label_ids(tokenizer, labels))
        content = without_controls(question.prompt(said, labels), tokenizer)
        return await _chat(service, [{"role": "user", "content": content}], wanted)

    def place(name: str, question: Question) -> str:
        size = len(question.prompt("", question.labels(settings, has_yes_no=has_yes_no)))
        return "state" if len(said) >= size else entry("questions", name)

    sources = [(place(name, question), partial(encode, question)) for name, question in questions.items()]
    values = await pooled(state, context, body, sources, shares_prefix=True)
    answers = {
        name: question.answer(probabilities(logprobs, settings.temperature.get(question.kind, 1.0)))
        for (name, question), logprobs in zip(questions.items(), values, strict=True)
    }
    counts = context.num_tokens
    await context.answer(
        DecisionList(body.model or state.model, answers, DecisionUsage(counts.prompt, 0, counts.cached))
    )


async def _scores(
    state: AppState,
    context: RequestContext,
    body: RerankRequest | ScoreRequest,
    pairs: list[tuple[str, str]],
    places: list[tuple[str, str]],
) -> tuple[Method, list[float]]:
    """Return how texts are compared, and the score of each pair. `places` are those of the texts in the body."""
    method = body.splitfuse_method or _method(state)
    if method == "cosine":
        if body.splitfuse_instruction is not None:
            message = "splitfuse_instruction needs the method yes_no: write it in front of the texts"
            raise InvalidRequestError(message, parameter="splitfuse_instruction")
        texts: dict[str, str] = {}  # each once
        for text, place in zip(chain.from_iterable(pairs), chain.from_iterable(places), strict=True):
            texts.setdefault(text, place)
        sources = [(place, partial(_embeddable, state.service, text)) for text, place in texts.items()]
        found = dict(zip(texts, await pooled(state, context, body, sources), strict=True))
        return method, await state.service.off_loop(lambda: [cosine(found[one], found[other]) for one, other in pairs])
    service, tokenizer = state.service, state.service.tokenizer
    if not service.client.info.limits.generates:
        raise InvalidRequestError(f"{ENCODER}: splitfuse_method must be cosine", parameter="splitfuse_method")
    answers = PoolingParams(label_ids(tokenizer, rerank.ANSWERS))
    plain = {text: without_controls(text, tokenizer) for pair in pairs for text in pair}
    instruction = without_controls(body.splitfuse_instruction or rerank.INSTRUCTION, tokenizer)

    async def judgement(query: str, document: str) -> PreparedRequest:
        if rerank.has_chatml(tokenizer):
            text = rerank.chatml(plain[query], plain[document], instruction)
            return await _embeddable(service, text, answers, add_special_tokens=False)
        return await _chat(service, rerank.messages(plain[query], plain[document], instruction), answers)

    sources = [
        (first if len(query) > len(document) else second, partial(judgement, query, document))
        for (query, document), (first, second) in zip(pairs, places, strict=True)
    ]
    logprobs = await pooled(state, context, body, sources, shares_prefix=True)
    return method, [probabilities(each)[1] for each in logprobs]


def _method(state: AppState) -> Method:
    """Return how the model compares texts if a request does not say: by its judgement, if it can be asked for one."""
    tokenizer = state.service.tokenizer
    if state.service.client.info.is_embedder:
        return "cosine"
    can_be_asked = tokenizer.chat_template is not None or rerank.has_chatml(tokenizer)
    return "yes_no" if can_be_asked and has_labels(tokenizer, rerank.ANSWERS) else "cosine"


async def _embeddable(
    service: TextService, text: str | list[int], wanted: PoolingParams | None = None, *, add_special_tokens: bool = True
) -> PreparedRequest:
    limit = service.client.info.limits.max_model_len
    encoded = await service.encode(text, add_special_tokens=add_special_tokens, max_model_len=limit)
    return for_pooling(encoded.token_ids, wanted)


async def _chat(service: TextService, messages: list[dict[str, str]], wanted: PoolingParams) -> PreparedRequest:
    limit = service.client.info.limits.max_model_len
    encoded = await service.encode_chat(messages, options=_UNTHOUGHT, max_model_len=limit)
    if encoded.message is not None and encoded.message.start is Start.THOUGHT:
        raise InvalidRequestError(
            "the model's chat template opens a thought, and a judgement is read before any: use another model"
        )
    return for_pooling(encoded.token_ids, wanted)


def _usage(context: RequestContext) -> PoolingUsage:
    count = context.num_tokens.prompt
    return PoolingUsage(count, count)


def _base64(numbers: array[float]) -> str:
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode()


_route = functools.partial(Route, dialect=OPENAI)

ROUTES = (
    _route("POST", EmbeddingRequest.PATH, embeddings, "Embeddings of texts", EmbeddingList, EmbeddingRequest),
    *(
        _route("POST", path, reranking, "How well documents answer a query", Ranking, RerankRequest)
        for path in (RerankRequest.PATH, "/v2/rerank", "/rerank")
    ),
    *(
        _route("POST", path, scores, "How well texts go together", ScoreList, ScoreRequest)
        for path in (ScoreRequest.PATH, "/score")
    ),
    _route("POST", DecisionRequest.PATH, decisions, "Probabilities of answers", DecisionList, DecisionRequest),
)
"""Route table of these routes."""
