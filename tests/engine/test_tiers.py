"""KV blocks that another engine has computed, or this one before a restart, give what computing them gives."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_encoders
import torch
from backends import variants
from patience import PATIENCE
from scheduler_checks import check_scheduler

from splitfuse.api import pipeline
from splitfuse.config.engine import EngineConfig
from splitfuse.core.events import PhasesEntered
from splitfuse.core.kv import fetching
from splitfuse.core.kv.fetching import Fetch, Frame
from splitfuse.core.latency.phases import LatencyPhase
from splitfuse.core.limits import EngineLimits
from splitfuse.core.plan import Land, Logprobs, Save, StepPlan
from splitfuse.core.replicas.replica_view import ReplicaView
from splitfuse.core.replicas.routing import expected_tokens
from splitfuse.core.request_output import RequestOutput
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.engine.block_file import BlockFile
from splitfuse.engine.client import EngineState
from splitfuse.engine.engine import Engine
from splitfuse.engine.messages import Add, Prefetch
from splitfuse.engine.ragged import RaggedEngine
from splitfuse.engine.replica_choice import _accepts
from splitfuse.engine.tier_files import open_tiers
from splitfuse.engine.tiers import Tiers
from splitfuse.errors import ConfigError, EngineUnavailableError, InvalidRequestError
from splitfuse.runtime.executor import Executor
from splitfuse.runtime.loading import load_model

SMALL = {"dtype": "float32", "num_blocks": 24, "block_size": 4, "max_num_batched_tokens": 16}
KINDS = ["llama-gqa", "mistral-window", "gemma3", "deepseek-v3", "gpt-oss", "gemma4-unified-shared-keys"]
MEMORY = {"kv_memory_tier": "1MiB"}

Answer = tuple[list[int], list[list[tuple[int, float]]], int]


@pytest.fixture
def engines() -> Iterator[list[Engine]]:
    made: list[Engine] = []
    yield made
    for engine in made:
        engine.close()


def make(engines: list[Engine], count: int, **settings: Any) -> list[Engine]:
    """Engines of one model that share their tiers, if the settings have any."""
    config = EngineConfig.from_settings(settings)
    model = load_model(config)
    files, key = open_tiers(config.cache)
    parts = [None] * count if files is None else files.split(count)
    made = [Engine(config, model, name_key=key, tier_files=part) for part in parts]
    engines += made
    return made


def prompt(number: int, length: int = 50) -> list[int]:
    rng = Random(number)
    return [rng.randrange(15, 60) for _ in range(length)]


def ask(engine: Engine, *prompts: list[int], **params: Any) -> list[Answer]:
    """The tokens and logprobs of each prompt's answer, and how many tokens were cached; then all is saved."""
    for number, each in enumerate(prompts):
        engine.add_request(f"{number}", each, SamplingParams(**{"max_tokens": 9, "logprobs": 2, **params}))
    answers: dict[str, Answer] = {f"{number}": ([], [], 0) for number in range(len(prompts))}
    while engine.has_unfinished:
        for output in engine.step(isolate=True):
            assert output.error is None
            tokens, logprobs, _ = answers[output.request_id]
            entries = output.logprobs or Logprobs()
            logprobs += [[(each.token_id, each.logprob), *each.top] for each in entries]
            answers[output.request_id] = tokens + list(output.token_ids), logprobs, output.num_cached_tokens
            check_scheduler(engine.scheduler)
    if engine.tiers is not None:
        assert engine.tiers.wait_until_written(PATIENCE)
    return [*answers.values()]


def without_cached(answers: list[Answer]) -> list[tuple[object, ...]]:
    return [answer[:2] for answer in answers]


