"""Reference cycles: requests leave none, so that full garbage collections, which stop all streams, stay short."""

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from running_server import RunningServer

import splitfuse
from splitfuse.errors import InvalidRequestError

PROMPT = "Once upon a time"
COMPLETION = "/v1/completions"
CHAT = "/v1/chat/completions"
BODIES: list[tuple[str, dict[str, Any]]] = [
    (COMPLETION, {"prompt": PROMPT, "max_tokens": 6}),
    (COMPLETION, {"prompt": [PROMPT, "x"], "n": 2, "max_tokens": 6, "stream": True, "logprobs": 2}),
    (CHAT, {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 6, "stop": ["zzz"], "seed": 1}),
    (COMPLETION, {"prompt": PROMPT, "max_tokens": -1}),
    (COMPLETION, {"prompt": PROMPT, "surprise": 1}),
    (COMPLETION, {"prompt": PROMPT, "splitfuse_deadline": 1e-9, "max_tokens": 100}),
    (COMPLETION, {"prompt": PROMPT * 2000}),
    (COMPLETION, {"prompt": PROMPT, "logit_bias": {"999999": 1}}),
    (CHAT, {"messages": [{"role": "nonsense", "content": ""}]}),
    ("/v1/nowhere", {}),
    ("/tokenize", {"prompt": PROMPT}),
]


def garbage_of(work: Callable[[], object], *, settled: Callable[[], object] = lambda: None) -> Counter[str]:
    """What only the garbage collector frees after `work`, by type, when it has been done before."""
    for _ in range(2):
        work()
    settled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(5):
            work()
        settled()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        return Counter(f"{type(each).__module__}.{type(each).__qualname__}" for each in gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def test_calls_of_a_pipeline_leave_no_cycles(pipe: splitfuse.Pipeline) -> None:
    def work() -> None:
        pipe([PROMPT, "x"], max_new_tokens=6)
        pipe(PROMPT, max_new_tokens=6, temperature=0.8, seed=3, logprobs=2, stop=["zzz"], n=2)
        stream = pipe(PROMPT, max_new_tokens=50, stream=True)
        next(stream)
        stream.close()
        with suppress(InvalidRequestError):
            pipe(PROMPT, max_new_tokens=-1)

    assert not garbage_of(work)


def test_requests_leave_no_cycles(server: RunningServer) -> None:
    with server.http() as http:

        def work() -> None:
            for path, body in BODIES:
                http.post(path, json=body)
            http.post(COMPLETION, content=b"{")
            with http.stream("POST", COMPLETION, json={"prompt": PROMPT, "max_tokens": 300, "stream": True}) as answer:
                next(answer.iter_bytes())  # and hang up

        found = garbage_of(work, settled=server.assert_idle)
    ours = {name for name in found if "splitfuse" in name or name.startswith(("msgspec", "builtins.trace"))}
    assert not ours, found  # asyncio has a cycle for each connection


def test_a_pipeline_exempts_what_it_has_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen: list[None] = []
    monkeypatch.setattr("splitfuse.engine.garbage.freeze", lambda: frozen.append(None))
    splitfuse.pipeline(num_blocks=64)
    assert len(frozen) == 1


@pytest.mark.parametrize("settings", [{}, {"kv_memory_tier": "4MiB"}, {"ttft": "60s"}], ids=str)
def test_a_pipeline_is_freed_without_the_collector(settings: dict[str, str]) -> None:
    gc.collect()
    gc.disable()
    try:
        pipe = splitfuse.pipeline(num_blocks=64, **settings)
        pipe(PROMPT, max_new_tokens=3)
        parts = [weakref.ref(each) for each in (pipe.engine, pipe.engine.scheduler, pipe.engine.model.decoder)]
        del pipe
        assert [part() for part in parts] == [None] * 3
    finally:
        gc.enable()
