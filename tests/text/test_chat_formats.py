"""How models write thoughts and calls of tools: each format read whole and in pieces, and where models go wrong."""

import itertools
import json
import random

import pytest
from transformers.utils.chat_parsing import parse_response

from splitfuse.text.chat_formats.formats import CHAT_FORMATS, PLAIN, ChatFormat, format_of
from splitfuse.text.chat_formats.message import ArgumentsDelta, AssistantMessage, ContentDelta, Tool
from splitfuse.text.chat_formats.parser import MessageParser, Start, start_of
from splitfuse.text.chat_formats.response_template import with_response_template

THINK = ("<think>", "</think>")
WEATHER = Tool(
    name="get_weather",
    parameters={
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "hourly": {"type": "boolean"},
            "limits": {"type": "array", "items": {"type": "number"}},
            "options": {"type": "object"},
        },
        "required": ["city"],
    },
)
CLOCK = Tool(name="clock", parameters={"type": "object", "properties": {}})
TOOLS = (WEATHER, CLOCK)
CITY = 'Paris "X"\n{a: \\d} </b> ü'
ARGUMENTS = {"city": CITY, "days": 30, "hourly": True, "limits": [1.5, -2], "options": {"a": {"b": None}}}
JSON = json.dumps(ARGUMENTS, ensure_ascii=False)
TWO = [("get_weather", ARGUMENTS), ("clock", {})]


def with_thoughts(name: str) -> ChatFormat:
    reasoning = {"harmony": None, "mistral": ("[THINK]", "[/THINK]"), "gemma4": ("<|channel>thought\n", "<channel|>")}
    return ChatFormat(name=name, reasoning=reasoning.get(name, THINK), calls=CHAT_FORMATS[name].calls)


def tagged(before: str, after: str, end: str) -> str:
    values = [(key, value if isinstance(value, str) else json.dumps(value)) for key, value in ARGUMENTS.items()]
    return "".join(f"{before}{key}{after}{value}{end}" for key, value in values)


def dsml(section: str) -> str:
    values = "".join(
        f'<｜DSML｜parameter name="{key}" string="{str(isinstance(value, str)).lower()}">'
        f"{value if isinstance(value, str) else json.dumps(value)}</｜DSML｜parameter>\n"
        for key, value in ARGUMENTS.items()
    )
    return (
        f'<｜DSML｜{section}>\n<｜DSML｜invoke name="get_weather">\n{values}</｜DSML｜invoke>\n'
        f'<｜DSML｜invoke name="clock">\n</｜DSML｜invoke>\n</｜DSML｜{section}>'
    )


PYTHON = f"get_weather(city={CITY!r}, days=30, hourly=True, limits=[1.5, -2], options={{'a': {{'b': None}}}})"
CALLS = {
    "hermes": f'<tool_call>\n{{"name": "get_weather", "arguments": {JSON}}}\n</tool_call>\n'
    '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>',
    "qwen_xml": "<tool_call>\n<function=get_weather>\n"
    + tagged("<parameter=", ">\n", "\n</parameter>\n")
    + "</function>\n</tool_call>\n<tool_call>\n<function=clock>\n</function>\n</tool_call>",
    "llama_json": f'<|python_tag|>{{"name": "get_weather", "parameters": {JSON}}}; '
    '{"name": "clock", "parameters": {}}',
    "llama_python": f"<|python_start|>[{PYTHON}, clock()]<|python_end|>",
    "lfm2": f"<|tool_call_start|>[{PYTHON}, clock()]<|tool_call_end|>",
    "olmo3": f"<function_calls>\n{PYTHON}\nclock()\n</function_calls>",
    "mistral": f"[TOOL_CALLS]get_weather[ARGS]{JSON}[TOOL_CALLS]clock[ARGS]{{}}",
    "mistral_list": f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {JSON}, "id": "123456789"}}, '
    '{"name": "clock", "arguments": {}}]',
    "deepseek_v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
    f"{JSON}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>clock\n```json\n{{}}\n```"
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek_v3_1": f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{JSON}<｜tool▁call▁end｜>"
    "<｜tool▁call▁begin｜>clock<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek_v3_2": dsml("function_calls"),
    "deepseek_v4": dsml("tool_calls"),
    "glm": "<tool_call>get_weather\n"
    + tagged("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n")
    + "</tool_call>\n<tool_call>clock\n</tool_call>",
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
    f"{JSON}<|tool_call_end|><|tool_call_begin|>functions.clock:1<|tool_call_argument_begin|>{{}}<|tool_call_end|>"
    "<|tool_calls_section_end|>",
    "minimax": '<minimax:tool_call>\n<invoke name="get_weather">\n'
    + tagged('<parameter name="', '">', "</parameter>\n")
    + '</invoke>\n<invoke name="clock">\n</invoke>\n</minimax:tool_call>',
    "gemma4": f'<|tool_call>call:get_weather{{city:<|"|>{CITY}<|"|>,days:30,hourly:true,limits:[1.5,-2],'
    "options:{a:{b:null}}}<tool_call|><|tool_call>call:clock{}<tool_call|>",
    "phi4": f'<|tool_call|>[{{"name": "get_weather", "arguments": {JSON}}}, {{"name": "clock"}}]<|/tool_call|>',
    "nemotron": f'<TOOLCALL>[{{"name": "get_weather", "arguments": {JSON}}}, {{"name": "clock"}}]</TOOLCALL>',
    "seed": "<seed:tool_call>\n<function=get_weather>\n"
    + tagged("<parameter=", ">", "</parameter>\n")
    + "</function>\n</seed:tool_call>\n<seed:tool_call>\n<function=clock>\n</function>\n</seed:tool_call>",
    "granite": f'<|tool_call|>[{{"name": "get_weather", "arguments": {JSON}}}, {{"name": "clock", "arguments": {{}}}}]',
}
HARMONY_CALLS = (
    f"<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{JSON}<|call|><|start|>assistant"
    "<|channel|>commentary to=functions.clock <|constrain|>json<|message|>{}<|call|>"
)