@pytest.mark.parametrize("kind", KINDS)
def test_what_one_engine_computed_another_fetches(
    kind: str, folder_of: Callable[[str], str], engines: list[Engine]
) -> None:
    first, second, third = make(engines, 3, model=folder_of(kind), **SMALL, **MEMORY)
    (computed,), (fetched,) = ask(first, prompt(1)), ask(second, prompt(1))
    assert (computed[2], fetched[2]) == (0, 48)
    assert fetched[0] == computed[0]
    turn = prompt(1) + computed[0] + prompt(2, 5)
    (next_turn,), (alone,) = ask(third, turn), ask(make(engines, 1, model=folder_of(kind), **SMALL)[0], turn)
    assert next_turn[2] == 58, "all that was computed: the answer's blocks too, and the last one, which is not full"
    assert next_turn[0] == alone[0]
    assert third.tiers is not None and third.tiers.stats.num_fetched == 15


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
@pytest.mark.parametrize("variant", variants())
def test_fetched_blocks_give_the_same_bits(variant: str, kv_cache_dtype: str, engines: list[Engine]) -> None:
    settings = {"kernels": variant, "kv_cache_dtype": kv_cache_dtype, "num_threads": 1, "num_blocks": 40}
    first, second = make(engines, 2, **settings, kv_memory_tier="8MiB", max_num_seqs=4)
    prompts = [prompt(number, 130 + 40 * number) for number in range(3)]
    computed, fetched = ask(first, *prompts), ask(second, *prompts)
    assert [answer[2] for answer in fetched] == [128, 160, 192]
    assert without_cached(fetched) == without_cached(computed)


def test_drafts_are_saved_as_far_as_they_were_right(folder_of: Callable[[str], str], engines: list[Engine]) -> None:
    settings = {"model": folder_of("llama-gqa"), **SMALL, "num_speculative_tokens": 6}
    text = prompt(1, 12) * 3
    first, second = make(engines, 2, **settings, **MEMORY)
    (computed,) = ask(first, text, max_tokens=30)
    (fetched,) = ask(second, text + computed[0], max_tokens=9)
    (alone,) = ask(make(engines, 1, **{**settings, "num_speculative_tokens": 0})[0], text + computed[0], max_tokens=9)
    assert fetched[2] >= 60 and fetched[0] == alone[0]


def test_what_ends_between_steps_of_an_idle_engine_is_saved_at_once(
    folder_of: Callable[[str], str], engines: list[Engine]
) -> None:
    (engine,) = make(engines, 1, model=folder_of("llama-gqa"), **SMALL, **MEMORY)
    engine.add_request("a", prompt(1, 10), SamplingParams(max_tokens=30))
    engine.step()
    names = list[bytes]()
    engine.allocator.name_blocks(prompt(1, 10), names, 2)
    part = engine.allocator.name_part(names, prompt(1, 10)[8:])
    assert engine.tiers is not None and not engine.ids_in_flight()
    engine.abort("a")
    assert engine.tiers.wait_until_written(PATIENCE) and all(map(engine.tiers.read, (*names, part)))


