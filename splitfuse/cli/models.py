"""`splitfuse models`: list the architectures that can be loaded, or say of a model whether it can."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from splitfuse.cli.flags import cli_errors
from splitfuse.config.engine import EngineConfig

HEADS = ("architecture", "models", "beyond Llama", "limits", "C++ kernels")
"""Heads of the columns; the last says how the C++ kernels compute the network."""
MIB = 2**20
OFFLINE = "HF_HUB_OFFLINE"


@cli_errors()
def models(
    check: Annotated[
        str | None,
        typer.Option(help="Say of a folder, a file or a Hub model in the local cache what it is and how it is kept."),
    ] = None,
) -> None:
    """List the architectures that can be loaded, models that have them, and what their networks have."""
    from splitfuse.cli.tables import console, make_table

    if check is not None:
        for line in check_lines(check):
            print(line, flush=True)
        return
    table = make_table(None, HEADS, cells(), left=HEADS)
    table.columns[0].no_wrap = True
    console().print(table)


def cells() -> list[tuple[str, ...]]:
    """Return the rows of the table, under HEADS."""
    from splitfuse.models.families.table import rows
    from splitfuse.runtime.backend_choice import in_cpp

    return [
        (row.architecture, row.models, ", ".join(row.properties), row.limits, in_cpp(row.spec.layers)) for row in rows()
    ]


def check_lines(model: str) -> Iterator[str]:
    """Yield lines on what a model is and what would become of it, without reading its tensors.

    Raises SplitfuseError with the reason why it cannot be loaded.
    """
    if not Path(model).expanduser().exists():
        os.environ.setdefault(OFFLINE, "1")  # nothing is fetched
    from splitfuse.models.families.registry import load_spec
    from splitfuse.models.families.table import MODELS
    from splitfuse.models.sources.hub import open_model
    from splitfuse.models.storage import tensor_groups
    from splitfuse.models.weights import check_weights, describe_aside, resolve_dtype
    from splitfuse.runtime.backend_choice import choose_backend
    from splitfuse.runtime.memory_planner import plan_memory
    from splitfuse.text.tokenizer import Tokenizer

    source = open_model(model)
    spec, config = load_spec(source), EngineConfig()
    known = f" ({MODELS[spec.architecture]})" if spec.architecture in MODELS else ""
    yield f"{source.location}: {spec.architecture}{known}, {len(spec.layers)} layers, {spec.max_position} positions"
    weights = source.weights()
    spec = check_weights(weights, spec)
    backend = choose_backend(config, dtype := resolve_dtype(config.model.dtype, spec))
    files, groups = source.files(), tensor_groups(weights, spec, backend, dtype)
    on_disk, in_memory = sum(file.stat().st_size for file in files), sum(group.num_bytes for group in groups)
    number = "1 file" if len(files) == 1 else f"{len(files)} files"
    yield f"weights: {on_disk / MIB:.1f} MiB in {number}, {in_memory / MIB:.1f} MiB in memory"
    for group in groups:
        exact = "exact" if group.exact else "rounded"
        yield f"  {group.count} tensors in {group.stored}: {group.kept}, {exact}, {group.num_bytes / MIB:.1f} MiB"
    yield from describe_aside(weights, spec)
    yield from weights.remarks()
    yield str(plan_memory(spec, config, backend=backend, weights=weights))
    tokenizer = Tokenizer.from_source(source)
    template = "a chat template" if tokenizer.chat_template is not None else "no chat template"
    yield f"tokenizer: {tokenizer.vocab_size} tokens, {template}"
    yield "it can be loaded"
