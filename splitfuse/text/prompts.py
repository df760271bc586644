"""Turns a prompt or a conversation into a request for an engine: token ids, parameters, checked limits."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

from splitfuse.core.limits import EngineLimits, prompt_too_long
from splitfuse.core.pooling_params import PoolingParams
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.errors import InvalidRequestError
from splitfuse.text.chat_formats.grammar import call_grammar
from splitfuse.text.chat_formats.parser import MessageSource, start_of
from splitfuse.text.chat_options import CHAT as CHAT
from splitfuse.text.chat_options import ChatOptions as ChatOptions
from splitfuse.text.reasoning import chat_reasoning
from splitfuse.text.sandbox import Sandbox
from splitfuse.text.tokenizer import Tokenizer
from splitfuse.text.variables import asks_for_no_thought, check_variables, template_variables

GREEDY = SamplingParams()

LONG = 8
"""Characters of a text for each token that the model can read, from which on its tokens are first counted in pieces."""
PIECE = 16384
"""Characters of these pieces."""
MAX_FORMS = 64
"""Number of forms of answers whose grammars are kept for further requests."""

Message = Mapping[str, Any]


@dataclass(frozen=True)
class PreparedRequest:
    """Holds a prompt as token ids, with the parameters of its `params.n` answers. Check it once, where it enters."""

    token_ids: tuple[int, ...]
    params: SamplingParams = GREEDY
    continues: bool = True
    """Flag of an answer that continues the prompt's text; without it, it stands alone, as in a chat."""
    return_full_text: bool = False
    """Flag of an answer whose text begins with the prompt's."""
    message: MessageSource | None = None
    """Parts of which the answer consists; None: it is a text."""
    pooling: PoolingParams | None = None
    """Numbers of the prompt that are wanted in place of a text."""
    adapter: str = ""
    """Digest of the LoRA adapter that the answer is computed with; empty: none."""
    _limits: EngineLimits | None = field(default=None, init=False, repr=False, compare=False)

    def check(self, limits: EngineLimits) -> None:
        """Raise InvalidRequestError if the request exceeds the limits. Checking it again costs nothing."""
        if self._limits != limits:
            limits.check(self.token_ids, self.params, self.pooling)
            object.__setattr__(self, "_limits", limits)


