"""A recording replayed: equal bits for any load and from any file of a rotation, and the first step that differs."""

import math
import shutil
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
import tiny_encoders
import tiny_models
from backends import why_not
from forced_preemption import break_steps, force_preemptions
from recorded_engine import SMALL, RecordedEngine, config_of, recorded
from safetensors.torch import load_file, save_file
from tiny_adapters import ATTENTION, module_shapes, save_adapter

from splitfuse.core.plan import ZERO_STATE, Chunk, ChunkResult, StateSlots, TokenLogprob
from splitfuse.core.pooling_params import NOTHING_GENERATED, PoolingParams
from splitfuse.core.reasoning import Reasoning
from splitfuse.core.request_output import FinishReason
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.speculation import drafting
from splitfuse.core.structured_outputs import StructuredOutputs
from splitfuse.engine.messages import Add, Finish
from splitfuse.engine.trace import ChunkDetail, ChunkTrace, FinishTrace, PreemptTrace, RequestTrace, StepTrace
from splitfuse.errors import ConfigError, RecordingError
from splitfuse.kernels.cpu.library import VARIANTS
from splitfuse.kernels.reference import ReferenceBackend
from splitfuse.recording import replay as replay_module
from splitfuse.recording.format import Frame, Recording, Records, encode_frame
from splitfuse.recording.replay import ReplayReport, compare_identity, load, replay
from splitfuse.recording.requests import read_requests
from splitfuse.runtime.executor import Executor
from splitfuse.text.grammar import compile_structured_outputs

EQUAL_BITS = pytest.mark.skipif(all(map(why_not, VARIANTS)), reason="the C++ kernels cannot be used here")
SMALL_FILES = 4 * 24_000 / 2**20


@dataclass(frozen=True)
class Case:
    """A kind of model, and what its requests may ask for."""

    save: Callable[[Path], object] | None = None
    settings: dict[str, Any] | None = None
    generates: bool = True
    speaks: bool = False
    """Whether it has a tokenizer, which forms of answers need."""
    adapts: bool = False
    plans_ahead: bool = False


CASES = {
    "bundled": Case(speaks=True),
    "planned ahead": Case(speaks=True, plans_ahead=True),
    "int8": Case(settings={"quantization": "int8", "kv_cache_dtype": "int8"}),
    "drafts": Case(settings={"num_speculative_tokens": 5}, speaks=True),
    "lora": Case(lambda folder: tiny_models.save("llama-gqa", folder), {"dtype": "bfloat16"}, adapts=True),
    "qwen3.5": Case(lambda folder: tiny_models.save("qwen3.5", folder), {"dtype": "bfloat16"}),
    "granite-hybrid": Case(lambda folder: tiny_models.save("granite-hybrid", folder), {"dtype": "bfloat16"}),
    "encoder": Case(tiny_encoders.save, {}, generates=False),
}


def request(rng: Random, case: Case, name: str, vocab_size: int, prompts: list[list[int]], digest: str) -> list[Add]:
    """A request of any kind, one message for each of its choices."""
    prompt = (*rng.choice(prompts), *(rng.randrange(5, vocab_size) for _ in range(rng.randrange(1, 20))))
    if not case.generates or rng.random() < 0.1:
        pooling = PoolingParams(() if not case.generates or rng.random() < 0.5 else (5, 6))
        return [Add(name, prompt, NOTHING_GENERATED, pooling=pooling)]
    seed = rng.getrandbits(32)
    params = SamplingParams(
        max_tokens=rng.randrange(1, 20),
        temperature=rng.choice((0.0, 1.0)),
        top_k=rng.choice((0, 20)),
        repetition_penalty=rng.choice((1.0, 1.2)),
        min_tokens=rng.randrange(2),
        logprobs=rng.choice((None, 0, 2)),
        prompt_logprobs=rng.choice((None, None, None, 1)),
    )
    if case.speaks and rng.random() < 0.5:
        if rng.random() < 0.7:
            form = compile_structured_outputs(StructuredOutputs.of({"regex": "([a-d]{2} ){1,9}!"}))
            params = replace(params, structured_outputs=form)
        if rng.random() < 0.7:
            reasoning = Reasoning(start_token_ids=(1,), end_token_ids=(2,), is_open=True, max_tokens=rng.randrange(9))
            params = replace(params, reasoning=reasoning)
    adapter = digest if rng.random() < 0.5 else ""
    choices = range(rng.choice((1, 1, 3)))
    return [Add(f"{name}-{n}", prompt, params, choice=n, adapter=adapter, seed=seed) for n in choices]


