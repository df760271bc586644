"""One pipeline or engine in several threads, and after a fork."""

import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from patience import PATIENCE

import splitfuse
from splitfuse.config.engine import EngineConfig
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.engine.engine import Engine
from splitfuse.engine.guard import Guard
from splitfuse.engine.ragged import RaggedEngine
from splitfuse.runtime.loading import load_model

PROMPTS = ["Erik plays", "Once upon a time", "The dog", "Mia and Tom", "A small house", "In the garden"]


@pytest.fixture(scope="module")
def pipe() -> splitfuse.Pipeline:
    return splitfuse.pipeline(num_blocks=200)


def in_threads(work: Callable[[int], object], count: int) -> list[object]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))


def test_threads_may_share_a_pipeline(pipe: splitfuse.Pipeline) -> None:
    alone = [pipe(prompt, max_new_tokens=12)[0].generated_text for prompt in PROMPTS]

    def call(number: int) -> str:
        if number % 2:
            pieces = list(pipe(PROMPTS[number], max_new_tokens=12, stream=True))
            assert [piece.response is not None for piece in pieces] == [False] * (len(pieces) - 1) + [True]
            return "".join(piece.text for piece in pieces)
        return pipe(PROMPTS[number], max_new_tokens=12)[0].generated_text

    assert in_threads(call, len(PROMPTS)) == alone
    assert not pipe.engine.has_unfinished


def test_a_stream_that_is_not_read_holds_up_no_thread(pipe: splitfuse.Pipeline) -> None:
    stream = pipe(PROMPTS[0], max_new_tokens=12, stream=True)
    first = next(stream)
    assert in_threads(lambda _: pipe(PROMPTS[1], max_new_tokens=5)[0].generated_length, 2) == [5, 5]
    rest = "".join(piece.text for piece in stream)
    assert first.text + rest == pipe(PROMPTS[0], max_new_tokens=12)[0].generated_text


def test_threads_may_share_an_engine(pipe: splitfuse.Pipeline) -> None:
    engine = Engine(pipe.engine.config, pipe.engine.model)
    received: dict[str, list[int]] = {}

    def call(number: int) -> None:
        for turn in range(5):
            engine.add_request(f"{number}.{turn}", [5 + number, 6, 7], SamplingParams(max_tokens=7, temperature=0.0))
            for output in engine.step():
                received.setdefault(output.request_id, []).extend(output.token_ids)

    in_threads(call, 4)
    while engine.has_unfinished:
        for output in engine.step():
            received.setdefault(output.request_id, []).extend(output.token_ids)
    assert len(received) == 20
    assert all(received[f"{number}.{turn}"] == received[f"{number}.0"] for number in range(4) for turn in range(5))


def test_threads_may_share_a_ragged_engine() -> None:
    config = EngineConfig.from_settings({"num_blocks": 100})
    engine = RaggedEngine(config, load_model(config))

    def call(number: int) -> list[float]:
        for token in range(20):
            logits = engine.put([number], [[token + 1]])
        engine.flush(number)
        return [float(each) for each in logits[0, :5]]

    first, *others = in_threads(call, 4)
    assert others == [first] * 3
    engine.check()


def test_threads_come_in_their_order() -> None:
    guard, came, order = Guard(), threading.Event(), []

    def wait() -> None:
        came.set()
        with guard:
            order.append("another")

    thread = threading.Thread(target=wait)
    with guard, guard:  # the same thread again
        thread.start()
        came.wait()
        while not guard._queue.locked():
            pass
    with guard:
        order.append("this one, again")
    thread.join()
    assert order == ["another", "this one, again"]


FORKED = """if True:
    import os, sys, torch, splitfuse
    from splitfuse.config.engine import EngineConfig
    from splitfuse.core.sampling_params import SamplingParams
    from splitfuse.engine.ragged import RaggedEngine
    from splitfuse.kernels.cpu.backend import CpuBackend
    from splitfuse.kernels.weights import WeightRole
    from splitfuse.runtime.loading import load_model

    torch.set_num_threads(2)
    config = EngineConfig.from_settings({"num_blocks": 64, "kernels": sys.argv[1], "dtype": sys.argv[2]})
    pipe = splitfuse.pipeline(num_blocks=64, kernels=sys.argv[1], dtype=sys.argv[2])
    pipe("Once", max_new_tokens=3)
    stream = pipe("Once", max_new_tokens=30, stream=True)
    next(stream)
    ragged = RaggedEngine(config, pipe.engine.model)
    ragged.put([1], [[5, 6]])
    backend = CpuBackend(num_threads=2) if sys.argv[1] == "auto" else None
    x, w = torch.ones(40, 256).bfloat16(), torch.ones(128, 256).bfloat16()
    if backend:
        packed = backend.pack([w], role=WeightRole.QKV)
        wanted = backend.linear(x, packed)
    if os.fork():
        print(os.waitstatus_to_exitcode(os.wait()[1]))
        sys.exit()
    for use in (
        lambda: pipe("Once", max_new_tokens=3),
        lambda: list(pipe("Once", max_new_tokens=3, stream=True)),
        lambda: next(stream),
        lambda: pipe.engine.add_request("a", [5], SamplingParams()),
        pipe.engine.step,
        lambda: ragged.put([1], [[7]]),
        lambda: ragged.flush(1),
        splitfuse.pipeline,
        lambda: RaggedEngine.load(config),
    ):
        try:
            use()
        except splitfuse.EngineUnavailableError as error:
            assert "is a fork of the one that loaded the model" in str(error)
        else:
            os._exit(1)
    os._exit(0 if backend is None or torch.equal(backend.linear(x, packed), wanted) else 2)
"""


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_a_fork_is_told_that_it_has_no_engine(kernels: str) -> None:
    dtype = "float32" if kernels == "reference" else "bfloat16"
    printed = subprocess.check_output([sys.executable, "-c", FORKED, kernels, dtype], text=True, timeout=PATIENCE)
    assert printed.split() == ["0"]
