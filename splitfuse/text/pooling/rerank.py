"""Asks a decoder whether a document answers a query, as the Qwen3-Reranker models were trained to be asked.

The answer is the probability of `yes` against `no` as the next token. Models without ChatML's tokens are asked with the
same words in their own chat template.
"""

from __future__ import annotations

from typing import Any

from splitfuse.text.pooling.labels import has_labels
from splitfuse.text.tokenizer import Tokenizer

ANSWERS = ("no", "yes")
"""Labels of the two answers."""

INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
"""Task in words, if a request names none: the one that these models know best."""

_SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. Note that the "
    'answer can only be "yes" or "no".'
)
_CHATML = (
    f"<|im_start|>system\n{_SYSTEM}<|im_end|>\n<|im_start|>user\n%s<|im_end|>\n<|im_start|>assistant\n"
    "<think>\n\n</think>\n\n"
)


def has_chatml(tokenizer: Tokenizer) -> bool:
    """Return whether the vocabulary has the tokens that begin and end a turn in ChatML, and an empty thought."""
    return has_labels(tokenizer, ("<|im_start|>", "<|im_end|>", "<think>", "</think>"))


def user_turn(query: str, document: str, instruction: str) -> str:
    """Return the user's turn of a judgement."""
    return f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"


def chatml(query: str, document: str, instruction: str) -> str:
    """Return the whole prompt of a judgement, in ChatML."""
    return _CHATML % user_turn(query, document, instruction)


def messages(query: str, document: str, instruction: str) -> list[dict[str, Any]]:
    """Return a judgement as messages for a chat template."""
    turn = user_turn(query, document, instruction)
    return [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": turn}]
