"""Loads the model that the settings name: opens it, plans its memory, loads its weights."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from splitfuse.config.engine import MAX_TOKEN_BUDGET, EngineConfig
from splitfuse.errors import AdapterError, ConfigError, MemoryPlanError, ModelError, UnsupportedModelError, brief
from splitfuse.kernels.group import Group
from splitfuse.kernels.interface import Backend
from splitfuse.kernels.lora import PackedAdapter
from splitfuse.kernels.sharing import WeightSharing
from splitfuse.models.decoder import Decoder
from splitfuse.models.families.registry import load_spec
from splitfuse.models.kv_cache import KVCache
from splitfuse.models.lora import read_adapter, resolve_adapter
from splitfuse.models.rope import has_long_factors
from splitfuse.models.sharding import RankDecoder
from splitfuse.models.sources.dummy import DummyWeights
from splitfuse.models.sources.files import MAX_TOKENIZER_BYTES
from splitfuse.models.sources.hub import adapter_folder, check_revision, open_model
from splitfuse.models.sources.pooling import Pooling, read_pooling
from splitfuse.models.sources.source import ModelSource, WeightSource
from splitfuse.models.spec import ModelSpec
from splitfuse.models.storage import describe_kept, describe_quantization, may_be_quantized
from splitfuse.models.weights import (
    check_weights,
    describe_aside,
    load_decoder,
    resolve_dtype,
    stored_parameters,
    weight_bytes,
)
from splitfuse.runtime.backend_choice import choose_backend
from splitfuse.runtime.device import choose_device, device_of, rank_devices
from splitfuse.runtime.draft_model import DraftRunner, open_draft
from splitfuse.runtime.executor import Executor
from splitfuse.runtime.fingerprint import describe_kernels, digest, fingerprint, identify, kv_fingerprint
from splitfuse.runtime.machine import available_memory, usable_cores
from splitfuse.runtime.memory_plan import DraftSizes, MemoryPlan
from splitfuse.runtime.memory_planner import plan_memory, tier_bytes
from splitfuse.runtime.parallel.leader import Leader
from splitfuse.runtime.sampling.grammar import Grammars
from splitfuse.runtime.step_graphs import StepGraphs
from splitfuse.runtime.step_memory import first_shard, token_bytes

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """Holds a model on its device, and what an engine needs to know of it."""

    source: ModelSource
    spec: ModelSpec
    plan: MemoryPlan
    eos_token_ids: tuple[int, ...]
    decoder: Decoder
    identity: Mapping[str, str]
    """Texts that name what decides the tokens of a request besides the request."""
    grammars: Grammars
    weights: Callable[[], WeightSource]
    pooling: Pooling | None = None
    """Way to make embeddings, if the model is for that."""
    leader: Leader | None = None
    """The other ranks that compute it."""
    draft: Decoder | None = None
    """Draft model, if there is one."""
    cuda_graphs: bool = False
    """Whether steps are captured in CUDA graphs."""

    @property
    def fingerprint(self) -> str:
        """Return a name of its identity."""
        return fingerprint(self.identity)

    @property
    def kv_fingerprint(self) -> bytes:
        """Return the root of the names of its KV blocks."""
        return kv_fingerprint(
            self.identity,
            layout=self.decoder.backend.capabilities.kv_layout,
            block_size=self.plan.block_size,
            long_rope=any(has_long_factors(rope, self.spec.max_position) for rope in self.spec.ropes),
            shard="1/1" if self.leader is None else f"1/{self.leader.group.shard.size}",
        )

    def load_adapter(self, path: str) -> tuple[str, PackedAdapter]:
        """Return the digest of the LoRA adapter in a folder or on the Hub, and the adapter as the backend keeps it.

        Raises AdapterError, ModelNotFoundError.
        """
        if self.leader is not None:
            raise AdapterError(f"the adapter {path} cannot be applied: ranks of a tensor-parallel group have none")
        files = read_adapter(adapter_folder(path))
        adapter = resolve_adapter(files, self.spec, stored_parameters(self.weights(), self.spec))
        return files.digest, self.decoder.backend.pack_adapter(adapter, self.decoder.weights, self.decoder.dtype)

    def make_executor(self) -> Executor:
        """Return an executor with a KV cache of its own, as large as planned: each engine makes one. Of a model that
        several ranks compute one engine may run at a time: their caches are one.

        Raises MemoryPlanError.
        """
        if self.leader is not None and self.plan.num_blocks > self.leader.num_blocks:
            raise MemoryPlanError(
                f"num_blocks is {self.plan.num_blocks}, and the other ranks have {self.leader.num_blocks}: "
                "use at most that"
            )
        cache = KVCache(
            self.decoder.spec,
            num_blocks=self.plan.num_blocks,
            block_size=self.plan.block_size,
            dtype=self.decoder.dtype,
            device=self.decoder.device,
            backend=self.decoder.backend,
            num_states=self.plan.num_states,
        )
        threads = getattr(self.decoder.backend, "num_threads", math.inf)
        threads *= 1 if self.leader is None else self.leader.num_local_ranks
        keeps_plans = self.decoder.device.type == "cuda" or threads < usable_cores()
        return Executor(self.decoder, cache, self.grammars, keeps_plans=keeps_plans, cuda_graphs=self.cuda_graphs)

    def make_draft_runner(self, executor: Executor) -> DraftRunner | None:
        """Return what computes the draft model for the requests of an executor, with a KV cache of its own; None if
        there is no draft model. Raises MemoryPlanError.
        """
        if self.draft is None:
            return None
        return DraftRunner(
            self.draft,
            executor.requests,
            num_blocks=self.plan.num_blocks,
            block_size=self.plan.block_size,
            vocab_size=self.spec.vocab_size,
        )


def load_model(
    config: EngineConfig,
    source: ModelSource | None = None,
    *,
    progress: bool = False,
    announce: Callable[[MemoryPlan], None] = lambda _: None,
    on_progress: Callable[[float], None] = lambda _: None,
    weight_sharing: WeightSharing | None = None,
    tiers_filled: int = 0,
    tiers_for_moves: bool = False,
    nodes: Mapping[int, Sequence[int]] | None = None,
) -> LoadedModel:
    """Load the model that `config` names, from `source` if it is open already.

    `announce` is called with the memory plan before anything is loaded, `on_progress` with the fraction that is. With
    `weight_sharing`, processes share one copy of the weights if the backend can. `tiers_filled` is how much of the KV
    tier in memory is taken already; with `tiers_for_moves` there is some for requests that move, if no tier was asked
    for. In an engine's own process threads and weights are divided among the NUMA `nodes`, whose cores are given.

    Raises ModelError, MemoryPlanError or ConfigError.
    """
    opened = _open(config, source)
    source, spec, weights, backend = opened.source, opened.spec, opened.weights, opened.backend
    dtype, device = opened.dtype, opened.device
    pooling = _pooling(source)
    if pooling is not None and pooling.max_length is not None and config.model.max_model_len is None:
        spec = replace(spec, max_position=min(pooling.max_length + 1, spec.max_position))  # one is left to generate
    if (adapter := source.adapter()) is not None:
        _logger.warning("%s holds an adapter of %s too, which is not applied", source.location, adapter)
    draft = open_draft(config, source, spec, device=device)
    num_sharers = 1 if weight_sharing is None else weight_sharing.num_sharers
    if weight_sharing is not None and weight_sharing.share is not None:
        tiers_filled = 0  # its share was measured before that
    tiers = tier_bytes(config.cache, num_sharers=num_sharers, filled=tiers_filled, for_moves=tiers_for_moves)
    plan = _plan(spec, config, backend, weights, weight_sharing, tiers, None if draft is None else draft.sizes)
    remarks = describe_aside(weights, spec) + describe_kept(weights, spec, backend, dtype)
    if nodes and weight_sharing is None and (division := backend.use_nodes(nodes)) is not None:
        remarks = [*remarks, division]
    plan = replace(plan, remarks=(*plan.remarks, *choose_device(config).remarks, *remarks))
    announce(plan)
    spec = replace(spec, max_position=plan.max_model_len)  # no larger tables than will be read
    leader = None if config.model.tensor_parallel_size == 1 else _start_ranks(config, opened, spec, plan)
    decoder = load_decoder(
        weights,
        spec,
        dtype=dtype,
        device=device,
        backend=backend,
        progress=progress,
        on_progress=on_progress,
        group=None if leader is None else leader.group,
    )
    backend.finish_loading()
    if leader is not None:
        assert isinstance(decoder, RankDecoder)
        leader.wait()
        leader.lead(decoder)
    draft_decoder = None if draft is None else draft.load(plan.max_model_len)
    identity = identify(source, config, backend=backend, plan=plan, device=device)
    ends = eos_tokens(source, spec.vocab_size)
    grammars = Grammars(partial(tokenizer_json, config, source), spec.vocab_size, ends)
    dummy = config.model.load_format == "dummy"
    open_weights = partial(DummyWeights, dtype, device) if dummy else source.weights
    others = pooling, leader, draft_decoder
    if config.model.cuda_graphs and (obstacle := StepGraphs.obstacle(decoder)):
        raise ConfigError(f"cuda_graphs cannot be used: {obstacle}")
    graphs = config.model.cuda_graphs
    return LoadedModel(source, spec, plan, ends, decoder, identity, grammars, open_weights, *others, cuda_graphs=graphs)


def load_rank(config: EngineConfig, group: Group, *, files: str, kernels: str) -> tuple[RankDecoder, KVCache]:
    """Load the part of a follower, for a leader that has such files and kernels. The settings name all sizes.

    Raises as `load_model` does.
    """
    opened = _open(config)
    location = opened.source.location
    if _files(opened.source, config) != files:
        raise ModelError(
            f"the model in {location} is not that of the leader: copy that one's files to the machine of this rank"
            if config.model.rank
            else f"{location} was changed while it was loaded: start again"
        )
    if (ours := describe_kernels(opened.backend)) != kernels:
        which = "kernels that both have, such as kernels=avx2"
        if opened.device.type == "cuda":
            which = "as device the first of GPUs that are alike, such as device=cuda:2"
        raise ConfigError(f"a rank has {ours}, and its leader {kernels}: their bits differ; name {which}")
    num_blocks, max_model_len = config.cache.num_blocks, config.model.max_model_len
    assert num_blocks is not None and max_model_len is not None
    decoder = load_decoder(
        opened.weights,
        replace(opened.spec, max_position=max_model_len),
        dtype=opened.dtype,
        device=opened.device,
        backend=opened.backend,
        group=group,
    )
    assert isinstance(decoder, RankDecoder)
    opened.backend.finish_loading()
    cache = KVCache(
        decoder.spec,
        num_blocks=num_blocks,
        block_size=config.cache.block_size,
        dtype=decoder.dtype,
        device=decoder.device,
        backend=decoder.backend,
    )
    return decoder, cache


@dataclass(frozen=True)
class _Opened:
    """Holds what is known of a model before its memory is planned."""

    source: ModelSource
    spec: ModelSpec
    dtype: torch.dtype
    device: torch.device
    weights: WeightSource
    backend: Backend


def _open(config: EngineConfig, source: ModelSource | None = None) -> _Opened:
    """Open the model that `config` names, and check its weights: its numbers may be impossible."""
    source = source or open_source(config)
    spec = load_spec(source)
    device = parse_device(device_of(config))
    use_cores(device)
    dtype = resolve_dtype(config.model.dtype, spec)
    weights = DummyWeights(dtype, device) if config.model.load_format == "dummy" else source.weights()
    spec = check_weights(weights, spec)
    check_quantization(config, source, weights)
    backend = choose_backend(config, dtype)
    if config.model.num_local_ranks > 1 and device.type == "cpu" and not backend.capabilities.own_threads:
        torch.set_num_threads(max(1, _all_cores() // config.model.num_local_ranks))
    return _Opened(source, spec, dtype, device, weights, backend)


@functools.cache
def _all_cores() -> int:
    """Return the cores of this process, before they were divided among ranks: once it has been a rank, PyTorch's
    threads stay divided.
    """
    return usable_cores()


def _files(source: ModelSource, config: EngineConfig) -> str:
    """Return a name of the files that all ranks must have. On one machine they read the same weights."""
    return digest(source, config, weights=bool(config.model.rank))


def _start_ranks(config: EngineConfig, opened: _Opened, spec: ModelSpec, plan: MemoryPlan) -> Leader:
    """Start the other ranks, which load their parts at the same time as this one."""
    # What is not used costs nothing. Products read numbers of 4 bytes packed in 5 at most, and in whole slabs, from one
    # of two places: see Common in csrc/linear.h.
    tokens, width = max(plan.max_num_batched_tokens, MAX_TOKEN_BUDGET), token_bytes(spec, opened.dtype)
    return Leader(
        config,
        shard=first_shard(config, opened.backend),
        devices=rank_devices(config),
        files=_files(opened.source, config),
        kernels=describe_kernels(opened.backend),
        logit_bytes=4 * opened.backend.capabilities.head_rows * spec.vocab_size,
        step_bytes=tokens * (width + 2 * (width * 5 // 4 + 2**12)),
        num_blocks=plan.num_blocks,
        max_model_len=plan.max_model_len,
    )


def open_source(config: EngineConfig, *, weights: bool = True) -> ModelSource:
    """Open the model that the settings name, of the Hub with its weights if they are wanted. Raises ModelError."""
    model = config.model
    check_revision(model.revision, model.model, model.tokenizer)
    weights = weights and model.load_format != "dummy"
    return open_model(model.model, model.revision, gguf_file=model.gguf_file, weights=weights)


def use_cores(device: torch.device) -> None:
    """Let PyTorch use no more threads than there are cores for this process: it knows no CPU quota."""
    if device.type == "cpu" and (cores := usable_cores()) < torch.get_num_threads():
        torch.set_num_threads(cores)


def _pooling(source: ModelSource) -> Pooling | None:
    """Return how a decoder's folder says that embeddings are made. Raises UnsupportedModelError."""
    pooling = read_pooling(source)
    if pooling is not None and pooling.mode != "last":
        raise UnsupportedModelError(
            f"{source.location}/1_Pooling/config.json has the pooling {pooling.mode}: of models that generate, the "
            "last token gives the embedding; without modules.json the model generates text"
        )
    return pooling


