"""The access log: one line of JSON for each request, without prompts and texts unless they are requested."""

import dataclasses
import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitfuse.server.access_log import RequestLog, RequestRecord

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=30)  # lone surrogates too
ANY_SECONDS = st.none() | st.floats()
RECORDS = st.builds(
    RequestRecord,
    request_id=ANY_TEXT,
    route=ANY_TEXT,
    status=st.integers(100, 599),
    total_seconds=st.floats(),
    key=st.none() | ANY_TEXT,
    prompt_tokens=st.integers(0),
    generated_tokens=st.integers(0),
    cached_tokens=st.integers(0),
    finish_reasons=st.dictionaries(ANY_TEXT, st.integers(1), max_size=3),
    error=st.none() | ANY_TEXT,
    queue_seconds=ANY_SECONDS,
    time_to_first_token_seconds=ANY_SECONDS,
    inter_token_latency_seconds=st.lists(st.floats(), max_size=3).map(tuple),
    steps=st.integers(0),
    slo_met=st.none() | st.booleans(),
    slo_violation=st.none() | ANY_TEXT,
)
RECORD = RequestRecord(
    request_id="r-1",
    route="/v1/completions",
    status=200,
    total_seconds=2.5,
    key="key 2",
    prompt_tokens=12,
    generated_tokens=5,
    cached_tokens=8,
    finish_reasons={"stop": 2, "length": 1},
    queue_seconds=0.25,
    time_to_first_token_seconds=0.5,
    inter_token_latency_seconds=(0.1, 0.2, 0.6),
    steps=4,
    slo_met=True,
    slo_violation="of 2.5 s, 2 s went into waiting",
)


def parse(line: str) -> dict[str, Any]:
    """Strictly: no NaN, no Infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    fields = json.loads(line, parse_constant=refuse)
    assert isinstance(fields, dict)
    return fields


def written(record: RequestRecord, prompt: Any = None, text: Any = None, *, log_prompts: bool = False) -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict", newline="")
    RequestLog(stream.write, log_prompts=log_prompts, now=lambda: 1_800_000_000.25).write(record, prompt, text)
    stream.flush()
    raw = stream.buffer
    assert isinstance(raw, io.BytesIO)
    return raw.getvalue().decode("ascii")


@given(RECORDS, ANY_TEXT, st.lists(ANY_TEXT, max_size=2))
def test_any_record_is_one_line_of_json(record: RequestRecord, prompt: str, texts: list[str]) -> None:
    line = written(record, prompt, texts, log_prompts=True)
    assert line.endswith("\n")
    assert len(line.splitlines()) == 1
    fields = parse(line)
    assert fields["prompt"] == prompt
    assert fields["text"] == texts
    for name in ("request_id", "route", "status", "key", "prompt_tokens", "generated_tokens", "error", "steps"):
        assert fields[name] == getattr(record, name)
    assert fields["finish_reasons"] == record.finish_reasons


def test_the_fields_of_a_line() -> None:
    assert parse(written(RECORD)) == {
        "time": "2027-01-15T08:00:00.250+00:00",
        "request_id": "r-1",
        "route": "/v1/completions",
        "status": 200,
        "key": "key 2",
        "prompt_tokens": 12,
        "generated_tokens": 5,
        "cached_tokens": 8,
        "finish_reasons": {"stop": 2, "length": 1},
        "error": None,
        "queue_seconds": 0.25,
        "time_to_first_token_seconds": 0.5,
        "inter_token_latency_median_seconds": 0.2,
        "inter_token_latency_max_seconds": 0.6,
        "total_seconds": 2.5,
        "steps": 4,
        "resumed": 0,
        "on_loan": False,
        "slo_met": True,
        "slo_violation": "of 2.5 s, 2 s went into waiting",
    }


def test_every_field_of_a_record_reaches_the_line() -> None:
    plain = written(RECORD)
    for field in dataclasses.fields(RequestRecord):
        value = getattr(RECORD, field.name)
        other = {str: "other", bool: None, int: 17, float: 0.125, tuple: (), dict: {}, type(None): "other"}[type(value)]
        changed = dataclasses.replace(RECORD, **{field.name: other})
        assert written(changed) != plain, field.name


def test_a_request_without_tokens_has_no_token_times() -> None:
    fields = parse(written(RequestRecord(request_id="r", route="/v1/models", status=401, total_seconds=0.001)))
    assert fields["inter_token_latency_median_seconds"] is fields["inter_token_latency_max_seconds"] is None
    assert fields["time_to_first_token_seconds"] is fields["queue_seconds"] is None
    assert fields["finish_reasons"] == {}


@given(ANY_TEXT, ANY_TEXT)
def test_prompts_and_texts_are_not_logged_by_default(prompt: str, text: str) -> None:
    assert written(RECORD, prompt, text) == written(RECORD)


PROMPTS: list[Any] = [
    "a text",
    [1, 2, 3],
    [{"role": "user", "content": "a\u2028b\nc\ud800"}],
    None,
]


@pytest.mark.parametrize("prompt", PROMPTS, ids=["text", "tokens", "chat", "none"])
def test_prompts_of_every_kind_are_logged_on_request(prompt: Any) -> None:
    fields = parse(written(RECORD, prompt, ["one", "two"], log_prompts=True))
    assert fields["prompt"] == prompt
    assert fields["text"] == ["one", "two"]
    assert fields["request_id"] == "r-1"


@pytest.mark.parametrize("prompt", [float("nan"), [float("inf")], {(1, 2): 3}, b"\xff", object])
def test_values_beyond_json_are_logged_as_repr(prompt: Any) -> None:
    assert parse(written(RECORD, prompt, log_prompts=True))["prompt"] == repr(prompt)
