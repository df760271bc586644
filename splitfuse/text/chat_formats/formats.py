"""Lists the ways in which models write thoughts and calls of tools, as data, and recognizes a model's.

The texts hold the white space that models write; a parser takes any. What they mean is said in parser.py, and how
a grammar is made of them in grammar.py.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class CallFormat:
    """Says how calls are written: section[0], then each call from `open` to `close` with separators, then section[1].

    The subclasses say what is in between.
    """

    open: str
    close: str = ""
    section: tuple[str, str] = ("", "")
    separator: str = ""
    ids: Literal["random", "short", "numbered"] = "random"
    """Kind of the ids of calls: `call_...`; nine letters and digits; `functions.name:0`, as the model writes them."""
    is_bare: bool = False
    """Flag of calls that may come without `open` and `close`, at the beginning of an answer."""

    @property
    def is_repeatable(self) -> bool:
        """Return whether an answer may have several calls."""
        return True

    @property
    def texts(self) -> tuple[str, ...]:
        """Return the texts that begin and end calls, and those between their parts."""
        return (self.open, self.close, *self.section)


@dataclass(frozen=True, kw_only=True)
class JsonCalls(CallFormat):
    """Calls that are an object with a name and arguments, or a list of such objects.

    <tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>
    """

    arguments: str = "arguments"
    is_list: bool = False


@dataclass(frozen=True, kw_only=True)
class NamedCalls(CallFormat):
    """Calls with the name before an object of arguments. `before` is what stands before the name; after it comes one of
    `after`, of which the first is that of our grammars.

    [TOOL_CALLS]weather[ARGS]{"city": "Paris"}
    """

    before: str = ""
    after: tuple[str, ...]
    end: str = ""
    """Text between the arguments and `close`."""
    call_id: str = ""
    """Text before an id, which some write after the name."""

    @property
    def texts(self) -> tuple[str, ...]:
        """See CallFormat."""
        return (*super().texts, self.before, *self.after, self.call_id)


@dataclass(frozen=True, kw_only=True)
class TaggedCalls(CallFormat):
    """Calls whose arguments are raw texts between tags: strings, or JSON for other types of the tool's schema.

    <tool_call><function=weather><parameter=city>Paris</parameter></function></tool_call>
    """

    before: str = ""
    """Text between `open` and the name."""
    after: str = ""
    """Text after the name."""
    key: tuple[str, str]
    """Texts before and after the name of an argument."""
    value: tuple[str, ...]
    """Texts before a value; with two, the first is that of a string and the second that of JSON."""
    end: str
    """Text after a value."""
    end_of_call: str = ""
    """Text between the last argument and `close`."""

    @property
    def texts(self) -> tuple[str, ...]:
        """See CallFormat."""
        return (*super().texts, self.before, self.after, *self.key, *self.value, self.end, self.end_of_call)


@dataclass(frozen=True, kw_only=True)
class PythonCalls(CallFormat):
    """Calls that are written as in Python, within brackets or a line each.

    [weather(city="Paris")]
    """

    brackets: tuple[str, str] = ("[", "]")


@dataclass(frozen=True, kw_only=True)
class GemmaCalls(CallFormat):
    """Calls whose arguments are an object with keys without quotes, and `quote` around texts.

    <|tool_call>call:weather{city:<|"|>Paris<|"|>}<tool_call|>
    """

    before: str = "call:"
    quote: str = '<|"|>'

    @property
    def texts(self) -> tuple[str, ...]:
        """See CallFormat."""
        return (*super().texts, self.quote)


@dataclass(frozen=True, kw_only=True)
class Channels(CallFormat):
    """Messages of several channels: `analysis` is the thought, `final` the content, and a recipient is a tool's name.

    <|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Paris"}<|call|>
    """

    open: str = "<|start|>"
    close: str = "<|call|>"

    @property
    def is_repeatable(self) -> bool:
        """Return False: an answer ends with its call."""
        return False

    @property
    def texts(self) -> tuple[str, ...]:
        """See CallFormat."""
        return ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>")


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """Says how a model writes the parts of an answer."""

    name: str
    reasoning: tuple[str, str] | None = None
    """Texts around a thought."""
    calls: CallFormat | None = None

    @property
    def markers(self) -> tuple[str, ...]:
        """Return the texts between the parts that may be special tokens, which otherwise are not shown.

        >>> CHAT_FORMATS["hermes"].markers
        ('<tool_call>', '</tool_call>')
        """
        texts = (*(self.reasoning or ()), *(self.calls.texts if self.calls else ()))
        return tuple(dict.fromkeys(marker for text in texts for marker in _MARKER.findall(text)))

    @property
    def thinks(self) -> bool:
        """Return whether answers may have thoughts."""
        return self.reasoning is not None or isinstance(self.calls, Channels)

    @property
    def triggers(self) -> tuple[str, ...]:
        """Return the texts with which calls begin, where a model is free to call."""
        begin = self.calls and (self.calls.section[0] or self.calls.open).strip()
        return (begin,) if begin else ()


_MARKER = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]|◁[^◁▷]+▷")

PLAIN = ChatFormat(name="plain")
"""Format of answers that are content throughout."""

_DEEPSEEK_SECTION = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
_DEEPSEEK = NamedCalls(
    section=_DEEPSEEK_SECTION,
    open="<｜tool▁call▁begin｜>",
    after=("<｜tool▁sep｜>",),
    close="<｜tool▁call▁end｜>",
)


def _dsml(section: str) -> TaggedCalls:
    tag = "｜DSML｜"
    return TaggedCalls(
        section=(f"<{tag}{section}>\n", f"\n</{tag}{section}>"),
        open=f"<{tag}invoke",
        before=' name="',
        after='">\n',
        key=(f'<{tag}parameter name="', '"'),
        value=(' string="true">', ' string="false">'),
        end=f"</{tag}parameter>\n",
        close=f"</{tag}invoke>",
        separator="\n",
    )


_CALLS: dict[str, CallFormat] = {
    "hermes": JsonCalls(open="<tool_call>\n", close="\n</tool_call>", separator="\n"),
    "qwen_xml": TaggedCalls(
        open="<tool_call>\n",
        before="<function=",
        after=">\n",
        key=("<parameter=", ">"),
        value=("\n",),
        end="\n</parameter>\n",
        end_of_call="</function>",
        close="\n</tool_call>",
        separator="\n",
    ),
    "llama_json": JsonCalls(open="<|python_tag|>", arguments="parameters", separator="; ", is_bare=True),
    "llama_python": PythonCalls(open="<|python_start|>", close="<|python_end|>", separator=", ", is_bare=True),
    "lfm2": PythonCalls(open="<|tool_call_start|>", close="<|tool_call_end|>", separator=", "),
    "olmo3": PythonCalls(open="<function_calls>\n", close="\n</function_calls>", separator="\n", brackets=("", "")),
    "mistral": NamedCalls(open="[TOOL_CALLS]", after=("[ARGS]",), call_id="[CALL_ID]", ids="short"),
    "mistral_list": JsonCalls(open="[TOOL_CALLS]", separator=", ", is_list=True, ids="short"),
    "harmony": Channels(),
    "deepseek_v3": replace(
        _DEEPSEEK,
        before="function<｜tool▁sep｜>",
        after=("\n```json\n",),
        end="\n```",
        separator="\n",
    ),
    "deepseek_v3_1": _DEEPSEEK,
    "deepseek_v3_2": _dsml("function_calls"),
    "deepseek_v4": _dsml("tool_calls"),
    "glm": TaggedCalls(
        open="<tool_call>",
        after="\n",
        key=("<arg_key>", "</arg_key>\n"),
        value=("<arg_value>",),
        end="</arg_value>\n",
        close="</tool_call>",
        separator="\n",
    ),
    "kimi_k2": NamedCalls(
        section=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
        open="<|tool_call_begin|>",
        before="functions.",
        after=("<|tool_call_argument_begin|>",),
        close="<|tool_call_end|>",
        ids="numbered",
    ),
    "minimax": TaggedCalls(
        section=("<minimax:tool_call>\n", "\n</minimax:tool_call>"),
        open="<invoke",
        before=' name="',
        after='">\n',
        key=('<parameter name="', '">'),
        value=("",),
        end="</parameter>\n",
        close="</invoke>",
        separator="\n",
    ),
    "gemma4": GemmaCalls(open="<|tool_call>", close="<tool_call|>"),
    "granite": JsonCalls(open="<|tool_call|>", separator=", ", is_list=True),
    "phi4": JsonCalls(open="<|tool_call|>", close="<|/tool_call|>", separator=", ", is_list=True),
    "nemotron": JsonCalls(open="<TOOLCALL>", close="</TOOLCALL>", separator=", ", is_list=True),
    "seed": TaggedCalls(
        open="<seed:tool_call>\n",
        before="<function=",
        after=">\n",
        key=("<parameter=", ">"),
        value=("",),
        end="</parameter>\n",
        end_of_call="</function>",
        close="\n</seed:tool_call>",
        separator="\n",
    ),
}

_RECOGNIZED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("harmony", ("<|channel|>", "<|message|>")),
    ("gemma4", ("<|tool_call>", "<tool_call|>")),
    ("deepseek_v3_2", ("｜DSML｜", "function_calls>")),
    ("deepseek_v4", ("｜DSML｜",)),
    ("deepseek_v3", ("<｜tool▁call▁begin｜>", "```json")),
    ("deepseek_v3_1", ("<｜tool▁call▁begin｜>",)),
    ("kimi_k2", ("<|tool_call_begin|>",)),
    ("minimax", ("<minimax:tool_call>",)),
    ("glm", ("<arg_key>", "<tool_call>")),
    ("seed", ("<seed:tool_call>",)),
    ("qwen_xml", ("<function=", "<parameter=", "<tool_call>")),
    ("plain", ("<invoke name=", "<tool_call>")),  # MiniMax M3, whose arguments are nested tags
    ("hermes", ("<tool_call>",)),
    ("mistral", ("[TOOL_CALLS]", "[ARGS]")),
    ("mistral_list", ("[TOOL_CALLS]",)),
    ("lfm2", ("<|tool_call_start|>",)),
    ("lfm2", ("<|tool_list_start|>",)),
    ("lfm2", ("List of tools: [", "<|im_start|>")),
    ("olmo3", ("<function_calls>",)),
    ("nemotron", ("<TOOLCALL>",)),
    ("phi4", ("<|tool_call|>", "<|/tool_call|>")),
    ("granite", ("<|tool_call|>",)),
    ("llama_python", ("<|python_start|>",)),
    ("llama_json", ("<|python_tag|>",)),
    ("llama_json", ('{"name": function name, "parameters"',)),
)
"""Names of formats with the markers that all are in a chat template, the more special ones first."""

_REASONING: tuple[tuple[str, str], ...] = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|channel>thought\n", "<channel|>"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("◁think▷", "◁/think▷"),
)
"""Texts around thoughts, of which the second is in the chat template."""

CHAT_FORMATS = {name: ChatFormat(name=name, calls=calls) for name, calls in _CALLS.items()}
"""Formats by their names, without the texts around thoughts, which a chat template has or has not."""


@functools.lru_cache(maxsize=64)
def _format_of(template: str) -> ChatFormat:
    reasoning = next((pair for pair in _REASONING if pair[1] in template), None)
    found = (name for name, markers in _RECOGNIZED if all(marker in template for marker in markers))
    return replace(CHAT_FORMATS.get(next(found, "plain"), PLAIN), reasoning=reasoning)


def format_of(chat_template: str | None, special_tokens: Mapping[str, str]) -> ChatFormat:  # noqa: ARG001
    """Return the format of the answers to a chat template, by the markers that it writes.

    >>> format_of("{% if tools %}<tool_call>...{% endif %}", {}).name
    'hermes'
    """
    return _format_of(chat_template or "")
