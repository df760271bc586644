"""Defines the messages between an engine and its client in another thread or process.

Plain data, encoded as MessagePack: a message consists of numbers, texts and lists. The same types cross between threads
unencoded.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import replace

import msgspec

from splitfuse.config.engine import EngineConfig
from splitfuse.core.limits import EngineLimits
from splitfuse.core.pooling_params import PoolingParams
from splitfuse.core.request_output import FinishReason, RequestOutput
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.core.scheduling_options import DEFAULT_SCHEDULING, SchedulingOptions
from splitfuse.core.slo.attainable import Attainable
from splitfuse.core.slo.cost_model import StepTimes
from splitfuse.core.slo.targets import NO_SLO, SloTargets
from splitfuse.engine.trace import TraceLevel, TraceRecord

# To the engine -------------------------------------------------------------------------------------------------------


class ResumePoint(msgspec.Struct, frozen=True):
    """Says what a request has been given by other engines: it goes on behind that, and nothing of it is repeated."""

    token_ids: tuple[int, ...] = ()
    """Tokens that it has generated."""
    token_times: tuple[float, ...] = ()
    """Times at which its client was given each of them, on the machine's monotonic clock: its SLO goes on too."""
    num_prompt_logprobs: int = 0
    """Number of log-probabilities of its prompt that were reported."""


class Loan(msgspec.Struct, frozen=True):
    """Names a loan, of a request whose leading KV blocks another engine holds."""

    number: int
    path: str
    """File of the channel between the two engines."""
    num_blocks: int
    """Blocks that the creditor holds at most: those of whole tiles."""


class Add(msgspec.Struct, frozen=True, tag=True):
    """Adds a request that keeps to the engine's limits. `params.n` is ignored: each choice is a message of its own."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    choice: int = 0
    scheduling: SchedulingOptions = DEFAULT_SCHEDULING
    sent: float | None = None
    """Time at which it was sent, on the machine's monotonic clock."""
    pooling: PoolingParams | None = None
    """Numbers to give in place of tokens; `params` are NOTHING_GENERATED then."""
    adapter: str = ""
    """Digest of the LoRA adapter that the request is computed with; empty: none."""
    seed: int | None = None
    """Seed of its random choices; None: see `settled`."""
    resume_point: ResumePoint | None = None
    """Where the request goes on that another engine has begun; None: it is new."""
    block_sources: tuple[str, ...] = ()
    """Addresses, the best first, where blocks of it may be that the engine lacks: see EngineInfo.block_sources."""
    loan: Loan | None = None
    """Loan without which the engine's cache could not hold it; its creditor is asked at the same time."""
    hands_over: bool = False
    """True if it leaves the engine after its first token: its blocks are laid ready as they are computed."""

    @property
    def settled(self) -> Add:
        """Return the request with a seed: that of its parameters, or a random one; and with an arrival time: now, if it
        has none. What it waits for the step in flight counts to its SLO.
        """
        request = self
        if request.seed is None:
            seed = secrets.randbits(64) if self.params.seed is None else self.params.seed
            request = msgspec.structs.replace(request, seed=seed)
        if request.scheduling.arrival_time is None:
            scheduling = replace(request.scheduling, arrival_time=time.monotonic())
            request = msgspec.structs.replace(request, scheduling=scheduling)
        return request

    def keeps_to(self, limits: EngineLimits) -> bool:
        """Return whether the request, but for what is lent to it, keeps to the limits of an engine."""
        lent = 0 if self.loan is None else self.loan.num_blocks
        if lent != limits.lent_blocks:
            limits = replace(limits, lent_blocks=lent)
        return limits.fits(len(self.prompt_token_ids), self.params)

    @property
    def known_tokens(self) -> tuple[int, ...]:
        """Return the tokens of its prompt, and those that it has generated."""
        return (
            self.prompt_token_ids if self.resume_point is None else self.prompt_token_ids + self.resume_point.token_ids
        )

    @property
    def cache_salt(self) -> str:
        """Return the salt of its cached blocks: what an adapter has computed, no other request can use."""
        salt = self.scheduling.cache_salt
        return f"{salt}/{self.adapter}" if self.adapter else salt


class Finish(msgspec.Struct, frozen=True, tag=True):
    """Ends a request of which no more is wanted, keeping its first `num_tokens` tokens, or all."""

    request_id: str
    reason: FinishReason
    num_tokens: int | None = None
    ended: float | None = None
    """Time at which the client finished it (monotonic clock); None: on receipt."""
    num_there: int | None = None
    """Number of its leading KV blocks that the engine has on which it goes on: those behind them go with it. None: as
    many as were laid ready.
    """


