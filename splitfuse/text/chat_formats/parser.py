"""Reads the parts of an answer: one parser for streams and for whole answers, so that both give the same message.

The parser is a generator that yields where it needs more text. A call begins once its name is known: until then its
text is held back, and becomes content if it turns out to be no call. Its arguments follow as they come: JSON as it
stands, other notations as JSON (values.py). What follows malformed arguments is left to the content; JSON that is
malformed stays in the arguments up to the end of the call, since nothing tells better what was meant.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from splitfuse.text.chat_formats import values
from splitfuse.text.chat_formats.formats import (
    PLAIN,
    CallFormat,
    Channels,
    ChatFormat,
    GemmaCalls,
    JsonCalls,
    NamedCalls,
    PythonCalls,
    TaggedCalls,
)
from splitfuse.text.chat_formats.message import (
    ArgumentsDelta,
    AssistantMessage,
    ContentDelta,
    MessageEvent,
    ReasoningDelta,
    Tool,
    ToolCallStart,
)
from splitfuse.text.chat_formats.source import SPACE, Emit, Markers, Source, Steps, markers_of

MAX_NAME = 256
"""Number of characters of the name of a tool."""
_NAME = re.compile(r"[\w.:/-]")
_KEY = re.compile(r"[^<>\"\n]")
_SPACES = re.compile(f"[{SPACE}]")
_NUMBERED = re.compile(r"(.+):([0-9]+)")
_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"to=([\w.-]+)")
HEADER_BEGINS = ("<|start|>", "<|channel|>")
"""Markers with which headers of messages of channels begin; `<|message|>` ends one."""
BODY_MARKERS = ("<|message|>", "<|end|>", "<|call|>", "<|return|>")
"""Other markers around the bodies of these messages."""
_HEADS = Markers((*HEADER_BEGINS, "<|message|>"))
_BODY_ENDS = Markers((*HEADER_BEGINS, *BODY_MARKERS))
_LAST_HEADER = re.compile(r"<\|channel\|>\s*(\w+)[^<]*<\|message\|>\Z")
_ANALYSIS, _FINAL = "<|channel|>analysis<|message|>", "<|channel|>final<|message|>"


class Start(Enum):
    """Names what a prompt has left open where the answer begins."""

    NEW = auto()
    """Nothing."""
    THOUGHT = auto()
    """A thought without text."""
    IN_THOUGHT = auto()
    """A thought with text."""
    AFTER_THOUGHT = auto()
    """Content without text, after a thought or in place of one."""
    CONTENT = auto()
    """Content with text, or a call, whose rest is content of this answer."""


def start_of(chat_format: ChatFormat, prompt: str, continued: str = "") -> Start:
    """Return where an answer begins whose prompt ends with `continued`, the text of a message which it continues.

    Before that text only the very end of the prompt counts, which the template wrote: users and tools may write any
    marker within it.

    >>> start_of(ChatFormat(name="thinker", reasoning=("<think>", "</think>")), "<|assistant|><think>\\n")
    <Start.THOUGHT: 2>
    """
    text, before = continued.strip(), prompt.rstrip()
    before = before.removesuffix(text).rstrip() if before.endswith(text) else ""
    if isinstance(chat_format.calls, Channels):
        if text or (header := _LAST_HEADER.search(before)) is None:
            return Start.CONTENT if text else Start.NEW
        return Start.THOUGHT if header[1] == "analysis" else Start.AFTER_THOUGHT
    if chat_format.reasoning is None:
        return Start.CONTENT if text else Start.NEW
    open_text, close_text = map(str.strip, chat_format.reasoning)
    start = Start.THOUGHT if before.endswith(open_text) else Start.NEW
    start = Start.AFTER_THOUGHT if before.endswith(close_text) else start
    while text:
        if start is Start.THOUGHT:
            thought, close, text = text.removeprefix(open_text).partition(close_text)
            unclosed = Start.IN_THOUGHT if thought.strip() else Start.THOUGHT
            start = Start.AFTER_THOUGHT if close else unclosed
        elif text.startswith(open_text):
            start, text = Start.THOUGHT, text.removeprefix(open_text)
        elif text.startswith(close_text):
            start, text = Start.AFTER_THOUGHT, text.removeprefix(close_text)
        else:
            return Start.CONTENT
        text = text.strip()
    return start


class MessageParser:
    """Turns the text of one answer into events as it comes. However a text is cut, the events make the same message.

    >>> parser = MessageParser(ChatFormat(name="thinker", reasoning=("<think>", "</think>")))
    >>> parser.feed("<think>Hm.</think>Hel")
    [ReasoningDelta(text='Hm.'), ContentDelta(text='Hel')]
    """

    def __init__(self, chat_format: ChatFormat, *, tools: Sequence[Tool] = (), start: Start = Start.NEW) -> None:
        """Begin an answer. Without `tools`, calls are content. `start` says where the prompt has ended."""
        self._tools = {tool.name: tool for tool in tools}
        self._calls = chat_format.calls if tools else None
        self._open, self._close = (text.strip() for text in chat_format.reasoning or ("", ""))
        self._start = start
        self._source = Source()
        self._events: list[MessageEvent] = []
        self._content = _Text(ContentDelta, has_begun=start is Start.CONTENT)
        self._thought = _Text(ReasoningDelta, has_begun=start is Start.IN_THOUGHT)
        if start is Start.AFTER_THOUGHT:
            self._content.touch()
        self._num_calls = 0
        self._num_unclosed = 0  # calls whose end has not come
        self._in_section = False
        self._swallows_close = False  # a call has ended the thought, whose end may still come
        self._steps = self._channels() if isinstance(chat_format.calls, Channels) else self._message()

    def feed(self, text: str) -> list[MessageEvent]:
        """Return the events that are certain after `text`, which follows what was fed before."""
        self._feed(text)
        return self._taken()

    def finish(self) -> list[MessageEvent]:
        """Return the events for what was held back: the answer has ended."""
        self._source.has_ended = True
        self._feed("")
        self._emit(self._content, self._content.rest())
        return self._taken()

    def _feed(self, text: str) -> None:
        self._source.feed(text)
        next(self._steps, None)

    def _taken(self) -> list[MessageEvent]:
        events, self._events = self._events, []
        return events

    def _emit(self, part: _Text, text: str) -> None:
        last = self._events[-1] if self._events else None
        if text and isinstance(last, part.kind):
            self._events[-1] = part.kind(last.text + text)
        elif text:
            self._events.append(part.kind(text))

    def _say(self, text: str) -> None:
        self._emit(self._content, self._content.push(text))

    def _think(self, text: str) -> None:
        self._emit(self._thought, self._thought.push(text))

    def _argue(self, text: str) -> None:
        """Add to the arguments of the last call."""
        last = self._events[-1] if self._events else None
        if text and isinstance(last, ArgumentsDelta):
            self._events[-1] = ArgumentsDelta(last.index, last.text + text)
        elif text:
            self._events.append(ArgumentsDelta(self._num_calls - 1, text))

    # The parts of an answer.

    def _message(self) -> Steps[None]:
        """Read content, with thoughts at its beginning and after calls, and calls anywhere."""
        calls, source = self._calls, self._source
        markers = markers_of(*filter(None, (self._open, self._close)), *_ends_of(calls))
        if not markers.texts:
            yield from source.copy(markers, lambda text: self._emit(self._content, text))
            return
        if self._start is Start.THOUGHT:
            yield from self._read_thought()
        elif self._start is Start.IN_THOUGHT:
            yield from self._read_rest_of_thought()
        while True:
            if calls is not None and calls.is_bare and self._content.at_start:
                self._say((yield from source.take_run(_SPACES)))
                if (yield from self._bare_call(calls)):
                    continue
            marker = yield from source.copy(markers, self._say)
            if not marker:
                return
            if marker == self._open and self._content.at_start:
                yield from self._read_thought()
            elif marker == self._close and self._swallows_close:
                self._swallows_close = False
                self._content.touch()
            elif calls is None or not (yield from self._read_call(calls, marker)):
                self._say(marker)

    def _read_thought(self) -> Steps[None]:
        """Read a thought."""
        self._thought.begin()
        yield from self._source.skip_space()
        yield from self._source.take(self._open)  # some repeat what the template has written
        yield from self._read_rest_of_thought()

    def _read_rest_of_thought(self) -> Steps[None]:
        """Read a thought to its end, or to a call at the beginning of a line: models forget to end their thoughts."""
        source, calls = self._source, self._calls
        markers = markers_of(self._close, *_begins_of(calls))
        while marker := (yield from source.copy(markers, self._think)):
            if marker == self._close:
                break
            if calls is not None and self._thought.at_line_start and (yield from self._read_call(calls, marker)):
                self._swallows_close = True
                break
            self._think(marker)
        self._content.touch()

    def _read_call(self, calls: CallFormat, marker: str) -> Steps[bool]:
        """Read what follows a marker of calls. Returns False, with nothing read, if it is none here."""
        source, section = self._source, calls.section
        if marker == calls.close.strip():
            is_known = self._num_unclosed > 0
            self._num_unclosed -= is_known
        elif marker == section[1].strip():
            is_known, self._in_section = self._in_section, False
        else:
            source.mark()
            is_known = True
            if marker == section[0].strip():
                yield from source.skip_space()
                is_known = yield from source.take(calls.open.strip())
            if not is_known or not (yield from self._calls_of(calls)):
                source.reset()
                return False
            self._in_section |= marker == section[0].strip()
        if is_known:
            self._content.touch()
        return is_known

    def _bare_call(self, calls: CallFormat) -> Steps[bool]:
        """Read a call without a marker before it, of a tool that is there: other objects and lists are content."""
        source = self._source
        first = yield from source.peek()
        if first not in ("[", "{"):
            return False
        source.mark()
        if (yield from self._calls_of(calls, is_bare=True)):
            self._content.touch()
            return True
        source.reset(skip=1)
        self._say(first)
        return False

    def _calls_of(self, calls: CallFormat, *, is_bare: bool = False) -> Steps[bool]:
        """Read a call, or several if they share a marker. Returns False, with the mark still set, if it is none."""
        match calls:
            case JsonCalls():
                is_call = yield from self._objects(calls, is_bare)
            case NamedCalls():
                is_call = yield from self._named(calls)
            case TaggedCalls():
                is_call = yield from self._tagged(calls)
            case PythonCalls():  # the same models are also told to write JSON
                is_json = (yield from self._source.skip_space()) == "{"
                is_call = yield from self._objects(calls, is_bare) if is_json else self._python(calls, is_bare)
            case GemmaCalls():
                is_call = yield from self._gemma(calls)
            case _:
                is_call = False
        if is_call and calls.close and not is_bare:
            yield from self._source.skip_space()
            is_closed = (yield from self._source.take(close := calls.close.strip())) or self._source.ends_within(close)
            self._num_unclosed += not is_closed
        return is_call

    def _begin(self, name: str, call_id: str = "") -> None:
        """Begin a call: from here on nothing of it becomes content."""
        kind = self._calls.ids if self._calls else "random"
        if not call_id and kind == "short":
            call_id = "".join(secrets.choice(_ALPHABET) for _ in range(9))
        elif not call_id:
            numbered = f"functions.{name}:{self._num_calls}"
            call_id = numbered if kind == "numbered" else f"call_{secrets.token_hex(12)}"
        self._source.commit()
        self._events.append(ToolCallStart(self._num_calls, call_id, name))
        self._num_calls += 1

    # JSON: {"name": "weather", "arguments": {"city": "Paris"}}

    def _objects(self, calls: CallFormat, is_bare: bool = False) -> Steps[bool]:
        source = self._source
        yield from source.skip_space()
        is_list = yield from source.take("[")
        yield from source.skip_space()
        if not (yield from self._object(calls, is_bare)):
            return False
        while True:
            source.mark()
            if (yield from source.skip_space()) in (",", ";"):
                source.position += 1
                yield from source.skip_space()
            if not (yield from self._object(calls, is_bare)):
                source.reset()
                break
        if is_list:
            yield from source.skip_space()
            yield from source.take("]")
        return True

    def _object(self, calls: CallFormat, is_bare: bool) -> Steps[bool]:
        source = self._source
        name = ""
        held: list[str] = []  # arguments before the name
        has_begun = False
        if not (yield from source.take("{")):
            return False
        while (yield from source.skip_space()) == '"':
            key = yield from values.json_string(source)
            if key is None or (yield from source.skip_space()) != ":":
                return has_begun
            source.position += 1
            first = yield from source.skip_space()
            if key == "name" and not name:
                name = (yield from values.json_string(source)) or ""
                if not (name in self._tools if is_bare else _is_name(name)):
                    return False
                if held:
                    self._begin(name)
                    self._argue("".join(held))
                    has_begun = True
            elif key in ("arguments", "parameters") and name and not has_begun:
                self._begin(name)
                has_begun = True
                yield from self._arguments(calls, first)
            elif is_bare and key not in ("arguments", "parameters", "type"):
                return has_begun
            else:
                text: list[str] = []
                if not (yield from values.json_value(source, text.append)):
                    return has_begun
                held = text if key in ("arguments", "parameters") else held
            if not (yield from source.take_separator("}")):
                return has_begun
        if not name or not (yield from source.take("}")):
            return has_begun
        if not has_begun:
            self._begin(name)
            self._argue("{}")
        return True

    def _arguments(self, calls: CallFormat, first: str) -> Steps[None]:
        """Read arguments in JSON, or in a text that holds JSON. What is none is read to the end of the call."""
        source, ends = self._source, _ends_of(calls)
        for end in ends:
            if (yield from source.comes(end)):
                first = ""
        if (yield from source.take("null")) or not (first or source.has_ended):
            self._argue("{}")
        elif first == '"':
            source.position += 1
            yield from values.quoted(source, '"', self._argue)
        elif not (yield from values.json_value(source, self._argue)):
            marker = yield from source.copy(markers_of(*ends), self._argue, keeps_end=False)
            source.position -= len(marker)

    # JSON after a name: weather[ARGS]{"city": "Paris"}

    def _named(self, calls: NamedCalls) -> Steps[bool]:
        source = self._source
        if (yield from source.skip_space()) in ("[", "{"):
            return (yield from self._objects(calls))
        yield from source.take(calls.before.strip())
        name = yield from source.take_run(_NAME, MAX_NAME)
        call_id = ""
        if calls.ids == "numbered" and (numbered := _NUMBERED.fullmatch(name)):
            call_id, name = calls.before + name, numbered[1]
        yield from source.skip_space()
        if calls.call_id and (yield from source.take(calls.call_id)):
            call_id = yield from source.take_run(_NAME, MAX_NAME)
        for after in calls.after:
            if (yield from source.take(after.strip())):
                break
        else:
            if (yield from source.peek()) != "{":
                return False
        if not name:
            return False
        self._begin(name, call_id)
        yield from self._arguments(calls, (yield from source.skip_space()))
        if calls.end:
            yield from source.skip_space()
            yield from source.take(calls.end.strip())
        return True

    # Texts between tags: <function=weather><parameter=city>Paris</parameter></function>

    def _tagged(self, calls: TaggedCalls) -> Steps[bool]:
        source = self._source
        end = (calls.end_of_call or calls.close).strip()
        yield from source.skip_space()
        if not (yield from source.take(calls.before.strip())):
            return False
        name = yield from source.take_run(_NAME, MAX_NAME)
        if not name or not (yield from source.take(calls.after.strip())):
            return False
        key_open, key_close = (text.strip() for text in calls.key)
        if not calls.after.strip():  # nothing but what follows tells a name from a text
            yield from source.skip_space()
            if not (yield from source.comes(key_open)) and not (yield from source.comes(end)):
                return False
        self._begin(name)
        separator = "{"
        while True:
            yield from source.skip_space()
            if not (yield from source.take(key_open)):
                break
            key = yield from source.take_run(_KEY, MAX_NAME)
            if not key or not (yield from source.take(key_close)):
                break
            of_schema = values.types_of(self._tools[name].parameters, key) if name in self._tools else frozenset()
            types = yield from self._before_value(calls, of_schema)
            if types is None:
                break
            if not (yield from self._value(calls, f"{separator}{values.quote(key)}: ", types)):
                return True
            separator = ", "
        if source.ends_within(*map(str.strip, calls.texts)):
            return True
        self._argue("{}" if separator == "{" else "}")
        if end != calls.close.strip():
            yield from source.take(end)
        return True

    def _before_value(self, calls: TaggedCalls, types: frozenset[str]) -> Steps[frozenset[str] | None]:
        """Read what stands before a value, and return its types; None if it is missing."""
        source = self._source
        if calls.value[0].strip():
            yield from source.skip_space()
        else:
            yield from source.take(calls.value[0])
        for number, text in enumerate(calls.value):
            if (yield from source.take(text.strip())):
                if len(calls.value) == 1:
                    return types
                return frozenset(("string",)) if number == 0 else (types or values.ANY) - {"string"}
        return None

    def _value(self, calls: TaggedCalls, before: str, types: frozenset[str]) -> Steps[bool]:
        """Read a value: a string as it comes, others at their end. Returns whether the end came."""
        end = calls.end.strip()
        ends = [end]
        if calls.end.startswith("\n"):
            ends = [f"\n{end}", end, f"\n{calls.end_of_call}{calls.close}"]
        self._argue(before)
        if types == {"string"}:
            self._argue('"')
            emit: Emit = lambda text: self._argue(values.escape(text))  # noqa: E731
            marker = yield from self._source.copy(markers_of(*ends), emit, keeps_end=False)
            self._argue('"' if marker else "")
        else:
            held: list[str] = []
            marker = yield from self._source.copy(markers_of(*ends), held.append)
            self._argue(values.json_of("".join(held), types) if marker else "")
        if marker == ends[-1] != end:  # some forget the end of the last value
            self._source.position -= len(marker)
        return bool(marker)

    # Python: [weather(city="Paris"), time()]

    def _python(self, calls: PythonCalls, is_bare: bool) -> Steps[bool]:
        source = self._source
        yield from source.skip_space()
        if not (yield from source.take(calls.brackets[0])):
            return False
        yield from source.skip_space()
        if (is_whole := (yield from self._python_call(is_bare))) is None:
            return False
        while is_whole:
            source.mark()
            yield from source.take_separator("")
            yield from source.skip_space()
            if (is_whole := (yield from self._python_call(is_bare))) is None:
                source.reset()
                yield from source.skip_space()
                yield from source.take(calls.brackets[1])
        return True

    def _python_call(self, is_bare: bool) -> Steps[bool | None]:
        """Read a call. Returns whether all of it came; None if it is none."""
        source = self._source
        name = yield from source.take_run(_NAME, MAX_NAME)
        if not (name in self._tools if is_bare else name) or not (yield from source.take("(")):
            return None
        separator = "{"
        while (yield from source.skip_space()) != ")":
            key = yield from source.take_run(_NAME, MAX_NAME)
            yield from source.skip_space()
            if not key or not (yield from source.take("=")):
                return None if separator == "{" else False
            if separator == "{":
                self._begin(name)
            self._argue(f"{separator}{values.quote(key)}: ")
            separator = ", "
            if not (yield from values.literal(source, values.PYTHON, self._argue)):
                return False
            if not (yield from source.take_separator(")")):
                return False
        source.position += 1
        if separator == "{":
            self._begin(name)
        self._argue("{}" if separator == "{" else "}")
        return True

    # Gemma: call:weather{city:<|"|>Paris<|"|>}

    def _gemma(self, calls: GemmaCalls) -> Steps[bool]:
        source = self._source
        yield from source.skip_space()
        if not (yield from source.take(calls.before)):
            return False
        name = yield from source.take_run(_NAME, MAX_NAME)
        if not name or (yield from source.skip_space()) != "{":
            return False
        self._begin(name)
        yield from values.literal(source, values.gemma(calls.quote), self._argue)
        return True

    # Channels: <|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hello

    def _channels(self) -> Steps[None]:
        source = self._source
        if self._start is Start.CONTENT:
            self._end_body((yield from source.copy(_BODY_ENDS, self._say)))
        elif self._start is not Start.NEW:
            yield from self._channel(_ANALYSIS if self._start is Start.THOUGHT else _FINAL)
        while True:
            source.mark()
            spaces = yield from source.take_run(_SPACES)
            header = yield from self._header()
            if header:
                source.commit()
                yield from self._channel(header)
                continue
            source.reset(skip=len(spaces))
            self._say(spaces)
            for marker in _HEADS.texts:
                if (yield from source.take(marker)):
                    self._say(marker)
            marker = yield from source.copy(_HEADS, self._say)
            if not marker:
                return
            source.position -= len(marker)

    def _header(self) -> Steps[str]:
        """Read the header of a message, and return it; an empty text if there is none."""
        source = self._source
        begins = False
        for text in ("<|start|>", "<|channel|>", "<|message|>", "to="):
            begins = begins or (yield from source.comes(text))
        if not begins:
            return ""
        parts = ["<|start|>"] if (yield from source.take("<|start|>")) else []
        marker = yield from source.copy(markers_of("<|message|>", "<|start|>", "<|end|>", "<|call|>"), parts.append)
        return "".join(parts) + marker if marker == "<|message|>" else ""

    def _channel(self, header: str) -> Steps[None]:
        """Read the body of a message, and its end."""
        source = self._source
        channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
        if recipient and self._calls is None:
            self._say(header)
            marker = yield from source.copy(_BODY_ENDS, self._say)
            if marker in _HEADS.texts:
                source.position -= len(marker)
            else:
                self._say(marker)
            return
        if recipient and recipient[1].startswith("functions."):
            self._begin(recipient[1].removeprefix("functions."))
            yield from source.skip_space()
            if not (yield from values.json_value(source, self._argue)):
                marker = yield from source.copy(_BODY_ENDS, self._argue)
                source.position -= len(marker)
            yield from source.skip_space()
            self._content.begin()
            marker = yield from source.copy(_BODY_ENDS, self._say)
        elif channel and channel[1] == "analysis":
            self._thought.begin()
            marker = yield from source.copy(_BODY_ENDS, self._think)
        else:
            self._content.begin()
            marker = yield from source.copy(_BODY_ENDS, self._say)
        self._end_body(marker)

    def _end_body(self, marker: str) -> None:
        """Take in the marker that ended the body of a message, or leave it where it begins the next one's header."""
        if marker in _HEADS.texts:
            self._source.position -= len(marker)
        if marker:
            self._content.touch()


