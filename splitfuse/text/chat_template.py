"""Turns chat messages into the prompt that a model was trained on, by the model's own Jinja template.

A template comes with the weights and is untrusted code. It runs in Jinja's immutable sandbox and sees plain JSON data
only. Its time and memory are bounded by the process that it runs in: see sandbox.py. The environment is that of
transformers' `apply_chat_template`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from enum import Enum, auto
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from splitfuse.errors import InvalidRequestError, TokenizerError

MAX_TEMPLATE = 250_000
"""Number of characters of the longest template that is read: those of models have at most 50,000."""
_PROBE = "a text that is looked for"
_CONVERSATIONS = {
    "system": ("system", "user"),
    "user": ("user",),
    "assistant": ("user", "assistant", "user"),
}
"""Conversations that try what a template makes of the content of a role."""


def check_syntax(source: str) -> None:
    """Raise TokenizerError for a template that is not well formed. Nothing of it is run or compiled."""
    with _compiling():
        if len(source) > MAX_TEMPLATE:
            raise ValueError(f"it has {len(source)} characters; at most {MAX_TEMPLATE} are read")
        _environment().parse(source)


def variables_of(source: str) -> frozenset[str]:
    """Return the names of the variables that a template reads. Raises TokenizerError as `check_syntax`.

    >>> variables_of("{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}")
    frozenset({'enable_thinking'})
    """
    with _compiling():
        environment = _environment()
        return frozenset(meta.find_undeclared_variables(environment.parse(source)))


class ChatTemplate:
    """Renders conversations by one template, compiled once. Safe to share between threads.

    >>> template = ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}")
    >>> template.render([{"role": "user", "content": "Hello"}])
    'user: Hello'
    """

    def __init__(self, source: str | None, special_tokens: Mapping[str, str] | None = None) -> None:
        """Compile a template. `special_tokens`, such as `{"bos_token": "<s>"}`, are its variables of these names.
        Raises TokenizerError for no template (`source` None) or one that does not compile.
        """
        if source is None:
            raise TokenizerError(
                "the model has no chat template; use plain prompts, or add a chat_template.jinja to its folder"
            )
        self._special_tokens = dict(special_tokens or {})
        with _compiling():
            self._template = _environment().from_string(source)
        self._forms: dict[str, _Form] = {}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the prompt's text with special tokens written out: encode it with `add_special_tokens=False`.

        Content is given in the form that the template reads, a text or a list of parts, whichever form it comes in;
        parts of text are joined by line ends for a template that reads text.

        `variables` are a template's own switches, such as `{"enable_thinking": False}`. Raises InvalidRequestError for
        messages that are malformed or that the template refuses, TokenizerError for a template that breaks the rules.
        """
        arguments = {
            **self._special_tokens,
            **_plain(variables or {}, "variables"),
            "messages": [self._in_form(message) for message in _checked(messages)],
            "tools": _plain(tools, "tools"),
            "documents": _plain(documents, "documents"),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render(arguments)
        except _RefusedError as error:
            raise InvalidRequestError(f"the chat template refuses: {error!s:.1000}", parameter="messages") from error
        except (SecurityError, MemoryError, RecursionError) as error:
            raise TokenizerError(f"the chat template did what templates may not: {error!r}") from error
        except Exception as error:  # like any program, a template can fail on data it was not written for
            message = f"the chat template cannot render these messages: {error!s:.300}"
            raise InvalidRequestError(message, parameter="messages") from error

    def _in_form(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return a message whose content has the form that the template reads in messages of its role."""
        content, form = message.get("content"), self._form(message["role"])
        if form is _Form.PARTS and isinstance(content, str):
            return {**message, "content": [_text_part(content)]}
        if form is _Form.TEXT and isinstance(content, list) and all(map(_is_text_part, content)):
            return {**message, "content": "\n".join(part["text"] for part in content)}
        return message

    def _form(self, role: str) -> _Form:
        """Return the form of content that messages of a role have, found by trying both."""
        role = role if role in _CONVERSATIONS else "user"
        if role not in self._forms:
            user = "" if role == "user" else self._form("user")

            def tried(content: Any) -> str:
                other = [_text_part("other")] if user is _Form.PARTS else "other"
                roles = _CONVERSATIONS[role]
                messages = [{"role": each, "content": content if each == role else other} for each in roles]
                try:
                    others = {"tools": None, "documents": None, "add_generation_prompt": True}
                    return self._template.render({**self._special_tokens, **others, "messages": messages})
                except Exception:  # it refuses a role, or fails with content of this form
                    return ""

            text, parts = tried(_PROBE), tried([_text_part(_PROBE)])
            if _PROBE not in text and _PROBE in parts:
                self._forms[role] = _Form.PARTS
            else:
                self._forms[role] = _Form.EITHER if text and text == parts else _Form.TEXT
        return self._forms[role]


class _Form(Enum):
    """Names the forms of content that a template may read."""

    TEXT = auto()
    PARTS = auto()
    EITHER = auto()


def _text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


@contextmanager
def _compiling() -> Iterator[None]:
    """Raise what is wrong with a template as TokenizerError."""
    try:
        yield
    except TemplateSyntaxError as error:
        raise TokenizerError(f"the chat template is broken: {error.message:.200} (line {error.lineno})") from error
    except Exception as error:  # anything that jinja2 or the Python compiler raises
        raise TokenizerError(f"the chat template cannot be compiled: {error!r:.200}") from error


class _RefusedError(TemplateError):
    """Raised by a template that calls raise_exception."""


def _checked(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return plain copies of the messages, without keys whose value is None (templates test for the key)."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise _malformed("messages must be a non-empty list of objects with role and content", messages)
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise _malformed(f"messages[{index}] must be an object with a role, such as 'user'", message)
        if not isinstance(message.get("content"), str | Sequence | None):
            raise _malformed(f"messages[{index}].content must be text or a list of parts", message["content"])
    return [
        {key: value for key, value in message.items() if value is not None} for message in _plain(messages, "messages")
    ]


def _malformed(wanted: str, found: object) -> InvalidRequestError:
    return InvalidRequestError(f"{wanted}, not {found!r:.80}", parameter="messages")


def _plain(value: Any, name: str) -> Any:
    """Return a copy of JSON types alone: objects of other kinds have methods that the sandbox does not know."""
    return json.loads(as_json(value, name))


def as_json(value: Any, name: str) -> str:
    """Return JSON. Raises InvalidRequestError, naming the value, for anything but plain data in valid Unicode."""
    try:
        text = json.dumps(value, ensure_ascii=False)  # to escape millions of characters takes 20 times as long
        text.encode()  # not with half a surrogate pair
        return text
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"{name} must be plain JSON data: {error}", parameter=name) from error


class _GenerationBlock(Extension):
    """Renders the body of `{% generation %}...{% endgeneration %}`, which marks the model's text for training."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the block's body, in a scope of its own."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_refuse, strftime_now=_strftime_now)
    return environment


def _refuse(message: str) -> NoReturn:
    raise _RefusedError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Return plain JSON: Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