def tokenizer_json(config: EngineConfig, source: ModelSource) -> str:
    """Return the tokenizer.json of a model. Raises ModelError if it has none."""
    if (other := config.model.tokenizer) is not None:
        source = open_model(other, config.model.revision, weights=False)
    if (content := source.read("tokenizer.json", MAX_TOKENIZER_BYTES)) is None:
        raise ModelError(f"{source.location} has no tokenizer.json")
    return content.decode()


def check_quantization(config: EngineConfig, source: ModelSource, weights: WeightSource) -> None:
    """Raise ConfigError if the settings would quantize weights that are quantized already."""
    if config.model.quantization is not None and not may_be_quantized(weights, config.model.quantization):
        raise ConfigError(
            f"quantization={config.model.quantization} would quantize {source.location} a second time, which has "
            f"{describe_quantization(weights)}: leave quantization out"
        )


def _plan(
    spec: ModelSpec,
    config: EngineConfig,
    backend: Backend,
    weights: WeightSource,
    sharing: WeightSharing | None,
    tiers: int,
    draft: DraftSizes | None,
) -> MemoryPlan:
    """Return the memory plan, and let the backend share weights if it can. Weights that are there already take no more
    memory; what remains is divided among the processes that share them. One that starts once others run has what the
    first had, if so much is free: what others take of their shares is no longer free, and not to be divided again.
    """
    plan = partial(plan_memory, spec, config, backend=backend, weights=weights, tiers=tiers, draft=draft)
    if sharing is None:
        return plan()
    free = min(map(available_memory, set(rank_devices(config))))
    num_sharers, share = sharing.num_sharers, sharing.share
    if not backend.capabilities.shares_weights or config.model.tensor_parallel_size > 1:  # each has its own
        return plan(available=free // num_sharers if share is None else min(share, free))
    size = weight_bytes(spec, resolve_dtype(config.model.dtype, spec), backend, weights)
    divided = (free if sharing.filled else free - size) // num_sharers if share is None else min(share - size, free)
    shared = plan(available=size + divided)
    backend.share_weights(sharing, size)
    return shared


def eos_tokens(source: ModelSource, vocab_size: int) -> tuple[int, ...]:
    """Return the tokens that end a text. Those outside the vocabulary, which the model cannot generate, are left out
    with a warning: files that name one load in transformers and vLLM too, and end where its others say.

    Raises ModelError if they are no token ids.
    """
    ids = source.eos_token_ids()
    if unknown := [token for token in ids if token >= vocab_size]:
        _logger.warning(
            "%s has EOS tokens outside its vocabulary, which are ignored: %s; its token ids are from 0 to %d",
            source.location,
            ", ".join(map(brief, unknown)),
            vocab_size - 1,
        )
    known = tuple(token for token in ids if token < vocab_size)
    if not known:
        _logger.warning(
            "%s names no EOS token (eos_token_id in generation_config.json or config.json, eos_token in "
            "tokenizer_config.json): texts end at their length or a stop of the request",
            source.location,
        )
    return known


def parse_device(name: str) -> torch.device:
    """Return the torch device of that name. Raises ConfigError if there is none."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used: {reason}; cpu always can") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} cannot be used: choose cpu, cuda, or one GPU such as cuda:1")
    return device