class PromptEncoder:
    """Encodes prompts and conversations with a model's tokenizer and chat template. Safe to share between threads.

    Templates run in a Sandbox, and so does the tokenizer if one is given: a server's texts come from anyone.
    """

    def __init__(self, tokenizer: Tokenizer, sandbox: Sandbox | None = None) -> None:
        self._tokenize = tokenizer.encode if sandbox is None else sandbox.encode
        self._sandbox = sandbox or Sandbox(tokenizer)
        self._compile = lru_cache(MAX_FORMS)(self._sandbox.compile)
        self._tokenizer = tokenizer
        self._chat_format = tokenizer.chat_format
        self._reads_tools = False  # known of the template after the first request with tools

    def encode(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams = GREEDY,
        *,
        add_special_tokens: bool = True,
        max_model_len: int | None = None,
    ) -> PreparedRequest:
        """Return the request for a text or a list of token ids. Raises InvalidRequestError for anything else, and
        PromptTooLongError, before all of it is read, if it surely exceeds `max_model_len` tokens.
        """
        if isinstance(prompt, str):
            if not prompt:
                raise InvalidRequestError(
                    "the prompt is empty: it must have at least one character", parameter="prompt"
                )
            return PreparedRequest(self._encode_text(prompt, add_special_tokens, max_model_len), params)
        is_list = isinstance(prompt, Sequence) and not isinstance(prompt, bytes | bytearray)
        if is_list and max_model_len is not None and len(prompt) > max_model_len:
            raise prompt_too_long(str(len(prompt)), max_model_len)
        if is_list and all(isinstance(token, int) and not isinstance(token, bool) for token in prompt):
            return PreparedRequest(tuple(prompt), params)
        raise InvalidRequestError(
            f"a prompt must be a text or a list of token ids, not {prompt!r:.80}", parameter="prompt"
        )

    def encode_chat(
        self,
        messages: str | Sequence[Message],
        params: SamplingParams = GREEDY,
        options: ChatOptions = CHAT,
        *,
        add_special_tokens: bool = False,
        max_model_len: int | None = None,
    ) -> PreparedRequest:
        """Return the request for a conversation, or for a single user's turn, through the model's chat template.

        Raises TokenizerError if the model has no template or it breaks the rules, InvalidRequestError for messages that
        it refuses, PromptTooLongError as `encode`. Templates write special tokens themselves.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        end = continued = ""
        if options.continue_final_message:
            continued = _text_of(messages[-1])
            messages, end = _with_end(messages)
        text = self._render(messages, options)
        if end:
            text = _before_end(text, end)
        token_ids = self._encode_text(text, add_special_tokens, max_model_len)
        message = None
        if options.reads_parts:
            start = start_of(self._chat_format, text, continued)
            message = MessageSource(
                self._chat_format,
                options.tools,
                start,
                options.parallel_tool_calls,
                options.tool_choice.mode == "required",
            )
            reasoning = chat_reasoning(
                self._tokenizer,
                start,
                max_tokens=options.max_reasoning_tokens,
                has_form=params.structured_outputs is not None,
                has_tools=bool(options.tools),
                may_think=not asks_for_no_thought(options.variables, options.reasoning_effort),
            )
            params = replace(params, reasoning=reasoning)
        return PreparedRequest(token_ids, params, continues=options.continue_final_message, message=message)

    def _render(self, messages: Sequence[Message], options: ChatOptions) -> str:
        """Return the text of a conversation. Raises InvalidRequestError for tools that the template passes over."""
        adds, known = options.add_generation_prompt, self._tokenizer.template_variables
        if self._tokenizer.chat_template is not None:
            check_variables(options.variables, known, thinks=self._chat_format.thinks)
        wishes = {name: value for name, value in (options.wishes or {}).items() if name in known}
        variables: Mapping[str, Any] | None = {**wishes, **(options.variables or {})} or None
        if options.reasoning_effort is not None or options.verbosity is not None:
            variables = template_variables(
                variables,
                effort=options.reasoning_effort,
                verbosity=options.verbosity,
                known=known,
                thinks=self._chat_format.thinks,
            )
        tools = [tool.as_dict() for tool in options.tools]
        text = self._sandbox.render(messages, add_generation_prompt=adds, variables=variables, tools=tools or None)
        if tools and not self._reads_tools:
            if text == self._sandbox.render(messages, add_generation_prompt=adds, variables=variables):
                message = "the model's chat template does not tell the model of tools: leave them out"
                raise InvalidRequestError(message, parameter="tools")
            self._reads_tools = True
        return text

    def compile(self, params: SamplingParams, options: ChatOptions = CHAT) -> SamplingParams:
        """Return the parameters with the grammar of their structured_outputs, and of calls that `options` require or
        whose tools are strict. Raises InvalidRequestError for a form that cannot be enforced, and for one next to calls
        that are required.
        """
        form = params.structured_outputs
        if form is not None and options.tool_choice.mode == "required":
            message = "structured_outputs and tool_choice both say which form the answer must have: leave one out"
            raise InvalidRequestError(message, parameter="structured_outputs")
        if options.tools and (form is None or not form.compiled):
            calls = call_grammar(
                self._chat_format,
                options.tools,
                options.tool_choice,
                parallel=options.parallel_tool_calls,
                special_tokens=self._marker_ids,
                form=form,
            )
            form = calls or form
        if form is None or form.compiled:
            return params
        return replace(params, structured_outputs=self._compile(form))

    @cached_property
    def _marker_ids(self) -> dict[str, int]:
        return self._tokenizer.marker_ids(self._chat_format.markers)

    def _encode_text(self, text: str, add_special_tokens: bool, max_model_len: int | None) -> tuple[int, ...]:
        if max_model_len is not None and len(text) > LONG * max_model_len:
            count = 0
            for start in range(0, len(text), PIECE):
                # A cut may add tokens: it takes twice as many as fit to be sure.
                count += len(self._tokenize(text[start : start + PIECE], add_special_tokens=False))
                if count > 2 * max_model_len:
                    raise prompt_too_long(f"more than {max_model_len}", max_model_len)
        return self._tokenize(text, add_special_tokens=add_special_tokens)


def _text_of(message: Message) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _with_end(messages: Sequence[Message]) -> tuple[list[Message], str]:
    """Return the messages with a mark at the end of the last one's text, and the mark, which no text can foresee.

    Raises InvalidRequestError for a last message with calls: they end it.
    """
    *others, last = messages
    if last.get("tool_calls"):
        message = "continue_final_message cannot continue a message with tool_calls: leave one of them out"
        raise InvalidRequestError(message, parameter="continue_final_message")
    content, end = last.get("content"), f"{secrets.token_hex(16)} "  # the space tells whether a template strips texts
    if isinstance(content, str):
        content += end
    elif content:
        content = [*content[:-1], {**content[-1], "text": content[-1]["text"] + end}]
    return [*others, {**last, "content": content}], end


def _before_end(text: str, end: str) -> str:
    """Return what a template wrote before the mark. Raises InvalidRequestError if it left the last message out."""
    before, mark, after = text.rpartition(end.strip())
    if not mark:
        message = "continue_final_message needs a last message that the chat template writes as it is"
        raise InvalidRequestError(message, parameter="continue_final_message")
    return before if after.startswith(" ") else before.rstrip()
