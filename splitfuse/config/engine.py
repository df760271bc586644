"""Defines the settings of an engine: frozen, parsed and checked once.

Dtypes are strings. A field left at None is resolved when the model is known (`max_model_len`, `num_blocks`).

    config = EngineConfig.from_settings({"model": "Qwen/Qwen2.5-0.5B-Instruct", "itl": "100ms"})
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from splitfuse.config.fields import check_at_least, check_choice, check_size, parse_settings, refuse_unknown, setting
from splitfuse.config.values import (
    PER_TOKEN,
    parse_adapter,
    parse_address,
    parse_bytes,
    parse_disk_tier,
    parse_itl,
    parse_seconds,
)
from splitfuse.errors import ConfigError

DTYPES = ("auto", "bfloat16", "float16", "float32")
LOAD_FORMATS = ("safetensors", "dummy")
QUANTIZATIONS = {"int8": (128,), "int4": (64, 128)}
"""Quantizations of weights, with the group sizes of each."""
KERNELS = ("auto", "avx512_amx", "avx512_bf16", "avx512", "avx2", "triton", "torch", "reference")
MAX_RANKS = 64
"""Most ranks of a tensor-parallel group: more than models have key/value heads to divide."""
MAX_THREADS = 1024
"""Number of threads of the largest machines. Hundreds of thousands end the process."""
KV_CACHE_DTYPES = ("auto", "int8", "fp8")
TARGETS = ("ttft", "itl", "tpot")
"""Names of the settings which are targets of an SLO."""
TAIL_SHARE, MAX_TAIL_SHARE = 0.15, 0.5
MAX_SPECULATIVE_TOKENS = 64
"""Most tokens that can be drafted for a request in a step: more than any step is worth."""
MAX_TOKEN_BUDGET = 2048
"""Largest token budget that is chosen by itself: up to here, every machine that was measured is saturated."""


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
        1, "Number of processes that compute the model together, each with a part of its weights, and a GPU if on GPUs."
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
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("load_format", self.load_format, LOAD_FORMATS)
        check_choice("kernels", self.kernels, KERNELS)
        if self.quantization is not None:
            check_choice("quantization", self.quantization, tuple(QUANTIZATIONS))
        elif self.quantization_group_size is not None:
            raise ConfigError(
                f"quantization_group_size {self.quantization_group_size} needs quantization int8 or int4: set that too"
            )
        group_sizes = {size for sizes in QUANTIZATIONS.values() for size in sizes}
        if self.quantization_group_size not in (None, *group_sizes):
            raise ConfigError(f"quantization_group_size must be 64 or 128, not {self.quantization_group_size}")
        check_at_least("num_threads", self.num_threads, 1)
        if self.num_threads is not None and self.num_threads > MAX_THREADS:
            raise ConfigError(f"num_threads must be at most {MAX_THREADS}, not {self.num_threads}")
        check_at_least("max_model_len", self.max_model_len, 2)
        check_at_least("tensor_parallel_size", self.tensor_parallel_size, 1)
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
        check_at_least("max_num_batched_tokens", self.max_num_batched_tokens, 1)
        check_at_least("max_num_seqs", self.max_num_seqs, 1)
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
        check_at_least("block_size", self.block_size, 1)
        if not 0.05 <= self.gpu_memory_share <= 1.0:
            raise ConfigError(f"gpu_memory_share must be from 0.05 to 1, not {self.gpu_memory_share}")
        check_choice("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        check_at_least("num_blocks", self.num_blocks, 1)
        if self.kv_cache_memory_gib is not None:
            check_size("kv_cache_memory_gib", self.kv_cache_memory_gib)
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


PARTS: dict[str, type[Any]] = {"model": ModelConfig, "scheduler": SchedulerConfig, "cache": CacheConfig}


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
            if self.model.cuda_graphs:
                raise ConfigError(
                    f"cuda_graphs cannot be used with tensor_parallel_size={size}, whose ranks would have to capture "
                    "the same steps at the same time: leave one of them out"
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
            part: parse_settings(kind, {name: value for name, value in settings.items() if known[name][0] is kind})
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


def change_settings(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return engine settings with changes to them: num_blocks replaces kv_cache_memory_gib, and the other way round.
    Another model is not at the revision of the one before, and a GGUF file has no gguf_file in it.
    """
    sizes = {"num_blocks", "kv_cache_memory_gib"}
    replaced = sizes if sizes & changes.keys() else set[str]()
    if (model := changes.get("model")) is not None and model != settings.get("model"):
        replaced = replaced | ({"revision", "gguf_file"} if model.endswith(".gguf") else {"revision"})
    return {**{name: value for name, value in settings.items() if name not in replaced}, **changes}