def drive(engine: RecordedEngine, case: Case, rng: Random, *, num_requests: int = 18, digest: str = "") -> None:
    """Send requests of all kinds, some of which are given up."""
    vocab_size = engine.engine.limits.vocab_size
    lengths = (0, 34, 65, 85) if case.generates else (0, 9, 30)
    prompts = [[rng.randrange(5, vocab_size) for _ in range(length)] for length in lengths]
    if case.generates:  # what it generates is drafted, whatever the model says
        same = SamplingParams(max_tokens=19, ignore_eos=True, logit_bias={7: 100.0})
        engine.engine.add(Add("same", (5, 6, 7), same))
    sent = 0
    while sent < num_requests or engine.engine.has_unfinished:
        if sent < num_requests and rng.random() < 0.5:
            for each in request(rng, case, str(sent), vocab_size, prompts, digest):
                engine.engine.limits.check(each.prompt_token_ids, each.params, each.pooling)
                engine.engine.add(each)
            sent += 1
        engine.step()
        running = [each for each in engine.engine.scheduler.queue.running if each.request_id != "same"]
        if running and rng.random() < 0.12:
            given_up = rng.choice(running)
            kept = max(len(given_up.output_token_ids) - 1, 0)
            reason = rng.choice((FinishReason.ABORT, FinishReason.STOP))
            engine.engine.finish(Finish(given_up.request_id, reason, kept))


def frames_of(path: Path, kind: type[Any]) -> list[Any]:
    frames = Recording.open(path).frames()
    return [each for frame in frames if isinstance(frame, Records) for each in frame.records if isinstance(each, kind)]


def replayed(path: Path, *, keep_going: bool = False, **changes: Any) -> ReplayReport:
    recording = Recording.open(path)
    loaded = load(recording, replay_module.config_of(recording, changes))
    return replay(recording, loaded, keep_going=keep_going)


@EQUAL_BITS
@pytest.mark.parametrize("name", CASES)
def test_any_load_is_replayed_to_the_last_bit_from_any_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drafting, "WORTH", 0.0)  # drafts whatever steps take
    case, folder, lora = CASES[name], None, ()
    settings: dict[str, Any] = {"max_num_batched_tokens": 48, **(case.settings or {})}
    if case.save is not None:
        folder = tmp_path / "model"
        folder.mkdir()
        case.save(folder)
    if case.adapts:
        assert folder is not None
        shapes = module_shapes(load_file(folder / "model.safetensors"), ATTENTION)
        settings["lora"] = lora = (f"sql={save_adapter(tmp_path / 'adapter', shapes)}",)
    if case.generates:
        settings |= {"num_blocks": 14, "block_size": 32}
    path = tmp_path / "load.rec"
    with recorded(path, config_of(folder, **settings), max_mib=SMALL_FILES) as engine:
        digest = engine.engine.adapters.get("sql", "")
        force_preemptions(engine.engine)
        engine.engine.executor.keeps_plans = case.plans_ahead
        drive(engine, case, Random(7), digest=digest)
    files = [path.with_name(f"load.rec.{n}") for n in (3, 2, 1) if path.with_name(f"load.rec.{n}").exists()]
    num_first = num_drafts = 0
    for file in (*files, path):
        report = replayed(file, **({"lora": lora} if lora else {}))
        assert report.difference is None and report.fault == ""
        assert report.num_steps == len(frames_of(file, StepTrace))
        num_first += report.num_computed_first
        num_drafts += sum(chunk.num_drafts for step in frames_of(file, StepTrace) for chunk in step.chunks)
    assert (num_drafts > 5) is (name == "drafts")
    if case.generates:
        assert frames_of(path, PreemptTrace) + [each for file in files for each in frames_of(file, PreemptTrace)]
        assert len(files) >= 1 and num_first > 0
        reasons = {each.reason for file in (*files, path) for each in frames_of(file, FinishTrace)}
        assert {FinishReason.ABORT, FinishReason.LENGTH} <= reasons


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    tiny_models.save("llama-gqa", path)
    return path


