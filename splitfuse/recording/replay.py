"""Runs the steps of a recording again, and compares what they give with what they gave, bit for bit.

    recording = Recording.open(Path("server.rec"))
    report = replay(recording, load(recording, config_of(recording)))
    print(report.difference or "equal")

Plans are those of the file, so the scheduler has no part in it. Keys, values and states that were computed before the
file began are computed first, from the tokens: equal bits whatever the chunks make that exact.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, zip_longest
from typing import Any

import msgspec

from splitfuse.config.engine import EngineConfig, change_settings
from splitfuse.config.values import parse_adapter
from splitfuse.core.limits import EngineLimits, ceil_div, check_token_ids
from splitfuse.core.plan import ZERO_STATE, Chunk, ChunkResult, SamplingState, StateSlots, StepPlan, StepResult
from splitfuse.core.sampling_params import MAX_SEED
from splitfuse.engine.guard import check_process
from splitfuse.engine.trace import PLAIN, ChunkDetail, ChunkTrace, FinishTrace, PreemptTrace, RequestTrace, StepTrace
from splitfuse.errors import ConfigError, InvalidRequestError, RecordingError
from splitfuse.models.encoder.spec import is_encoder
from splitfuse.recording.format import EngineEnd, EngineStart, Recording, Records, Tables
from splitfuse.runtime.encoding import EncoderExecutor, LoadedEncoder, encoder_settings, load_encoder
from splitfuse.runtime.executor import Executor
from splitfuse.runtime.loading import LoadedModel, load_model, open_source

NOT_REPLAYED = (
    *("ttft", "itl", "tpot", "enable_slo", "tail_share", "kv_cache_memory_gib", "num_threads"),
    *("draft_model", "num_speculative_tokens"),
)
"""Settings that change nothing in a replay, which has the plans already, and the threads of this machine."""
OF_THE_MACHINE = ("kernels", "device")
"""Parts of an identity that a replay may have otherwise: then it shows whether they change bits."""


@dataclass
class Contents:
    """Sums up a recording."""

    engines: dict[int, EngineStart] = field(default_factory=dict)
    """First start of each engine, by its index."""
    adapters: dict[str, str] = field(default_factory=dict)
    """Names of the LoRA adapters that requests have, by digest."""
    num_blocks: int = 0
    num_states: int = 0
    num_steps: int = 0
    num_requests: int = 0
    first_time: float = 0.0
    last_time: float = 0.0

    @classmethod
    def of(cls, recording: Recording) -> Contents:
        """Read a recording once. Raises RecordingError if no engine has started in it."""
        found, used, names = cls(), set[str](), dict[str, str]()
        found.first_time = found.last_time = recording.header.monotonic
        for frame in recording.frames():
            if isinstance(frame, EngineStart):
                found.engines.setdefault(frame.engine, frame)
                names |= {digest: name for name, digest in frame.adapters.items()}
            elif isinstance(frame, Tables):
                blocks = [block for table in frame.tables.values() for block in table]
                found.num_blocks = max(found.num_blocks, *(block + 1 for block in blocks), 0)
            elif isinstance(frame, Records):
                for record in frame.records:
                    if isinstance(record, RequestTrace) and record.detail is not None:
                        found.num_requests += 1
                        used |= {record.detail.adapter} - {""}
                    elif isinstance(record, StepTrace):
                        found.num_steps += 1
                        found.last_time = record.end_time
                        for chunk in record.chunks:
                            if chunk.detail is not None:
                                found._count(chunk.detail)
        if not found.engines:
            raise RecordingError(f"{recording.path} has nothing to replay: no engine was ready in it")
        found.adapters = {digest: names.get(digest, "") for digest in used}
        return found

    def _count(self, detail: ChunkDetail) -> None:
        self.num_blocks = max(self.num_blocks, *(block + 1 for block in detail.blocks), 0)
        if detail.state is not None:
            read, write, kept = detail.state
            self.num_states = max(self.num_states, read + 1, write + 1, *(slot + 1 for _, slot in kept))


def config_of(recording: Recording, changes: Mapping[str, Any]) -> EngineConfig:
    """Return the settings with which a recording is replayed. `changes` win: another folder of the model, for example.

    Raises ConfigError, ModelError, RecordingError.
    """
    start = next((frame for frame in recording.frames() if isinstance(frame, EngineStart)), None)
    if start is None:
        raise RecordingError(f"{recording.path} has nothing to replay: no engine was ready in it")
    settings = {name: value for name, value in recording.header.settings.items() if name not in NOT_REPLAYED}
    config = EngineConfig.from_settings(change_settings(settings, changes))
    limits = start.limits
    if config.cache.block_size != limits.block_size and "block_size" in changes:
        raise ConfigError(
            f"block_size {config.cache.block_size} cannot be replayed: the steps of {recording.path} are for blocks of "
            f"{limits.block_size} tokens; leave it out"
        )
    resolved = {"max_model_len": limits.max_model_len, "block_size": limits.block_size}
    if not is_encoder(open_source(config)):
        resolved["num_blocks"] = limits.num_blocks
    return EngineConfig.from_settings(change_settings({**settings, **resolved}, changes))


@dataclass
class ReplayModel:
    """Holds a model that recordings can be replayed on, with its LoRA adapters."""

    model: LoadedModel | LoadedEncoder
    executor: Executor | EncoderExecutor
    limits: EngineLimits
    num_states: int
    budget: int
    """Tokens that are computed at a time of what a file does not have."""


def load(recording: Recording, config: EngineConfig) -> ReplayModel:
    """Load the model of `config`, with as much of a cache as the recording uses, and its adapters.

    Raises ModelError, MemoryPlanError, ConfigError, and RecordingError if an adapter of the recording is missing.
    """
    check_process()
    contents, source = Contents.of(recording), open_source(config)
    model: LoadedModel | LoadedEncoder
    if is_encoder(source):
        model = load_encoder(encoder_settings(config), source)
    else:
        model = load_model(config, source)
        if contents.num_blocks > (most := model.plan.num_blocks):
            raise RecordingError(
                f"{recording.path} uses the KV block {contents.num_blocks - 1}, but the cache has only {most}"
            )
        if contents.num_states > (most := model.plan.num_states):
            what = f"has memory for only {most}" if most else "has none"
            raise RecordingError(
                f"{recording.path} uses the recurrent state {contents.num_states - 1}, but here {what}"
            )
        num_states = contents.num_states + 1 if model.plan.num_states else 0  # one for what is computed first
        model = replace(model, plan=replace(model.plan, num_blocks=max(contents.num_blocks, 1), num_states=num_states))
    executor, plan = model.make_executor(), model.plan
    for _, path in map(parse_adapter, config.model.lora):
        digest, adapter = model.load_adapter(path)
        executor.adapters[digest] = adapter
    if missing := contents.adapters.keys() - executor.adapters.keys():
        named = ", ".join(sorted(f"{digest} ({contents.adapters[digest] or 'no name'})" for digest in missing))
        raise RecordingError(f"{recording.path} has requests with LoRA adapters that are not given as lora: {named}")
    limits = EngineLimits(
        *(plan.max_model_len, model.spec.vocab_size, plan.num_blocks, plan.block_size),
        generates=isinstance(model, LoadedModel),
    )
    return ReplayModel(model, executor, limits, plan.num_states, plan.max_num_batched_tokens)


def compare_identity(recording: Recording, model: LoadedModel | LoadedEncoder, *, force: bool = False) -> list[str]:
    """Return what a replay has otherwise than the recording, as texts. Raises RecordingError for more than the machine
    unless `force`.
    """
    starts = [frame for frame in recording.frames() if isinstance(frame, EngineStart)]
    found = {
        name: f"{name}: recorded {recorded.get(name)!r}, here {model.identity.get(name)!r}"
        for recorded in (start.identity for start in starts)
        for name in sorted({*recorded, *model.identity})
        if recorded.get(name) != model.identity.get(name)
    }
    if not force and (wrong := [text for name, text in found.items() if name not in OF_THE_MACHINE]):
        raise RecordingError(f"{recording.path} was recorded with another {'; another '.join(wrong)}; --force replays")
    return list(found.values())


@dataclass(frozen=True)
class Mismatch:
    """Names the first thing that a step gave otherwise than it was recorded."""

    engine: int
    step: int
    request_id: str
    position: int
    """Position of the token, prompt included."""
    what: str
    expected: Any
    got: Any
    num_requests: int
    """Number of requests of this step which have something that differs."""
    kernels: str

    def __str__(self) -> str:
        """Return a sentence for people."""
        others = f"; {self.num_requests} requests of this step differ" if self.num_requests > 1 else ""
        return (
            f"step {self.step} of engine {self.engine}, request {self.request_id}, position {self.position}: "
            f"{self.what} {self.got} in place of {self.expected}{others} (kernels: {self.kernels})"
        )


@dataclass
class ReplayReport:
    """Counts what was replayed: up to the first step that differs, or all of it."""

    num_engines: int = 0
    num_steps: int = 0
    """Steps that are equal to the last bit."""
    num_different_steps: int = 0
    num_requests: int = 0
    num_tokens: int = 0
    num_different_tokens: int = 0
    num_logprobs: int = 0
    num_different_logprobs: int = 0
    logprob_error: float = 0.0
    """Largest difference between two log-probabilities of the same token."""
    num_values: int = 0
    num_computed_first: int = 0
    """Tokens whose keys, values and states the file did not have."""
    seconds: float = 0.0
    difference: Mismatch | None = None
    """First difference."""
    fault: str = ""
    """What is wrong with the end of the file."""

    def count_differences(self, traced: ChunkTrace, got: ChunkResult) -> None:
        """Count what a chunk gave otherwise than it was recorded."""
        detail = _detail(traced)
        self.num_different_tokens += _num_different(traced.token_ids, got.token_ids)
        for recorded, now in ((detail.logprobs, got.logprobs), (detail.prompt_logprobs, got.prompt_logprobs)):
            self.num_different_logprobs += _num_different(recorded, now)
            errors = [
                abs(a.logprob - b.logprob) for a, b in zip(recorded, now, strict=False) if a.token_id == b.token_id
            ]
            self.logprob_error = max(self.logprob_error, *(each for each in errors if math.isfinite(each)), 0.0)


def replay(
    recording: Recording,
    loaded: ReplayModel,
    *,
    keep_going: bool = False,
    on_step: Callable[[], object] = lambda: None,
) -> ReplayReport:
    """Run the steps of a recording again, up to the first that gives something else, or with `keep_going` all of them,
    each with the recorded tokens before it. Raises RecordingError for a file whose steps cannot be those of an engine.
    """
    report, began = ReplayReport(), time.monotonic()
    for engine in sorted(Contents.of(recording).engines):
        report.num_engines += 1
        part = _EngineReplay(loaded, engine, report, keep_going=keep_going)
        for frame in recording.frames():
            if getattr(frame, "engine", None) == engine and not part.has_ended:
                try:
                    part.take(frame, on_step)
                except InvalidRequestError as error:
                    raise RecordingError(f"{recording.path}, before step {part.step + 1}: {error}") from error
        part.reset()
    report.seconds, report.fault = time.monotonic() - began, recording.fault
    return report


@dataclass
class _Request:
    request_id: str
    state: SamplingState
    token_ids: list[int]
    table: list[int] = field(default_factory=list)
    num_known: int = 0
    """Positions of which keys and values are known to be in the cache."""


class _EngineReplay:
    """Replays one engine."""

    def __init__(self, loaded: ReplayModel, engine: int, report: ReplayReport, *, keep_going: bool) -> None:
        self.step = 0
        self._keep_going = keep_going
        self._loaded, self._engine, self._report = loaded, engine, report
        self._executor, self._limits = loaded.executor, loaded.limits
        self._requests: dict[int, _Request] = {}
        self._sent: set[str] = set()
        self._retired: list[str] = []
        self._has_cache = isinstance(loaded.executor, Executor)
        self._numbers = 0
        self.reset()

    def reset(self) -> None:
        """Forget all requests and what is in the cache."""
        for number in list(self._requests):
            self._forget(number)
        self._known = bytearray(self._limits.num_blocks * self._limits.block_size if self._has_cache else 0)
        self._known_states: set[int] = set()

    def take(self, frame: Any, on_step: Callable[[], object]) -> None:
        """Replay a frame."""
        match frame:
            case EngineStart() | EngineEnd():
                self.reset()
            case Tables():
                for number, table in frame.tables.items():
                    self._request(number).table[:] = self._checked(table)
            case Records():
                for record in frame.records:
                    match record:
                        case RequestTrace():
                            self._add(record)
                        case StepTrace():
                            self._step(record)
                            on_step()
                            if self.has_ended:
                                return
                        case PreemptTrace():
                            request = self._request(record.number)
                            request.table.clear()
                            request.num_known = 0
                        case FinishTrace():
                            self._forget(record.number)

    @property
    def has_ended(self) -> bool:
        """Return whether nothing more is replayed, since a step differs."""
        return self._report.difference is not None and not self._keep_going

    def _request(self, number: int) -> _Request:
        if (request := self._requests.get(number)) is None:
            raise InvalidRequestError(f"there is no unfinished request of the number {number}")
        return request

    def _forget(self, number: int) -> None:
        request = self._requests.pop(number, None)
        if request is not None:
            self._retire(request.state.request_id)

    def _retire(self, request_id: str) -> None:
        """Let the executor forget a request; if it goes on, it is sent again with the recorded tokens."""
        if request_id in self._sent:
            self._sent.remove(request_id)
            self._retired.append(request_id)

    def _add(self, record: RequestTrace) -> None:
        detail, vocab_size = record.detail, self._limits.vocab_size
        if detail is None or record.number in self._requests:
            what = "has no prompt and parameters" if detail is None else "is there twice"
            raise InvalidRequestError(f"the request {record.request_id!r:.80} {what}")
        roomy = replace(self._limits, num_blocks=2**31)  # the prompt alone may be in the file, not yet its blocks
        roomy.check(detail.prompt_token_ids, detail.params, detail.pooling)
        check_token_ids("an answer", detail.output_token_ids, vocab_size)
        check_token_ids("eos_token_ids", detail.eos_token_ids, vocab_size)
        if not 0 <= detail.seed <= MAX_SEED or record.choice < 0:
            raise InvalidRequestError(f"the seed {detail.seed} or the choice {record.choice} is out of range")
        if detail.adapter and detail.adapter not in self._executor.adapters:
            raise InvalidRequestError(f"there is no adapter {detail.adapter!r:.80}")
        self._numbers += 1
        state = SamplingState(
            *(str(self._numbers), detail.prompt_token_ids, detail.params, detail.eos_token_ids),
            *(detail.seed, record.choice, list(detail.output_token_ids), detail.pooling),
            adapter=detail.adapter,
        )
        tokens = [*detail.prompt_token_ids, *detail.output_token_ids]
        self._requests[record.number] = _Request(record.request_id, state, tokens)
        self._report.num_requests += 1

    def _step(self, record: StepTrace) -> None:
        self.step = record.step
        planned: dict[str, tuple[_Request, ChunkTrace]] = {}
        chunks = []
        for traced in record.chunks:
            request = self._request(traced.number)
            chunk = self._chunk(request, traced)
            if chunk.request_id in planned:
                raise InvalidRequestError(f"the request {request.request_id!r:.80} is in the step {record.step} twice")
            planned[chunk.request_id] = request, traced
            if not _detail(traced).state_lost:  # what it has computed was lost, too
                chunks.append(chunk)
        for chunk in chunks:
            self._compute_unknown(planned[chunk.request_id][0], chunk)
        result = self._compute(chunks, planned, record)
        self._compare(record, chunks, planned, result)
        for chunk in chunks:
            request, traced = planned[chunk.request_id]
            check_token_ids("an answer", traced.token_ids, self._limits.vocab_size)
            request.token_ids += traced.token_ids
            self._note_written(request, chunk, num_right=max(len(traced.token_ids) - 1, 0))

    def _chunk(self, request: _Request, traced: ChunkTrace) -> Chunk:
        """Return the chunk as it was planned. Raises InvalidRequestError for one that cannot have been."""
        detail, limits, start = _detail(traced), self._limits, traced.start
        end = start + traced.num_tokens
        table, state, drafts = request.table, detail.state, detail.drafts
        num_known = len(request.token_ids)
        if not 0 <= detail.first_block <= len(table):
            raise InvalidRequestError(f"the block table of the request {request.request_id!r:.80} has a gap")
        if detail.blocks:
            table[detail.first_block :] = self._checked(detail.blocks)
        is_valid = (
            0 <= start < end - len(drafts) <= num_known
            and end <= limits.max_model_len
            and detail.samples + len(drafts) <= detail.num_logits <= traced.num_tokens
            and (not drafts or (detail.samples and end - len(drafts) == num_known and state is None))
            and len(traced.token_ids) <= 1 + len(drafts)
            and len(table) >= ceil_div(end, limits.block_size)
            and (state is None) == (self._loaded.num_states == 0)
            and (state is None or _is_valid(state, start, end, self._loaded.num_states - 1))
        )
        if not is_valid:
            where = f"the chunk of {traced.num_tokens} tokens from {start} on"
            raise InvalidRequestError(f"{where} of the request {request.request_id!r:.80} cannot be computed")
        check_token_ids("a chunk", drafts, limits.vocab_size)
        ids = (*request.token_ids[start : end - len(drafts)], *drafts)
        return Chunk(
            *(request.state.request_id, start, ids, tuple(table), detail.num_logits, detail.samples, state),
            num_drafts=len(drafts),
        )

    def _checked(self, blocks: Sequence[int]) -> Sequence[int]:
        """Return blocks of a table. Raises InvalidRequestError if the cache does not have them."""
        if self._has_cache and not all(0 <= block < self._limits.num_blocks for block in blocks):
            raise InvalidRequestError(f"a block table has blocks that are not from 0 to {self._limits.num_blocks - 1}")
        return blocks

    def _compute_unknown(self, request: _Request, chunk: Chunk) -> None:
        """Compute what the chunk reads and the file does not have."""
        if not self._has_cache:
            return
        size, table = self._limits.block_size, chunk.block_table
        unknown = [
            position
            for position in range(request.num_known, chunk.start)
            if not self._known[table[position // size] * size + position % size]
        ]
        if chunk.state is not None:
            read = chunk.state.read
            if read == ZERO_STATE or (not unknown and read in self._known_states):
                return
            slot = self._loaded.num_states - 1 if read in self._known_states else read
            unknown = list(range(chunk.start))
        for start, end in _runs(unknown, self._loaded.budget):
            state = None
            if chunk.state is not None:
                state = StateSlots(slot if start else ZERO_STATE, slot)
            ids = tuple(request.token_ids[start:end])
            first = Chunk(chunk.request_id, start, ids, table, 0, samples=False, state=state)
            self._execute((first,), self.step, self._loaded.budget)
            self._note_written(request, first)
            self._report.num_computed_first += end - start

    def _note_written(self, request: _Request, chunk: Chunk, *, num_right: int = 0) -> None:
        """Note what a chunk has computed, with as many of its drafts as were right."""
        if self._has_cache:
            size, table = self._limits.block_size, chunk.block_table
            end = chunk.end - chunk.num_drafts + num_right
            for position in range(chunk.start, end):
                self._known[table[position // size] * size + position % size] = 1
            if chunk.start <= request.num_known:
                request.num_known = max(request.num_known, end)
            if chunk.state is not None:
                self._known_states |= {chunk.state.write, *(slot for _, slot in chunk.state.kept)}

    def _compute(
        self, chunks: Sequence[Chunk], planned: Mapping[str, tuple[_Request, ChunkTrace]], record: StepTrace
    ) -> StepResult:
        """Return the result of a step; if it raises, without the chunks that have failed in the recording."""
        try:
            return self._execute(chunks, record.step, record.token_budget)
        except Exception as error:
            failed = ChunkResult(error=f"the forward step failed: {error!r}")
            others = [chunk for chunk in chunks if planned[chunk.request_id][1].error is None]
            if len(others) == len(chunks):
                return {chunk.request_id: failed for chunk in chunks}
        return {chunk.request_id: failed for chunk in chunks} | self._compute(others, planned, record)

    def _execute(self, chunks: Sequence[Chunk], step: int, budget: int) -> StepResult:
        if not chunks:
            return {}
        ids = {chunk.request_id for chunk in chunks}
        states = [request.state for request in self._requests.values() if request.state.request_id in ids - self._sent]
        for state in states:  # as many as were chosen until now: its first chunk may have been lost
            request = next(each for each in self._requests.values() if each.state is state)
            state.output_token_ids[:] = request.token_ids[len(state.prompt_token_ids) :]
        plan = StepPlan(step, budget, tuple(chunks), tuple(states), tuple(self._retired))
        self._retired.clear()
        self._sent |= ids
        return self._executor.collect(self._executor.submit(plan))

    def _compare(
        self,
        record: StepTrace,
        chunks: Sequence[Chunk],
        planned: Mapping[str, tuple[_Request, ChunkTrace]],
        result: StepResult,
    ) -> None:
        report, found = self._report, []
        for chunk in chunks:
            request, traced = planned[chunk.request_id]
            got = result[chunk.request_id]
            if first := next(_differences(chunk, traced, got), None):
                found.append((request, first))
                report.count_differences(traced, got)
                if got.token_ids != traced.token_ids:
                    self._retire(chunk.request_id)
            report.num_tokens += len(traced.token_ids)
            report.num_logprobs += len(_detail(traced).logprobs) + len(_detail(traced).prompt_logprobs)
            report.num_values += len(_detail(traced).values)
        if found:
            report.num_different_steps += 1
            request, (what, position, expected, value) = found[0]
            report.difference = report.difference or Mismatch(
                *(self._engine, record.step, request.request_id, position, what, expected, value, len(found)),
                kernels=self._loaded.model.identity["kernels"],
            )
        else:
            report.num_steps += 1


def _detail(traced: ChunkTrace) -> ChunkDetail:
    return traced.detail or PLAIN


def _num_different(recorded: Sequence[Any], now: Sequence[Any]) -> int:
    return sum(_bits(a) != _bits(b) for a, b in zip_longest(recorded, now))


def _is_valid(state: StateSlots, start: int, end: int, num_states: int) -> bool:
    """Return whether a chunk can have these slots; the last one of the cache is not of the recording."""
    ends = [start, *(position for position, _ in state.kept), end]
    slots = [state.write, *(slot for _, slot in state.kept)]
    return (
        ZERO_STATE <= state.read < num_states
        and (state.read == ZERO_STATE) == (start == 0)
        and all(0 <= slot < num_states for slot in slots)
        and all(before < after for before, after in pairwise(ends))
    )


def _runs(positions: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Yield runs of neighbours, each as its first and the one after its last, of at most `most`."""
    start = 0
    for index in range(1, len(positions) + 1):
        is_end = index == len(positions) or positions[index] != positions[index - 1] + 1
        if is_end or index - start == most:
            yield positions[start], positions[index - 1] + 1
            start = index


def _differences(chunk: Chunk, traced: ChunkTrace, got: ChunkResult) -> Iterator[tuple[str, int, Any, Any]]:
    """Yield what differs, its position, what is expected, and what a chunk gave."""
    detail, end = _detail(traced), chunk.end - chunk.num_drafts
    if (traced.error is None) != (got.error is None):
        yield "error", end, traced.error, got.error
    if traced.error is not None:
        return
    first = end - chunk.num_logits + 1
    for what, position, expected, given in (
        ("token", end, traced.token_ids, got.token_ids),
        ("log-probability", end, detail.logprobs, got.logprobs),
        ("prompt log-probability", first, detail.prompt_logprobs, got.prompt_logprobs),
        ("value", 0, detail.values, got.values),
        ("is_complete", end, (detail.is_complete,), (got.is_complete,)),
    ):
        if _bits(expected) != _bits(given):
            pairs = zip_longest(expected, given)
            index, (wanted, value) = next((i, pair) for i, pair in enumerate(pairs) if _bits(pair[0]) != _bits(pair[1]))
            yield what, position + index, wanted, value


_bits = msgspec.msgpack.Encoder().encode  # == takes 0.0 for -0.0, and no NaN for itself