def test_what_ends_between_steps_is_saved_before_others_land_in_its_blocks(
    folder_of: Callable[[str], str], engines: list[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("splitfuse.core.kv.prefetching.LONGEST_FETCH", PATIENCE)  # on a busy machine blocks come late
    first, second = make(engines, 2, model=folder_of("llama-gqa"), **SMALL, **MEMORY)
    ask(second, prompt(2, 30))
    first.add_request("a", prompt(1, 10), SamplingParams(max_tokens=30))
    first.step()
    request = first.scheduler.get("a")
    assert request is not None and request.kv.num_computed == 10
    assert isinstance(first.executor, Executor) and first.tiers is not None
    content = torch.empty(first.tiers.block_bytes, dtype=torch.uint8)
    first.executor.kv_cache.read_block(request.kv.blocks[2], content)
    own, names, size = list[bytes](), list[bytes](), 4
    first.allocator.name_blocks(prompt(1, 10), own, 2)
    first.allocator.name_blocks(prompt(2, 30), names, 7)
    blocks = tuple(tuple(prompt(2, 30)[start : start + size]) for start in range(0, 28, size))
    assert first.prefetch(Prefetch("b", tuple(names), blocks, ()))
    first.abort("a")
    while first.has_unfinished:
        first.step()
    assert first.tiers.stats.num_fetched == 7 and first.tiers.wait_until_written(PATIENCE)
    frame = first.tiers.read(first.allocator.name_part(own, prompt(1, 10)[8:]))
    assert frame is not None and bytes(frame.data) == content.numpy().tobytes()


def test_a_small_cache_is_filled_again_from_the_tier(folder_of: Callable[[str], str], engines: list[Engine]) -> None:
    settings = {"model": folder_of("llama-gqa"), **SMALL}
    (engine,), (plain,) = make(engines, 1, **settings, **MEMORY), make(engines, 1, **settings)
    prompts = [prompt(number) for number in range(4)]
    wanted = [without_cached(ask(plain, each))[0][0] for each in prompts]
    for turn in range(3):
        answers = [ask(engine, each)[0] for each in prompts]
        assert [tokens for tokens, _, _ in answers] == wanted
        assert all(cached == (48 if turn else 0) for _, _, cached in answers)
    crowd = ask(engine, *prompts)
    assert [tokens for tokens, _, _ in crowd] == wanted


@pytest.mark.parametrize("tier", ["memory", "disk"])
def test_one_flipped_bit_is_never_used_and_is_counted(
    tier: str, folder_of: Callable[[str], str], engines: list[Engine], tmp_path: Path
) -> None:
    tiers = MEMORY if tier == "memory" else {"kv_disk_tier": f"{tmp_path}/kv:1MiB"}
    first, second = make(engines, 2, model=folder_of("llama-gqa"), **SMALL, **tiers)
    (computed,) = ask(first, prompt(1))
    assert first.tiers is not None
    file = first.tiers._tiers[0].file
    at = file._data_at + file._slot_bytes * [*file._index.values()][5] + 321
    (byte,) = os.pread(file._fd, 1, at)
    os.pwrite(file._fd, bytes([byte ^ 4]), at)
    (fetched,) = ask(second, prompt(1))
    assert fetched[0] == computed[0] and fetched[2] == 20
    assert second.tiers is not None and second.tiers.stats.num_dropped == 1
    (again,) = ask(second, prompt(1))
    assert again[0] == computed[0] and again[2] == 48


def test_a_block_that_one_tier_has_lost_comes_from_the_other(
    folder_of: Callable[[str], str], engines: list[Engine], tmp_path: Path
) -> None:
    tiers = {**MEMORY, "kv_disk_tier": f"{tmp_path}/kv:1MiB"}
    first, second = make(engines, 2, model=folder_of("llama-gqa"), **SMALL, **tiers)
    (computed,) = ask(first, prompt(1))
    assert first.tiers is not None and second.tiers is not None
    memory = first.tiers._tiers[0].file
    at = memory._data_at + memory._slot_bytes * [*memory._index.values()][5] + 321
    (byte,) = os.pread(memory._fd, 1, at)
    os.pwrite(memory._fd, bytes([byte ^ 4]), at)
    assert ask(second, prompt(1)) == [(*computed[:2], 48)]
    assert second.tiers.stats.num_dropped == 1


def test_blocks_land_nowhere_without_an_inbox(folder_of: Callable[[str], str], engines: list[Engine]) -> None:
    """Chunks would attend to blocks that nothing has written."""
    (engine,) = make(engines, 1, model=folder_of("llama-gqa"), **SMALL)
    executor = engine.executor
    with pytest.raises(AssertionError, match="an inbox has them"):
        executor.collect(executor.submit(StepPlan(1, 16, (), prefetched=(Land(0, 1),))))


def test_a_request_for_which_nothing_can_be_asked_is_computed(
    folder_of: Callable[[str], str], engines: list[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = make(engines, 2, model=folder_of("llama-gqa"), **SMALL, **MEMORY)
    (computed,) = ask(first, prompt(1))

    def fail(*_: Any) -> Any:
        raise ZeroDivisionError

    assert second.scheduler.fetches is not None
    monkeypatch.setattr(second.scheduler.fetches.fetching, "ask", fail)
    assert ask(second, prompt(1)) == [computed]


def test_a_restarted_engine_finds_its_blocks_on_the_disk(
    folder_of: Callable[[str], str], engines: list[Engine], tmp_path: Path
) -> None:
    settings = {"model": folder_of("llama-gqa"), **SMALL, "kv_disk_tier": f"{tmp_path}/kv:1MiB"}
    (computed,) = ask(make(engines, 1, **settings)[0], prompt(1))
    engines.pop().close()
    assert (tmp_path / "kv" / "key").stat().st_mode & 0o777 == 0o600
    (engine,) = make(engines, 1, **settings, kv_memory_tier="1MiB")
    (fetched,) = ask(engine, prompt(1) + computed[0])
    assert fetched[2] == 58
    assert engine.tiers is not None and engine.tiers.stats.num_saved >= 14, "memory has them too now"
    engines.pop().close()
    other = {**settings, "model": folder_of("mistral-window")}
    (engine,) = make(engines, 1, **other)
    assert engine.tiers is not None and engine.tiers.stats.num_dropped >= 14, "those of another model are forgotten"
    assert ask(engine, prompt(1))[0][2] == 0
    engines.pop().close()
    (tmp_path / "kv" / "key").unlink()
    (engine,) = make(engines, 1, **other)
    assert ask(engine, prompt(1))[0][2] == 0, "another key, other names"


def test_full_tiers_are_no_errors(
    folder_of: Callable[[str], str],
    engines: list[Engine],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = {"model": folder_of("llama-gqa"), **SMALL}
    (plain,) = make(engines, 1, **settings)
    prompts = [prompt(number) for number in range(5)]
    wanted = [ask(plain, each)[0][0] for each in prompts]
    (tiny,) = make(engines, 1, **settings, kv_memory_tier="0.03MiB")
    assert [ask(tiny, each)[0][0] for each in prompts * 2] == wanted * 2
    (disk,) = make(engines, 1, **settings, kv_disk_tier=f"{tmp_path}/kv:1MiB")

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.pwritev", full)
    assert [ask(disk, each)[0][0] for each in prompts] == wanted
    assert disk.tiers is not None and disk.tiers.stats.num_saved == 0 and disk.tiers.stats.num_unsaved > 30
    said = [each for each in caplog.messages if "not saved" in each]
    assert said == ["KV blocks are not saved to kv_disk_tier now: No space left on device"]


def test_a_tier_that_writes_slowly_leaves_blocks_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits to be written takes no more memory than there is for it."""
    go_on, write = threading.Event(), BlockFile.write

    def slow(self: BlockFile, frame: Frame, before: bytes) -> bool:
        go_on.wait()
        return write(self, frame, before)

    monkeypatch.setattr(BlockFile, "write", slow)
    fd, size = os.memfd_create("slow"), 64
    file = BlockFile(fd, num_bytes=2**20, block_bytes=size, block_size=4, fingerprint=bytes(32))
    tiers = Tiers({"kv_memory_tier": file}, size, staged_bytes=10 * size)
    for number in range(10):
        buffer = tiers.buffer(name := bytes([number]) * 16)
        assert buffer is not None
        tiers.save(Save(number, name, (1, 2, 3, 4)), buffer)
    assert tiers.buffer(b"n" * 16) is None and tiers.stats.num_unsaved == 1
    go_on.set()
    assert tiers.wait_until_written(PATIENCE) and tiers.stats.num_saved == 10
    assert tiers.buffer(b"n" * 16) is not None
    assert tiers.close()
    os.close(fd)


def hang_reads(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Let no block be read until the event that is returned."""
    go_on, read = threading.Event(), BlockFile.read

    def slow(self: BlockFile, name: bytes) -> Any:
        go_on.wait()
        return read(self, name)

    monkeypatch.setattr(BlockFile, "read", slow)
    return go_on


def test_a_tier_that_hangs_holds_a_request_up_once(
    folder_of: Callable[[str], str], engines: list[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = make(engines, 2, model=folder_of("llama-gqa"), **SMALL, **MEMORY)
    wanted = [ask(first, prompt(number))[0] for number in range(3)]
    go_on, tiers_ask = hang_reads(monkeypatch), Tiers.ask
    asked: list[Fetch] = []

    def ask_and_wait(self: Tiers, fetch: Fetch) -> None:
        asked.append(fetch)
        tiers_ask(self, fetch)
        while not self._reading_until:  # the reader has begun, and hangs
            time.sleep(0.001)

    monkeypatch.setattr(Tiers, "ask", ask_and_wait)
    monkeypatch.setattr(fetching, "LONGEST_FETCH", 0.05)
    assert [ask(second, prompt(number))[0] for number in range(3)] == wanted
    go_on.set()
    assert second.tiers is not None and second.tiers.stats.num_fetched == 0 and len(asked) == 1


def test_a_request_that_ends_while_it_waits_leaves_nothing(
    folder_of: Callable[[str], str], engines: list[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = make(engines, 2, model=folder_of("llama-gqa"), **SMALL, **MEMORY)
    (wanted,) = ask(first, prompt(1))
    go_on = hang_reads(monkeypatch)
    second.add_request("gone", prompt(1), SamplingParams(max_tokens=9))
    assert second.step() == [] and second.scheduler.queue.fetching
    assert second.abort("gone") and not second.has_unfinished
    go_on.set()
    (answer,) = ask(second, prompt(1))
    assert answer[0] == wanted[0]


def test_a_router_counts_what_replicas_can_fetch() -> None:
    view = ReplicaView(num_blocks=10, block_size=32, max_num_seqs=4, token_budget=64)
    info = SimpleNamespace(limits=EngineLimits(100, 100, 10, 32))
    replica: Any = SimpleNamespace(view=view, state=EngineState.READY, silent=False, is_drained=False, info=info)
    names = [bytes([number]) * 16 for number in range(4)]

    def cached(shared: int) -> int:
        return expected_tokens(view.memory.cached_tokens(names), shared)

    assert (cached(0), cached(128)) == (0, 124)
    view.memory.add(names[:2])
    assert (cached(0), cached(32), cached(128)) == (64, 64, 126)
    view.memory.add(names)
    assert cached(128) == 128
    small, large = (Add("a", (1,) * count, SamplingParams(max_tokens=9)) for count in (1, 200))
    assert _accepts(replica, small) and not _accepts(replica, large), "machines differ in memory"


def test_a_rejected_request_does_not_end_an_engine_that_waits_for_blocks(
    folder_of: Callable[[str], str], engines: list[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = make(engines, 2, model=folder_of("llama-gqa"), **SMALL, **MEMORY)
    (wanted,) = ask(first, prompt(1))
    go_on = hang_reads(monkeypatch)
    second.add_request("waits", prompt(1), SamplingParams(max_tokens=9))
    assert second.step(isolate=True) == [] and second.scheduler.queue.fetching
    failed: Future[Any] = Future()
    failed.set_exception(InvalidRequestError("a form that is none"))
    second._pending._held["rejected"] = Add("rejected", (20, 21), SamplingParams()), failed  # as `add` holds it
    (output,) = second.step(isolate=True)
    assert output.request_id == "rejected" and output.error == "a form that is none"
    go_on.set()
    tokens: list[int] = []
    while second.has_unfinished:
        tokens += [token for output in second.step(isolate=True) for token in output.token_ids]
    assert tokens == wanted[0]


def test_what_no_request_waits_for_is_not_read_on(
    folder_of: Callable[[str], str], engines: list[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = make(engines, 2, model=folder_of("llama-gqa"), **SMALL, **MEMORY)
    ask(first, prompt(1))
    begun, hang, read, reads = threading.Event(), threading.Event(), BlockFile.read, list[bytes]()

    def slow(self: BlockFile, name: bytes) -> Any:
        reads.append(name)
        begun.set()
        hang.wait()
        return read(self, name)

    monkeypatch.setattr(BlockFile, "read", slow)
    second.add_request("gone", prompt(1), SamplingParams(max_tokens=9))
    assert second.step() == [] and begun.wait(PATIENCE)
    assert second.abort("gone")
    hang.set()
    assert second.tiers is not None and second.tiers._arrived.wait(PATIENCE)
    assert len(reads) == 1 and second.tiers._answers.empty() and second.tiers.stats.num_fetched == 0


def test_a_fetch_of_an_idle_engine_is_a_phase_of_its_own(
    folder_of: Callable[[str], str], engines: list[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = make(engines, 2, model=folder_of("llama-gqa"), **SMALL, **MEMORY)
    ask(first, prompt(1))
    read = BlockFile.read

    def slow(self: BlockFile, name: bytes) -> Any:
        time.sleep(0.02)
        return read(self, name)

    monkeypatch.setattr(BlockFile, "read", slow)
    entered: list[LatencyPhase] = []
    second.events.subscribe(PhasesEntered, lambda event: entered.extend(phase for _, phase in event.phases))
    second.add_request("a", prompt(1), SamplingParams(max_tokens=2))
    outputs: list[RequestOutput] = []
    while second.has_unfinished:
        outputs += second.step()
    breakdown = outputs[-1].latency_breakdown
    assert breakdown is not None and outputs[-1].num_cached_tokens == 48
    assert breakdown.phases[LatencyPhase.FETCHING] >= 12 * 0.02
    assert sum(breakdown.phases.values()) == pytest.approx(breakdown.closed - breakdown.opened)
    assert entered == [LatencyPhase.FETCHING, LatencyPhase.JOINING, LatencyPhase.PREFILL, LatencyPhase.DECODE]


@pytest.mark.parametrize("work", ["read", "write"])
def test_any_exception_of_a_file_costs_its_block_alone(
    work: str, folder_of: Callable[[str], str], engines: list[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = make(engines, 2, model=folder_of("llama-gqa"), **SMALL, **MEMORY)

    def fail(*_: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(BlockFile, work, fail)
        wanted = ask(first, prompt(1))
        assert without_cached(ask(second, prompt(1))) == without_cached(wanted)
    ask(first, prompt(2))
    assert ask(second, prompt(2))[0][2] == 48, "both threads go on"


def test_a_folder_is_given_back_by_what_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitfuse.engine.tier_files.LOCK_SECONDS", 0.0)
    settings = {"kv_disk_tier": f"{tmp_path}/kv:8MiB", "num_threads": 1, "num_blocks": 64}
    with pytest.raises(ConfigError, match="too small for blocks of"):
        pipeline(**{**settings, "kv_disk_tier": f"{tmp_path}/kv:0.01MiB"})
    story = "Once upon a time, there was a little girl named Lily. She had a red ball. " * 4
    with pipeline(**settings) as pipe:
        (first,) = pipe(story, max_new_tokens=2, do_sample=False)
    with pytest.raises(EngineUnavailableError, match="the engine is closed"):
        pipe(story, max_new_tokens=2)
    pipe = pipeline(**settings)
    (second,) = pipe(story, max_new_tokens=2, do_sample=False)
    assert second.generated_text == first.generated_text and second.num_cached_tokens > 32
    del pipe
    files, _ = open_tiers(EngineConfig.from_settings(settings).cache)
    assert files is not None
    files.close()


# --- what cannot be honoured ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_memory_tier": "4"}, "such as 4GiB, not '4'"),
        ({"kv_memory_tier": "0MiB"}, "such as 4GiB"),
        ({"kv_disk_tier": "50GiB"}, "such as /var/cache/kv:50GiB, not '50GiB'"),
        ({"kv_disk_tier": "/tmp/kv:many"}, "the size of kv_disk_tier must be"),
        ({"kv_memory_tier": "1GiB", "enable_prefix_caching": False}, "kv_memory_tier needs enable_prefix_caching"),
    ],
)
def test_settings_that_say_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig.from_settings(settings)


@pytest.mark.parametrize("tier", [MEMORY, {"kv_disk_tier": "/nowhere/kv:1MiB"}], ids=str)
def test_models_without_blocks_that_can_move_are_refused(
    tier: dict[str, str], folder_of: Callable[[str], str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="recurrent state"):
        load_model(EngineConfig.from_settings({"model": folder_of("lfm2"), **SMALL, **tier}))
    tiny_encoders.save(tmp_path)
    with pytest.raises(ConfigError, match=f"{next(iter(tier))} cannot be set"):
        Engine.load(EngineConfig.from_settings({"model": str(tmp_path), **tier}))
    with pytest.raises(ConfigError, match="RaggedEngine"):
        RaggedEngine.load(EngineConfig.from_settings(tier))


def test_a_tier_that_is_too_small_is_refused(folder_of: Callable[[str], str], engines: list[Engine]) -> None:
    with pytest.raises(ConfigError, match="too small for blocks of"):
        make(engines, 4, model=folder_of("llama-gqa"), **SMALL, kv_memory_tier="0.01MiB")


def test_a_folder_has_one_server_and_a_secret_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitfuse.engine.tier_files.LOCK_SECONDS", 0.0)
    cache = EngineConfig.from_settings({"kv_disk_tier": f"{tmp_path}/kv:1MiB"}).cache
    files, key = open_tiers(cache)
    assert files is not None
    with pytest.raises(ConfigError, match="used by another server"):
        open_tiers(cache)
    files.close()
    again, same = open_tiers(cache)
    assert again is not None and same == key
    again.close()
    for name, mode in (("key", 0o644), ("blocks", 0o660)):
        (tmp_path / "kv" / name).chmod(mode)
        with pytest.raises(ConfigError, match=f"others may read .*/{name}, .* set its mode to 600"):
            open_tiers(cache)
        (tmp_path / "kv" / name).chmod(0o600)
    (tmp_path / "kv").chmod(0o777)
    with pytest.raises(ConfigError, match=r"others may write to .* set its mode to 700"):
        open_tiers(cache)
    (tmp_path / "kv").chmod(0o755)
    (tmp_path / "kv" / "blocks").rename(tmp_path / "elsewhere")
    (tmp_path / "kv" / "blocks").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="cannot be used"):
        open_tiers(cache)
    (tmp_path / "kv" / "blocks").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("os.geteuid", lambda: 1 + os.getuid())
        with pytest.raises(ConfigError, match="belongs to another user"):
            open_tiers(cache)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be used"):
        open_tiers(EngineConfig.from_settings({"kv_disk_tier": f"{tmp_path}/file/kv:1MiB"}).cache)
