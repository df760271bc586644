"""A prompt and settings that give something to read from the bundled model, whatever it has learnt."""

from collections.abc import Iterable
from typing import Any

from splitfuse import Response

PROMPT = "Erik plays the cello. Ella lives in a small house by the sea."
NO_SPECIAL_TOKENS = dict.fromkeys(range(6), -100.0)  # they have no text
READABLE: dict[str, Any] = {"temperature": 1.0, "seed": 5, "logit_bias": NO_SPECIAL_TOKENS, "max_new_tokens": 12}


def texts(responses: Iterable[Response]) -> list[str]:
    """What was answered."""
    return [response.generated_text for response in responses]
