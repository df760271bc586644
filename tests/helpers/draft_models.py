"""Draft models for tests: the first layers of a model, and drafting that asks them whatever a step takes."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from splitfuse.core.events import StepRecord
from splitfuse.core.plan import DraftKind
from splitfuse.core.speculation.token_cost import TokenCost
from splitfuse.engine.engine import Engine

LAYER = "model.layers."


def first_layers(model: Path, folder: Path, count: int) -> str:
    """Write a model that has only the first layers of another one. Returns its folder."""
    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": count}))
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((model / name).read_bytes())
    tensors = load_file(model / "model.safetensors")
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith(LAYER) or int(name.removeprefix(LAYER).split(".")[0]) < count
    }
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


class FixedCost(TokenCost):
    """Steps of equal time."""

    is_measured = True
    per_token = 0.0

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._fixed = seconds

    def seconds(self, tokens: int) -> float:
        return self._fixed + 0.0 * tokens

    def observe(self, tokens: int, seconds: float) -> None:
        pass


def draft_always(engine: Engine) -> None:
    """Let the draft model of an engine guess whenever it can."""
    drafting = engine.scheduler.drafting
    assert drafting is not None and drafting.model is not None
    drafting.cost, drafting.model.cost = FixedCost(1.0), FixedCost(1e-6)


def count_drafts(engine: Engine) -> dict[DraftKind, list[int]]:
    """Return a dictionary that has, while the engine runs, the drafts of each kind, and those that were right."""
    counts = {kind: [0, 0] for kind in DraftKind}

    def count(step: StepRecord) -> None:
        for chunk in step.plan.chunks:
            if chunk.num_drafts:
                counts[chunk.draft_kind][0] += chunk.num_drafts
                counts[chunk.draft_kind][1] += max(len(step.result[chunk.request_id].token_ids) - 1, 0)

    engine.events.subscribe(StepRecord, count)
    return counts