def parse(
    chat_format: ChatFormat, *pieces: str, tools: tuple[Tool, ...] = TOOLS, start: Start = Start.NEW
) -> AssistantMessage:
    parser = MessageParser(chat_format, tools=tools, start=start)
    events = [event for piece in pieces for event in parser.feed(piece)]
    return AssistantMessage.of([*events, *parser.finish()])


def plain(message: AssistantMessage) -> tuple[str, str, list[tuple[str, str]]]:
    """A message without the ids, of which no two are equal."""
    return message.content, message.reasoning, [(call.name, call.arguments) for call in message.tool_calls]


def calls_of(message: AssistantMessage) -> list[tuple[str, object]]:
    return [(call.name, json.loads(call.arguments)) for call in message.tool_calls]


def whole_answer(name: str) -> str:
    """A thought, content and two calls."""
    if name == "harmony":
        return (
            "<|channel|>analysis<|message|>Which city? <tool_call><|end|><|start|>assistant<|channel|>commentary"
            f"<|message|>I will\nlook.<|end|><|start|>assistant{HARMONY_CALLS}"
        )
    start, end = with_thoughts(name).reasoning or THINK
    return f"{start}\nWhich city? x < y\n{end}\n\nI will\nlook.\n\n{CALLS[name]}\n"


def cuts(text: str, count: int, seed: int = 0) -> list[list[str]]:
    """Ways to cut a text: into characters, and at random."""
    if len(text) < 2:
        return [[text]]
    rng = random.Random(seed)
    found = [list(text)]
    for _ in range(count - 1):
        at = [0, *sorted(rng.sample(range(1, len(text)), min(rng.choice((1, 2, 4, 8, 40)), len(text) - 1))), len(text)]
        found.append([text[a:b] for a, b in itertools.pairwise(at)])
    return found


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_answer_gives_thought_content_and_calls(name: str) -> None:
    message = parse(with_thoughts(name), whole_answer(name))
    assert message.content == "I will\nlook."
    assert message.reasoning.startswith("Which city? ")
    assert calls_of(message) == TWO
    assert len({call.call_id for call in message.tool_calls}) == 2


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_any_cut_gives_the_same_message(name: str) -> None:
    text = whole_answer(name)
    whole = plain(parse(with_thoughts(name), text))
    for pieces in cuts(text, 1000):
        assert plain(parse(with_thoughts(name), *pieces)) == whole


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_any_cut_of_garbage_gives_the_same_message(name: str) -> None:
    rng = random.Random(name)
    chat_format = with_thoughts(name)
    answer = whole_answer(name)
    parts = [*chat_format.markers, *'{}[]"\\\n :,=<>()', "get_weather", '{"name": "clock", "arguments": {"a": 1', "x"]
    for number in range(150):
        start, end = sorted(rng.choices(range(len(answer)), k=2))
        text = "".join(rng.choices(parts, k=rng.randrange(12)))
        text = rng.choice((text, answer[:start] + text + answer[end:], answer[:end]))
        whole = plain(parse(chat_format, text))
        for pieces in cuts(text, 4, number):
            assert plain(parse(chat_format, *pieces)) == whole, text


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_answer_cut_off_anywhere_invents_nothing(name: str) -> None:
    text = whole_answer(name)
    whole = parse(with_thoughts(name), text)
    for length in range(len(text)):
        part = parse(with_thoughts(name), text[:length])
        for got, expected in zip(part.tool_calls, whole.tool_calls, strict=False):
            assert got.name == expected.name
            assert expected.arguments.startswith(got.arguments)


