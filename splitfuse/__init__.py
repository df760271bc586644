"""splitfuse: Dynamic SplitFuse serving of large language models.

    import splitfuse
    pipe = splitfuse.pipeline()
    print(pipe("Erik plays the cello.\\n\\nWhat does Erik play?", chat=True)[0].generated_text)

The public names are resolved when they are first used, so that importing this package is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from splitfuse.version import __version__ as __version__

if TYPE_CHECKING:
    from splitfuse.api import Pipeline, pipeline
    from splitfuse.clients.client import AsyncClient
    from splitfuse.clients.sync import Client, async_client, client, serve
    from splitfuse.config import EngineConfig
    from splitfuse.core.request import FinishReason
    from splitfuse.core.sampling_params import SamplingParams
    from splitfuse.engine.engine import Engine
    from splitfuse.engine.ragged import RaggedEngine
    from splitfuse.errors import (
        ConfigError,
        DrainingError,
        EngineUnavailableError,
        InvalidRequestError,
        MemoryPlanError,
        ModelError,
        ModelNotFoundError,
        OverloadedError,
        PromptTooLongError,
        RequestFailedError,
        RequestTooLargeError,
        ServerError,
        SplitfuseError,
        TokenizerError,
        UnsupportedModelError,
        WeightsError,
    )
    from splitfuse.text.responses import Piece, Response

__all__ = [
    "AsyncClient",
    "Client",
    "ConfigError",
    "DrainingError",
    "Engine",
    "EngineConfig",
    "EngineUnavailableError",
    "FinishReason",
    "InvalidRequestError",
    "MemoryPlanError",
    "ModelError",
    "ModelNotFoundError",
    "OverloadedError",
    "Piece",
    "Pipeline",
    "PromptTooLongError",
    "RaggedEngine",
    "RequestFailedError",
    "RequestTooLargeError",
    "Response",
    "SamplingParams",
    "ServerError",
    "SplitfuseError",
    "TokenizerError",
    "UnsupportedModelError",
    "WeightsError",
    "async_client",
    "client",
    "pipeline",
    "serve",
]

_HOMES = {
    "AsyncClient": "splitfuse.clients.client",
    "Client": "splitfuse.clients.sync",
    "Engine": "splitfuse.engine.engine",
    "EngineConfig": "splitfuse.config",
    "FinishReason": "splitfuse.core.request",
    "Piece": "splitfuse.text.responses",
    "Pipeline": "splitfuse.api",
    "RaggedEngine": "splitfuse.engine.ragged",
    "Response": "splitfuse.text.responses",
    "SamplingParams": "splitfuse.core.sampling_params",
    "async_client": "splitfuse.clients.sync",
    "client": "splitfuse.clients.sync",
    "pipeline": "splitfuse.api",
    "serve": "splitfuse.clients.sync",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'splitfuse' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, "splitfuse.errors")), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
