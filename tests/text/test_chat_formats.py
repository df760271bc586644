"""How models write thoughts and calls of tools: each format read whole and in pieces, and where models go wrong."""

import itertools
import json
import random

import pytest

from splitfuse.text.chat_formats.formats import CHAT_FORMATS, ChatFormat
from splitfuse.text.chat_formats.message import AssistantMessage, Tool
from splitfuse.text.chat_formats.parser import MessageParser

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
    "granite": f'<|tool_call|>[{{"name": "get_weather", "arguments": {JSON}}}, {{"name": "clock", "arguments": {{}}}}]',
}
HARMONY_CALLS = (
    f"<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{JSON}<|call|><|start|>assistant"
    "<|channel|>commentary to=functions.clock <|constrain|>json<|message|>{}<|call|>"
)


def parse(chat_format: ChatFormat, *pieces: str, tools: tuple[Tool, ...] = TOOLS, prompt: str = "") -> AssistantMessage:
    parser = MessageParser(chat_format, tools=tools, prompt=prompt)
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
    rng = random.Random(seed)
    found = [list(text)]
    for _ in range(count - 1):
        share = rng.choice((0.02, 0.1, 0.3, 0.7))
        at = [0, *(i for i in range(1, len(text)) if rng.random() < share), len(text)]
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