@pytest.mark.parametrize("name", sorted(set(CHAT_FORMATS) - {"harmony", "glm"}))  # these two end calls in other ways
def test_part_of_the_end_of_a_call_is_no_content(name: str) -> None:
    calls, text = CHAT_FORMATS[name].calls, whole_answer(name)
    assert calls is not None
    for length in range(len(close := calls.close.strip())):
        assert parse(with_thoughts(name), text[: text.rindex(close) + length]).content == "I will\nlook."


def test_no_tools_leave_calls_in_the_content() -> None:
    for name in CHAT_FORMATS:
        calls = HARMONY_CALLS if name == "harmony" else CALLS[name]
        message = parse(with_thoughts(name), f"See: {calls}", tools=())
        assert plain(message) == (f"See: {calls}", "", []), name


def test_plain_format_leaves_the_text_as_it_is() -> None:
    text = " \n<think>x</think> <tool_call>{}</tool_call> \n"
    for pieces in cuts(text, 20):
        assert plain(parse(PLAIN, *pieces)) == (text, "", [])
    assert MessageParser(PLAIN).feed("Hello \n") == [ContentDelta("Hello \n")]


@pytest.mark.parametrize(
    ("prompt", "start", "reasoning", "content"),
    [
        ("<|im_start|>assistant\n", Start.NEW, "", "Hm.\n</think>\n\nHello"),
        ("<|im_start|>assistant\n<think>\n", Start.THOUGHT, "Hm.", "Hello"),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", Start.AFTER_THOUGHT, "", "Hm.\n</think>\n\nHello"),
        ("<｜User｜>Hi<｜Assistant｜></think>", Start.AFTER_THOUGHT, "", "Hm.\n</think>\n\nHello"),
        ("[INST]<|im_start|>assistant\n<think>[/INST]", Start.NEW, "", "Hm.\n</think>\n\nHello"),
        ("[TOOL_RESULTS][/INST]<think>well[/TOOL_RESULTS]", Start.NEW, "", "Hm.\n</think>\n\nHello"),
    ],
)
def test_template_may_have_opened_the_thought(prompt: str, start: Start, reasoning: str, content: str) -> None:
    chat_format = ChatFormat(name="thinker", reasoning=THINK)
    assert start_of(chat_format, prompt) is start
    assert start_of(PLAIN, prompt) is Start.NEW
    for pieces in cuts("Hm.\n</think>\n\nHello", 20):
        message = parse(chat_format, *pieces, start=start)
        assert (message.reasoning.strip(), message.content) == (reasoning, content)


@pytest.mark.parametrize(
    ("continued", "start"),
    [
        ("", Start.NEW),
        ("<think>\n", Start.THOUGHT),
        ("<think>\n" + 200 * "well ", Start.IN_THOUGHT),
        ("<think>\nwell</th", Start.IN_THOUGHT),
        ("<think>\nwell</think>\n", Start.AFTER_THOUGHT),
        ("<think>\nwell</think>yes", Start.CONTENT),
        ("</think>", Start.AFTER_THOUGHT),
        ("<", Start.CONTENT),
        ("Anna </think>", Start.CONTENT),
    ],
)
def test_answer_may_continue_any_part_of_a_message(continued: str, start: Start) -> None:
    chat_format = ChatFormat(name="thinker", reasoning=THINK)
    for header in ("<|im_start|>assistant\n", "ASSISTANT: "):
        assert start_of(chat_format, f"<think>hi{header}{continued}", continued) is start
    assert start_of(chat_format, f"<think>hi\n<think>\n\n</think>\n\n{continued}", continued) in (
        start,
        Start.AFTER_THOUGHT,
    )
    assert start_of(PLAIN, continued, continued) is (Start.CONTENT if continued else Start.NEW)


