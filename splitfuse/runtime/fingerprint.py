"""Names what decides the tokens of a request besides the request: version, model, and the settings that change them."""

from __future__ import annotations

import hashlib
import re

import llguidance
import msgspec
import torch

from splitfuse.config import EngineConfig
from splitfuse.kernels.interface import Backend
from splitfuse.models.sources.source import ModelSource
from splitfuse.runtime.machine import gpu
from splitfuse.runtime.memory_plan import MemoryPlan
from splitfuse.version import __version__


def fingerprint(
    source: ModelSource, config: EngineConfig, *, backend: Backend, plan: MemoryPlan, device: torch.device
) -> str:
    """Return 12 hexadecimal digits that are equal where requests with a seed have equal answers, and differ where they
    may not: not for other budgets, blocks or numbers of threads, which change no token.
    """
    model, is_dummy = config.model, config.model.load_format == "dummy"
    parts = {
        "versions": (__version__, str(torch.__version__), llguidance.__version__),
        "model": source.digest(weights=not is_dummy),
        "tokenizer": model.tokenizer,
        "formats": (model.load_format, model.dtype, model.quantization, model.quantization_group_size),
        "kv_cache_dtype": config.cache.kv_cache_dtype,
        "kernels": re.sub(r", \d+ threads?", "", backend.describe()),
        "device": (device.type, gpu(device)),
        "max_model_len": plan.max_model_len,
    }
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()[:12]
