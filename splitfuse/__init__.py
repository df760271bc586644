"""splitfuse: Dynamic SplitFuse serving of large language models.

    import splitfuse
    pipe = splitfuse.pipeline()
    print(pipe("Erik plays the cello.\\n\\nWhat does Erik play?", chat=True)[0].generated_text)

All public names are imported when they are first used, so that importing this package is instant.
"""

from __future__ import annotations

import importlib
import os

from splitfuse.version import __version__ as __version__

TYPE_CHECKING = False  # importing it from typing takes longer than all else here
if TYPE_CHECKING:
    from typing import Any

    from splitfuse.api import Pipeline as Pipeline
    from splitfuse.api import pipeline as pipeline
    from splitfuse.clients.client import AsyncClient as AsyncClient
    from splitfuse.clients.sync import Client as Client
    from splitfuse.clients.sync import async_client as async_client
    from splitfuse.clients.sync import client as client
    from splitfuse.clients.sync import serve as serve
    from splitfuse.config.engine import EngineConfig as EngineConfig
    from splitfuse.core.request_output import FinishReason as FinishReason
    from splitfuse.core.sampling_params import SamplingParams as SamplingParams
    from splitfuse.engine.engine import Engine as Engine
    from splitfuse.engine.ragged import RaggedEngine as RaggedEngine
    from splitfuse.errors import ConfigError as ConfigError
    from splitfuse.errors import DrainingError as DrainingError
    from splitfuse.errors import EngineUnavailableError as EngineUnavailableError
    from splitfuse.errors import InvalidRequestError as InvalidRequestError
    from splitfuse.errors import MemoryPlanError as MemoryPlanError
    from splitfuse.errors import ModelError as ModelError
    from splitfuse.errors import ModelNotFoundError as ModelNotFoundError
    from splitfuse.errors import OverloadedError as OverloadedError
    from splitfuse.errors import PromptTooLongError as PromptTooLongError
    from splitfuse.errors import RequestFailedError as RequestFailedError
    from splitfuse.errors import RequestTooLargeError as RequestTooLargeError
    from splitfuse.errors import ServerError as ServerError
    from splitfuse.errors import SplitfuseError as SplitfuseError
    from splitfuse.errors import TokenizerError as TokenizerError
    from splitfuse.errors import UnsupportedModelError as UnsupportedModelError
    from splitfuse.errors import WeightsError as WeightsError
    from splitfuse.text.responses import Piece as Piece
    from splitfuse.text.responses import Response as Response

# PyTorch's OpenMP threads (GNU's) wait for each other busily, by default for up to 16 ms. Next to another busy process
# they use up the cores' time for that, and steps take many times as long. It is read once, when PyTorch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # 0.1 to 0.4 ms: longer than the gaps between operations

_HOMES = {
    "splitfuse.api": ("Pipeline", "pipeline"),
    "splitfuse.clients.client": ("AsyncClient",),
    "splitfuse.clients.sync": ("Client", "async_client", "client", "serve"),
    "splitfuse.config.engine": ("EngineConfig",),
    "splitfuse.core.request_output": ("FinishReason",),
    "splitfuse.core.sampling_params": ("SamplingParams",),
    "splitfuse.engine.engine": ("Engine",),
    "splitfuse.engine.ragged": ("RaggedEngine",),
    "splitfuse.errors": (
        "ConfigError",
        "DrainingError",
        "EngineUnavailableError",
        "InvalidRequestError",
        "MemoryPlanError",
        "ModelError",
        "ModelNotFoundError",
        "OverloadedError",
        "PromptTooLongError",
        "RequestFailedError",
        "RequestTooLargeError",
        "ServerError",
        "SplitfuseError",
        "TokenizerError",
        "UnsupportedModelError",
        "WeightsError",
    ),
    "splitfuse.text.responses": ("Piece", "Response"),
}
_MODULES = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'splitfuse' has no attribute {name!r}")
    from splitfuse.engine import garbage

    with garbage.paused():
        return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