def test_answer_that_continues_a_thought_keeps_its_spaces() -> None:
    for pieces in cuts(" <think> more</think> Hello", 20):
        message = parse(with_thoughts("hermes"), *pieces, start=Start.IN_THOUGHT)
        assert (message.reasoning, message.content) == (" <think> more", "Hello")


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_answer_that_continues_a_call_is_its_rest(name: str) -> None:
    calls = HARMONY_CALLS if name == "harmony" else CALLS[name]
    for length in range(1, len(calls), 7):
        start = start_of(with_thoughts(name), f"Hi {calls[:length]}", calls[:length])
        content, reasoning, found = plain(parse(with_thoughts(name), calls[length:] + " Well", start=start))
        assert reasoning == "" and TWO[len(TWO) - len(found) :] == [(each, json.loads(got)) for each, got in found]
        if not found and name != "harmony":
            assert content == calls[length:] + " Well"


def test_channels_may_be_opened_by_the_prompt() -> None:
    harmony, rest = with_thoughts("harmony"), "Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hello<|return|>"
    for prompt, continued, content, reasoning in (
        ("<|start|>assistant<|channel|>analysis<|message|>", "", "Hello", "Hm."),
        ("<|start|>assistant<|channel|>final<|message|>", "", "Hm.\nHello", ""),
        ("<|start|>assistant<|channel|>final<|message|>Well", "Well", "Hm.\nHello", ""),
    ):
        for pieces in cuts(rest, 20):
            message = parse(harmony, *pieces, start=start_of(harmony, prompt, continued))
            assert (message.content, message.reasoning) == (content, reasoning)


# What users of other servers complain about.


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_texts_of_arguments_come_as_they_are_written(name: str) -> None:
    parser = MessageParser(with_thoughts(name), tools=TOOLS)
    answer = whole_answer(name)
    news = parser.feed(answer[: answer.index("Paris") + 5])
    assert isinstance(news[-1], ArgumentsDelta)
    assert news[-1].text == '{"city": "Paris'
    start = parser.feed(' "')
    assert start in ([], [ArgumentsDelta(0, " ")], [ArgumentsDelta(0, ' "')], [ArgumentsDelta(0, ' \\"')])


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_digits_that_come_singly_are_neither_lost_nor_doubled(name: str) -> None:
    message = parse(with_thoughts(name), *whole_answer(name))
    assert calls_of(message)[0][1] == ARGUMENTS


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>",
        "<tool_call>\nno call</tool_call>",
        '<tool_call>\n{"name": "get_weather"',
        '<tool_call>\n{"name": get_weather}\n</tool_call>',
        '<tool_call>\n{"nam": "get_weather", }\n</tool_call>',
        '<tool_call>\n["get_weather"]\n</tool_call>',
        '<tool_call>{"name": ""}</tool_call>',
        '<tool_call>{"name": "a b"}</tool_call>',
        "</tool_call> before <tool_call>",
        "</tool_call>",
    ],
)
def test_what_is_no_call_becomes_content(text: str) -> None:
    for pieces in cuts(f"See: {text} end", 20):
        assert plain(parse(with_thoughts("hermes"), *pieces)) == (f"See: {text} end", "", [])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"city": "a" "b"}}', '{"city": "a" "b"}}'),
        ('{"city": print("x")}}', '{"city": print("x")}}'),
        ('{"city": "</tool_call>"}}', '{"city": "</tool_call>"}'),
        ('"{\\"city\\": \\"\\ud83d\\ude00\\"}"}', '{"city": "\U0001f600"}'),
        ("{}", "{}"),
        ("null}", "{}"),
        ("}", "}"),
        ('{"a": [1, {"b": "}"}], "c": 1e5}}', '{"a": [1, {"b": "}"}], "c": 1e5}'),
    ],
)
def test_arguments_in_json_come_as_they_stand(arguments: str, expected: str) -> None:
    text = f'<tool_call>\n{{"name": "get_weather", "arguments": {arguments}\n</tool_call>\n'
    for pieces in cuts(text + CALLS["hermes"], 20):
        content, _, calls = plain(parse(with_thoughts("hermes"), *pieces))
        assert (content, len(calls)) == ("", 3)
        assert (calls[0][0], calls[0][1].rstrip()) == ("get_weather", expected)


