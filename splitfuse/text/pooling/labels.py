"""Finds the tokens that stand for answers, and turns their log-probabilities into probabilities of the answers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from splitfuse.errors import InvalidRequestError
from splitfuse.text.tokenizer import Tokenizer


def label_ids(tokenizer: Tokenizer, labels: Sequence[str]) -> tuple[int, ...]:
    """Return the token of each label. Raises InvalidRequestError unless each is a single token, different from the
    others'.
    """
    encoded = [tokenizer.encode(label, add_special_tokens=False) for label in labels]
    ids = tuple(each[0] for each in encoded if len(each) == 1)
    if len(set(ids)) < len(labels):
        raise InvalidRequestError(
            f"the model's vocabulary has no single token for each of {', '.join(labels)}, by which it would answer: "
            "use another model"
        )
    return ids


def has_labels(tokenizer: Tokenizer, labels: Sequence[str]) -> bool:
    """Return whether each label is a single token, different from the others'."""
    try:
        return bool(label_ids(tokenizer, labels))
    except InvalidRequestError:
        return False


def without_controls(text: str, tokenizer: Tokenizer) -> str:
    """Return a text in which no control token of the vocabulary is written out: a space parts those that are. So a
    state or a document cannot end its turn, and answer for the model.
    """
    for control in tokenizer.control_texts:
        if len(control) > 1 and control in text:
            text = text.replace(control, f"{control[0]} {control[1:]}")
    return text


def probabilities(logprobs: Sequence[float], temperature: float = 1.0) -> list[float]:
    """Return the softmax of log-probabilities, or of logits, at a temperature: the probabilities of answers if there
    are no others.

    >>> probabilities([-2.0, -2.0])
    [0.5, 0.5]
    """
    peak = max(logprobs)
    if peak == -math.inf:  # none of them can follow: then none is likelier than another
        return [1.0 / len(logprobs)] * len(logprobs)
    weights = [math.exp((each - peak) / temperature) for each in logprobs]
    total = math.fsum(weights)
    return [weight / total for weight in weights]
