"""Finds the tokens by which a model marks its thoughts, for an engine that follows them token by token.

Only tokens that a tokenizer has for whole markers, such as `</think>`, are taken for marks: text of several ordinary
tokens may be written in others too, and its end may lie within one.
"""

from __future__ import annotations

from splitfuse.core.reasoning import Reasoning
from splitfuse.errors import InvalidRequestError
from splitfuse.text.chat_formats.formats import Channels
from splitfuse.text.chat_formats.parser import Start
from splitfuse.text.tokenizer import Tokenizer

_CHANNELS = ("<|channel|>analysis<|message|>", "<|end|>")
_ANSWERS = {
    "<|end|>": "<|start|>assistant<|channel|>final<|message|>",
    "</think>": "\n\n",
}
"""End of a thought -> what models write between it and the answer."""
_SPACES = ("\n", "\n\n", "\n\n\n", "\r\n", "\r\n\r\n", " ", "\t")
"""Texts that models write before the opening of a thought, or after its end, and that are no answer."""


def chat_reasoning(
    tokenizer: Tokenizer,
    start: Start,
    *,
    max_tokens: int | None = None,
    has_form: bool = False,
    has_tools: bool = False,
    may_think: bool = True,
) -> Reasoning | None:
    """Return how an engine finds the thought in an answer that begins at `start`; None if it cannot and nothing depends
    on it, or if there can be no thought: after content, and in an answer of a form where a thought was ended before, or
    is not wanted (`may_think`). Raises as `reasoning_params`, and for a budget with a model whose thoughts are unknown.
    """
    chat_format = tokenizer.chat_format
    has_channels = isinstance(chat_format.calls, Channels)
    if (texts := _CHANNELS if has_channels else chat_format.reasoning) is None:
        if max_tokens is not None:
            raise _refused(max_tokens, "it is not known how this model writes thoughts")
        return None
    open_text, close_text = texts
    is_open = start in (Start.THOUGHT, Start.IN_THOUGHT)
    if has_form and not is_open and not (start is Start.NEW and may_think):
        return None
    if start is Start.CONTENT and not has_channels:
        return None
    answer = _ANSWERS.get(close_text, "")
    return reasoning_params(
        tokenizer,
        open_text=open_text,
        close_text=close_text,
        is_open=is_open,
        reopens=has_channels,
        max_tokens=max_tokens,
        has_form=has_form,
        answer_text="<|start|>assistant" if has_channels and has_tools else answer,
    )


def reasoning_params(
    tokenizer: Tokenizer,
    *,
    open_text: str,
    close_text: str,
    is_open: bool = False,
    reopens: bool = False,
    max_tokens: int | None = None,
    has_form: bool = False,
    last_words: str = "",
    answer_text: str = "",
) -> Reasoning | None:
    """Return how an engine finds thoughts between two texts; None if it cannot, and nothing depends on it.

    `is_open` says that the prompt has opened a thought, `reopens` that `open_text` opens one anywhere, `has_form` that
    the answer must have a form. A thought that has used up its budget, `max_tokens`, is closed by `last_words` and
    `close_text`. `answer_text` follows one that was closed so, or any before an answer of a form.

    Raises InvalidRequestError for a budget with a model that has no tokens for these texts, and for a form if the
    prompt has opened a thought.

    >>> reasoning_params(tokenizer, open_text="<think>", close_text="</think>", answer_text="\\n\\n", max_tokens=100)
    """
    start, end = _marker(tokenizer, open_text), _marker(tokenizer, close_text)
    has_start = is_open or (start and start[0] in tokenizer.added_ids)
    has_end = end and end[0] in tokenizer.added_ids and end[-1] in tokenizer.added_ids
    closing = tokenizer.encode(last_words + close_text.strip(), add_special_tokens=False)
    answer = tokenizer.encode(close_text.strip() + answer_text, add_special_tokens=False)
    spaces = (tokenizer.encode(close_text.strip() + space, add_special_tokens=False) for space in _SPACES)
    if has_start and has_end and closing[-len(end) :] == end and answer[: len(end)] == end:
        return Reasoning(
            start_token_ids=start,
            end_token_ids=end,
            is_open=is_open,
            reopens=reopens,
            max_tokens=max_tokens,
            close_token_ids=closing,
            answer_token_ids=answer[len(end) :],
            space_token_ids=tuple(ids[-1] for ids in spaces if ids[:-1] == end),
        )
    if max_tokens is None and not (has_form and is_open):  # one that is not open cannot be opened in any form
        return None
    text = close_text if has_start else open_text
    raise _refused(max_tokens, f"the tokenizer has no token of its own for {text.strip()!r}")


def _refused(max_tokens: int | None, problem: str) -> InvalidRequestError:
    if max_tokens is not None:
        message, parameter = f"reasoning_max_tokens {max_tokens} cannot be kept", "reasoning_max_tokens"
    else:
        message, parameter = "an answer after a thought cannot have a form", "structured_outputs"
    return InvalidRequestError(f"{message} with this model: {problem}", parameter=parameter)


def _marker(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Return the tokens of a marker, without the white space around it, which may be one token with other text."""
    return tokenizer.encode(text.strip(), add_special_tokens=False)
