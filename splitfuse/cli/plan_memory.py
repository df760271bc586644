"""`splitfuse plan-memory`: show the memory that a model needs, before anything is loaded."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from splitfuse.cli.flags import given, with_flags
from splitfuse.config.engine import EngineConfig

if TYPE_CHECKING:
    from splitfuse.models.sources.source import WeightSource


@with_flags()
def plan_memory(**flags: Any) -> None:
    """Print the memory that a model needs, and what is available."""
    from splitfuse.errors import WeightsError
    from splitfuse.models.families.registry import load_spec
    from splitfuse.models.storage import describe_kept
    from splitfuse.models.weights import check_weights, resolve_dtype
    from splitfuse.runtime import memory_planner
    from splitfuse.runtime.backend_choice import choose_backend
    from splitfuse.runtime.device import choose_device, device_of
    from splitfuse.runtime.draft_model import open_draft
    from splitfuse.runtime.loading import check_quantization, open_source, parse_device

    config = EngineConfig.from_settings(given(flags))
    device = parse_device(device_of(config))
    source = open_source(config, weights=False)
    spec = load_spec(source)
    weights: WeightSource | None = None
    with suppress(WeightsError):  # of the Hub they are not fetched
        weights = source.weights()
    if weights is not None:
        spec = check_weights(weights, spec)
        check_quantization(config, source, weights)
    draft = open_draft(config, source, spec, device=device, fetched=False)
    backend = choose_backend(config, dtype := resolve_dtype(config.model.dtype, spec))
    plan = memory_planner.plan_memory(
        spec, config, backend=backend, weights=weights, draft=None if draft is None else draft.sizes
    )
    if weights is not None:
        plan = replace(plan, remarks=(*plan.remarks, *describe_kept(weights, spec, backend, dtype)))
    plan = replace(plan, remarks=(*plan.remarks, *choose_device(config).remarks))
    print(plan, flush=True)
