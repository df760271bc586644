"""Defines the settings of engines and servers: frozen, parsed and checked once. Standard library only.

Dtypes are strings. The metadata of a field holds its help text. Flags, keywords of `pipeline()` and the table in
docs/server.md are derived from the fields. A field left at None is resolved when the model is known (`max_model_len`,
`num_blocks`).

    config = EngineConfig.from_settings({"model": "Qwen/Qwen2.5-0.5B-Instruct", "itl": "100ms"})
"""

from __future__ import annotations

import dataclasses
import enum
import math
import re
import sys
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from splitfuse.errors import ConfigError, did_you_mean

DTYPES = ("auto", "bfloat16", "float16", "float32")
LOAD_FORMATS = ("safetensors", "dummy")
QUANTIZATIONS = {"int8": (128,), "int4": (64, 128)}
"""Quantizations of weights, with the group sizes of each."""
KERNELS = ("auto", "avx512_amx", "avx512_bf16", "avx512", "avx2", "triton", "torch", "reference")
ADAPTER_NAME = re.compile(r"[\w.:/@+-]{1,128}")
"""Names that a LoRA adapter can have as a model."""
MAX_RANKS = 64
"""Most ranks of a tensor-parallel group: more than models have key/value heads to divide."""
MAX_THREADS = 1024
"""Number of threads of the largest machines. Hundreds of thousands end the process."""
KV_CACHE_DTYPES = ("auto", "int8", "fp8")
UNITS = {"ms": 1e-3, "s": 1.0, "min": 60.0}
SIZES = {"MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
PER_TOKEN = "/token"
TARGETS = ("ttft", "itl", "tpot")
"""Names of the settings which are targets of an SLO."""
MIN_TARGET, MAX_TARGET = 1e-6, 86400.0
"""Bounds of an SLO target, in seconds. No step is as short as the least: a target below it means the same, and the
scheduler multiplies targets and divides by them, which must not leave the range of floating point.
"""
MIN_RECORD_MIB = 4.0
"""Least size of a recording in MiB: its four files have some seconds of a busy server each."""
MAX_SIZE = 1e9
"""Largest size in GiB or MiB: as bytes, it is still a number."""
MIN_TIMEOUT, MAX_TIMEOUT = 0.001, 1_000_000.0
"""Bounds of a timeout in the settings, in seconds: beyond them, timers of the system spin or overflow."""
TAIL_SHARE, MAX_TAIL_SHARE = 0.15, 0.5
MAX_SPECULATIVE_TOKENS = 64
"""Most tokens that can be drafted for a request in a step: more than any step is worth."""
MAX_FRONTS = 64
"""Largest number of processes that speak HTTP for a server."""
MAX_ENGINES = 4096
MOST_ON_RAY = 256
"""Number of replicas up to which a server on Ray can be scaled, unless max_replicas says another."""
MAX_TOKEN_BUDGET = 2048
"""Largest token budget that is chosen by itself: up to here, every machine that was measured is saturated."""


_Part = TypeVar("_Part")


def setting(default: Any, help: str) -> Any:  # noqa: A002 - the word every command line uses
    """Return a dataclass field with its help text."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Says which model is loaded, with which numeric formats and backend."""

    model: str | None = setting(
        None, "Model folder, GGUF file, Hugging Face Hub name, or smollm2 (default: the bundled model)."
    )
    revision: str | None = setting(None, "Branch, tag or commit on the Hub.")
    gguf_file: str | None = setting(None, "Name of a GGUF file in the folder or Hub model, if it has several.")
    tokenizer: str | None = setting(None, "Folder or Hub name of another tokenizer (default: the model's).")
    dtype: str = setting(
        "auto", "Dtype of weights and activations: auto (the checkpoint's), bfloat16, float16 or float32."
    )
    quantization: str | None = setting(
        None, "Quantize weights while loading, to int8 or int4 (C++ and Triton kernels)."
    )
    quantization_group_size: int | None = setting(
        None, "Columns per scale: 128 for int8, 64 or 128 for int4 (default: a whole row for int8, 64 for int4)."
    )
    kernels: str = setting(
        "auto",
        "Backend: auto (the fastest available), avx512_amx, avx512_bf16, avx512 or avx2 (C++), triton (NVIDIA GPUs), "
        "torch (PyTorch with oneDNN) or reference (PyTorch).",
    )
    num_threads: int | None = setting(
        None,
        "Threads of the C++ kernels, in each rank (default: the cores available to this process, divided among them).",
    )
    tensor_parallel_size: int = setting(
        1, "Number of processes that compute the model together, each with a part of its weights."
    )
    rank: tuple[str, ...] = setting(
        (),
        "Address of a process of these on another machine (splitfuse rank), as host:port; give one for each but this "
        "process. Such ranks wait for the network twice a layer.",
    )
    rank_key_file: str | None = setting(
        None, "File with the secret that ranks elsewhere have too, readable by its owner only; needed with rank."
    )
    draft_model: str | None = setting(
        None,
        "Model folder, GGUF file, Hugging Face Hub name, or smollm2: a smaller model with the same vocabulary, which "
        "drafts tokens too, where that makes tokens come faster; needs num_speculative_tokens (default: none).",
    )
    device: str = setting(
        "auto", "PyTorch device, such as cpu or cuda:0; auto: a GPU that has room, if there is one, else the CPU."
    )
    batch_invariant: bool = setting(
        False,
        "Give a request the same bits whatever the other requests are. The C++ kernels always do; the Triton kernels "
        "are slower then, and others cannot.",
    )
    cuda_graphs: bool = setting(
        False, "Replay steps whose shapes recur as CUDA graphs (Triton kernels; not yet tried on a GPU)."
    )
    load_format: str = setting("safetensors", "safetensors, or dummy: random weights from the config alone.")
    lora: tuple[str, ...] = setting(
        (), "LoRA adapter to load, as name=path of its folder or Hub name; requests choose it by name. May be repeated."
    )
    max_model_len: int | None = setting(
        None, "Maximum number of prompt and output tokens of a request (default: the model's limit)."
    )

    def __post_init__(self) -> None:
        _choice("dtype", self.dtype, DTYPES)
        _choice("load_format", self.load_format, LOAD_FORMATS)
        _choice("kernels", self.kernels, KERNELS)
        if self.quantization is not None:
            _choice("quantization", self.quantization, tuple(QUANTIZATIONS))
        elif self.quantization_group_size is not None:
            raise ConfigError(
                f"quantization_group_size {self.quantization_group_size} needs quantization int8 or int4: set that too"
            )
        group_sizes = {size for sizes in QUANTIZATIONS.values() for size in sizes}
        if self.quantization_group_size not in (None, *group_sizes):
            raise ConfigError(f"quantization_group_size must be 64 or 128, not {self.quantization_group_size}")
        _at_least("num_threads", self.num_threads, 1)
        if self.num_threads is not None and self.num_threads > MAX_THREADS:
            raise ConfigError(f"num_threads must be at most {MAX_THREADS}, not {self.num_threads}")
        _at_least("max_model_len", self.max_model_len, 2)
        _at_least("tensor_parallel_size", self.tensor_parallel_size, 1)
        if self.tensor_parallel_size > MAX_RANKS:
            raise ConfigError(f"tensor_parallel_size must be at most {MAX_RANKS}, not {self.tensor_parallel_size}")
        for text in self.rank:
            if parse_address("rank", text)[1] == 0:
                raise ConfigError(f"rank {text} must have the port that it listens on, such as 9100")
        if self.rank and self.tensor_parallel_size != len(self.rank) + 1:
            raise ConfigError(
                f"tensor_parallel_size={self.tensor_parallel_size} must count this process and the {len(self.rank)} of "
                f"rank, on other machines: set it to {len(self.rank) + 1}"
            )
        if twice := next((each for each in self.rank if self.rank.count(each) > 1), None):
            raise ConfigError(f"rank {twice} is given twice: give each once")
        if bool(self.rank) != (self.rank_key_file is not None):
            raise ConfigError("rank and rank_key_file go together: give both or none")
        if self.lora and self.tensor_parallel_size > 1:
            raise ConfigError(
                f"lora cannot be used with tensor_parallel_size={self.tensor_parallel_size}, whose ranks have no "
                "adapters: leave one of them out"
            )
        names = [parse_adapter(each)[0] for each in self.lora]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ConfigError(f"lora gives the name {twice!r} to two adapters: each needs one of its own")

    @property
    def num_local_ranks(self) -> int:
        """Return how many processes of this machine compute the model together."""
        return 1 if self.rank else self.tensor_parallel_size


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Says how steps are composed: token budget, concurrency and SLOs."""

    max_num_batched_tokens: int | None = setting(
        None,
        "Token budget of a step (default: chosen by itself, and changed as steps are measured; with SLOs, as large as "
        "memory permits).",
    )
    max_num_seqs: int = setting(64, "Maximum number of running requests.")
    num_speculative_tokens: int = setting(
        0,
        "Most tokens that are drafted for a request in a step, from its own prompt and answer; they are computed where "
        "that makes tokens come faster, and change no output. 0: none.",
    )
    ttft: str | None = setting(None, "SLO for the time to first token (TTFT): 1s, or 2ms/token for each prompt token.")
    itl: str | None = setting(
        None,
        "SLO for the inter-token latency (ITL): 250ms for its moving average, or 250ms/p99 for 99 % of the gaps of an "
        "answer.",
    )
    tpot: str | None = setting(
        None, "SLO for the time per output token (TPOT), the mean ITL of an answer, such as 100ms."
    )
    enable_slo: bool = setting(False, "Schedule for the SLOs of keys and requests even without ttft, itl and tpot.")
    tail_share: float = setting(
        TAIL_SHARE,
        "Fraction of each step that late prompts can have: they wait about 1 / tail_share times as long as by age (at "
        "most 0.5). Higher cuts tail latency and lowers goodput.",
    )

    def __post_init__(self) -> None:
        _at_least("max_num_batched_tokens", self.max_num_batched_tokens, 1)
        _at_least("max_num_seqs", self.max_num_seqs, 1)
        if not 0 <= self.num_speculative_tokens <= MAX_SPECULATIVE_TOKENS:
            raise ConfigError(
                f"num_speculative_tokens must be from 0 to {MAX_SPECULATIVE_TOKENS}, not {self.num_speculative_tokens}"
            )
        if self.ttft is not None:
            parse_seconds("ttft", self.ttft.removesuffix(PER_TOKEN))
        if self.itl is not None:
            parse_itl(self.itl)
        if self.tpot is not None:
            parse_seconds("tpot", self.tpot)
        if not 0 < self.tail_share <= MAX_TAIL_SHARE:
            raise ConfigError(f"tail_share must be above 0 and at most {MAX_TAIL_SHARE}, not {self.tail_share}")

    @property
    def targets(self) -> dict[str, str]:
        """Return the targets of all requests without their own, by name: those of TARGETS that are given."""
        return {name: value for name in TARGETS if (value := getattr(self, name)) is not None}

    @property
    def token_budget(self) -> int:
        """Return the most tokens that a step may have: max_num_batched_tokens, or a bound while that is open."""
        return self.max_num_batched_tokens or MAX_TOKEN_BUDGET

    @property
    def has_targets(self) -> bool:
        """Return whether all requests have an SLO by default."""
        return bool(self.targets)

    @property
    def slo_enabled(self) -> bool:
        """Return whether requests have, or may have, SLOs."""
        return self.enable_slo or self.has_targets


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Says how large the paged KV cache is, and what it stores."""

    block_size: int = setting(32, "Tokens per KV block.")
    num_blocks: int | None = setting(None, "Number of KV blocks (default: as many as fit kv_cache_memory_gib).")
    kv_cache_memory_gib: float | None = setting(
        None,
        "Memory for the KV cache in GiB (default: enough for max_num_seqs requests, at most half of the free memory).",
    )
    gpu_memory_share: float = setting(
        0.9,
        "Fraction of a GPU's memory that an engine takes at most, from 0.05 to 1: its KV cache takes what weights and "
        "activations leave of that.",
    )
    kv_cache_dtype: str = setting(
        "auto",
        "Dtype of the KV cache: auto (the activations'), int8 (half the memory; C++ and Triton kernels) or fp8 (the "
        "same memory; Triton kernels).",
    )
    enable_prefix_caching: bool = setting(True, "Reuse KV blocks of prompts that begin alike.")
    kv_memory_tier: str | None = setting(
        None, "Memory for KV blocks behind the KV cache, shared by all engines, such as 4GiB (default: none)."
    )
    kv_disk_tier: str | None = setting(
        None, "Folder and size of KV blocks on a disk, such as /var/cache/kv:50GiB; they outlive the server."
    )

    kv_loans: bool = setting(
        False, "Let engines hold KV blocks of another's request that its cache cannot hold alone (C++ kernels only)."
    )

    def __post_init__(self) -> None:
        tiers = [name for name in ("kv_memory_tier", "kv_disk_tier") if getattr(self, name) is not None]
        if self.kv_memory_tier is not None:
            parse_bytes("kv_memory_tier", self.kv_memory_tier)
        if self.kv_disk_tier is not None:
            parse_disk_tier(self.kv_disk_tier)
        if tiers and not self.enable_prefix_caching:
            raise ConfigError(f"{tiers[0]} needs enable_prefix_caching: without it no block is found again; set it too")
        _at_least("block_size", self.block_size, 1)
        if not 0.05 <= self.gpu_memory_share <= 1.0:
            raise ConfigError(f"gpu_memory_share must be from 0.05 to 1, not {self.gpu_memory_share}")
        _choice("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        _at_least("num_blocks", self.num_blocks, 1)
        if self.kv_cache_memory_gib is not None:
            _size("kv_cache_memory_gib", self.kv_cache_memory_gib)
        if self.num_blocks is not None and self.kv_cache_memory_gib is not None:
            raise ConfigError(
                f"num_blocks {self.num_blocks} and kv_cache_memory_gib {self.kv_cache_memory_gib} both set the size of "
                "the KV cache: give one of them"
            )

    @property
    def memory_tier_bytes(self) -> int:
        """Return the size of the memory tier; 0: there is none."""
        return 0 if self.kv_memory_tier is None else parse_bytes("kv_memory_tier", self.kv_memory_tier)

    @property
    def disk_tier_bytes(self) -> int:
        """Return the size of the disk tier; 0: there is none."""
        return 0 if self.kv_disk_tier is None else parse_disk_tier(self.kv_disk_tier)[1]

    @property
    def has_tiers(self) -> bool:
        """Return whether KV blocks are kept behind the KV cache."""
        return self.kv_memory_tier is not None or self.kv_disk_tier is not None


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Holds all settings of an engine. It travels in this parsed form, to worker processes too."""

    model: ModelConfig = field(default_factory=ModelConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)

    def __post_init__(self) -> None:
        if (size := self.model.tensor_parallel_size) > 1:
            moving = {"kv_loans": self.cache.kv_loans, "kv_memory_tier": self.cache.kv_memory_tier}
            moving["kv_disk_tier"] = self.cache.kv_disk_tier
            if name := next((name for name, value in moving.items() if value), None):
                raise ConfigError(
                    f"{name} cannot be used with tensor_parallel_size={size}, where each rank has a part of every KV "
                    "block: leave one of them out"
                )
            if (draft := self.model.draft_model) is not None:
                raise ConfigError(
                    f"draft_model {draft} cannot be used with tensor_parallel_size={size}, whose ranks compute one "
                    "model: leave one of them out"
                )
        if self.model.draft_model is not None and not self.scheduler.num_speculative_tokens:
            raise ConfigError(
                f"draft_model {self.model.draft_model} drafts nothing while num_speculative_tokens is 0: set it to 4, "
                "for example"
            )

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> EngineConfig:
        """Parse flat settings, such as `{"dtype": "float32", "block_size": 16}`.

        Raises ConfigError for an unknown name (with the nearest known one), or a value of the wrong type or range.
        """
        known = cls.setting_fields()
        refuse_unknown(settings, known)
        parts = {
            part: _parse(kind, {name: value for name, value in settings.items() if known[name][0] is kind})
            for part, kind in PARTS.items()
        }
        return cls(**parts)

    @property
    def settings(self) -> dict[str, Any]:
        """Return the settings that have a value, flat, as `from_settings` takes them."""
        parts = [getattr(self, name) for name in PARTS]
        return {name: value for part in parts for name, value in vars(part).items() if value not in (None, ())}

    @classmethod
    def setting_fields(cls) -> dict[str, tuple[type[Any], dataclasses.Field[Any]]]:
        """Return, for each flat setting name, the part that it belongs to and its field."""
        return {f.name: (part, f) for part in PARTS.values() for f in dataclasses.fields(part)}


class Role(enum.StrEnum):
    """Says which part of a request an engine is given. It is routing alone: any engine can do all of it."""

    MIXED = "mixed"
    """All of a request."""
    PROMPT = "prompt"
    """Its prompt, up to the first token."""
    GENERATION = "generation"
    """What is generated after that."""


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Says how a server meets its clients. Nothing here changes what is generated."""

    host: str = setting("127.0.0.1", "Address to listen on; the default accepts connections from this machine only.")
    port: int = setting(8000, "Port to listen on; 0 picks a free one.")
    name: str = setting("splitfuse", "Name of the deployment, for client(), ps and stop.")
    fronts: int = setting(
        1, "Number of processes that speak HTTP on this port, for when one core of HTTP is not enough (Linux)."
    )
    replicas: int | None = setting(
        None, "Number of engine processes, which divide the cores of this machine (default: 1, with engine 0)."
    )
    max_replicas: int | None = setting(
        None,
        "Largest number of replicas that splitfuse scale can start: cores and memory of this machine are divided among "
        "so many (default: replicas; 256 with ray).",
    )
    autoscale: str | None = setting(
        None,
        "Least and largest number of replicas, such as 1:4: every 10 s there are as many as the arrivals of the last "
        "five minutes, and those expected while one starts, need to meet their SLOs; needs an SLO (default: the number "
        "changes by splitfuse scale alone).",
    )
    engine: tuple[str, ...] = setting(
        (), "Engine to use that runs elsewhere (splitfuse engine), as host:port; may be repeated."
    )
    key_file: str | None = setting(
        None, "File with the secret that engines elsewhere have too, readable by its owner only; needed with engine."
    )
    roles: str | None = setting(
        None,
        "Roles of the engines in their order, such as prompt:1,generation:1,mixed:2: prompt engines hand requests over "
        "after the first token (default: all are mixed).",
    )
    ray: str | None = setting(
        None,
        "Ray cluster that places the replicas: host:port of its head, auto for the one that this machine is in, or "
        "local to start one here; needs splitfuse[ray] and num_threads, for which Ray is asked as CPUs.",
    )
    ray_memory: str | None = setting(
        None, "Memory that Ray keeps for each replica, such as 16GiB (default: none is asked for)."
    )
    ray_timeout: float = setting(
        2.0, "Seconds until Ray must have a place for a replica; longer where it starts machines for that."
    )
    engine_tls: bool = setting(False, "Speak TLS with engines elsewhere, which need a certificate for that.")
    engine_listen: str | None = setting(
        None,
        "Address of this machine at which engines elsewhere fetch KV blocks from its engines, such as 10.0.0.1:9100; "
        "each of them takes one more port (default: they do not).",
    )
    api_key: tuple[str, ...] = setting((), "API key that requests must send; may be repeated.")
    api_key_file: str | None = setting(
        None,
        "File with an API key per line, optionally followed by settings such as name=alice weight=2 priority=low "
        "ttft=1s itl=100ms tpot=50ms.",
    )
    allow_origin: tuple[str, ...] = setting((), "Web origin allowed by CORS; * allows any. May be repeated.")
    tls_certificate: str | None = setting(None, "PEM certificate file; with tls_key, enables HTTPS.")
    tls_key: str | None = setting(None, "PEM key file.")
    served_model_name: str | None = setting(None, "Name of the model in the API.")
    max_queued_requests: int = setting(
        1024, "Maximum number of running and waiting requests; further requests get HTTP 429."
    )
    max_queued_tokens: int = setting(
        4_194_304,
        "Maximum sum of prompt tokens and max_tokens over open requests, and of their log-probabilities; further "
        "requests get HTTP 429.",
    )
    max_body_mib: float = setting(16.0, "Maximum size of a request body in MiB.")
    max_prompts: int = setting(256, "Maximum number of prompts in a request.")
    max_stored_responses: int = setting(
        1024, "Maximum number of answers kept for store: true and previous_response_id; 0 keeps none."
    )
    max_stored_mib: float = setting(64.0, "Maximum size of these answers and what they were asked, together, in MiB.")
    step_timeout: float = setting(60.0, "Seconds after which an engine stuck in a step is restarted.")
    drain_timeout: float = setting(60.0, "Seconds that running requests may take to finish after SIGTERM.")
    client_timeout: float = setting(
        60.0,
        "Seconds that a client may take to send a head or a body (plus a second for each 16 KiB), or to read; then it "
        "is disconnected.",
    )
    keep_alive_timeout: float = setting(
        120.0, "Seconds after which an idle connection is closed; load balancers close theirs after 60 to 90."
    )
    log_prompts: bool = setting(False, "Include prompts and answers in the log.")
    otel: bool = setting(
        False,
        "Send a span of each request to an OpenTelemetry collector, which OTEL_EXPORTER_OTLP_ENDPOINT names; needs "
        "splitfuse[otel].",
    )
    record: str | None = setting(
        None, "File to record requests and steps to, for splitfuse replay; token ids of prompts and answers are in it."
    )
    record_max_mib: float = setting(
        1024.0, "Maximum size of a recording in MiB: FILE and those before it, FILE.1 to FILE.3."
    )
    console: bool = setting(False, "Serve a live view of the engines at /console.")

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be from 0 to 65535, not {self.port}")
        if not self.name or not all(c.isalnum() or c in "-_." for c in self.name) or self.name.startswith("."):
            raise ConfigError(f"name must be made of letters, digits, '-', '_' and '.', not {self.name!r}")
        if not 1 <= self.fronts <= MAX_FRONTS:
            raise ConfigError(f"fronts must be from 1 to {MAX_FRONTS}, not {self.fronts}")
        if self.fronts > 1 and sys.platform != "linux":
            raise ConfigError(
                f"fronts must be 1 on {sys.platform}, not {self.fronts}: only Linux divides connections among the "
                "sockets of one port"
            )
        if self.fronts > 1 and self.otel:
            raise ConfigError(
                "fronts and otel are mutually exclusive: a span needs the headers of its request, which stay in a "
                "front: leave one of them out"
            )
        for name in ("max_queued_requests", "max_queued_tokens", "max_prompts"):
            _at_least(name, getattr(self, name), 1)
        _at_least("replicas", self.replicas, 0 if self.engine else 1)
        if self.max_replicas is not None and not max(self.num_replicas, 1) <= self.max_replicas <= MAX_ENGINES:
            raise ConfigError(
                f"max_replicas must be at least replicas, which is {self.num_replicas}, and at most {MAX_ENGINES}, not "
                f"{self.max_replicas}"
            )
        if self.autoscale is not None:
            self._check_autoscale(*parse_autoscale(self.autoscale))
        if self.max_replicas is not None and not self.num_replicas:
            raise ConfigError("max_replicas needs replicas of at least 1 beside the engines elsewhere")
        if self.max_replicas is not None and self.roles is not None:
            raise ConfigError("max_replicas and roles are mutually exclusive: leave one of them out")
        for name, text in (("engine", each) for each in self.engine):
            if parse_address(name, text)[1] == 0:
                raise ConfigError(f"engine {text} must have the port that the engine listens on, such as 9000")
        if twice := next((each for each in self.engine if self.engine.count(each) > 1), None):
            raise ConfigError(f"engine {twice} is given twice: give each once")
        if self.ray is not None:
            self._check_ray(self.ray)
        elif self.ray_memory is not None:
            raise ConfigError("ray_memory is for replicas on Ray: set ray, or leave it out")
        elif self.ray_timeout != ServerConfig.ray_timeout:
            raise ConfigError("ray_timeout is for replicas on Ray: set ray, or leave it out")
        if self.roles is not None:
            parse_roles(self.roles, self.num_engines)
        if self.engine and self.key_file is None:
            raise ConfigError("engine needs key_file: the secret that its engine was started with")
        if not self.engine and (self.key_file is not None or self.engine_tls):
            name = "engine_tls" if self.key_file is None else "key_file"
            raise ConfigError(f"{name} is for engines elsewhere: name one with engine, or leave it out")
        if self.engine_listen is not None:
            self._check_engine_listen(self.engine_listen)
        _at_least("max_stored_responses", self.max_stored_responses, 0)
        _size("max_body_mib", self.max_body_mib)
        _size("max_stored_mib", self.max_stored_mib)
        _size("record_max_mib", self.record_max_mib)
        if self.record_max_mib < MIN_RECORD_MIB:
            raise ConfigError(f"record_max_mib must be at least {MIN_RECORD_MIB:g}, not {self.record_max_mib}")
        if self.record is not None and not self.record.strip():
            raise ConfigError(f"record {self.record!r} must be the path of a file, such as server.rec")
        if self.record is None and self.record_max_mib != ServerConfig.record_max_mib:
            raise ConfigError("record_max_mib is for a recording: set record, or leave it out")
        for name in ("step_timeout", "drain_timeout", "client_timeout", "keep_alive_timeout"):
            _timeout(name, getattr(self, name))
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ConfigError("tls_certificate and tls_key go together: give both or none")
        if any(not key.strip() for key in self.api_key):
            raise ConfigError("api_key must not be empty")
        if not all(key.isprintable() for key in self.api_key):
            raise ConfigError("api_key must have no line end, nor any other control character, in it")

    def _check_engine_listen(self, text: str) -> None:
        host, port = parse_address("engine_listen", text)
        if not (self.engine and self.num_replicas):
            raise ConfigError(
                "engine_listen is for engines of this machine beside others elsewhere: set engine and replicas, or "
                "leave it out"
            )
        most = self.most_replicas
        if not 0 < port <= 65536 - most:
            raise ConfigError(f"engine_listen {text} must have a port with {most - 1} more behind it, such as 9100")
        if host in ("0.0.0.0", "::"):
            raise ConfigError(f"engine_listen {text} must be an address at which engines elsewhere reach this machine")
        if is_loopback(host) and not all(is_loopback(parse_address("engine", each)[0]) for each in self.engine):
            raise ConfigError(
                f"engine_listen {text} cannot be reached from other machines: give this one's address there"
            )
        if self.engine_tls and self.tls_certificate is None:
            raise ConfigError("engine_listen with engine_tls needs tls_certificate and tls_key, which it uses too")

    def _check_autoscale(self, least: int, most: int) -> None:
        for name in ("max_replicas", "roles"):
            if getattr(self, name) is not None:
                raise ConfigError(f"autoscale and {name} are mutually exclusive: leave one of them out")
        if not least <= self.num_replicas <= most:
            raise ConfigError(
                f"replicas {self.replicas} must be from {least} to {most}, as autoscale says, or be left out"
            )

    def _check_ray(self, address: str) -> None:
        if address not in ("local", "auto"):
            if address.startswith("ray://"):
                raise ConfigError(f"ray {address} is of Ray's client, which places nothing: give host:port of the head")
            parse_address("ray", address)
        if self.ray_memory is not None:
            parse_bytes("ray_memory", self.ray_memory)
        _timeout("ray_timeout", self.ray_timeout)
        if self.replicas == 0:
            raise ConfigError("ray needs replicas of at least 1: leave one of them out")
        if self.engine_listen is not None:
            raise ConfigError("engine_listen is for engines of this machine, and with ray there are none: leave it out")

    @property
    def num_replicas(self) -> int:
        """Return the number of engines that belong to the server: on this machine, or on Ray."""
        if self.replicas is None and self.autoscale is not None:
            return parse_autoscale(self.autoscale)[0]
        return self.replicas if self.replicas is not None else int(not self.engine or self.ray is not None)

    @property
    def engine_roles(self) -> tuple[Role, ...]:
        """Return the role of each engine: first those on this machine, then the others."""
        return (Role.MIXED,) * self.num_engines if self.roles is None else parse_roles(self.roles, self.num_engines)

    @property
    def num_engines(self) -> int:
        """Return the number of all its engines, at the start."""
        return self.num_replicas + len(self.engine)

    @property
    def max_engines(self) -> int:
        """Return the most engines that it can come to have."""
        return self.most_replicas + len(self.engine)

    @property
    def most_replicas(self) -> int:
        """Return the most replicas that it can come to have."""
        if self.max_replicas is not None:
            return self.max_replicas
        if self.autoscale is not None:
            return parse_autoscale(self.autoscale)[1]
        can_grow = self.ray is not None and self.roles is None
        return max(self.num_replicas, MOST_ON_RAY if can_grow else 0)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> ServerConfig:
        """Return the configuration from flat settings. Raises ConfigError for an unknown name or a wrong type."""
        refuse_unknown(settings, [each.name for each in dataclasses.fields(cls)])
        return _parse(cls, settings)


@dataclass(frozen=True, kw_only=True)
class GatewayConfig:
    """Says which servers a gateway passes requests on to, and how it meets its clients (splitfuse gateway)."""

    server: tuple[str, ...] = setting(
        (), "URL of a server to pass requests on to, a cell, such as http://10.0.0.2:8000; repeated for each."
    )
    server_key_file: str | None = setting(
        None,
        "File with an API key of the servers, with which their /metrics are read, readable by its owner only; needed "
        "where they have keys.",
    )
    server_certificate: str | None = setting(
        None, "PEM file with the certificates that servers at https may have (default: the system's authorities)."
    )
    host: str = setting("127.0.0.1", "Address to listen on; the default accepts connections from this machine only.")
    port: int = setting(8080, "Port to listen on; 0 picks a free one.")
    name: str = setting("gateway", "Name of the deployment, for ps and stop.")
    tls_certificate: str | None = setting(None, "PEM certificate file; with tls_key, enables HTTPS.")
    tls_key: str | None = setting(None, "PEM key file.")
    max_open_requests: int = setting(4096, "Maximum number of open requests; further requests get HTTP 429.")
    max_body_mib: float = setting(16.0, "Maximum size of a request body in MiB.")
    drain_timeout: float = setting(60.0, "Seconds that open requests may take to finish after SIGTERM.")
    client_timeout: float = setting(
        60.0,
        "Seconds that a client may take to send a head or a body (plus a second for each 16 KiB), or to read; then it "
        "is disconnected.",
    )
    keep_alive_timeout: float = setting(120.0, "Seconds after which an idle connection is closed.")

    def __post_init__(self) -> None:
        if not self.server:
            raise ConfigError("server is missing: give the URL of each server, such as --server http://10.0.0.2:8000")
        urls = [parse_url("server", each) for each in self.server]
        if twice := next((each for each in urls if urls.count(each) > 1), None):
            raise ConfigError(f"server {twice} is given twice: give each once")
        if self.server_certificate is not None and not any(each.startswith("https:") for each in urls):
            raise ConfigError("server_certificate is for servers at https: leave it out")
        _at_least("max_open_requests", self.max_open_requests, 1)
        assert self.front is not None  # which checks the rest

    @property
    def front(self) -> ServerConfig:
        """Return the settings of its HTTP server."""
        return ServerConfig(
            host=self.host,
            port=self.port,
            name=self.name,
            tls_certificate=self.tls_certificate,
            tls_key=self.tls_key,
            max_queued_requests=self.max_open_requests,
            max_body_mib=self.max_body_mib,
            drain_timeout=self.drain_timeout,
            client_timeout=self.client_timeout,
            keep_alive_timeout=self.keep_alive_timeout,
        )

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> GatewayConfig:
        """Return the configuration from flat settings. Raises ConfigError for an unknown name or a wrong type."""
        refuse_unknown(settings, [each.name for each in dataclasses.fields(cls)])
        return _parse(cls, settings)


@dataclass(frozen=True, kw_only=True)
class RankConfig:
    """Says how a rank is reached that computes a model with a server on another machine (splitfuse rank)."""

    model: str | None = setting(None, "Model folder, GGUF file or Hub name here (default: the server's).")
    listen: str | None = setting(None, "Address and port to listen on, such as 10.0.0.2:9100; 0.0.0.0 for any address.")
    key_file: str | None = setting(
        None, "File with the secret that the server has as rank_key_file, readable by its owner only."
    )

    def __post_init__(self) -> None:
        if self.listen is None:
            raise ConfigError("listen is missing: give the address to listen on, such as --listen 10.0.0.2:9100")
        parse_address("listen", self.listen)
        if self.key_file is None:
            raise ConfigError(
                "key_file is missing: give a file with a secret, which (umask 077; openssl rand -hex 32 > FILE) makes"
            )


@dataclass(frozen=True, kw_only=True)
class ListenConfig:
    """Says how an engine is reached that serves servers on other machines (splitfuse engine)."""

    listen: str | None = setting(None, "Address and port to listen on, such as 10.0.0.2:9000; 0.0.0.0 for any address.")
    key_file: str | None = setting(
        None, "File with the secret that servers and other engines have too, readable by its owner only."
    )
    tls_certificate: str | None = setting(None, "PEM certificate file; with tls_key, all connections are TLS.")
    tls_key: str | None = setting(None, "PEM key file.")
    step_timeout: float = setting(60.0, "Seconds after which an engine that is stuck in a step ends itself.")

    def __post_init__(self) -> None:
        if self.listen is None:
            raise ConfigError("listen is missing: give the address to listen on, such as --listen 10.0.0.2:9000")
        parse_address("listen", self.listen)
        if self.key_file is None:
            raise ConfigError(
                "key_file is missing: give a file with a secret, which (umask 077; openssl rand -hex 32 > FILE) makes"
            )
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ConfigError("tls_certificate and tls_key go together: give both or none")
        _timeout("step_timeout", self.step_timeout)


def change_settings(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return engine settings with changes to them: num_blocks replaces kv_cache_memory_gib, and the other way round."""
    sizes = {"num_blocks", "kv_cache_memory_gib"}
    replaced = sizes if sizes & changes.keys() else set[str]()
    return {**{name: value for name, value in settings.items() if name not in replaced}, **changes}


def parse_adapter(text: str) -> tuple[str, str]:
    """Return the name and the path of a LoRA adapter given as `name=path`. Raises ConfigError."""
    name, _, path = text.partition("=")
    if not ADAPTER_NAME.fullmatch(name) or not path:
        raise ConfigError(f"lora must be name=path, such as sql=adapters/sql, not {text!r}")
    return name, path


def parse_address(name: str, text: str) -> tuple[str, int]:
    """Return the host and the port of an address. Raises ConfigError, naming the setting.

    >>> parse_address("engine", "10.0.0.2:9000"), parse_address("engine", "[::1]:9000")
    (('10.0.0.2', 9000), ('::1', 9000))
    """
    match = re.fullmatch(r"(\[[0-9a-fA-F:.%\w]+\]|[^:\s/\[\]]+):(\d{1,5})", text, re.ASCII)
    if match is None or int(match[2]) > 65535:
        raise ConfigError(f"{name} must be an address and a port, such as 10.0.0.2:9000, not {text!r:.200}")
    return match[1].strip("[]"), int(match[2])


def parse_url(name: str, text: str) -> str:
    """Return the URL of a server without a slash at its end. Raises ConfigError, naming the setting.

    >>> parse_url("server", "http://10.0.0.2:8000/")
    'http://10.0.0.2:8000'
    """
    url = text.rstrip("/")
    found = re.fullmatch(r"https?://(?:\[[0-9a-fA-F:.]+\]|[\w-]{1,63}(?:\.[\w-]{1,63})*)(?::(\d{1,5}))?", url, re.ASCII)
    if found is None or not 1 <= int(found[1] or 1) <= 65535:
        raise ConfigError(f"{name} must be the URL of a server, such as http://10.0.0.2:8000, not {text!r:.200}")
    return url


def is_loopback(host: str) -> bool:
    """Return whether a host means the machine itself, on each machine another one."""
    return host in ("localhost", "::1") or host.startswith("127.")


def parse_seconds(name: str, text: str) -> float:
    """Return a duration such as `1s` or `250ms` in seconds. Raises ConfigError, naming the setting, without a unit."""
    number = text.strip().rstrip("abcdefghijklmnopqrstuvwxyz ")
    unit = text.strip()[len(number) :].strip()
    try:
        seconds = float(number) * UNITS[unit]
    except (ValueError, KeyError) as error:
        forms = f"1s, 250ms or 2ms{PER_TOKEN}" if name == "ttft" else "1s or 250ms"
        raise ConfigError(f"{name} must be a time with its unit, such as {forms}, not {text!r}") from error
    if not MIN_TARGET <= seconds <= MAX_TARGET:
        raise ConfigError(
            f"{name} must be a time from {1e3 * MIN_TARGET:g}ms to {MAX_TARGET:.0f}s, such as 250ms, not {text!r}"
        )
    return seconds


def parse_bytes(name: str, text: str) -> int:
    """Return a size such as `4GiB` in bytes. Raises ConfigError, naming the setting.

    >>> parse_bytes("kv_memory_tier", "1.5MiB")
    1572864
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(MiB|GiB|TiB)", text.strip())
    size = float(match[1]) * SIZES[match[2]] if match else 0.0
    if not 1 <= size <= MAX_SIZE * SIZES["GiB"]:
        raise ConfigError(f"{name} must be a size in MiB, GiB or TiB, such as 4GiB, not {text!r:.80}")
    return int(size)


def parse_disk_tier(text: str) -> tuple[str, int]:
    """Return the folder and the bytes of a disk tier given as `PATH:50GiB`. Raises ConfigError."""
    path, colon, size = text.rpartition(":")
    if not colon or not path:
        raise ConfigError(
            "kv_disk_tier must be a folder and a size in MiB, GiB or TiB, such as /var/cache/kv:50GiB, not "
            f"{text!r:.200}"
        )
    return path, parse_bytes("the size of kv_disk_tier", size)


def parse_autoscale(text: str) -> tuple[int, int]:
    """Return the least and the largest number of replicas, given as `1:4`. Raises ConfigError.

    >>> parse_autoscale("1:4")
    (1, 4)
    """
    match = re.fullmatch(r"(\d{1,4}):(\d{1,4})", text, re.ASCII)
    if match is None or not 1 <= int(match[1]) <= int(match[2]) <= MAX_ENGINES:
        raise ConfigError(
            f"autoscale must be the least and the largest number of replicas, such as 1:4, not {text!r:.80}"
        )
    return int(match[1]), int(match[2])


def parse_roles(text: str, num_engines: int) -> tuple[Role, ...]:
    """Return the role of each engine, given as `prompt:1,generation:1`. Raises ConfigError for roles that are unknown,
    or too many or too few, and where a part of each request has no engine.

    >>> [str(role) for role in parse_roles("prompt:1,generation:2", 3)]
    ['prompt', 'generation', 'generation']
    """
    roles: list[Role] = []
    for part in text.split(","):
        name, _, number = part.strip().partition(":")
        if name not in list(Role) or not number.isdecimal() or not 1 <= int(number) <= MAX_ENGINES:
            names = ", ".join(Role)
            raise ConfigError(f"roles must be such as prompt:1,generation:1, of {names}, not {part.strip()!r:.80}")
        roles += [Role(name)] * int(number)
    if len(roles) != num_engines:
        raise ConfigError(f"roles {text!r:.80} are of {len(roles)} engines, and there are {num_engines}: give each one")
    if Role.MIXED not in roles and len(set(roles)) == 1:
        missing = Role.GENERATION if roles[0] is Role.PROMPT else Role.PROMPT
        raise ConfigError(f"roles {text!r:.80} leave out {missing} engines: add one, or mixed ones")
    return tuple(roles)


def parse_itl(text: str) -> tuple[float, float | None]:
    """Return the seconds of an ITL target and its percentile, which is None for the moving average. Raises ConfigError.

    >>> parse_itl("250ms"), parse_itl("250ms/p99")
    ((0.25, None), (0.25, 99.0))
    """
    time, slash, percentile = text.partition("/")
    seconds = parse_seconds("itl", time)
    if not slash:
        return seconds, None
    number = percentile.strip().removeprefix("p")
    try:
        percent = float(number) if number != percentile.strip() else math.nan
    except ValueError:
        percent = math.nan
    if not 0 < percent < 100:
        raise ConfigError(
            f"itl {text!r} must end with a percentile above p0 and below p100, such as {time.strip()}/p99, or with "
            f"nothing, as {time.strip()}"
        )
    return seconds, percent


PARTS: dict[str, type[Any]] = {"model": ModelConfig, "scheduler": SchedulerConfig, "cache": CacheConfig}


def _parse(part: type[_Part], settings: Mapping[str, Any]) -> _Part:
    """Return a part from its settings. Raises ConfigError for a wrong type."""
    hints, values = typing.get_type_hints(part), dict(settings)
    for name, value in settings.items():
        if hints[name] == tuple[str, ...]:
            values[name] = (value,) if isinstance(value, str) else tuple(value)
            if not all(isinstance(item, str) for item in values[name]):
                raise ConfigError(f"{name} must be a text or a list of texts, not {value!r:.80}")
        else:
            _check_type(name, value, hints[name])
    return part(**values)


def refuse_unknown(settings: Iterable[str], known: Collection[str]) -> None:
    """Raise ConfigError, with the nearest known name, for a setting that is not known."""
    for name in settings:
        if name not in known:
            raise ConfigError(f"unknown setting {name!r}{did_you_mean(name, known)}")


def _check_type(name: str, value: Any, hint: Any) -> None:
    wanted_types = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    allowed = (*wanted_types, int) if float in wanted_types else wanted_types
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        wanted = " or ".join("None" if t is types.NoneType else t.__name__ for t in wanted_types)
        raise ConfigError(f"{name} must be {wanted}, not {value!r}")


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def _size(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ConfigError(f"{name} must be a positive number, not {value}")
    if value > MAX_SIZE:
        raise ConfigError(f"{name} must be at most {MAX_SIZE:.0f}, not {value}")


def _timeout(name: str, value: float) -> None:
    if not MIN_TIMEOUT <= value <= MAX_TIMEOUT:
        raise ConfigError(f"{name} must be a number of seconds from {MIN_TIMEOUT:g} to {MAX_TIMEOUT:.0f}, not {value}")


def _at_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise ConfigError(f"{name} must be at least {least}, not {value}")
