"""Defines how a conversation is rendered, and what its answer may consist of, with the keywords of a call for that.

Plain data without a tokenizer, so that a client of a remote server can import it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from splitfuse.errors import InvalidRequestError, brief
from splitfuse.text.chat_formats.message import AUTO, Tool, ToolChoice
from splitfuse.text.kwargs import check_flags
from splitfuse.text.tools import choice_of, chosen_tools, tools_of


@dataclass(frozen=True)
class ChatOptions:
    """Says how the chat template renders a conversation."""

    add_generation_prompt: bool = True
    """Flag that begins the assistant's turn."""
    continue_final_message: bool = False
    """Flag that leaves the last message open, for the answer to continue it."""
    variables: Mapping[str, Any] | None = None
    """Template's own switches, such as `{"enable_thinking": False}`."""
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = AUTO
    parallel_tool_calls: bool = True
    """Flag of an answer that may have several calls."""
    reads_parts: bool = False
    """Flag that reads thoughts and calls in the answer, which otherwise is a text."""
    reasoning_effort: str | None = None
    """Word for how long to think, one of EFFORTS in variables.py."""
    verbosity: str | None = None
    """Word for how long to answer: low, medium or high."""
    max_reasoning_tokens: int | None = None
    """Most tokens of a thought, after which it is closed; None: as many as the model likes."""
    wishes: Mapping[str, Any] | None = None
    """Switches for templates that know them; `variables` that a template does not read are refused instead."""


CHAT = ChatOptions()


CHAT_KEYWORDS = {
    "tools": "Tools that the answer may call: list of mappings with name, description, parameters.",
    "tool_choice": "none, auto, required, or the name of the tool to call.",
    "parallel_tool_calls": "False for at most one call.",
    "reasoning_effort": "How long to think, for templates that know it: none, minimal, low, medium, high.",
    "reasoning_max_tokens": "Most tokens of a thought, which is closed then.",
    "verbosity": "How long to answer, for templates that know it: low, medium, high.",
    "chat_template_kwargs": "Variables of the chat template.",
}
"""Keywords that need `chat=True`, with their meanings."""


def take_chat_options(keywords: dict[str, Any], chat: bool) -> ChatOptions:
    """Take CHAT_KEYWORDS out of the keywords of a call. Raises InvalidRequestError for what cannot be honoured."""
    given = {name: value for name in CHAT_KEYWORDS if (value := keywords.pop(name, None)) is not None}
    if given and not chat:
        name = next(iter(given))
        raise InvalidRequestError(f"{name} needs chat=True", parameter=name)
    check_flags(parallel_tool_calls=given.get("parallel_tool_calls"))
    budget, variables = given.get("reasoning_max_tokens"), given.get("chat_template_kwargs")
    if budget is not None and (not isinstance(budget, int) or isinstance(budget, bool) or budget < 0):
        _refuse("reasoning_max_tokens", "a whole number from 0", budget)
    if variables is not None and not isinstance(variables, Mapping):
        _refuse("chat_template_kwargs", "a mapping", variables)
    tools, choice = tools_of(given.get("tools", ())), choice_of(given.get("tool_choice", "auto"))
    return ChatOptions(
        variables=variables,
        tools=chosen_tools(tools, choice),
        tool_choice=choice,
        parallel_tool_calls=given.get("parallel_tool_calls", True),
        reads_parts=chat,
        reasoning_effort=given.get("reasoning_effort"),
        verbosity=given.get("verbosity"),
        max_reasoning_tokens=budget,
    )


def _refuse(name: str, wanted: str, value: object) -> None:
    raise InvalidRequestError(f"{name} must be {wanted}, not {brief(value)}", parameter=name)
