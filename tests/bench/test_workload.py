"""Workloads: reproducible, distinct requests with the requested lengths."""

import statistics
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitfuse.bench.workload import (
    Chat,
    Independent,
    Lengths,
    SharedPrefix,
    TokenIds,
    Trace,
    Words,
    Workload,
    joined,
    poisson,
)
from splitfuse.errors import ConfigError

IDS = TokenIds(3072)
WORKLOADS: list[Workload] = [
    Independent(Lengths(100, 20, room=2048), IDS),
    SharedPrefix(Lengths(20, 20, room=2048), IDS, prefix=300, prefixes=3),
    Chat(Lengths(40, 20, room=2048), IDS, turns=3),
]


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: str(w.settings["kind"]))
def test_requests_are_functions_of_seed_stream_and_number(workload: Workload) -> None:
    ahead = [workload.first("a", i) for i in range(30)]
    assert [workload.first("a", i) for i in reversed(range(30))] == ahead[::-1]
    others = [workload.first("b", i) for i in range(30)]
    assert len({r.prompt for r in (*ahead, *others)}) == 60


@given(st.integers(2, 300), st.integers(1, 500), st.integers(1, 500), st.floats(0, 3))
def test_lengths_fit_the_context(room: int, prompt: int, generate: int, deviation: float) -> None:
    workload = Independent(Lengths(prompt, generate, deviation, room), IDS)
    for number in range(5):
        request = workload.first("x", number)
        assert len(request.prompt) >= 1 and request.max_tokens >= 1 and len(request.prompt) + request.max_tokens <= room
        assert not isinstance(request.prompt, str) and all(0 <= token < IDS.size for token in request.prompt)


def test_lengths_are_normal() -> None:
    workload = Independent(Lengths(500, 64), IDS)
    requests = [workload.first("x", i) for i in range(2000)]
    for lengths, mean in (([len(r.prompt) for r in requests], 500), ([r.max_tokens for r in requests], 64)):
        assert statistics.mean(lengths) == pytest.approx(mean, rel=0.03)
        assert statistics.stdev(lengths) == pytest.approx(0.3 * mean, rel=0.06)


def test_shared_prefixes() -> None:
    workload = WORKLOADS[1]
    requests = [workload.first(stream, i) for stream in "ab" for i in range(50)]
    assert len({request.prompt[:300] for request in requests}) == 3
    assert len({request.prompt[:301] for request in requests}) > 3
    assert all(request.prefix == 300 and len(request.prompt) > 300 for request in requests)


@given(st.lists(st.integers(1, 60), min_size=10, max_size=10), st.integers(40, 400))
def test_conversation_contains_all_earlier_turns(answers: list[int], room: int) -> None:
    workload = Chat(Lengths(30, 30, room=room), IDS, turns=10)
    request, turn = workload.first("x", 0), 0
    while True:
        assert not isinstance(request.prompt, str) and len(request.prompt) + request.max_tokens <= room
        answer = tuple(range(min(answers[turn], request.max_tokens)))
        following = workload.successor(request, answer)
        if following is None:
            assert turn == 9 or len(request.prompt) + len(answer) + 2 > room
            return
        turn += 1
        said = joined(request.prompt, answer)
        assert following.prompt[: len(said)] == said and len(following.prompt) > len(said)
        assert (following.turn, following.prefix) == (turn, len(said))
        request = following


def test_words_for_servers_without_ids() -> None:
    workload = Chat(Lengths(100, 20), Words(tokens_per_word=2.0), turns=2)
    first = workload.first("x", 0)
    assert isinstance(first.prompt, str) and 20 < len(first.prompt.split()) < 100
    second = workload.successor(first, "and so on")
    assert second is not None and second.prompt.startswith(f"{first.prompt} and so on ")  # type: ignore[union-attr]
    assert workload.successor(second, "") is None


def test_arrivals_are_a_poisson_process() -> None:
    times = list(islice(poisson(4.0, seed=1, stream="x"), 4000))
    assert times == list(islice(poisson(4.0, seed=1, stream="x"), 4000)) and times == sorted(times)
    gaps = [later - earlier for earlier, later in zip([0.0, *times], times, strict=False)]
    assert statistics.mean(gaps) == pytest.approx(0.25, rel=0.06)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.08)  # exponential: as large as the mean


def trace(folder: Path, *lines: str) -> Path:
    file = folder / "trace.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def test_trace_is_replayed(tmp_path: Path) -> None:
    file = trace(
        tmp_path,
        '{"at": 7.5, "prompt_tokens": 30, "generate": 4}',
        "",
        '{"at": 5, "prompt": [5, 6, 7], "generate": 2}',
        '{"at": 6, "prompt": "Once upon a time", "generate": 3}',
    )
    read = Trace.read(file, IDS)
    assert list(read.arrivals()) == [0.0, 1.0, 2.5] and read.is_timed
    requests = [read.first("x", i) for i in range(6)]
    assert [r.max_tokens for r in requests] == [2, 3, 4, 2, 3, 4]
    assert (requests[0].prompt, requests[1].prompt, len(requests[2].prompt)) == ((5, 6, 7), "Once upon a time", 30)
    assert requests[2].prompt != requests[5].prompt
    without = Trace.read(trace(tmp_path, '{"prompt_tokens": 3, "generate": 1}'), IDS)
    with pytest.raises(ConfigError, match="has no times"):
        without.arrivals()


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "line 1"),
        ('{"generate": 4}', "exactly one of prompt and prompt_tokens"),
        ('{"generate": 4, "prompt": "a", "prompt_tokens": 2}', "exactly one of prompt and prompt_tokens"),
        ('{"generate": 0, "prompt_tokens": 2}', "at least one token"),
        ('{"generate": 1, "prompt": []}', "at least one token"),
        ('{"generate": 1, "prompt_tokens": 2, "at": -1}', "at least 0"),
        ('{"generate": 1, "prompt_tokens": 2, "when": 1}', "when"),
        ('{"generate": 1000, "prompt_tokens": 2000}', "exceed the context of 2048"),
        (
            '{"generate": 1, "prompt_tokens": 2, "at": 1}\n{"generate": 1, "prompt_tokens": 2}',
            "either all lines have a time",
        ),
        ("", "is empty"),
    ],
)
def test_invalid_trace_is_rejected(tmp_path: Path, line: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        Trace.read(trace(tmp_path, line), IDS, room=2048)


def test_invalid_workload_is_rejected() -> None:
    for make in (
        lambda: Lengths(0.5, 1),
        lambda: Lengths(1, 1, -1),
        lambda: Lengths(1, 1, room=1),
        lambda: SharedPrefix(Lengths(1, 1, room=100), IDS, 99),
        lambda: Chat(Lengths(1, 1), IDS, 0),
    ):
        with pytest.raises(ConfigError):
            make()