def test_name_may_come_after_the_arguments_and_arguments_may_lack() -> None:
    text = (
        '<tool_call>{"arguments": {"city": "Paris"}, "name": "get_weather"}</tool_call>'
        '<tool_call>{"id": "1", "name": "clock"}</tool_call>'
    )
    assert plain(parse(with_thoughts("hermes"), text))[2] == [("get_weather", '{"city": "Paris"}'), ("clock", "{}")]


def test_call_may_end_a_thought_that_is_left_open() -> None:
    call = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
    message = parse(with_thoughts("hermes"), f"I call:\n{call}", start=Start.THOUGHT)
    assert plain(message) == ("", "I call:", [("clock", "{}")])
    message = parse(with_thoughts("hermes"), f"I call:\n{call}\n</think>\nDone", start=Start.THOUGHT)
    assert plain(message) == ("Done", "I call:", [("clock", "{}")])
    message = parse(with_thoughts("hermes"), f"One writes {call}\n</think>Well", start=Start.THOUGHT)
    assert plain(message) == ("Well", f"One writes {call}", [])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("llama_json", '{"name": "other", "parameters": {}}'),
        ("llama_json", '{"city": "Paris"}'),
        ("llama_json", 'Well: {"name": "clock", "parameters": {}}'),
        ("llama_python", "[other(x=1)]"),
        ("llama_python", "[1, 2]"),
        ("llama_python", "Well: [clock()]"),
    ],
)
def test_json_or_a_list_without_marker_is_content(name: str, text: str) -> None:
    for pieces in cuts(text, 10):
        assert plain(parse(with_thoughts(name), *pieces)) == (text, "", [])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("llama_json", f'{{"name": "get_weather", "parameters": {JSON}}}; {{"name": "clock", "parameters": {{}}}}'),
        ("llama_json", f'[{{"name": "get_weather", "parameters": {JSON}}}, {{"name": "clock"}}]'),
        ("llama_python", f"[{PYTHON}, clock()]"),
        ("llama_python", f'{{"name": "get_weather", "parameters": {JSON}}}; {{"name": "clock", "parameters": {{}}}}'),
        ("mistral", f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {JSON}}}, {{"name": "clock"}}]'),
        ("mistral", f"[TOOL_CALLS]get_weather{JSON}[TOOL_CALLS]clock[CALL_ID]abcdefghi[ARGS]{{}}"),
        ("mistral", f"[TOOL_CALLS]get_weather[ARGS]{JSON}[TOOL_CALLS]clock[ARGS]null"),
        ("kimi_k2", CALLS["kimi_k2"].replace("{}", "")),
        ("hermes", f'<tool_call>[{{"name": "get_weather", "arguments": {JSON}}}, {{"name": "clock"}}]</tool_call>'),
        ("glm", CALLS["glm"].replace("\n<arg", "<arg").replace("clock\n", "clock")),
        ("kimi_k2", CALLS["kimi_k2"].replace("functions.", "").replace(":0", "").replace(":1", "")),
        ("qwen_xml", CALLS["qwen_xml"].replace("null}}\n</parameter>", "null}}")),
        ("minimax", CALLS["minimax"].replace("<minimax:tool_call>", "").replace("</minimax:tool_call>", "")),
    ],
)
def test_other_ways_of_writing_the_same_calls(name: str, text: str) -> None:
    for pieces in cuts(text, 20):
        message = parse(with_thoughts(name), *pieces)
        assert (message.content, calls_of(message)) == ("", TWO)


