"""Reads conversations as Anthropic's API writes them, and folds them into what chat templates read.

Contents are blocks there: thoughts and calls stand in an assistant's turn, results of tools in a user's, and a system
message may stand anywhere. Templates know of other turns: see `TurnReader`.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, ClassVar

from msgspec import Meta

from splitfuse.errors import InvalidRequestError, any_of
from splitfuse.server.errors import RefusedError
from splitfuse.server.validation import Body, SchemaBounds, accepts_neutral
from splitfuse.text.chat_formats.message import Tool
from splitfuse.text.tools import NAME, name_results, placed_tool

EPHEMERAL = [{"type": "ephemeral"}, {"type": "ephemeral", "ttl": "5m"}, {"type": "ephemeral", "ttl": "1h"}]
"""Values of cache_control that change nothing: prompts stay in the prefix cache as long as there is room."""
BILLING = re.compile(r"\Ax-anthropic-billing-header:[^\n]*\n?")
"""Line at the beginning of Claude Code's system prompts, which it writes for Anthropic. It is not shown to the model:
it differs between conversations, so that no two of them would share a prefix."""
REMINDER = "<system-reminder>\n{}\n</system-reminder>"
"""Text in a user's turn that stands for a system message within the conversation, where templates have none. At the
beginning it would change the prefix of all that has been said before it."""
SIGNATURE = "splitfuse"
"""Signature of a thought. One that is not shown follows it, after a full stop, in base64."""
TYPES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "text": (("text",), ()),
    "thinking": (("thinking", "signature"), ()),
    "redacted_thinking": (("data",), ()),
    "tool_use": (("id", "name", "input"), ()),
    "tool_result": (("tool_use_id",), ("content", "is_error")),
    "tool_reference": (("tool_name",), ()),
}
"""Types of blocks, with the fields that they must and may have."""
OF_ROLE = {
    "user": ("text", "tool_result"),
    "assistant": ("text", "thinking", "redacted_thinking", "tool_use"),
    "system": ("text",),
}
"""Types of the blocks in a turn of each role."""
OF_RESULT = ("text", "tool_reference")
"""Types of the blocks in the result of a tool."""
_ID = Annotated[str, Meta(max_length=512)]
_TEXT_ONLY = "conversations are text, also with vision-language models: use blocks of the type text"
_NOT_RUN = "this server runs no tools itself: give tools of your own, with a name and an input_schema"


def sign(thought: str, *, shown: bool) -> str:
    """Return the signature of a thought, from which `hidden_thought` returns one that is not shown."""
    return SIGNATURE if shown else f"{SIGNATURE}.{base64.b64encode(thought.encode()).decode()}"


def hidden_thought(signature: str) -> str:
    """Return the thought in a signature; nothing if it is of another server's, which cannot be read here."""
    name, _, code = signature.partition(".")
    if name != SIGNATURE:
        return ""
    try:
        return base64.b64decode(code, validate=True).decode()
    except ValueError:
        return ""


class TypedBlock(Body, kw_only=True, frozen=True):
    """Holds a block of content, whose type says which fields it has."""

    type: str

    def check(self, where: str, known: Sequence[str]) -> None:
        """Raise InvalidRequestError or RefusedError, naming the place, for another type than the known ones, and for
        fields that do not go with it.
        """
        if self.type not in known:
            advice = f": {_TEXT_ONLY}" if self.type in ("image", "document", "search_result") else ""
            message = f"{where}.type must be {any_of(known)}, not {self.type!r:.80}{advice}"
            raise InvalidRequestError(message, parameter=f"{where}.type")
        self.check_neutral(where + ".")
        needed, foreign = _fields(type(self), self.type)
        for name in needed:
            if getattr(self, name) is None:
                place = f"{where}.{name}"
                raise RefusedError(400, f"{place} is missing", code="missing_parameter", parameter=place)
        for name, owner in foreign:
            if getattr(self, name) is not None:
                place = f"{where}.{name}"
                raise InvalidRequestError(f"{place} needs the type {owner}, not {self.type}", parameter=place)

    @classmethod
    def refine_schema(cls, schema: dict[str, Any], bounds: SchemaBounds) -> dict[str, Any]:
        """See Body: each type has fields of its own."""
        properties: dict[str, Any] = super().refine_schema(schema, bounds)["properties"]
        kinds: list[dict[str, Any]] = []
        for kind in properties["type"]["enum"]:
            needed, optional = TYPES[kind]
            own = {name: properties[name] for name in (*needed, *optional, *cls.NEUTRAL)}
            for name in needed:
                own[name] = next(option for option in own[name]["anyOf"] if option != {"type": "null"})
            own["type"] = {"const": kind}
            required = ["type", *needed]
            kinds.append({"type": "object", "properties": own, "required": required, "additionalProperties": False})
        return {"title": schema["title"], "description": schema["description"], "oneOf": kinds}


