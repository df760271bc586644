"""All settings of an engine, frozen and checked once, at the edge. Standard library only: dtypes are strings.

Every field's metadata holds the sentence that `--help` shows; the command line and `pipeline()` take their names from
here. A field left at None is resolved when the model is known (`max_model_len`, `num_blocks`).
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from splitfuse.errors import ConfigError, did_you_mean

DTYPES = ("auto", "bfloat16", "float16", "float32")
LOAD_FORMATS = ("safetensors", "dummy")
QUANTIZATIONS = ("int8", "int4")
GROUP_SIZES = (64, 128)
KERNELS = ("auto", "avx512_bf16", "avx512", "avx2", "torch", "reference")
KV_CACHE_DTYPES = ("auto", "int8")
UNITS = {"ms": 1e-3, "s": 1.0, "min": 60.0}
PER_TOKEN = "/token"
TAIL_SHARE, MAX_TAIL_SHARE = 1 / 16, 1 / 4


def setting(default: Any, help: str) -> Any:  # noqa: A002 - the word every command line uses
    """A dataclass field with its help text."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, and in what form."""

    model: str | None = setting(None, "A folder or a Hugging Face Hub name; left out, the small bundled model.")
    revision: str | None = setting(None, "Hub branch, tag or commit.")
    tokenizer: str | None = setting(None, "A folder or Hub name to take the tokenizer from, if not the model's.")
    dtype: str = setting(
        "auto", "Weights and activations: auto (as the checkpoint says), bfloat16, float16 or float32."
    )
    quantization: str | None = setting(
        None, "int8 or int4: weights are quantized while they are loaded (CPU kernels); left out, they are not."
    )
    quantization_group_size: int | None = setting(
        None, "Columns that share a scale: 128 for int8, 64 or 128 for int4; left out, a whole row and 64."
    )
    kernels: str = setting(
        "auto",
        "auto (the best this machine can run), avx512_bf16, avx512 or avx2 (C++), torch (PyTorch with oneDNN), "
        "reference (PyTorch).",
    )
    num_threads: int | None = setting(None, "Threads of the CPU kernels; left out, the cores this process may use.")
    device: str = setting("cpu", "A torch device, such as cpu or cuda:0.")
    load_format: str = setting("safetensors", "safetensors, or dummy: random weights made from the config alone.")
    max_model_len: int | None = setting(
        None, "Most tokens of prompt and output together; left out, what the model allows."
    )

    def __post_init__(self) -> None:
        _choice("dtype", self.dtype, DTYPES)
        _choice("load_format", self.load_format, LOAD_FORMATS)
        _choice("kernels", self.kernels, KERNELS)
        if self.quantization is not None:
            _choice("quantization", self.quantization, QUANTIZATIONS)
        elif self.quantization_group_size is not None:
            raise ConfigError("quantization_group_size needs a quantization: int8 or int4")
        if self.quantization_group_size not in (None, *GROUP_SIZES):
            raise ConfigError(f"quantization_group_size must be 64 or 128, not {self.quantization_group_size}")
        _at_least("num_threads", self.num_threads, 1)
        _at_least("max_model_len", self.max_model_len, 2)


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """How forward steps are composed."""

    max_num_batched_tokens: int = setting(256, "The token budget of one forward step.")
    max_num_seqs: int = setting(64, "Most requests running at once.")
    ttft: str | None = setting(
        None, "Time to the first token that requests are promised: 1s, or 2ms/token for each token of the prompt."
    )
    itl: str | None = setting(None, "Time between tokens that requests are promised, such as 250ms.")
    enable_slo: bool = setting(
        False, "Keep what keys and requests ask to be promised, even if nothing is promised to everybody."
    )
    tail_share: float = setting(
        TAIL_SHARE,
        "Part of each step for the oldest request if it is late or others come first, at most 0.25: more shortens the "
        "longest wait, and leaves fewer on time.",
    )

    def __post_init__(self) -> None:
        _at_least("max_num_batched_tokens", self.max_num_batched_tokens, 1)
        _at_least("max_num_seqs", self.max_num_seqs, 1)
        if self.ttft is not None:
            parse_seconds("ttft", self.ttft.removesuffix(PER_TOKEN))
        if self.itl is not None:
            parse_seconds("itl", self.itl)
        if not 0 < self.tail_share <= MAX_TAIL_SHARE:
            raise ConfigError(f"tail_share must be above 0 and at most {MAX_TAIL_SHARE}, not {self.tail_share}")

    @property
    def has_targets(self) -> bool:
        """Whether anything is promised to everybody."""
        return self.ttft is not None or self.itl is not None

    @property
    def slo_enabled(self) -> bool:
        """Whether anything is promised, or may be."""
        return self.enable_slo or self.has_targets


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The blocked KV cache."""

    block_size: int = setting(32, "Tokens in one KV block.")
    num_blocks: int | None = setting(None, "KV blocks in all; left out, as many as kv_cache_memory_gib holds.")
    kv_cache_memory_gib: float | None = setting(
        None,
        "Memory for the KV cache, in GiB; left out, enough for max_num_seqs requests, at most half of what is free.",
    )
    kv_cache_dtype: str = setting("auto", "auto (that of the activations) or int8: half the memory (CPU kernels).")
    enable_prefix_caching: bool = setting(True, "Reuse the KV blocks of equal prompt beginnings.")

    def __post_init__(self) -> None:
        _at_least("block_size", self.block_size, 1)
        _choice("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        _at_least("num_blocks", self.num_blocks, 1)
        if self.kv_cache_memory_gib is not None and not 0 < self.kv_cache_memory_gib < float("inf"):
            raise ConfigError(f"kv_cache_memory_gib must be a positive number, not {self.kv_cache_memory_gib}")
        if self.num_blocks is not None and self.kv_cache_memory_gib is not None:
            raise ConfigError("num_blocks and kv_cache_memory_gib both set the size of the KV cache: give one of them")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything an engine needs to know: the sum of the parts."""

    model: ModelConfig = field(default_factory=ModelConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> EngineConfig:
        """Sort flat settings, such as `{"dtype": "float32", "block_size": 16}`, into their parts.

        Raises ConfigError for a name that no part has (with the nearest one) or a value of the wrong type.
        """
        known = cls.setting_fields()
        for name, value in settings.items():
            if name not in known:
                raise ConfigError(f"unknown setting {name!r}{did_you_mean(name, known)}")
            _check_type(name, value, _hints(known[name][0])[name])
        parts = {
            part_field.name: PARTS[part_field.name](
                **{name: value for name, value in settings.items() if known[name][0] is PARTS[part_field.name]}
            )
            for part_field in dataclasses.fields(cls)
        }
        return cls(**parts)

    @property
    def settings(self) -> dict[str, Any]:
        """Return the settings that have a value, flat, as `from_settings` takes them."""
        parts = [getattr(self, name) for name in PARTS]
        return {name: value for part in parts for name, value in vars(part).items() if value is not None}

    @classmethod
    def setting_fields(cls) -> dict[str, tuple[type[Any], dataclasses.Field[Any]]]:
        """Return, for each flat setting name, the part that it belongs to and its field."""
        return {f.name: (part, f) for part in PARTS.values() for f in dataclasses.fields(part)}


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """How a server meets its clients. Nothing here changes what is generated."""

    host: str = setting("127.0.0.1", "Address to listen on: this machine only, unless another is given.")
    port: int = setting(8000, "Port to listen on; 0 takes a free one.")
    name: str = setting("splitfuse", "Name of the deployment, for client(), ps and stop.")
    replicas: int = setting(1, "Engine processes on this machine, which share its cores.")
    api_key: tuple[str, ...] = setting((), "A key that requests must bring; may be given several times.")
    api_key_file: str | None = setting(
        None, "A file with a key in each line, and name, weight, priority, ttft or itl of its owner behind it."
    )
    allow_origin: tuple[str, ...] = setting((), "A web origin that browsers may call from; * is any.")
    tls_certificate: str | None = setting(None, "A PEM file; with tls_key, the server speaks HTTPS.")
    tls_key: str | None = setting(None, "A PEM file.")
    served_model_name: str | None = setting(None, "Name of the model in requests and answers.")
    max_queued_requests: int = setting(1024, "Most requests at once, running and waiting; then 429.")
    max_queued_tokens: int = setting(4_194_304, "Most tokens at once, prompts and what they may generate; then 429.")
    max_body_mib: float = setting(16.0, "Largest body of a request, in MiB.")
    max_prompts: int = setting(256, "Most prompts in one request.")
    step_timeout: float = setting(60.0, "Seconds after which an engine that finishes no step is restarted.")
    drain_timeout: float = setting(60.0, "Seconds that running requests have to end after SIGTERM.")
    client_timeout: float = setting(60.0, "Seconds that a client may take nothing of its answer; then it has gone.")
    log_prompts: bool = setting(False, "Write prompts and answers to the log.")

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be from 0 to 65535, not {self.port}")
        if not self.name or not all(c.isalnum() or c in "-_." for c in self.name) or self.name.startswith("."):
            raise ConfigError(f"name must be made of letters, digits, '-', '_' and '.', not {self.name!r}")
        for name in ("replicas", "max_queued_requests", "max_queued_tokens", "max_prompts"):
            _at_least(name, getattr(self, name), 1)
        for name in ("max_body_mib", "step_timeout", "drain_timeout", "client_timeout"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} must be a positive number, not {getattr(self, name)}")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ConfigError("tls_certificate and tls_key go together: give both or none")
        if any(not key.strip() for key in self.api_key):
            raise ConfigError("a key must not be empty")

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> ServerConfig:
        """From flat settings. Raises ConfigError for a name it does not have or a value of the wrong type."""
        hints = _hints(cls)
        values = dict(settings)
        for name, value in values.items():
            if name not in hints:
                raise ConfigError(f"unknown setting {name!r}{did_you_mean(name, hints)}")
            if name in ("api_key", "allow_origin"):
                values[name] = (value,) if isinstance(value, str) else tuple(value)
                if not all(isinstance(item, str) for item in values[name]):
                    raise ConfigError(f"{name} must be a list of texts")
            else:
                _check_type(name, value, hints[name])
        return cls(**values)


def parse_seconds(name: str, text: str) -> float:
    """`1s` or `250ms` in seconds. Raises ConfigError, naming the setting, for anything else, such as no unit."""
    number = text.strip().rstrip("abcdefghijklmnopqrstuvwxyz ")
    unit = text.strip()[len(number) :].strip()
    try:
        seconds = float(number) * UNITS[unit]
    except (ValueError, KeyError) as error:
        forms = f"1s, 250ms or 2ms{PER_TOKEN}" if name == "ttft" else "1s or 250ms"
        raise ConfigError(f"{name} must be a time with its unit, such as {forms}, not {text!r}") from error
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"{name} must be a time above 0, not {text!r}")
    return seconds


PARTS: dict[str, type[Any]] = {"model": ModelConfig, "scheduler": SchedulerConfig, "cache": CacheConfig}


def _hints(part: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(part)


def _check_type(name: str, value: Any, hint: Any) -> None:
    wanted_types = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    allowed = (*wanted_types, int) if float in wanted_types else wanted_types
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        wanted = " or ".join("None" if t is types.NoneType else t.__name__ for t in wanted_types)
        raise ConfigError(f"{name} must be {wanted}, not {value!r}")


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def _at_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise ConfigError(f"{name} must be at least {least}, not {value}")
