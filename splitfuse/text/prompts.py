"""Turns a prompt or a conversation into a request for an engine: token ids, parameters, checked limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from splitfuse.core.limits import EngineLimits
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.errors import InvalidRequestError
from splitfuse.text.chat_template import ChatTemplate
from splitfuse.text.tokenizer import Tokenizer

GREEDY = SamplingParams()

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
    _limits: EngineLimits | None = field(default=None, init=False, repr=False, compare=False)

    def check(self, limits: EngineLimits) -> None:
        """Raise InvalidRequestError if the request exceeds the limits. Checking it again costs nothing."""
        if self._limits != limits:
            limits.check(self.token_ids, self.params)
            object.__setattr__(self, "_limits", limits)


class PromptEncoder:
    """Encodes prompts and conversations with a model's tokenizer and chat template. Safe to share between threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def encode(
        self, prompt: str | Sequence[int], params: SamplingParams = GREEDY, *, add_special_tokens: bool = True
    ) -> PreparedRequest:
        """Return the request for a text or a list of token ids. Raises InvalidRequestError for anything else."""
        if isinstance(prompt, str):
            if not prompt:
                raise InvalidRequestError(
                    "the prompt is empty: it must have at least one character", parameter="prompt"
                )
            return PreparedRequest(self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens), params)
        is_list = isinstance(prompt, Sequence) and not isinstance(prompt, bytes | bytearray)
        if is_list and all(isinstance(token, int) and not isinstance(token, bool) for token in prompt):
            return PreparedRequest(tuple(prompt), params)
        raise InvalidRequestError(
            f"a prompt must be a text or a list of token ids, not {prompt!r:.80}", parameter="prompt"
        )

    def encode_chat(
        self,
        messages: str | Sequence[Message],
        params: SamplingParams = GREEDY,
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> PreparedRequest:
        """Return the request for a conversation, or for a single user's turn, through the model's chat template.

        `variables` are the template's own switches, such as `{"enable_thinking": False}`. Raises TokenizerError if the
        model has no template or it breaks the rules, InvalidRequestError for messages that it refuses.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        text = self.template.render(messages, add_generation_prompt=add_generation_prompt, variables=variables)
        token_ids = self.tokenizer.encode(text, add_special_tokens=False)
        return PreparedRequest(token_ids, params, continues=False)

    @cached_property
    def template(self) -> ChatTemplate:
        """Return the model's chat template, compiled at its first use. Raises TokenizerError if there is none."""
        return ChatTemplate(self.tokenizer.chat_template, self.tokenizer.special_tokens)
