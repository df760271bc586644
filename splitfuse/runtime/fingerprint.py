"""Names what decides the tokens of a request besides the request, and the bytes of a KV block besides its tokens:
version, model, and the settings that change them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

import llguidance
import msgspec
import torch

from splitfuse.config.engine import EngineConfig
from splitfuse.kernels.interface import Backend
from splitfuse.models.sources.source import ModelSource
from splitfuse.runtime.machine import gpu
from splitfuse.runtime.memory_plan import MemoryPlan
from splitfuse.runtime.step_memory import first_shard
from splitfuse.version import __version__

_NOT_IN_BLOCKS = frozenset({"tokenizer", "llguidance", "max_model_len"})
"""Parts of an identity that keys and values do not depend on."""


def identify(
    source: ModelSource, config: EngineConfig, *, backend: Backend, plan: MemoryPlan, device: torch.device
) -> dict[str, str]:
    """Return texts that are all equal where requests with a seed have equal answers; where they may not have, one
    differs. Budgets, blocks and numbers of threads change no token.
    """
    model = config.model
    parts = {
        "version": __version__,
        "torch": torch.__version__,
        "llguidance": llguidance.__version__,
        "model": digest(source, config),
        "tokenizer": model.tokenizer,
        "load_format": model.load_format,
        "dtype": model.dtype,
        "quantization": model.quantization,
        "quantization_group_size": model.quantization_group_size,
        "kv_cache_dtype": config.cache.kv_cache_dtype,
        "kernels": describe_kernels(backend),
        "device": gpu(device) or device.type,
        "max_model_len": plan.max_model_len,
    }
    if first_shard(config, backend).sums:  # ranks that share memory give the same bits as one process
        parts["ranks"] = model.tensor_parallel_size
    return {name: str(part) for name, part in parts.items()}


def describe_kernels(backend: Backend) -> str:
    """Return a text that is equal where kernels give equal bits."""
    return re.sub(r", \d+ threads?", "", backend.describe())


def digest(source: ModelSource, config: EngineConfig, *, weights: bool = True) -> str:
    """Return a name of what the model's files say, with `weights` also of samples of those that are read."""
    return source.digest(weights=weights and config.model.load_format != "dummy")


def fingerprint(identity: Mapping[str, str]) -> str:
    """Return 12 hexadecimal digits that stand for an identity."""
    return hashlib.sha256(msgspec.json.encode(identity)).hexdigest()[:12]


def kv_fingerprint(
    identity: Mapping[str, str], *, layout: int, block_size: int, long_rope: bool = False, shard: str = "1/1"
) -> bytes:
    """Return a digest of all that the bytes of a KV block depend on besides its tokens, its salt and an adapter: the
    root of its name. `layout` is the version of what the bytes mean, `shard` the part of the heads that a block holds.
    `long_rope` says that positions are rotated by the frequencies of LongRoPE for long texts: of the model's length,
    which memory may limit, nothing else is in a block.
    """
    parts = {name: text for name, text in identity.items() if name not in _NOT_IN_BLOCKS}
    parts |= {"kv_layout": str(layout), "block_size": str(block_size), "long_rope": str(long_rope), "shard": shard}
    return hashlib.sha256(msgspec.json.encode(parts, order="sorted")).digest()
