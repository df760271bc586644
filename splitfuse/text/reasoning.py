"""Finds the tokens by which a model marks its thoughts, for an engine that follows them token by token.

Only tokens that a tokenizer has for whole markers, such as `</think>`, are taken for marks: text of several ordinary
tokens may be written in others too, and its end may lie within one.
"""

from __future__ import annotations

from splitfuse.core.reasoning import Reasoning
from splitfuse.errors import InvalidRequestError
from splitfuse.text.tokenizer import Tokenizer


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

    Raises InvalidRequestError for a budget, or a form, with a model that has no tokens for these texts.

    >>> reasoning_params(tokenizer, open_text="<think>", close_text="</think>", answer_text="\\n\\n", max_tokens=100)
    """
    start, end = _marker(tokenizer, open_text), _marker(tokenizer, close_text)
    has_start = is_open or (start and start[0] in tokenizer.added_ids)
    has_end = end and end[0] in tokenizer.added_ids and end[-1] in tokenizer.added_ids
    closing = tokenizer.encode(last_words + close_text.strip(), add_special_tokens=False)
    answer = tokenizer.encode(close_text.strip() + answer_text, add_special_tokens=False)
    if has_start and has_end and closing[-len(end) :] == end and answer[: len(end)] == end:
        return Reasoning(
            start_token_ids=start,
            end_token_ids=end,
            is_open=is_open,
            reopens=reopens,
            max_tokens=max_tokens,
            close_token_ids=closing,
            answer_token_ids=answer[len(end) :],
        )
    if max_tokens is None and not has_form:
        return None
    text = close_text if has_start else open_text
    problem = f"the model's tokenizer has no token of its own for {text.strip()!r}, by which a thought could be found"
    if max_tokens is not None:
        message, parameter = f"a budget of {max_tokens} tokens for thoughts cannot be kept", "reasoning_max_tokens"
    else:
        message, parameter = "an answer after a thought cannot have a form", "structured_outputs"
    raise InvalidRequestError(f"{message}: {problem}", parameter=parameter)


def _marker(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Return the tokens of a marker, without the white space around it, which may be one token with other text."""
    return tokenizer.encode(text.strip(), add_special_tokens=False)