class Lend(msgspec.Struct, frozen=True, tag=True):
    """Asks to hold the leading KV blocks of a request of another engine. The answer is in the channel."""

    loan: Loan


class Export(msgspec.Struct, frozen=True, tag=True):
    """Asks for the first `num_blocks` blocks of a request to be laid ready for another engine, on which it will go on.
    It runs on meanwhile. StepReport.exported tells how far that is.
    """

    request_id: str
    num_blocks: int


class Prefetch(msgspec.Struct, frozen=True, tag=True):
    """Brings full blocks into the prefix cache for a request that will come. Prefetched is the answer."""

    request_id: str
    names: tuple[bytes, ...]
    token_ids: tuple[tuple[int, ...], ...]
    block_sources: tuple[str, ...]
    """Addresses, the best first, where they are: see EngineInfo.block_sources."""


class LoadAdapter(msgspec.Struct, frozen=True, tag=True):
    """Loads a LoRA adapter from a folder, for requests that name its digest."""

    name: str
    path: str


class UnloadAdapter(msgspec.Struct, frozen=True, tag=True):
    """Forgets the adapter of a digest once its last request has ended."""

    digest: str


class SetTracing(msgspec.Struct, frozen=True, tag=True):
    """Sets how much the engine traces, in Traced."""

    level: TraceLevel


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Ends the engine, whatever is unfinished."""


class Heartbeat(msgspec.Struct, frozen=True, tag=True):
    """Tells an engine on another machine that its front lives, and at which time on the front's monotonic clock."""

    sent: float


Command = Add | Finish | Lend | Export | Prefetch | LoadAdapter | UnloadAdapter | SetTracing | Stop | Heartbeat

# From the engine -----------------------------------------------------------------------------------------------------


class Loading(msgspec.Struct, frozen=True, tag=True):
    """Reports that start-up has completed `fraction` of `stage`, from 0 to 1."""

    stage: str
    fraction: float = 0.0
    memory_plan: str = ""
    """Memory plan as it is printed; sent once, before anything is loaded."""


class EngineInfo(msgspec.Struct, frozen=True, tag=True):
    """Reports that the model is loaded, and what does not change while the engine lives."""

    model: str
    limits: EngineLimits
    max_num_batched_tokens: int
    """Most tokens that a step can have."""
    memory_plan: str
    """Memory plan as it is printed; its first line names the kernels."""
    planned_bytes: int = 0
    """Memory that the plan could take, in bytes."""
    embedding_size: int = 0
    """Numbers of an embedding."""
    is_embedder: bool = False
    """True for a model whose folder says how it makes embeddings."""
    slo_enabled: bool = False
    targets: SloTargets = NO_SLO
    """SLO of the requests that bring none."""
    max_num_seqs: int = 1
    """Most requests that run at once."""
    adapters: dict[str, str] = {}
    """Digests of the LoRA adapters that are loaded from the start, by name."""
    fingerprint: str = ""
    """Name of what decides the tokens of a request besides the request: see runtime/fingerprint.py."""
    identity: dict[str, str] = {}
    """Texts that the fingerprint stands for."""
    model_files: str = ""
    """Digest of the model's small files, which front and engines must have alike: its tokenizer is among them."""
    kv_fingerprint: bytes = b""
    """Root of the names of its KV blocks."""
    token_budget: int = 0
    """Token budget of the first steps."""
    channel_bytes: int = 0
    """Bytes of the data of a loan's channel; 0: the engine neither lends nor borrows."""
    num_tier_slots: int = 0
    """Most KV blocks that tiers have which all engines share; 0: there are none."""
    block_sources: tuple[str, ...] = ()
    """Addresses, the best first, where others can fetch the blocks that this engine lays ready: `memory:ID` for memory
    that engines of a machine share, `tcp://HOST:PORT` (or `tls://`) for an engine on another machine. Empty: KV does
    not move from it.
    """
    num_export_slots: int = 0
    """Number of blocks that it can lay ready at a time."""
    num_speculative_tokens: int = 0
    """Most tokens that are drafted for a request in a step; 0 for a model with recurrent states."""
    step_times: StepTimes | None = None
    """What steps are predicted by before the first one; None: they are not."""
    attainable: Attainable | None = None
    """What the machine can keep of the SLO, as far as it is known before the first step; None without one."""


