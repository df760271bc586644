"""Stop strings against searching the whole text at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitfuse.text.stop_strings import StopStrings


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
