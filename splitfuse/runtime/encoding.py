"""Loads a bidirectional encoder, and executes plans with it. It has the scheduler of decoders, and no KV cache.

A chunk of a prompt that goes on later computes nothing: the last one computes the whole text, since each token attends
to all. Texts that end in one step are computed in runs of at most the budget and a text's length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from splitfuse.config.engine import EngineConfig
from splitfuse.core.limits import ceil_div
from splitfuse.core.plan import ChunkResult, SamplingState, StepPlan, StepResult
from splitfuse.core.step_budget import FIRST_BUDGET
from splitfuse.errors import AdapterError, ConfigError, MemoryPlanError
from splitfuse.kernels.lora import PackedAdapter
from splitfuse.models.encoder.network import Encoder, weight_bytes
from splitfuse.models.encoder.spec import EncoderSpec, read_encoder
from splitfuse.models.sources.dummy import DummyWeights
from splitfuse.models.sources.pooling import Pooling
from splitfuse.models.sources.source import ModelSource
from splitfuse.models.weights import resolve_dtype
from splitfuse.runtime.backend_choice import choose_backend
from splitfuse.runtime.device import AUTO
from splitfuse.runtime.executor import StepHandle
from splitfuse.runtime.fingerprint import fingerprint, identify
from splitfuse.runtime.loading import open_source, parse_device, tokenizer_json, use_cores
from splitfuse.runtime.machine import available_memory
from splitfuse.runtime.memory_plan import MemoryPlan
from splitfuse.runtime.sampling.grammar import Grammars
from splitfuse.runtime.sampling.pool import embedding_result

TOKEN_NUMBERS = 12
"""Number of hidden and of inner states of a token that exist at once, generously."""


class EncoderExecutor:
    """Executes plans whose requests all ask for embeddings: see `Executor`."""

    keeps_plans = False

    def __init__(self, encoder: Encoder, most_tokens: int) -> None:
        self.encoder = encoder
        self.most_tokens = most_tokens
        """Tokens that are computed at a time, for which memory is planned: at least those of the longest text."""
        self.adapters: dict[str, PackedAdapter] = {}
        """LoRA adapters: none, see `LoadedEncoder.load_adapter`."""
        self._states: dict[str, SamplingState] = {}
        self._num_submitted = 0

    def submit(self, plan: StepPlan) -> StepHandle:
        """Execute a plan. Its results are known when this returns."""
        for request_id in plan.retired_requests:
            self._states.pop(request_id, None)
        self._states |= {new.request_id: new for new in plan.new_requests}
        self._num_submitted += 1
        results: StepResult = {chunk.request_id: ChunkResult() for chunk in plan.chunks}
        whole = [chunk.request_id for chunk in plan.chunks if chunk.samples]
        if whole:
            texts = [self._states[name].prompt_token_ids for name in whole]
            with torch.inference_mode():
                embeddings = [row for run in self._runs(texts) for row in self.encoder.embed(run).tolist()]
            results |= zip(whole, map(embedding_result, embeddings), strict=True)
        return StepHandle(self._num_submitted, plan, result=results)

    def _runs(self, texts: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
        """Yield the texts that end in one step in runs that fit `most_tokens`: of several that were begun, whose last
        chunks fit one step, all tokens are computed now.
        """
        run: list[Sequence[int]] = []
        for text in texts:
            if run and sum(map(len, run)) + len(text) > self.most_tokens:
                yield run
                run = []
            run.append(text)
        yield run

    def collect(self, handle: StepHandle) -> StepResult:
        """Return the result of a submitted plan."""
        return handle.taken()

    def wait_for_layers(self, handle: StepHandle) -> None:
        """Do nothing: it is done."""

    def drain(self) -> None:
        """Do nothing: nothing runs."""


@dataclass(frozen=True)
class LoadedEncoder:
    """Holds an encoder, and what an engine needs to know of it: see `LoadedModel`."""

    source: ModelSource
    spec: EncoderSpec
    plan: MemoryPlan
    encoder: Encoder
    identity: Mapping[str, str]
    """Texts that name what decides the tokens of a request besides the request."""
    grammars: Grammars
    pooling: Pooling
    most_tokens: int
    """Tokens that are computed at a time: see `EncoderExecutor`."""
    eos_token_ids: tuple[int, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Return a name of its identity."""
        return fingerprint(self.identity)

    @property
    def kv_fingerprint(self) -> bytes:
        """Return nothing: its blocks hold nothing, and have no names."""
        return b""

    def make_executor(self) -> EncoderExecutor:
        """Return an executor: each engine makes one."""
        return EncoderExecutor(self.encoder, self.most_tokens)

    def load_adapter(self, path: str) -> tuple[str, PackedAdapter]:
        """Raise AdapterError: encoders have no LoRA adapters."""
        raise AdapterError(f"the adapter {path} cannot be applied: {self.spec.architecture} is an encoder")