class _Text:
    """Holds back white space that may stand next to a marker: that around the content, or a thought, is no part of it,
    and white space within it is.
    """

    def __init__(self, kind: type[ContentDelta] | type[ReasoningDelta], *, has_begun: bool) -> None:
        self.kind = kind
        self.held = ""
        self._has_begun = has_begun
        self._touches = False  # what is held touches a marker

    @property
    def at_start(self) -> bool:
        """Return whether nothing, or only a marker and white space, came before."""
        return self._touches or not self._has_begun

    @property
    def at_line_start(self) -> bool:
        """Return whether nothing came on this line."""
        return self.at_start or "\n" in self.held

    def begin(self) -> None:
        """Begin a further part, on a line of its own."""
        self.held = "\n" if self._has_begun else ""
        self._touches = True

    def touch(self) -> None:
        """Note a marker."""
        self._touches = True

    def push(self, text: str) -> str:
        """Return the text that is certainly a part after `text`."""
        body = text.rstrip(SPACE)
        if not body:
            self.held += text
            return ""
        if self._touches and not self._has_begun:
            self.held, body = "", body.lstrip(SPACE)
        certain, self.held = self.held + body, text[len(text.rstrip(SPACE)) :]
        self._has_begun, self._touches = True, False
        return certain

    def rest(self) -> str:
        """Return the white space that ends the text, unless a marker is next to it."""
        return "" if self._touches else self.held