class EngineStats(msgspec.Struct):
    """Counts what happened since the engine began, and describes the state after its last step."""

    num_steps: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_available_blocks: int = 0
    num_prompt_tokens: int = 0  # of requests whose first token was chosen
    num_cached_tokens: int = 0  # of those, found in the prefix cache
    num_generated_tokens: int = 0
    num_computed_tokens: int = 0  # of all steps
    num_preemptions: int = 0
    step_tokens: int = 0  # of the last step
    step_seconds: float = 0.0
    predicted_step_seconds: float = 0.0  # 0: there was no prediction
    step_token_budget: int = 0  # of the last step
    token_budget: int = 0  # of steps that nothing else limits
    attainable: Attainable | None = None  # of the SLO; None without one
    step_times: StepTimes | None = None  # None: steps are not predicted
    num_draft_tokens: int = 0  # computed tokens that were guesses
    num_accepted_tokens: int = 0  # of those, that were right
    num_tier_blocks: int = 0  # that the KV tiers have, as far as the engine knows
    num_saved_blocks: int = 0  # written to the KV tiers
    num_fetched_blocks: int = 0  # read from there for requests
    num_moved_bytes: int = 0  # of both
    num_unsaved_blocks: int = 0  # not written: a tier was full, or behind
    num_lent_blocks: int = 0  # held for requests of other engines
    num_dropped_blocks: int = 0  # false by their checksum, or of another model
    num_form_drafts: int = 0  # of the drafts, forced by the form of an answer; what no kind has is by prompt lookup
    num_form_accepted: int = 0
    num_model_drafts: int = 0  # of the drafts, guessed by the draft model
    num_model_accepted: int = 0
    draft_model_seconds: float = 0.0
    num_peer_blocks: int = 0  # of those fetched, that engines on other machines had


class StepReport(msgspec.Struct, frozen=True, tag=True):
    """Reports what one step, or a command between two steps, changed."""

    outputs: tuple[RequestOutput, ...]
    stats: EngineStats
    traced: tuple[TraceRecord, ...] = ()
    """As in Traced: one message wakes the front once."""
    exported: dict[str, int] = {}
    """Numbers of leading blocks that Export asked for and that can be fetched now, by request."""


class Traced(msgspec.Struct, frozen=True, tag=True):
    """Reports what was traced in a step, or between two, if SetTracing asks for it."""

    records: tuple[TraceRecord, ...]


class AdapterLoaded(msgspec.Struct, frozen=True, tag=True):
    """Reports that an adapter is loaded under a name, by its digest, or why it is not."""

    name: str
    digest: str = ""
    error: str = ""


class Prefetched(msgspec.Struct, frozen=True, tag=True):
    """Reports that what Prefetch asked for has come, as far as it will: its first `num_blocks` blocks are there."""

    request_id: str
    num_blocks: int


class Alive(msgspec.Struct, frozen=True, tag=True):
    """Reports a few times a second that the process lives, whatever its engine does."""

    seconds_in_step: float
    """Seconds since the current step began; 0 if none runs."""
    beat: Heartbeat | None = None
    """Newest one that has come from the front."""
    beat_age: float = 0.0
    """Seconds since it came."""
    now: float = 0.0
    """Time on the engine's monotonic clock."""


class Leaving(msgspec.Struct, frozen=True, tag=True):
    """Reports that a signal asks the engine to end: its front may drain it, and sends Stop after that."""


class InFlight(msgspec.Struct, frozen=True, tag=True):
    """Reports which requests are in the step in flight, if these are others than before: of an engine elsewhere."""

    request_ids: tuple[str, ...]


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Reports that the engine has ended with an error."""

    error: str
    """Message of the error; its traceback went to standard error."""
    kind: str = ""
    """Name of its class, if it is one of errors.py."""
    is_planned: bool = False
    """True if it was told to end, which no request can have caused."""


Report = Loading | EngineInfo | StepReport | Traced | Prefetched | AdapterLoaded | Alive | Leaving | InFlight | Failed


class Welcome(msgspec.Struct, frozen=True):
    """Tells a front of the engine that it has reached, before any report."""

    config: EngineConfig
    """Settings that the engine was started with."""
    front: str = ""
    """Address of another front that it serves; then it closes the connection. Empty: it takes this one."""


encode: Callable[[Command | Report], bytes] = msgspec.msgpack.Encoder().encode
"""Function that returns a message as MessagePack."""
decode_command: Callable[[bytes], Command] = msgspec.msgpack.Decoder(Command).decode
"""Function that returns a command from its bytes, and raises msgspec.DecodeError for anything else."""
decode_report: Callable[[bytes], Report] = msgspec.msgpack.Decoder(Report).decode
"""Function that returns a report from its bytes, and raises msgspec.DecodeError for anything else."""