def load_encoder(
    config: EngineConfig,
    source: ModelSource | None = None,
    *,
    announce: Callable[[MemoryPlan], None] = lambda _: None,
) -> LoadedEncoder:
    """Load the encoder that `config` names, from `source` if it is open already. `announce` is called with the memory
    plan before anything is loaded.

    Raises ModelError, MemoryPlanError, or ConfigError for a setting that encoders do not have.
    """
    if config.model.device == AUTO:
        config = replace(config, model=replace(config.model, device="cpu"))
    source = source or open_source(config)
    spec = read_encoder(source)
    _check(config, spec)
    device = parse_device(config.model.device)
    use_cores(device)
    dtype = resolve_dtype(config.model.dtype, spec)
    backend = choose_backend(config, dtype)
    weights = DummyWeights(dtype, device) if config.model.load_format == "dummy" else source.weights()
    max_len = config.model.max_model_len or min(spec.wanted_length or spec.max_position, spec.max_position)
    budget = config.scheduler.max_num_batched_tokens or FIRST_BUDGET
    most_tokens = budget + max_len
    size, most = config.cache.block_size, config.scheduler.max_num_seqs
    widest = TOKEN_NUMBERS * spec.hidden_size + 2 * spec.intermediate_size
    plan = MemoryPlan(
        weights=weight_bytes(spec, backend, dtype),
        activations=most_tokens * widest * torch.float32.itemsize,
        block=0,
        block_size=size,
        num_blocks=most * ceil_div(max_len, size),  # they hold nothing, and there are enough
        max_model_len=max_len,
        available=available_memory(config.model.device),
        kernels=backend.describe(),
        model_len_lowered=False,
        max_num_seqs=most,
        max_num_batched_tokens=budget,
        remarks=(f"an encoder: it gives embeddings ({spec.pooling} of the hidden states), and generates nothing",),
    )
    if plan.need > plan.available:
        raise MemoryPlanError(f"the model does not fit into memory\n{plan}\na smaller max_num_batched_tokens may fit")
    announce(plan)
    encoder = Encoder.load(spec, weights, backend, dtype=dtype)
    backend.finish_loading()
    identity = identify(source, config, backend=backend, plan=plan, device=device)
    grammars = Grammars(partial(tokenizer_json, config, source), spec.vocab_size, ())
    return LoadedEncoder(source, spec, plan, encoder, identity, grammars, Pooling(spec.pooling), most_tokens)


def encoder_settings(config: EngineConfig) -> EngineConfig:
    """Return the settings of an engine of an encoder: it keeps nothing of a prompt, and its token budget is fixed."""
    budget = config.scheduler.max_num_batched_tokens or FIRST_BUDGET
    scheduler = replace(config.scheduler, max_num_batched_tokens=budget)
    return replace(config, scheduler=scheduler, cache=replace(config.cache, enable_prefix_caching=False))


def _check(config: EngineConfig, spec: EncoderSpec) -> None:
    """Raise ConfigError for a setting that an encoder cannot honour."""
    cache = config.cache
    for name, is_set in (
        ("num_blocks", cache.num_blocks is not None),
        ("kv_cache_memory_gib", cache.kv_cache_memory_gib is not None),
        ("kv_memory_tier", cache.kv_memory_tier is not None),
        ("kv_disk_tier", cache.kv_disk_tier is not None),
        ("kv_loans", cache.kv_loans),
        ("kv_cache_dtype", cache.kv_cache_dtype != "auto"),
        ("enable_slo, ttft, itl and tpot", config.scheduler.slo_enabled),
        ("num_speculative_tokens", config.scheduler.num_speculative_tokens > 0),
        ("draft_model", config.model.draft_model is not None),
        ("gguf_file", config.model.gguf_file is not None),
        ("tensor_parallel_size", config.model.tensor_parallel_size > 1),
    ):
        if is_set:
            raise ConfigError(
                f"{name} cannot be set for {spec.architecture}, an encoder without a KV cache whose steps are not "
                "predicted: leave it out"
            )
    wanted = config.model.max_model_len
    if wanted is not None and wanted > spec.max_position:
        raise ConfigError(
            f"max_model_len is {wanted}, but the model has {spec.max_position} positions: use at most that"
        )
    if config.model.device != "cpu":
        raise ConfigError(f"device {config.model.device} cannot be used for {spec.architecture}: encoders run on cpu")