@dataclass(frozen=True)
class MessageSource:
    """Says how to read an answer: its format, the tools that it may call, and where it begins."""

    chat_format: ChatFormat = PLAIN
    tools: tuple[Tool, ...] = ()
    start: Start = Start.NEW
    parallel: bool = True
    """Flag of an answer that may have several calls; without it, those after the first are left out."""
    calls_only: bool = False
    """Flag of an answer that consists of calls: what is held back where it is cut is the part of one."""

    def parser(self) -> MessageParser:
        """Return a parser at the beginning of the answer."""
        return MessageParser(self.chat_format, tools=self.tools, start=self.start)

    def read(self, text: str) -> AssistantMessage:
        """Return the message that a whole answer is."""
        parser = self.parser()
        return AssistantMessage.of([*parser.feed(text), *parser.finish()])


def _begins_of(calls: CallFormat | None) -> tuple[str, ...]:
    """Return the markers that begin calls."""
    return () if calls is None else tuple(filter(None, (calls.open.strip(), calls.section[0].strip())))


def _ends_of(calls: CallFormat | None) -> tuple[str, ...]:
    """Return the markers around calls."""
    if calls is None:
        return ()
    return (*_begins_of(calls), *filter(None, (calls.close.strip(), calls.section[1].strip())))


def _is_name(name: str) -> bool:
    return 0 < len(name) <= MAX_NAME and all(map(_NAME.match, name))
