"""Grammars of answers that must call tools: what they allow is read as calls that are valid by the tools' schemas."""

import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jsonschema_rs
import pytest
import tiny_tokenizers
import tokenizers
from llguidance import LLMatcher, LLTokenizer

from splitfuse.core.structured_outputs import StructuredOutputs
from splitfuse.errors import InvalidRequestError
from splitfuse.runtime.sampling.grammar import without_control_texts
from splitfuse.text.chat_formats.formats import CHAT_FORMATS, PLAIN
from splitfuse.text.chat_formats.grammar import NO_ARGUMENTS, call_grammar
from splitfuse.text.chat_formats.message import AssistantMessage, Tool, ToolChoice
from splitfuse.text.chat_formats.parser import MessageParser
from splitfuse.text.grammar import compile_structured_outputs
from splitfuse.text.tokenizer import Tokenizer

REQUIRED = ToolChoice("required")
BYTES = LLTokenizer("byte")
WEATHER = Tool(
    name="get_weather",
    parameters={
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer", "minimum": 0, "maximum": 99},
            "unit": {"enum": ["c", "f", 1]},
            "code": {"type": "string", "pattern": "^[a-z]{2}$"},
            "day": {"type": "string", "format": "date"},
            "note": {"anyOf": [{"type": "string", "maxLength": 5}, {"type": "null"}]},
            "options": {"$ref": "#/$defs/Options"},
            "names": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
        },
        "required": ["city", "unit", "options"],
        "additionalProperties": False,
        "$defs": {
            "Options": {
                "type": "object",
                "properties": {"fast": {"type": "boolean"}},
                "required": ["fast"],
                "additionalProperties": False,
            }
        },
    },
)
HERMES = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
TOOLS = {tool.name: tool for tool in (WEATHER, Tool(name="clock"))}


def compiled(name: str, choice: ToolChoice = REQUIRED, *, parallel: bool = True, **options: Any) -> StructuredOutputs:
    form = call_grammar(CHAT_FORMATS[name], tuple(TOOLS.values()), choice, parallel=parallel, **options)
    assert form is not None
    return compile_structured_outputs(form)


def sample(form: StructuredOutputs, rng: random.Random, ends: list[str]) -> str:
    """An answer that a grammar allows, of bytes chosen at random; texts end at times."""
    matcher = LLMatcher(BYTES, form.compiled, log_level=0)
    answer = bytearray()

    def allowed() -> list[int]:
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        return [byte for byte in range(256) if mask >> byte & 1]

    while not matcher.is_stopped() and not (matcher.is_accepting() and rng.random() < 0.5):
        choices = allowed()
        wanted = list(rng.choice(ends).encode()) if len(choices) > 100 and rng.random() < 0.4 else []
        if not wanted:
            usual = [byte for byte in choices if chr(byte) in 'abc0159{}[]",:<>/ \n.-']
            wanted = [rng.choice(usual or [byte for byte in choices if byte < 128] or choices)]
        for byte in wanted:
            if byte not in choices:
                break
            matcher.consume_token(byte)
            answer.append(byte)
            choices = allowed()
    return answer.decode(errors="replace")


def read(name: str, text: str) -> AssistantMessage:
    parser = MessageParser(CHAT_FORMATS[name], tools=tuple(TOOLS.values()))
    return AssistantMessage.of([*parser.feed(text), *parser.finish()])


@pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "single"])
@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_allowed_answers_are_valid_calls(name: str, parallel: bool) -> None:
    form = compiled(name, parallel=parallel)
    rng = random.Random(name)
    for _ in range(3):
        text = sample(form, rng, [getattr(CHAT_FORMATS[name].calls, "end", "").strip() or '"', '"', '<|"|>'])
        message = read(name, text)
        assert not message.content, text
        assert len(message.tool_calls) == 1 or (parallel and message.tool_calls), text
        for call in message.tool_calls:
            jsonschema_rs.validate(TOOLS[call.name].parameters or NO_ARGUMENTS, json.loads(call.arguments))


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_named_tool_is_called(name: str) -> None:
    text = sample(compiled(name, ToolChoice("required", "clock"), parallel=False), random.Random(0), ['"'])
    assert [(call.name, json.loads(call.arguments)) for call in read(name, text).tool_calls] == [("clock", {})]


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_strict_tools_are_valid_also_where_the_model_is_free(name: str) -> None:
    calls, rng = CHAT_FORMATS[name].calls, random.Random(name)
    ends = [getattr(calls, "end", "").strip() or '"', '"', '<|"|>']
    call = sample(compiled(name, ToolChoice("required", "get_weather"), parallel=False), rng, ends)
    form = call_grammar(CHAT_FORMATS[name], [replace(WEATHER, strict=True), Tool(name="clock")], ToolChoice("auto"))
    assert form is not None
    form = compile_structured_outputs(form)
    answer = "Well, so: "
    if name == "harmony":
        answer = f"<|channel|>final<|message|>{answer}"
        call = call if call.startswith("<|start|>") else f"<|start|>assistant{call}"
        texts = [answer, call, f"{answer}<|end|>{call}"]
    else:
        texts = [answer, "", call, *([] if calls and calls.is_bare else [answer + call])]
    for text in texts:
        matcher = LLMatcher(BYTES, form.compiled, log_level=0)
        assert matcher.try_consume_tokens(list(text.encode())) == len(text.encode()), text
        assert matcher.is_accepting()
    wrong = re.sub("true|false", "12345", call).encode()
    assert LLMatcher(BYTES, form.compiled, log_level=0).try_consume_tokens(list(wrong)) < len(wrong)


@pytest.mark.parametrize("name", ["hermes", "qwen_xml", "mistral", "harmony", "gemma4", "deepseek_v3_1"])
def test_answer_calls_tools_or_has_the_form_of_the_request(name: str) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    asked = call_grammar(
        CHAT_FORMATS[name], list(TOOLS.values()), ToolChoice("auto"), form=StructuredOutputs.of({"json": schema})
    )
    assert asked is not None
    form = compile_structured_outputs(asked)
    call = sample(compiled(name, ToolChoice("required", "clock"), parallel=False), random.Random(0), ['"'])
    lead = "<|channel|>final<|message|>" if name == "harmony" else ""
    for text, length in ((call, 1000), (lead + '{"a": 1}', 1000), (lead + '{"a": "x"}', len(lead) + 6), ("Well", 0)):
        matcher = LLMatcher(BYTES, form.compiled, log_level=0)
        assert matcher.try_consume_tokens(list(text.encode())) == min(length, len(text.encode()))
        assert matcher.is_accepting() == (length == 1000)


def test_form_of_the_whole_answer_stays_as_it_is() -> None:
    form = StructuredOutputs.of({"json_object": True})
    for chat_format in (PLAIN, CHAT_FORMATS["llama_json"]):
        assert call_grammar(chat_format, [WEATHER], ToolChoice("auto"), form=form) is form
    assert call_grammar(CHAT_FORMATS["hermes"], [], ToolChoice("auto"), form=form) is None
    form = StructuredOutputs.of({"regex": "[a-z]+"})
    assert call_grammar(CHAT_FORMATS["hermes"], [WEATHER], ToolChoice("auto"), form=form) is form


def test_form_that_cannot_be_enforced_next_to_tools_is_named() -> None:
    form = StructuredOutputs.of({"json": {"oneOf": [{}, {}]}})
    asked = call_grammar(CHAT_FORMATS["hermes"], [WEATHER], ToolChoice("auto"), form=form)
    assert asked is not None
    with pytest.raises(InvalidRequestError, match=r"structured_outputs.json has the key 'oneOf'"):
        compile_structured_outputs(asked)