@cache
def _fields(kind: type[TypedBlock], type_name: str) -> tuple[Sequence[str], Sequence[tuple[str, str]]]:
    """Return the fields that a block of a type must have, and those of other types, each with its type."""
    needed, optional = TYPES[type_name]
    owners = {name: owner for owner, fields in TYPES.items() for name in fields[0] + fields[1]}
    others = [name for name in kind.supported() if name not in ("type", *needed, *optional)]
    return needed, [(name, owners[name]) for name in others]


class _TextBlock(TypedBlock, kw_only=True, frozen=True):
    REFUSED: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("source", "title", "context", "file_id"), _TEXT_ONLY),
        "citations": "answers cite nothing",
    }

    text: str | None = None


@accepts_neutral(cache_control=EPHEMERAL, citations=[[]])
class SystemBlock(_TextBlock, kw_only=True, frozen=True):
    """Holds a part of the system prompt."""

    type: Annotated[str, Meta(extra_json_schema={"enum": ["text"]})]


@accepts_neutral(cache_control=EPHEMERAL, citations=[[], {"enabled": False}])
class ResultBlock(_TextBlock, kw_only=True, frozen=True):
    """Holds a part of a tool's result: a text, or the name of a tool that was found."""

    type: Annotated[str, Meta(extra_json_schema={"enum": list(OF_RESULT)})]
    tool_name: Annotated[str, Meta(description="Of a tool with defer_loading, which is shown from here on")] | None = (
        None
    )


@accepts_neutral(
    cache_control=EPHEMERAL, caller=[{"type": "direct"}], citations=[[], {"enabled": False}], toolset_name=[]
)
class ContentBlock(_TextBlock, kw_only=True, frozen=True):
    """Holds a part of a turn: a text, a thought, a call of a tool, or its result."""

    type: Annotated[str, Meta(extra_json_schema={"enum": sorted({t for types in OF_ROLE.values() for t in types})})]
    thinking: str | None = None
    signature: str | None = None
    data: Annotated[str, Meta(description="Of a thought that cannot be read; changes nothing")] | None = None
    id: _ID | None = None
    name: Annotated[str, Meta(extra_json_schema={"pattern": NAME})] | None = None
    input: dict[str, Any] | None = None
    tool_use_id: _ID | None = None
    content: str | Annotated[list[ResultBlock], Meta(max_length=1024)] | None = None
    is_error: Annotated[bool, Meta(description="Begins the result with Error:")] | None = None


@accepts_neutral(output_config=[{}])
class MessageTurn(Body, kw_only=True, frozen=True):
    """Holds one turn of a conversation."""

    role: Annotated[str, Meta(extra_json_schema={"enum": list(OF_ROLE)})]
    content: str | Annotated[list[ContentBlock], Meta(min_length=1, max_length=1024)]
    clear_at: (
        Annotated[
            str,
            Meta(
                description="Of a system message: whether later user messages end it",
                extra_json_schema={"enum": ["never", "next_user_message"]},
            ),
        ]
        | None
    ) = None

    def check(self, where: str) -> None:
        """Raise InvalidRequestError or RefusedError, naming the place, for what no turn can have."""
        if self.role not in OF_ROLE:
            message = f"{where}.role must be user, assistant or system, not {self.role!r:.80}"
            raise InvalidRequestError(message, parameter=f"{where}.role")
        self.check_neutral(where + ".")
        if self.clear_at not in (None, "never", "next_user_message") or (self.clear_at and self.role != "system"):
            wanted = "must be never or next_user_message, of a system message"
            message = f"{where}.clear_at {wanted}, not {self.clear_at!r:.80} of the role {self.role}"
            raise InvalidRequestError(message, parameter=f"{where}.clear_at")
        for number, block in enumerate(self.blocks):
            block.check(f"{where}.content[{number}]", OF_ROLE[self.role])

    @property
    def blocks(self) -> Sequence[ContentBlock]:
        """Return the content as blocks."""
        return [ContentBlock(type="text", text=self.content)] if isinstance(self.content, str) else self.content


