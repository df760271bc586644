"""Translates between calls and the HTTP API, as plain data: keywords -> body, answer -> response, error.

Decides how the keywords of a call are written in a body. Opens no connection.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from splitfuse.core.request_output import FinishReason
from splitfuse.core.sampling_params import PARAMETERS, SamplingParams
from splitfuse.errors import (
    DrainingError,
    EngineUnavailableError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    PromptTooLongError,
    RequestFailedError,
    RequestQuarantinedError,
    RequestTooLargeError,
    ServerError,
    SplitfuseError,
)
from splitfuse.text.chat_formats.message import AssistantMessage, ToolCall, ToolChoice
from splitfuse.text.chat_options import CHAT, CHAT_KEYWORDS, ChatOptions, take_chat_options
from splitfuse.text.kwargs import (
    SAMPLING_KEYWORDS,
    as_list,
    check_flags,
    check_max_length,
    refuse_unknown,
    resolve_max_tokens,
    respell,
    sampling_params,
    spelled_as_keywords,
)
from splitfuse.text.responses import Response, TextLogprob
from splitfuse.text.tools import written_messages

COMPLETIONS_PATH, CHAT_PATH = "/v1/completions", "/v1/chat/completions"
OTHER_KEYWORDS = (
    "do_sample",
    "max_length",
    "chat",
    "return_full_text",
    "deadline",
    "stream",
    "streaming_fn",
    "adapter",
)
"""Keywords of a call that are not sampling parameters."""
OWN_FORM = ("max_tokens", "temperature", "logit_bias", "logprobs", "prompt_logprobs", "structured_outputs")
"""Sampling parameters with another name, form or default in a body than in a call."""


@dataclass(frozen=True)
class RemoteRequest:
    """Holds one prompt of a call, checked as far as that is possible without the model."""

    index: int
    prompt: Any
    """Text, token ids or, for a chat, messages."""
    is_chat: bool
    params: SamplingParams
    max_length: int | None = None
    prefix: str = ""
    """Text that a response has before the generated one."""
    deadline: float | None = None
    chat: ChatOptions = CHAT
    """Options of a chat, with tools that may be called."""
    adapter: str | None = None
    """Name of a LoRA adapter, which the server has as a model."""

    @property
    def path(self) -> str:
        """Return the route that answers it."""
        return CHAT_PATH if self.is_chat else COMPLETIONS_PATH

    @property
    def prompt_body(self) -> dict[str, Any]:
        """Return the part of a body that has the prompt: that of a request to /tokenize has no other."""
        if not self.is_chat:
            return {"prompt": self.prompt}
        fields = {
            "messages": self.prompt,
            "tools": [tool.as_dict() for tool in self.chat.tools],
            "reasoning_effort": self.chat.reasoning_effort,
            "verbosity": self.chat.verbosity,
            "chat_template_kwargs": self.chat.variables,
        }
        return {name: value for name, value in fields.items() if value}

    @property
    def counts_logprobs(self) -> bool:
        """Return whether only logprobs tell the number of tokens of a choice: usage counts those of all choices, and
        those of stop strings.
        """
        return self.params.n > 1 or bool(self.params.stop)

    def clamp_max_tokens(self, num_prompt: int, max_model_len: int) -> RemoteRequest:
        """Return the request with max_tokens resolved. Raises InvalidRequestError if max_length leaves no room."""
        with spelled_as_keywords():
            params = resolve_max_tokens(self.params, num_prompt, max_model_len, self.max_length)
        return replace(self, max_length=None, params=params)

    def body(self, *, stream: bool) -> dict[str, Any]:
        """Return the body that a server expects, without what has its default."""
        params = self.params
        body = {**self.prompt_body, "max_tokens": params.max_tokens, "temperature": params.temperature}
        for name, parameter in PARAMETERS.items():
            if name not in OWN_FORM and (value := getattr(params, name)) != parameter.default:
                body[name] = value
        if params.logit_bias:
            body["logit_bias"] = {str(token): bias for token, bias in params.logit_bias.items()}
        if params.structured_outputs is not None:
            body["structured_outputs"] = params.structured_outputs.as_dict()
        if params.logprobs is not None or self.counts_logprobs:
            count = params.logprobs or 0
            body |= {"logprobs": True, "top_logprobs": count} if self.is_chat else {"logprobs": count}
        if self.chat.tools:
            body |= {
                "tool_choice": _choice(self.chat.tool_choice),
                "parallel_tool_calls": self.chat.parallel_tool_calls,
            }
        if self.chat.max_reasoning_tokens is not None:
            body["reasoning_max_tokens"] = self.chat.max_reasoning_tokens
        if self.adapter is not None:
            body["model"] = self.adapter
        if self.deadline is not None:
            body["splitfuse_deadline"] = self.deadline
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body


def _choice(choice: ToolChoice) -> str | dict[str, Any]:
    return choice.mode if choice.name is None else {"type": "function", "function": {"name": choice.name}}


def prepare(
    prompts: Any,
    *,
    max_length: int | None = None,
    chat: bool = False,
    return_full_text: bool = False,
    deadline: float | None = None,
    adapter: str | None = None,
    **keywords: Any,
) -> list[RemoteRequest]:
    """Return the requests of a call, one for each prompt. Raises InvalidRequestError for what cannot be honoured."""
    refuse_unknown(keywords, {*SAMPLING_KEYWORDS, *CHAT_KEYWORDS, *OTHER_KEYWORDS} - {"prompt_logprobs"})
    check_flags(chat=chat, return_full_text=return_full_text)
    if max_length is not None:
        check_max_length(max_length)
    options = take_chat_options(keywords, chat)
    params = sampling_params(**keywords)
    requests = []
    for index, prompt in enumerate(as_list(prompts, chat)):
        if return_full_text and (chat or not isinstance(prompt, str)):
            raise InvalidRequestError(
                "return_full_text needs prompts of text: of others, only the server knows the text",
                parameter="return_full_text",
            )
        if chat and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        elif chat:
            prompt = written_messages(prompt)
        prefix = prompt if return_full_text else ""
        requests.append(RemoteRequest(index, prompt, chat, params, max_length, prefix, deadline, options, adapter))
    return requests


# Answers -------------------------------------------------------------------------------------------------------------


@dataclass
class PartialResponse:
    """Collects one choice of an answer as it arrives."""

    request: RemoteRequest
    choice: int
    text: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    logprobs: list[TextLogprob] = field(default_factory=list)

    def push(self, choice: Mapping[str, Any]) -> AssistantMessage:
        """Take in a choice of an answer, whole or in part, and return its new text and thought."""
        message = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
        new = AssistantMessage(message.get("content") or "", message.get("reasoning") or "")
        self.text += new.content
        self.reasoning += new.reasoning
        for call in message.get("tool_calls") or ():
            self._push_call(call)
        self.logprobs += _logprobs(choice.get("logprobs"), self.request.params.logprobs or 0)
        if (reason := choice.get("finish_reason")) is not None:
            self.finish_reason = FinishReason.STOP if reason == "tool_calls" else FinishReason(reason)
        return new

    def _push_call(self, call: Mapping[str, Any]) -> None:
        """Take in a call, or what is added to the arguments of the last one."""
        function = call["function"]
        if "id" in call:
            self.tool_calls.append(ToolCall(call["id"], function["name"], function["arguments"]))
        else:
            last = self.tool_calls[call["index"]]
            self.tool_calls[call["index"]] = replace(last, arguments=last.arguments + function["arguments"])

    def failed(self, error: RequestFailedError) -> Response:
        """Return the response as far as it had come when the request failed."""
        return Response(
            self.request.prefix + self.text, 0, 0, FinishReason.ERROR, self.request.index, self.choice, error=str(error)
        )

    def response(self, usage: Mapping[str, Any]) -> Response:
        """Return the whole response. Raises ServerError if the answer is incomplete."""
        if self.finish_reason is None:
            raise ServerError(
                "the answer ended before it was complete: the server or a proxy closed the connection; try again"
            )
        details = usage.get("prompt_tokens_details") or {}
        return Response(
            generated_text=self.request.prefix + self.text,
            prompt_length=usage["prompt_tokens"],
            generated_length=len(self.logprobs) if self.request.counts_logprobs else usage["completion_tokens"],
            finish_reason=self.finish_reason,
            index=self.request.index,
            choice=self.choice,
            reasoning=self.reasoning,
            tool_calls=tuple(self.tool_calls),
            logprobs=None if self.request.params.logprobs is None else tuple(self.logprobs),
            num_cached_tokens=details.get("cached_tokens") or 0,
        )


def _logprobs(logprobs: Mapping[str, Any] | None, num_top: int) -> list[TextLogprob]:
    if logprobs is None:
        return []
    if "content" in logprobs:  # a chat's
        entries = logprobs["content"]
        tops = [tuple((top["token"], top["logprob"]) for top in entry["top_logprobs"]) for entry in entries]
        return [TextLogprob(entry["token"], entry["logprob"], top) for entry, top in zip(entries, tops, strict=True)]
    tokens = logprobs["tokens"]
    return [
        TextLogprob(token, value, tuple(sorted((top or {}).items(), key=lambda item: -item[1])[:num_top]))
        for token, value, top in zip(
            tokens, logprobs["token_logprobs"], logprobs["top_logprobs"] or [None] * len(tokens), strict=True
        )
    ]


_KINDS: Mapping[str, type[SplitfuseError]] = {
    kind.code: kind
    for kind in (
        PromptTooLongError,
        RequestTooLargeError,
        RequestQuarantinedError,
        ModelNotFoundError,
        DrainingError,
        EngineUnavailableError,
    )
}


def error_of(status: int, content: bytes, headers: Mapping[str, str]) -> SplitfuseError:
    """Return the error that an answer tells of."""
    try:
        return error_in(json.loads(content)["error"], status, headers)
    except (ValueError, TypeError, KeyError):
        text = content.decode(errors="replace")
        return ServerError(f"status {status}, but the body is not an error of a splitfuse server: {text:.200}")


def error_in(
    error: Mapping[str, Any], status: int | None = None, headers: Mapping[str, str] | None = None
) -> SplitfuseError:
    """Return the error that a body tells of, or an event of a stream, which has no status of its own."""
    message = str(error["message"])
    kind = _KINDS.get(error.get("code") or "")
    if status == 429 or error.get("type") == "rate_limit_error":
        return OverloadedError(message, retry_after=_seconds((headers or {}).get("retry-after")))
    if kind is not None and not issubclass(kind, InvalidRequestError):
        return kind(message)
    if status in (401, 403):
        return ServerError(f"{message}; set SPLITFUSE_API_KEY, or give api_key in Python")
    if kind is not None or error.get("type") == "invalid_request_error":
        refused = (kind or InvalidRequestError)(message)
        assert isinstance(refused, InvalidRequestError)
        refused.parameter = error.get("param")
        respell(refused)
        return refused
    if status == 503:
        return EngineUnavailableError(message)
    return RequestFailedError(message)


def _seconds(text: str | None) -> float:
    try:
        return max(float(text or 1), 0.0)
    except ValueError:
        return 1.0