@pytest.mark.parametrize(
    ("kind", "text", "is_valid"),
    [
        ("date", "2026-11-30", True),
        ("date", "2026-11-31", False),
        ("date", "2026-02-29", False),
        ("time", "23:59:59Z", True),
        ("date-time", "2026-01-31T08:00:00.5+01:00", True),
        ("date-time", "2026-01-31 08:00:00", False),
        ("uuid", "123e4567-e89b-12d3-a456-426614174000", True),
        ("email", "a.b@example.org", True),
        ("email", "a@b", False),
        ("ipv4", "192.168.0.255", True),
        ("ipv4", "192.168.0.256", False),
        ("uri", "https://example.org/a/b?c=d#e", True),
    ],
)
def test_raw_texts_have_the_format_of_the_schema(kind: str, text: str, is_valid: bool) -> None:
    schema = {"type": "object", "properties": {"x": {"type": "string", "format": kind}}, "required": ["x"]}
    asked = call_grammar(CHAT_FORMATS["minimax"], [Tool(name="f", parameters=schema)], REQUIRED)
    assert asked is not None
    matcher = LLMatcher(BYTES, compile_structured_outputs(asked).compiled, log_level=0)
    call = f'<minimax:tool_call>\n<invoke name="f">\n<parameter name="x">{text}</parameter>\n</invoke>'.encode()
    assert (matcher.try_consume_tokens(list(call)) == len(call)) is is_valid


def test_auto_has_no_grammar_and_unknown_formats_are_refused() -> None:
    assert call_grammar(CHAT_FORMATS["hermes"], [WEATHER], ToolChoice("auto")) is None
    with pytest.raises(InvalidRequestError, match="not known how it writes calls"):
        call_grammar(PLAIN, [WEATHER], REQUIRED)


@pytest.mark.parametrize(
    ("name", "schema", "problem"),
    [
        ("hermes", {"properties": {"x": {"not": {}}}}, "has the key 'not' at #/properties/x, which is not supported"),
        (
            "hermes",
            {"properties": {"x": {"oneOf": [{}, {}]}}},
            "has the key 'oneOf' with alternatives that may overlap",
        ),
        ("hermes", {"type": "array"}, 'must be a schema of an object, not of "array"'),
        ("hermes", {"properties": {"x": False}, "required": ["x"]}, "required property 'x' is unsatisfiable"),
        ("qwen_xml", {"properties": {"x": {"type": "array", "uniqueItems": True}}}, "has the key 'uniqueItems' at #"),
        ("qwen_xml", {"properties": {"x": {"type": "string", "format": "idn-email"}}}, "has the format 'idn-email'"),
        ("qwen_xml", {"properties": {"a>b": {}}}, "has the property 'a>b', which this model cannot write"),
        ("qwen_xml", {"properties": {"x": {"enum": 5}}}, "cannot be enforced: "),
        ("gemma4", {"properties": {"x": {"type": "string", "pattern": []}}}, "cannot be enforced: "),
        ("lfm2", {"required": 5}, "cannot be enforced: "),
        ("qwen_xml", {"anyOf": [{}]}, "has the key 'anyOf' at #, which is not supported in this model's way"),
        ("qwen_xml", {"properties": {"x": {"type": "string", "pattern": "(?=a)"}}}, "cannot be enforced"),
    ],
)
def test_schema_that_cannot_be_enforced_is_named(name: str, schema: dict[str, object], problem: str) -> None:
    tools = [Tool(name="clock"), Tool(name="f", parameters=schema, place="tools[1].input_schema")]
    with pytest.raises(InvalidRequestError) as error:
        compile_structured_outputs(call_grammar(CHAT_FORMATS[name], tools, REQUIRED) or StructuredOutputs("", ""))
    assert str(error.value).startswith("tools[1].input_schema ")
    assert problem in str(error.value)
    assert error.value.parameter == "tools[1].input_schema"


