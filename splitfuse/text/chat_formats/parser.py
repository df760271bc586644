"""Reads the parts of an answer: one parser for streams and for whole answers, so that both give the same message."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from splitfuse.text.chat_formats.formats import PLAIN, ChatFormat
from splitfuse.text.chat_formats.message import AssistantMessage, ContentDelta, MessageEvent, Tool


class MessageParser:
    """Turns the text of one answer into events as it comes. However a text is cut, the events make the same message."""

    def __init__(self, chat_format: ChatFormat, *, tools: Sequence[Tool] = (), prompt: str = "") -> None:
        """Begin an answer. Without `tools`, calls are content. `prompt` is the end of the text before the answer, in
        which a template may have opened a thought.
        """

    def feed(self, text: str) -> list[MessageEvent]:
        """Return the events that are certain after `text`, which follows what was fed before."""
        return [ContentDelta(text)] if text else []

    def finish(self) -> list[MessageEvent]:
        """Return the events for what was held back: the answer has ended."""
        return []


@dataclass(frozen=True)
class MessageSource:
    """Says how to read an answer: its format, the tools that it may call, the end of its prompt."""

    chat_format: ChatFormat = PLAIN
    tools: tuple[Tool, ...] = ()
    prompt: str = ""

    def parser(self) -> MessageParser:
        """Return a parser at the beginning of the answer."""
        return MessageParser(self.chat_format, tools=self.tools, prompt=self.prompt)

    def read(self, text: str) -> AssistantMessage:
        """Return the message that a whole answer is."""
        parser = self.parser()
        return AssistantMessage.of([*parser.feed(text), *parser.finish()])