RARE = 50
"""Token that only the prompt of one request has."""


@pytest.fixture(scope="module")
def path(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording of two requests, the second of which comes later and has the rare token."""
    path = tmp_path_factory.mktemp("recording") / "two.rec"
    with recorded(path, config_of(folder, **SMALL, max_num_batched_tokens=8)) as engine:
        never = SamplingParams(max_tokens=12, logit_bias={RARE: -100.0}, logprobs=0)
        engine.engine.add_request("a", range(3, 13), never)
        for _ in range(4):
            engine.step()
        engine.engine.add_request("b", (3, 4, RARE, *range(5, 15)), never)
        engine.run()
    return path


def first_choice(path: Path, number: int) -> tuple[int, int]:
    """The step in which a request gets its first token, and the token's position."""
    for step in frames_of(path, StepTrace):
        for chunk in step.chunks:
            if chunk.number == number and chunk.token_ids:
                return step.step, chunk.start + chunk.num_tokens
    raise AssertionError("it never came")


def test_a_changed_weight_is_found_at_the_first_step_that_has_it(folder: Path, path: Path, tmp_path: Path) -> None:
    assert replayed(path).difference is None
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    weights = load_file(changed / "model.safetensors")
    weights["model.embed_tokens.weight"][RARE] *= 1.01
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    report = replayed(path, model=str(changed))
    assert report.difference is not None and report.difference.request_id == "b"
    assert (report.difference.step, report.difference.position) == first_choice(path, 1)
    assert report.num_steps == first_choice(path, 1)[0] - frames_of(path, StepTrace)[0].step
    assert f"step {report.difference.step} of engine 0, request b, position 13: " in str(report.difference)
    recording = Recording.open(path)
    other = load(recording, replay_module.config_of(recording, {"model": str(changed)})).model
    with pytest.raises(RecordingError, match=r"was recorded with another model: recorded '.*', here '.*'; --force"):
        compare_identity(recording, other)
    assert [text[:6] for text in compare_identity(recording, other, force=True)] == ["model:"]


def test_a_changed_constant_of_a_kernel_is_found_and_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norm = ReferenceBackend.norm
    monkeypatch.setattr(
        ReferenceBackend, "norm", lambda self, x, spec, *rest: norm(self, x, replace(spec, eps=2 * spec.eps), *rest)
    )
    difference = replayed(path).difference
    assert difference is not None and difference.request_id == "a" and "reference kernels" in difference.kernels
    assert (difference.step, difference.position) == first_choice(path, 0)
    assert difference.what == "log-probability" and difference.expected.token_id == difference.got.token_id


def test_a_replay_that_keeps_going_has_the_recorded_tokens(
    path: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    weights = load_file(changed / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"].roll(1, 0)  # which chooses another token each time
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    compute, checked = Executor._compute, []

    def check(self: Executor, chunks: Sequence[Chunk]) -> dict[str, ChunkResult]:
        for chunk in chunks:
            state = self.requests[chunk.request_id].state
            tokens = [*state.prompt_token_ids, *state.output_token_ids]
            checked.append(tuple(tokens[chunk.start : chunk.end]) == chunk.token_ids)
        return compute(self, chunks)

    monkeypatch.setattr(Executor, "_compute", check)
    first, report = replayed(path, model=str(changed)), replayed(path, keep_going=True, model=str(changed))
    assert report.difference == first.difference is not None
    choices = sum(any(chunk.token_ids for chunk in step.chunks) for step in frames_of(path, StepTrace))
    assert (first.num_different_steps, report.num_different_steps) == (1, choices)
    assert report.num_steps + choices == len(frames_of(path, StepTrace))
    assert report.num_different_tokens == report.num_different_logprobs == report.num_tokens == 24
    assert all(checked)


@pytest.mark.skipif(
    any(map(why_not, VARIANTS)), reason="this CPU does not have all instruction sets, or there are no C++ kernels"
)
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_both_instruction_sets_replay_a_recording(quantization: str | None, tmp_path: Path) -> None:
    settings = {"max_num_batched_tokens": 48, "quantization": quantization, "num_blocks": 14, "block_size": 32}
    path = tmp_path / "load.rec"
    with recorded(path, config_of(None, kernels="avx512", **settings)) as engine:
        drive(engine, CASES["bundled"], Random(7), num_requests=30)
    num_steps = len(frames_of(path, StepTrace))
    for kernels in ("avx512", "avx2"):
        report = replayed(path, keep_going=True, kernels=kernels)
        assert report.num_steps + report.num_different_steps == num_steps and report.fault == ""
        if kernels == "avx512":
            assert report.difference is None
        elif report.difference is None:  # int8 adds up whole numbers, and rounds what else differs away
            assert quantization == "int8"
        else:  # sums of another order: nearly the same numbers, nearly always the same token
            assert "AVX2" in report.difference.kernels
            assert report.num_different_tokens <= 0.1 * report.num_tokens and report.logprob_error < 0.5


@EQUAL_BITS
@pytest.mark.parametrize("kind", ["llama-gqa", "qwen3.5"])
def test_steps_that_broke_are_replayed_as_they_ended(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_models.save(kind, tmp_path)
    path = tmp_path / "broken.rec"
    config = config_of(tmp_path, dtype="bfloat16", block_size=32, max_num_batched_tokens=16)
    with monkeypatch.context() as patched, recorded(path, config) as engine:
        break_steps(patched)
        for number in range(4):
            engine.engine.add_request(str(number), range(3, 13 + number), SamplingParams(max_tokens=12, logprobs=0))
        engine.run()
    details = [chunk.detail for step in frames_of(path, StepTrace) for chunk in step.chunks]
    assert any(detail.state_lost for detail in details) is (kind == "qwen3.5")
    assert replayed(path).difference is None


def test_an_engine_that_was_restarted_is_replayed_to_its_end(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "restarted.rec"
    config = config_of(folder, **SMALL)
    with recorded(path, config) as first:
        add(first, "lost")
        first.step()
        first.recorder.end_engine(0, "it was killed")
        second = RecordedEngine(first.engine.load(config), first.recorder)
        other = RecordedEngine(first.engine.load(config), first.recorder, index=1)
        for engine in (second, other):
            add(engine, "kept")
        for engine in (second, other, second, other):
            engine.step()
        second.run()
        other.run()
    report = replayed(path)
    assert report.difference is None and report.num_engines == 2
    assert (report.num_requests, report.num_steps) == (3, 9)


def add(engine: RecordedEngine, name: str) -> None:
    engine.engine.add_request(name, (3, 4, 5), SamplingParams(max_tokens=4, ignore_eos=True, logprobs=1))


@pytest.mark.parametrize(("recorded", "given"), [(0.0, -0.0), (math.nan, 0.0), (math.nan, float("nan")), (-0.0, -0.0)])
def test_zeros_and_nans_are_compared_by_their_bits(recorded: float, given: float) -> None:
    chunk = Chunk("a", 0, (3, 4), (0,), 1, samples=False)
    for got in (ChunkResult(values=(1.0, given)), ChunkResult(logprobs=(TokenLogprob(3, 1.0, ((3, given),)),))):
        logprobs = tuple(replace(each, top=((3, recorded),)) for each in got.logprobs)
        values = (1.0, recorded) if got.values else ()
        detail = ChunkDetail(1, False, 0, (0,), None, logprobs, (), values, False)
        found = list(replay_module._differences(chunk, ChunkTrace(0, 0, 2, (), None, detail), got))
        assert len(found) == (struct.pack("d", recorded) != struct.pack("d", given))
        assert not values or not found or found[0][:2] == ("value", 1)


def test_the_size_of_the_cache_can_be_given_otherwise(path: Path) -> None:
    recording = Recording.open(path)
    cache = replay_module.config_of(recording, {"kv_cache_memory_gib": 0.5}).cache
    assert (cache.num_blocks, cache.kv_cache_memory_gib, cache.block_size) == (None, 0.5, 4)
    with pytest.raises(RecordingError, match=r"uses the KV block \d+, but the cache has only 1"):
        replayed(path, num_blocks=1, max_model_len=4)
    with pytest.raises(ConfigError, match=r"block_size 8 cannot be replayed: .* blocks of 4 tokens; leave it out"):
        replay_module.config_of(recording, {"block_size": 8})
    assert replay_module.config_of(recording, {"block_size": 4}).cache.block_size == 4


def test_states_that_need_more_memory_are_refused(tmp_path: Path) -> None:
    tiny_models.save("qwen3.5", tmp_path)
    path, hostile = tmp_path / "states.rec", tmp_path / "hostile.rec"
    with recorded(path, config_of(tmp_path, dtype="bfloat16", block_size=32)) as engine:
        add(engine, "a")
        engine.run()
    step = frames_of(path, StepTrace)[0]
    detail = msgspec.structs.replace(step.chunks[0].detail, state=StateSlots(ZERO_STATE, 2**40))
    chunk = msgspec.structs.replace(step.chunks[0], detail=detail)
    more = Records(0, (msgspec.structs.replace(step, chunks=(chunk,)),))
    hostile.write_bytes(path.read_bytes() + encode_frame(more))
    with pytest.raises(RecordingError, match=rf"uses the recurrent state {2**40}, but here has memory for only \d+"):
        replayed(hostile)


def test_times_and_lengths_of_a_hostile_file_do_no_harm(path: Path) -> None:
    frames = list(Recording.open(path).frames())
    for index, kind, name in ((1, RequestTrace, "sent_time"), (1, StepTrace, "end_time"), (-2, FinishTrace, "time")):
        changed = [*frames]
        frame = changed[index]
        assert isinstance(frame, Records)
        assert any(isinstance(each, kind) for each in frame.records)
        records = [
            msgspec.structs.replace(each, **{name: math.inf}) if isinstance(each, kind) else each  # type: ignore[arg-type]
            for each in frame.records
        ]
        changed[index] = Records(0, tuple(records))
        with pytest.raises(RecordingError, match="a record has the time inf; it must be"):
            read_requests(changed)
    request = read_requests(frames)[0]
    assert request.end is not None and request.num_output_tokens == len(request.token_ids) > 0
    request.end = msgspec.structs.replace(request.end, num_output_tokens=2**62)
    assert request.num_output_tokens == len(request.token_ids)


def test_adapters_that_are_not_given_are_named(folder: Path, tmp_path: Path) -> None:
    shapes = module_shapes(load_file(folder / "model.safetensors"), ATTENTION)
    adapter = save_adapter(tmp_path / "adapter", shapes)
    path = tmp_path / "adapter.rec"
    with recorded(path, config_of(folder, **SMALL, lora=(f"sql={adapter}",))) as engine:
        digest = engine.engine.adapters["sql"]
        engine.engine.add_request("a", (3, 4), SamplingParams(max_tokens=2), adapter=digest)
        engine.run()
    assert str(adapter).encode() not in path.read_bytes()
    with pytest.raises(RecordingError, match=rf"not given as lora: {digest} \(sql\)"):
        replayed(path)
    assert replayed(path, lora=(f"other={adapter}",)).difference is None


def test_impossible_plans_are_errors_of_the_file(path: Path, tmp_path: Path) -> None:
    recording, hostile = Recording.open(path), tmp_path / "hostile.rec"
    loaded = load(recording, replay_module.config_of(recording, {}))
    frames, rng = [msgspec.to_builtins(frame) for frame in recording.frames()], Random(3)
    head = path.read_bytes()[: -sum(len(encode_frame(frame)) for frame in recording.frames())]
    num_refused = 0
    for _ in range(40):
        changed = [*frames]
        index = rng.randrange(1, len(frames))
        changed[index] = mutated(frames[index], rng)
        try:
            content = [encode_frame(msgspec.convert(frame, Frame)) for frame in changed]  # type: ignore[arg-type]
        except msgspec.ValidationError:
            continue
        hostile.write_bytes(head + b"".join(content))
        try:
            replay(Recording.open(hostile), loaded)
        except RecordingError as error:
            num_refused += 1
            assert str(hostile) in str(error)
    assert num_refused > 4


def mutated(value: Any, rng: Random) -> Any:
    """Data with one number or list in it changed."""
    if isinstance(value, list | tuple) and value and rng.random() < 0.95:
        index = rng.randrange(len(value))
        return [*value[:index], mutated(value[index], rng), *value[index + 1 :]]
    if isinstance(value, dict) and value:
        key = rng.choice(list(value))
        return {**value, key: mutated(value[key], rng)}
    if isinstance(value, int | float) and not isinstance(value, bool):
        return rng.choice((0, -1, 1, value + 1, value - 1, 2**31, 2**63, -(2**31), 10**6))
    return rng.choice((value, [], None, 5))
