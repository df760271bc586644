"""Chat templates against transformers' apply_chat_template, and against templates that mean harm."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
from tiny_tokenizers import KINDS
from transformers import PreTrainedTokenizerFast

from splitfuse.errors import InvalidRequestError, TokenizerError
from splitfuse.text.chat_formats.message import Tool
from splitfuse.text.chat_options import ChatOptions
from splitfuse.text.chat_template import ChatTemplate
from splitfuse.text.prompts import PromptEncoder
from splitfuse.text.tokenizer import Tokenizer

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
HELLO = [{"role": "user", "content": "Hello <b>\n"}]
TALK = [
    {"role": "system", "content": " Be kind. "},
    {"role": "user", "content": "What's 1 < 2?", "name": None},
    {"role": "assistant", "content": 'True — "yes".'},
    {"role": "user", "content": "世界?"},
]

MARKED = """
{%- for message in messages %}
    {%- generation %}
<|{{ message.role }}|>
{{ message['content'] | trim }}{{ eos_token }}
    {%- endgeneration %}
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{% endif %}
"""

BRACKETED = """
{{- bos_token }}
{%- set ns = namespace(system='', turns=0) %}
{%- for message in messages if message.role == 'system' %}
    {%- set ns.system = message.content | trim %}
    {%- break %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- if message.role == 'user' %}
        {%- set ns.turns = ns.turns + 1 %}
        {%- set system = ns.system ~ '\\n\\n' if ns.system and ns.turns == 1 else '' %}
        {{- '[INST] ' ~ system ~ message.content ~ ' [/INST]' }}
    {%- elif message.role == 'assistant' %}
        {{- ' ' + message.content + eos_token }}
    {%- else %}
        {{- raise_exception('roles must be user or assistant, not ' ~ message.role) }}
    {%- endif %}
{%- endfor %}
"""

WITH_TOOLS = """
{%- if tools is not none %}Tools: {{ tools | tojson(indent=2) }}
{% endif %}
{%- if documents %}{{ documents | length * 2 }} halves, {{ 2 ** 3 }}{% endif %}
{{- strftime_now('%Y') | length }} {{ thinking | default('undecided') }}
{%- macro say(message) %}{{ message.role | upper }}: {{ message | tojson }}{{ '-' * 3 }}{% endmacro %}
{%- for message in messages %}{{ say(message) }}{% endfor %}
"""


def render(source: str, messages: Sequence[Any] = HELLO, **settings: Any) -> str:
    return ChatTemplate(source, TOKENS).render(messages, **settings)


@pytest.mark.parametrize("source", [MARKED, BRACKETED, WITH_TOOLS], ids=["marked", "bracketed", "tools"])
@pytest.mark.parametrize("messages", [HELLO, TALK], ids=["hello", "talk"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize(
    "extra", [{}, {"tools": [{"name": "größer", "args": [1, None]}], "documents": [{"text": "x"}]}]
)
def test_renders_as_transformers(
    source: str, messages: list[dict[str, Any]], add_generation_prompt: bool, extra: dict[str, Any]
) -> None:
    oracle = PreTrainedTokenizerFast(tokenizer_object=KINDS["byte_level"](), **TOKENS)
    settings = {"add_generation_prompt": add_generation_prompt, **extra}
    expected = oracle.apply_chat_template(messages, chat_template=source, tokenize=False, thinking=True, **settings)
    assert render(source, messages, variables={"thinking": True}, **settings) == expected


@pytest.mark.parametrize("source", [MARKED, BRACKETED], ids=["marked", "bracketed"])
def test_the_final_message_is_left_open_as_in_transformers(source: str) -> None:
    oracle = PreTrainedTokenizerFast(tokenizer_object=KINDS["byte_level"](), **TOKENS)
    tokenizer = Tokenizer(KINDS["byte_level"](), special_tokens=TOKENS, chat_template=source)
    encoder = PromptEncoder(tokenizer)  # a process
    options = ChatOptions(add_generation_prompt=False, continue_final_message=True)
    texts = "Once upon", "Once upon ", " a\nb <|end|>\n", 'True — "yes".', "Hello"
    for role, text in product(("assistant", "user"), texts):
        messages = [*HELLO, {"role": role, "content": text}]
        expected = oracle.apply_chat_template(
            messages, chat_template=source, tokenize=False, continue_final_message=True
        )
        encoded = encoder.encode_chat(messages, options=options)
        assert tokenizer.decode(encoded.token_ids, skip_special_tokens=False) == expected
        assert encoded.continues and messages[-1]["content"] == text
        in_parts = [*HELLO, {"role": role, "content": [{"type": "text", "text": text}]}]
        assert encoder.encode_chat(in_parts, options=options) == encoded


def test_a_final_message_that_a_template_leaves_out_is_not_continued() -> None:
    source = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    encoder = PromptEncoder(Tokenizer(KINDS["byte_level"](), chat_template=source))
    options = ChatOptions(add_generation_prompt=False, continue_final_message=True)
    for last in ({"role": "assistant", "content": "x"}, {"role": "assistant"}, {"role": "user", "content": []}):
        with pytest.raises(InvalidRequestError, match="continue_final_message needs a last message"):
            encoder.encode_chat([*HELLO, last], options=options)


PARTS = "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}{{ part.text }};{% endfor %}{% endfor %}"
TEXT = "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}"
EITHER = """{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}
{%- for part in m.content %}{{ part.text }}{% endfor %}{% endif %};{% endfor %}"""
PARTS_OF_USERS = """{% for m in messages %}<{{ m.role }}>{% if m.role == 'user' %}
{%- for part in m.content %}{{ part.text }};{% endfor %}{% else %}{{ m.content }};{% endif %}{% endfor %}"""


def in_parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize("source", [PARTS, TEXT, EITHER, PARTS_OF_USERS], ids=["parts", "text", "either", "users"])
@pytest.mark.parametrize("sent", ["text", "parts"])
def test_content_has_the_form_that_the_template_reads(source: str, sent: str) -> None:
    messages = [{"role": role, "content": role.upper()} for role in ("system", "user", "assistant", "user")]
    if sent == "parts":
        messages = [{**message, "content": in_parts(str(message["content"]))} for message in messages]
    assert render(source, messages) == "<system>SYSTEM;<user>USER;<assistant>ASSISTANT;<user>USER;"


def test_several_parts_stay_apart_or_are_joined() -> None:
    messages = [{"role": "user", "content": in_parts("a", "b")}]
    assert render(PARTS, messages) == "<user>a;b;"
    assert render(TEXT, messages) == "<user>a\nb;"
    assert render(EITHER, messages) == "<user>ab;"


def test_template_that_reads_the_first_message_alone() -> None:
    source = "{% for part in messages[0].content %}{{ part.text }}{% endfor %}"
    assert render(source, [{"role": "user", "content": in_parts("a", "b")}]) == "ab"
    assert render(source, [{"role": "user", "content": "ab"}]) == "ab"


@pytest.mark.parametrize(
    ("source", "messages", "words"),
    [
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}",
            [{"role": "system", "content": "x"}, *HELLO],
            "System role not supported",
        ),
        (
            "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
            "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% endfor %}",
            HELLO * 2,
            "Conversation roles must alternate",
        ),
    ],
)
def test_template_refuses_in_its_own_words(source: str, messages: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"^the chat template refuses: {words}$") as error:
        render(source, messages)
    assert error.value.status == 400


def test_no_template_says_what_to_do() -> None:
    with pytest.raises(TokenizerError, match=r"no chat template; .*chat_template\.jinja"):
        ChatTemplate(None)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "non-empty list"),
        ("hello", "non-empty list"),
        ({"role": "user"}, "non-empty list"),
        (["hello"], r"messages\[0\] must be an object with a role"),
        ([{"content": "x"}], r"messages\[0\] must be an object with a role"),
        ([*HELLO, {"role": 3, "content": "x"}], r"messages\[1\] must be an object with a role"),
        ([{"role": "user", "content": 3}], r"messages\[0\]\.content must be text or a list of parts"),
        ([{"role": "user", "content": [object()]}], "plain JSON data"),
        ([{"role": "user", "content": "x", "extra": {1, 2}}], "plain JSON data"),
    ],
)
def test_malformed_messages(messages: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        render(MARKED, messages)
    assert caught.value.parameter == "messages"


def test_tools_and_variables_must_be_plain_data() -> None:
    with pytest.raises(InvalidRequestError, match="variables must be plain JSON data"):
        render(MARKED, variables={"x": object()})
    with pytest.raises(InvalidRequestError, match="tools must be plain JSON data"):
        render(MARKED, tools=[{"x": object()}])


def test_a_refusal_by_the_template_is_an_invalid_request() -> None:
    with pytest.raises(InvalidRequestError, match="template refuses: roles must be user or assistant, not tool"):
        render(BRACKETED, [{"role": "tool", "content": "x"}])


@pytest.mark.parametrize(
    "source", ["{{ messages[0].content.missing.more }}", "{{ messages[0].content + 1 }}", "{{ messages[0] % 0 }}"]
)
def test_messages_that_the_template_cannot_render(source: str) -> None:
    with pytest.raises(InvalidRequestError, match="cannot render these messages"):
        render(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for m in messages %}", "broken.*line 1"),
        ("{{ messages | nonsense }}", "broken.*nonsense"),
        ("{% include 'x' %}{{", "broken"),
        ("{% for m in messages %}" * 30 + "{% endfor %}" * 30, "cannot be compiled"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "cannot be compiled"),
    ],
)
def test_broken_templates(source: str, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        ChatTemplate(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__.threading }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ (messages | map(attribute='__class__') | list)[0].__name__ }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ ('%s' | attr('__class__')).x }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ self._TemplateReference__context.vars }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ],
)
def test_escapes_from_the_sandbox_are_refused(source: str) -> None:
    with pytest.raises((TokenizerError, InvalidRequestError), match=r"templates may not|cannot render"):
        render(source)


def test_tools_that_a_template_passes_over_are_refused() -> None:
    options = ChatOptions(tools=(Tool(name="now"),))
    encoder = PromptEncoder(Tokenizer(KINDS["byte_level"](), chat_template=TEXT))
    with pytest.raises(InvalidRequestError, match="chat template does not tell the model of tools") as refusal:
        encoder.encode_chat("Hello", options=options)
    assert refusal.value.parameter == "tools"
    tells = PromptEncoder(Tokenizer(KINDS["byte_level"](), chat_template="{{ tools | tojson if tools }}" + TEXT))
    assert len(tells.encode_chat("Hello", options=options).token_ids) > len(tells.encode_chat("Hello").token_ids)