@accepts_neutral(allowed_callers=[["direct"]], cache_control=EPHEMERAL, input_examples=[[]])
class MessagesTool(Body, kw_only=True, frozen=True):
    """Describes a tool that the model may call. `input_schema` is a JSON schema of an object."""

    REFUSED: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("max_uses", "allowed_domains", "blocked_domains", "user_location", "citations"), _NOT_RUN),
        **dict.fromkeys(("max_content_tokens", "max_characters", "configs", "default_config"), _NOT_RUN),
        **dict.fromkeys(("display_width_px", "display_height_px", "display_number"), _NOT_RUN),
    }

    name: Annotated[str, Meta(extra_json_schema={"pattern": NAME})]
    type: Annotated[str, Meta(extra_json_schema={"enum": ["custom"]})] | None = None
    description: str | None = None
    input_schema: (
        Annotated[dict[str, Any], Meta(extra_json_schema={"properties": {"type": {"const": "object"}}})] | None
    ) = None
    strict: Annotated[bool, Meta(description="Makes the input valid by the schema")] | None = None
    defer_loading: Annotated[bool, Meta(description="Shows the tool only after a tool_reference to it")] | None = None
    eager_input_streaming: Annotated[bool, Meta(description="Changes nothing: inputs stream as they come")] | None = (
        None
    )

    def tool(self, where: str) -> Tool:
        """Return the tool. Raises InvalidRequestError or RefusedError, naming the place."""
        if self.type not in (None, "custom"):
            message = f"{where}.type must be custom, not {self.type!r:.80}: {_NOT_RUN}"
            raise InvalidRequestError(message, parameter=f"{where}.type")
        self.check_neutral(where + ".")
        if self.input_schema is None:
            place = f"{where}.input_schema"
            raise RefusedError(400, f"{place} is missing", code="missing_parameter", parameter=place)
        tool = Tool(
            name=self.name, description=self.description, parameters=self.input_schema, strict=bool(self.strict)
        )
        return placed_tool(tool, where, parameters="input_schema")