@pytest.mark.parametrize(
    ("types", "raw", "value"),
    [
        ({"type": "string"}, "5", "5"),
        ({"type": "string"}, "\n a \n", "\n a \n"),
        ({"type": "integer"}, "5", 5),
        ({"type": "integer"}, "5.0", 5),
        ({"type": "integer"}, "five", "five"),
        ({"type": "number"}, "1e3", 1000),
        ({"type": "number"}, "nan", "nan"),
        ({"type": "boolean"}, "True", True),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "null"]}, "nul", "nul"),
        ({"type": "string", "nullable": True}, "None", None),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "7", 7),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "None", None),
        ({"$ref": "#/$defs/Numbers"}, "[1, 2]", [1, 2]),
        ({"type": "array"}, "['a', None]", ["a", None]),
        ({"type": "object"}, '{"a": 1}', {"a": 1}),
        ({"type": "object"}, "{a: 1}", "{a: 1}"),
        ({"enum": [1, 2]}, "2", 2),
        ({"enum": ["1", "2"]}, "2", "2"),
        ({"allOf": [{"type": "string"}, {"minLength": 1}]}, "2", "2"),
        ({"anyOf": [{"type": "string"}, {"minLength": 1}]}, "2", 2),
        ({"anyOf": [{"$ref": "#/$defs/Loop"}, {"type": "string"}]}, "2", "2"),
        ({}, "5", 5),
        ({}, "text", "text"),
        ({}, '{"a": 1}', {"a": 1}),
    ],
)
def test_raw_values_have_the_types_of_the_schema(types: dict[str, object], raw: str, value: object) -> None:
    schema = {"properties": {"x": types}, "$defs": {"Numbers": {"type": "array"}, "Loop": {"$ref": "#/$defs/Loop"}}}
    text = f'<minimax:tool_call><invoke name="f"><parameter name="x">{raw}</parameter></invoke></minimax:tool_call>'
    for pieces in cuts(text, 5):
        message = parse(with_thoughts("minimax"), *pieces, tools=(Tool(name="f", parameters=schema),))
        assert calls_of(message) == [("f", {"x": value})]


def test_deep_or_odd_values_do_no_harm() -> None:
    for text in ("[" * 5000, "{a:" * 5000, "(", "{1: 2, 'b': (3,), True: x, \"c\": 0x10}", "'\\ud800' '\\"):
        for name, opener in (("lfm2", "<|tool_call_start|>[f(x="), ("gemma4", "<|tool_call>call:f{x:")):
            whole = plain(parse(with_thoughts(name), opener + text))
            assert plain(parse(with_thoughts(name), *(opener + text))) == whole
            assert whole[2][0][0] == "f"
    message = parse(with_thoughts("lfm2"), "<|tool_call_start|>[f(x={1: 2, 'b': (3,), \"c\": 0x10})]<|tool_call_end|>")
    assert calls_of(message) == [("f", {"x": {"1": 2, "b": [3], "c": 16}})]


def test_ids_have_the_form_that_templates_read() -> None:
    ids = [call.call_id for call in parse(with_thoughts("mistral_list"), CALLS["mistral_list"]).tool_calls]
    assert all(len(each) == 9 and each.isalnum() for each in ids)
    ids = [call.call_id for call in parse(with_thoughts("kimi_k2"), CALLS["kimi_k2"]).tool_calls]
    assert ids == ["functions.get_weather:0", "functions.clock:1"]
    [call] = parse(with_thoughts("mistral"), "[TOOL_CALLS]clock[CALL_ID]abcdefghi[ARGS]{}").tool_calls
    assert call.call_id == "abcdefghi"


@pytest.mark.parametrize(
    ("template", "name", "reasoning"),
    [
        ("{{ messages }}", "plain", None),
        ("<think>{{ content.split('</think>') }}", "plain", THINK),
        ('<tool_call>\\n{\\"name\\": <function-name>', "hermes", None),
        ("<tool_call>\n<function=example>\n<parameter=a>\n</think>", "qwen_xml", THINK),
        ("<seed:tool_call><function=f><parameter=x> </seed:think>", "seed", ("<seed:think>", "</seed:think>")),
        ('Respond in the format {"name": function name, "parameters": dictionary', "llama_json", None),
        ("<|python_tag|>", "llama_json", None),
        ("<|python_start|> <|python_end|>", "llama_python", None),
        ("<|tool_list_start|>", "lfm2", None),
        ("<function_calls>", "olmo3", None),
        ("[TOOL_CALLS]' + name + '[ARGS] [THINK][/THINK]", "mistral", ("[THINK]", "[/THINK]")),
        ("[TOOL_CALLS] [", "mistral_list", None),
        ("<|channel|>analysis<|message|>", "harmony", None),
        ("<｜tool▁call▁begin｜>' + type + '<｜tool▁sep｜>' + name + '```json", "deepseek_v3", None),
        ("<｜tool▁call▁begin｜>' + name + '<｜tool▁sep｜>", "deepseek_v3_1", None),
        ("{% set dsml_token = '｜DSML｜' %}<' + dsml_token + 'function_calls> tool_calls", "deepseek_v3_2", None),
        ("{% set dsml_token = '｜DSML｜' %}<' + dsml_token + 'tool_calls>", "deepseek_v4", None),
        ("<tool_call>f\n<arg_key>k</arg_key>", "glm", None),
        ("<|tool_call_begin|>", "kimi_k2", None),
        ("<minimax:tool_call>", "minimax", None),
        (
            "<|tool_call>call:f<tool_call|> <|channel>thought <channel|>",
            "gemma4",
            ("<|channel>thought\n", "<channel|>"),
        ),
        ("<|tool_call|>", "granite", None),
        ("<|tool_call|> <|/tool_call|>", "phi4", None),
        ("<TOOLCALL>[", "nemotron", None),
    ],
)
def test_format_is_that_of_the_markers_in_the_template(
    template: str, name: str, reasoning: tuple[str, str] | None
) -> None:
    chat_format = format_of(template, {})
    assert (chat_format.name, chat_format.reasoning) == (name, reasoning)
    assert all(marker.strip() == marker for marker in chat_format.markers)


