"""`splitfuse plan-memory`: show the memory that a model needs, before anything is loaded."""

from __future__ import annotations

from typing import Any

from splitfuse.cli.flags import given, with_flags
from splitfuse.config import EngineConfig


@with_flags()
def plan_memory(**flags: Any) -> None:
    """Print the memory that a model needs, and what is available."""
    from splitfuse.models.families.registry import load_spec
    from splitfuse.models.sources.hub import open_model
    from splitfuse.models.weights import resolve_dtype
    from splitfuse.runtime import memory_plan
    from splitfuse.runtime.backend_choice import choose_backend
    from splitfuse.runtime.loading import parse_device

    config = EngineConfig.from_settings(given(flags))
    parse_device(config.model.device)
    spec = load_spec(
        open_model(config.model.model, config.model.revision, gguf_file=config.model.gguf_file, weights=False)
    )
    backend = choose_backend(config, resolve_dtype(config.model.dtype, spec))
    print(memory_plan.plan_memory(spec, config, backend=backend), flush=True)
