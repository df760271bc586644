"""Stop strings against searching the whole text at once, and other texts at which an answer ends."""

from __future__ import annotations

import pytest
import tiny_tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from splitfuse.core.request_output import FinishReason, RequestOutput
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.text.chat_formats.formats import CHAT_FORMATS
from splitfuse.text.chat_formats.message import Tool
from splitfuse.text.chat_formats.parser import MessageSource
from splitfuse.text.generation import Generation
from splitfuse.text.prompts import PreparedRequest
from splitfuse.text.stop_strings import StopStrings
from splitfuse.text.tokenizer import Tokenizer


def expected(text: str, stop: list[str]) -> tuple[str, str | None]:
    """What the output is, by looking for every stop string in the whole text."""
    found = [(text.find(s) + len(s), -len(s), s) for s in stop if s in text]
    if not found:
        return text, None
    end, negative_length, matched = min(found)
    return text[: end + negative_length], matched


def run(stop: list[str], pieces: list[str]) -> tuple[str, str | None, int]:
    """Output, matched stop string and `length`, with what must hold on the way asserted."""
    stops = StopStrings(stop)
    output = ""
    for piece in pieces:
        released, matched = stops.push(piece)
        output += released
        assert stops.length == len(output)
        if matched is not None:
            assert stops.finish() == ""
            return output, matched, stops.length
    return output + stops.finish(), None, stops.length


@given(st.text("ab", max_size=40), st.lists(st.text("ab", min_size=1, max_size=6), max_size=5), st.data())
def test_equals_a_search_of_the_whole_text_for_any_pieces(text: str, stop: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    output, matched = expected(text, stop)
    assert run(stop, pieces) == (output, matched, len(output))
    assert run(stop, list(text)) == (output, matched, len(output))


def test_holds_back_exactly_what_could_begin_a_stop_string() -> None:
    stops = StopStrings(["\n\nQ:", "END"])
    assert stops.push("Hello E") == ("Hello ", None)
    assert stops.push("N") == ("", None)
    assert stops.push("Ex") == ("ENEx", None)
    assert stops.push("\n") == ("", None)
    assert stops.push("\n") == ("", None)
    assert stops.push("\n") == ("\n", None)
    assert stops.push("Q: more") == ("", "\n\nQ:")
    assert stops.length == len("Hello ENEx\n")


def test_mii_fault_a_stop_string_matches_across_tokens() -> None:
    assert run(["Observation:"], ["Act.\nObs", "erv", "ation", ": no"]) == ("Act.\n", "Observation:", 5)


@pytest.mark.parametrize(
    ("stop", "text", "output", "matched"),
    [
        (["abcd", "bc"], "xabcd", "xa", "bc"),  # complete first
        (["bcd", "abcd"], "xabcd", "x", "abcd"),  # complete together: the longest
        (["ab", "abc"], "xabc", "x", "ab"),
        (["aab"], "aaab", "a", "aab"),
        (["b", "b"], "ab", "a", "b"),
        (["世界"], "你好世界。", "你好", "世界"),
        (["x" * 500], "y" + "x" * 501, "y", "x" * 500),
    ],
)
def test_which_match_counts(stop: list[str], text: str, output: str, matched: str) -> None:
    assert run(stop, [text]) == (output, matched, len(output))
    assert run(stop, list(text)) == (output, matched, len(output))


def test_without_stop_strings_all_text_is_released() -> None:
    stops = StopStrings([])
    piece = "any text at all"
    assert stops.push(piece)[0] is piece
    assert (stops.length, stops.finish()) == (len(piece), "")


# Answers in parts ----------------------------------------------------------------------------------------------------


def generated(text: str, source: MessageSource, *stop: str, at_once: int = 1) -> tuple[Generation, list[int]]:
    """An answer of these tokens, so many a step, until it ends; and how many tokens it was told to keep."""
    backend = tiny_tokenizers.byte_level()
    markers = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<tool_call>", "</tool_call>")
    backend.add_tokens([AddedToken(marker, normalized=False) for marker in markers])
    tokenizer = Tokenizer(backend)
    request = PreparedRequest((1,), SamplingParams(stop=stop), continues=False, message=source)
    generation, kept = Generation("g", request, tokenizer), list[int]()
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    for start in range(0, len(token_ids), at_once):
        generation.push(RequestOutput("g", tuple(token_ids[start : start + at_once])), kept.append)
        if generation.finish_reason is not None:
            break
    return generation, kept


@pytest.mark.parametrize(
    ("stop", "content"),
    [
        ("final", "The end"),
        ("analysis", "The end"),
        ("assistant", "The end"),
        ("end", "The"),
        ("<|channel|>", "The end"),
    ],
)
def test_a_stop_string_is_not_found_in_the_header_of_a_message(stop: str, content: str) -> None:
    text = "<|channel|>commentary<|message|>The<|end|><|start|>assistant<|channel|>final<|message|> end"
    generation, _ = generated(text, MessageSource(CHAT_FORMATS["harmony"]), stop)
    generation.end(FinishReason.STOP)
    assert (generation.message.content or "").split() == content.split()


def test_an_answer_of_one_call_ends_where_another_begins() -> None:
    calls = [f'<tool_call>\n{{"name": "now", "arguments": {{"n": {n}}}}}\n</tool_call>\n' for n in range(3)]
    tools = (Tool(name="now"),)
    for parallel in True, False:
        source = MessageSource(CHAT_FORMATS["hermes"], tools, parallel=parallel)
        generation, kept = generated("Well. " + "".join(calls), source)
        assert bool(kept) is not parallel and generation.text.count("<tool_call>") == (3 if parallel else 2)
        generation.finish_reason = generation.finish_reason or FinishReason.STOP
        message = generation.message
        assert message.content == "Well." and message.has_complete_calls
        assert [call.arguments for call in message.tool_calls] == [f'{{"n": {n}}}' for n in range(3 if parallel else 1)]


@pytest.mark.parametrize("at_once", [2, 3, 7, 500])
@pytest.mark.parametrize("stop", [(), ("arguments",), ('"n": 1',), ("</tool", "now")])
def test_an_answer_ends_at_the_same_token_however_many_come_at_once(stop: tuple[str, ...], at_once: int) -> None:
    calls = [f'<tool_call>\n{{"name": "now", "arguments": {{"n": {n}}}}}\n</tool_call>\n' for n in range(3)]
    text = "Well. " + "".join(calls)
    source = MessageSource(CHAT_FORMATS["hermes"], (Tool(name="now"),), parallel=False)
    (one, kept), (other, others_kept) = (generated(text, source, *stop, at_once=n) for n in (1, at_once))
    assert kept == others_kept and len(kept) == 1
    for name in ("text", "token_ids", "finish_reason", "stop_string", "num_computed_tokens"):
        assert getattr(one, name) == getattr(other, name)