def tokenizer_with(special: list[str], added: list[str]) -> Tokenizer:
    """A tokenizer of bytes, with added tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({each: i for i, each in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", *special])
    backend.add_tokens(added)
    return Tokenizer(backend)


@pytest.mark.parametrize(
    ("name", "special", "added", "text"),
    [
        (
            "hermes",
            [],
            ["<tool_call>", "</tool_call>"],
            '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>',
        ),
        ("hermes", [], [], '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'),
        ("mistral", ["[TOOL_CALLS]", "[ARGS]"], [], "[TOOL_CALLS]clock[ARGS]{}"),
        ("mistral", [], ["[TOOL_CALLS]", "[ARGS]"], "[TOOL_CALLS]clock[ARGS]{}"),
        (
            "harmony",
            ["<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"],
            [],
            "<|start|>assistant<|channel|>commentary to=functions.clock <|constrain|>json<|message|>{}",
        ),
        (
            "gemma4",
            ["<|tool_call>", "<tool_call|>", '<|"|>'],
            [],
            '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>,unit:<|"|>c<|"|>,options:{"fast": true}}<tool_call|>',
        ),
        (
            "glm",
            [],
            ["<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"],
            "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>unit</arg_key>\n"
            '<arg_value>1</arg_value>\n<arg_key>options</arg_key>\n<arg_value>{"fast": true}</arg_value>\n</tool_call>',
        ),
    ],
)
def test_markers_are_single_tokens_where_there_are_such(
    name: str, special: list[str], added: list[str], text: str
) -> None:
    tokenizer = tokenizer_with(special, added)
    ids = tokenizer.marker_ids(CHAT_FORMATS[name].markers)
    form = compiled(name, special_tokens=ids)
    matcher = LLMatcher(LLTokenizer(tokenizer.to_json(), eos_token=[256]), form.compiled, log_level=0)
    tokens = list(tokenizer.encode(text, add_special_tokens=False))
    assert matcher.try_consume_tokens(tokens) == len(tokens)
    assert matcher.is_accepting()
    assert len(read(name, text).tool_calls) == 1


@pytest.mark.parametrize(
    ("more", "others"),
    [({}, False), ({"required": ["a"]}, False), ({"additionalProperties": True}, True), ({"required": ["b"]}, True)],
    ids=["declared", "required", "open", "required-undeclared"],
)
def test_arguments_are_those_that_a_tool_declares(more: dict[str, Any], others: bool) -> None:
    tool = Tool(name="f", parameters={"type": "object", "properties": {"a": {"type": "integer"}}, **more})
    form = call_grammar(CHAT_FORMATS["hermes"], (tool,), REQUIRED, parallel=False)
    assert form is not None
    matcher = LLMatcher(BYTES, compile_structured_outputs(form).compiled, log_level=0)
    text = b'<tool_call>\n{"name": "f", "arguments": {"a": 1, "'
    assert matcher.try_consume_tokens(list(text)) == len(text) - (0 if others else 3)


@pytest.mark.parametrize("maker", [tiny_tokenizers.byte_level, tiny_tokenizers.byte_fallback])
def test_no_text_of_a_grammar_is_a_control_token(maker: Callable[[], tokenizers.Tokenizer]) -> None:
    backend = maker()
    backend.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in ("<tool_call>", "[TOOL]")])
    plain, hidden = backend.to_str(), without_control_texts(backend.to_str())
    known, found = LLTokenizer(plain), LLTokenizer(hidden)
    assert found.vocab_size == known.vocab_size and tiny_tokenizers.EOS not in hidden
    for text in (tiny_tokenizers.EOS, "<tool_call>"):
        token = backend.token_to_id(text)
        assert token in known.tokenize_str(f"a{text}b") and found.is_special_token(token)
        assert token not in found.tokenize_str(f"a{text}b")
    assert found.tokenize_str("the cat [TOOL]") == known.tokenize_str("the cat [TOOL]")