class TurnReader:
    """Folds a conversation into the messages that chat templates read.

    Turns of one role that follow each other are one. The results of tools are turns of their own, before the text of
    their user's turn. System messages before all others belong to the system prompt; later ones stand in a user's turn.
    """

    def __init__(self, system: str | Sequence[SystemBlock] | None, turns: Sequence[MessageTurn]) -> None:
        """Read a conversation. Raises InvalidRequestError or RefusedError, naming the place."""
        self.messages: list[dict[str, Any]] = []
        """Messages for a chat template."""
        self.found_tools: dict[str, str] = {}
        """Names of tools in results, with their places: those with defer_loading are shown from then on."""
        self._places: dict[int, str] = {}  # of ids, by the identity of calls and messages of results
        blocks = [SystemBlock(type="text", text=system)] if isinstance(system, str) else system or ()
        for number, block in enumerate(blocks):
            block.check(f"system[{number}]", ("text",))
            text = BILLING.sub("", block.text or "")
            self._say("system", [text] if text else [])
        last_user = max((index for index, turn in enumerate(turns) if turn.role == "user"), default=-1)
        for index, turn in enumerate(turns):
            where = f"messages[{index}]"
            turn.check(where)
            if turn.clear_at != "next_user_message" or index > last_user:
                self._read(turn, where)
        if not self.messages:
            raise InvalidRequestError("messages has no text in it: add a user's message", parameter="messages")
        for message in self.messages:
            texts = message["content"]
            message["content"] = (
                "".join(texts) if len(texts) < 2 else [{"type": "text", "text": text} for text in texts]
            )
        name_results(self.messages, self._place)

    @property
    def continues(self) -> bool:
        """Return whether the answer continues the last message. Raises InvalidRequestError if that calls tools."""
        last = self.messages[-1]
        if last["role"] != "assistant":
            return False
        if "tool_calls" in last:
            message = "messages must go on after a tool_use with a user's message, which has its tool_result"
            raise InvalidRequestError(message, parameter="messages")
        return True

    def _place(self, index: int, number: int | None) -> str:
        message = self.messages[index]
        return self._places[id(message if number is None else message["tool_calls"][number])]

    def _read(self, turn: MessageTurn, where: str) -> None:
        texts = [block.text or "" for block in turn.blocks if block.type == "text"]
        if turn.role == "system" and self._is_within:
            self._say("user", [REMINDER.format("\n".join(texts))])
            return
        if turn.role == "user":
            for number, block in enumerate(turn.blocks):
                if block.type == "tool_result":
                    self._add_result(block, f"{where}.content[{number}]")
        elif turn.role == "assistant":
            self._say("assistant", ())
            self._think(turn.blocks)
            self._call(turn.blocks, where)
        self._say(turn.role, texts)

    @property
    def _is_within(self) -> bool:
        return any(message["role"] != "system" for message in self.messages[:2])

    def _say(self, role: str, texts: Iterable[str]) -> None:
        """Add texts to the last message, or a new one if that has another role."""
        shown = list(texts)
        if self.messages and self.messages[-1]["role"] == role:
            self.messages[-1]["content"] += shown
        elif shown or role == "assistant":
            self.messages.append({"role": role, "content": shown})

    def _think(self, blocks: Sequence[ContentBlock]) -> None:
        thoughts = (block.thinking or hidden_thought(block.signature or "") for block in blocks)
        if thought := "\n".join(filter(None, thoughts)):
            last = self.messages[-1]
            last["reasoning_content"] = "\n".join(filter(None, (last.get("reasoning_content"), thought)))

    def _call(self, blocks: Sequence[ContentBlock], where: str) -> None:
        for number, block in enumerate(blocks):
            if block.type == "tool_use":
                function = {"name": block.name, "arguments": block.input}
                call = {"id": block.id, "type": "function", "function": function}
                self.messages[-1].setdefault("tool_calls", []).append(call)
                self._places[id(call)] = f"{where}.content[{number}].id"

    def _add_result(self, block: ContentBlock, where: str) -> None:
        content = block.content or ()
        parts = [ResultBlock(type="text", text=content)] if isinstance(content, str) else content
        texts = []
        for number, part in enumerate(parts):
            part.check(f"{where}.content[{number}]", OF_RESULT)
            if part.tool_name is not None:
                self.found_tools.setdefault(part.tool_name, f"{where}.content[{number}].tool_name")
            is_text = part.type == "text"
            texts.append(part.text or "" if is_text else f"The tool {part.tool_name} can be called now.")
        if block.is_error:
            texts[:1] = [f"Error: {''.join(texts[:1])}"]
        message = {"role": "tool", "tool_call_id": block.tool_use_id, "content": texts}
        self._places[id(message)] = f"{where}.tool_use_id"
        follows = bool(self.messages) and self.messages[-1]["role"] == "user"
        self.messages.insert(len(self.messages) - follows, message)


@accepts_neutral(keep=["all"], trigger=[], clear_at_least=[], exclude_tools=[], clear_tool_inputs=[])
class ContextEdit(Body, kw_only=True, frozen=True):
    """Holds an edit of the context. Templates decide which earlier thoughts they show, so that one is left: none."""

    type: Annotated[str, Meta(extra_json_schema={"enum": ["clear_thinking_20251015"]})]


class ContextManagement(Body, kw_only=True, frozen=True):
    """Lists edits of the context."""

    edits: Annotated[list[ContextEdit], Meta(max_length=64)] | None = None

    def check(self) -> None:
        """Raise InvalidRequestError or RefusedError, naming the place, for an edit that would change something."""
        for number, edit in enumerate(self.edits or ()):
            where = f"context_management.edits[{number}]"
            if edit.type != "clear_thinking_20251015":
                message = f"{where}.type must be clear_thinking_20251015, not {edit.type!r:.80}"
                raise InvalidRequestError(message, parameter=f"{where}.type")
            edit.check_neutral(where + ".")
            if edit.keep is None:  # type: ignore[attr-defined]
                message = f'{where}.keep must be "all": thoughts are not cleared'
                raise InvalidRequestError(message, parameter=f"{where}.keep")