# The parser of transformers, where its templates of responses can say what ours do.

CALL_OF = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
RESPONSE_TEMPLATES = {
    "hermes": {
        "open": "<tool_call>",
        "close": "</tool_call>",
        "content": "json",
        "transform": {"type": "function", "function": "{content}"},
    },
    "qwen_xml": {
        "open_pattern": r"<tool_call>\s*<function=(?P<name>[^>]+)>",
        "close_pattern": r"</function>\s*</tool_call>",
        "content": "xml-inline",
        "content_args": {"tag_pattern": r"<parameter=(?P<key>[^>]+)>\n(?P<value>.*?)\n</parameter>"},
        "transform": CALL_OF,
    },
    "deepseek_v3_1": {
        "open_pattern": r"(?:<｜tool▁calls▁begin｜>)?<｜tool▁call▁begin｜>(?P<name>\w+)<｜tool▁sep｜>",
        "close_pattern": r"<｜tool▁call▁end｜>(?:<｜tool▁calls▁end｜>)?",
        "content": "json",
        "transform": CALL_OF,
    },
    "gemma4": {
        "open_pattern": r"<\|tool_call>call:(?P<name>\w+)",
        "close": "<tool_call|>",
        "content": "json",
        "content_args": {"unquoted_keys": True, "string_delims": [['<|"|>', '<|"|>']]},
        "transform": CALL_OF,
    },
}


def response_template(name: str) -> dict[str, object]:
    start, end = (text.strip() for text in with_thoughts(name).reasoning or THINK)
    fields = {
        "reasoning": {"open": start, "close": end},
        "content": {"repeats": True, "join": ""},
        "tool_calls": {**RESPONSE_TEMPLATES[name], "repeats": True},
    }
    return {"start_anchor": "<|assistant|>", "fields": fields}


@pytest.mark.parametrize("name", RESPONSE_TEMPLATES)
def test_transformers_reads_the_same_message(name: str) -> None:
    chat_format = with_thoughts(name)
    template = response_template(name)
    tools = [tool.as_dict() for tool in TOOLS]
    expected = parse_response(whole_answer(name), template, prefix="", tools=tools)
    message = parse(chat_format, whole_answer(name))
    assert message.reasoning == expected["reasoning"]
    assert message.content == expected["content"]
    assert calls_of(message) == [
        (call["function"]["name"], call["function"]["arguments"]) for call in expected["tool_calls"]
    ]


@pytest.mark.parametrize("name", RESPONSE_TEMPLATES)
def test_response_template_says_which_format_it_is(name: str) -> None:
    expected = with_thoughts(name)
    found = with_response_template(PLAIN, response_template(name))
    assert (found.name, found.calls) == (name, expected.calls)
    assert found.reasoning == tuple(text.strip() for text in expected.reasoning or THINK)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ([], "has no fields"),
        ({"fields": {"thinking": {"open_pattern": "<a>", "close": "</a>"}}}, "they need open and close"),
        ({"fields": {"tool_calls": {"open": "<call>", "close": "</call>", "content": "json"}}}, "no known format"),
        (
            {"fields": {"tool_calls": {"open": "<tool_call>", "close": "</tool_call>", "content": "kv-lines"}}},
            "no known",
        ),
    ],
)
def test_response_template_that_is_not_read_is_logged(
    template: object, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert with_response_template(PLAIN, template) == PLAIN
    assert reason in caplog.text
