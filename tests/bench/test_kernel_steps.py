"""benchmarks/kernels: a step is compared with the limits of its own shape, no other's."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
from recorded_engine import config_of, recorded

from benchmarks.kernels.recorded import by_kind, recorded_steps, timed_steps
from benchmarks.kernels.steps import check_shape, make_chunks, step_operations
from benchmarks.models import SHAPES, config
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.errors import ConfigError
from splitfuse.models.families.registry import spec_from_config
from splitfuse.recording.format import Recording
from splitfuse.runtime.loading import load_model

DENSE = [name for name, shape in SHAPES.items() if not shape.num_experts]


@pytest.mark.parametrize("name", DENSE)
def test_a_model_of_the_shape_is_accepted(name: str) -> None:
    check_shape(name, spec_from_config(config(SHAPES[name])))


@pytest.mark.parametrize("name", DENSE)
def test_a_model_of_another_shape_is_refused_with_its_own(name: str) -> None:
    other = DENSE[DENSE.index(name) - 1]
    with pytest.raises(ConfigError, match=rf"--shape {other} has \w+ \d+, but the model has \d+: use --shape {name}"):
        check_shape(other, spec_from_config(config(SHAPES[name])))


def test_operations_of_rows_without_logits_end_with_their_keys_and_values() -> None:
    shape = SHAPES["0.5b"]
    spec = spec_from_config(config(shape))
    hidden, inner, layers = shape.hidden_size, shape.intermediate_size, shape.num_layers
    kv = 2 * shape.num_kv_heads * shape.head_dim * hidden
    layer, head = kv + 2 * hidden**2 + 3 * inner * hidden, hidden * spec.vocab_size
    decodes = 8 * (2 * (layers * layer + head) + 4 * layers * 513 * hidden)
    assert step_operations(spec, make_chunks(8, generating=True)) == decodes
    chunks = make_chunks(264, generating=False, beside=8)
    before, last = 256 * layer * (layers - 1), 256 * kv + layer - kv + head
    attended = 4 * hidden * ((layers - 1) * 256 * 257 // 2 + 256)
    assert step_operations(spec, chunks) == decodes + 2 * (before + last) + attended
    whole = replace(chunks[-1], num_logits=256)
    more = step_operations(spec, [*chunks[:-1], whole]) - step_operations(spec, chunks)
    assert more == 255 * 2 * (layer - kv + head) + 4 * hidden * (256 * 257 // 2 - 256)


def test_a_model_of_no_shape_is_refused() -> None:
    spec = spec_from_config(config(replace(SHAPES["0.5b"], num_layers=23)))
    with pytest.raises(ConfigError, match="has num_layers 24, but the model has 23: write one with python -m"):
        check_shape("0.5b", spec)
    experts = spec_from_config(config(SHAPES["moe"]))
    with pytest.raises(ConfigError, match="step wants a model of attention and dense MLPs"):
        check_shape("1.1b", experts)


def test_recorded_steps_are_compared_with_what_they_need(tmp_path: Path) -> None:
    tiny_models.save("llama-gqa", tmp_path)
    settings = config_of(tmp_path, block_size=4, num_blocks=64, max_num_batched_tokens=8)
    with recorded(tmp_path / "steps.rec", settings) as engine:
        engine.engine.add_request("a", range(3, 22), SamplingParams(max_tokens=4, ignore_eos=True))
        engine.run()
    model, steps = load_model(settings), recorded_steps(Recording.open(tmp_path / "steps.rec"))
    bound_by_memory = list(timed_steps(steps, model, read=1.0, dots=1e30))
    assert [(step.num_prompt_tokens, step.num_decodes) for step in bound_by_memory] == [(8, 0), (3, 0), *[(0, 1)] * 3]
    weights, kv = model.plan.weights, model.plan.block / model.plan.block_size
    if not model.spec.tied_embeddings:
        weights -= model.spec.vocab_size * model.spec.hidden_size * 2
    assert [step.limit for step in bound_by_memory] == [weights + kv * start for start in (8, 16, 19, 20, 21)]
    _, end, *decodes = timed_steps(steps, model, read=1e30, dots=1.0)
    assert end.limit > 2 * decodes[0].limit > 0  # with the logits of one row each
    assert all(step.seconds > 0 for step in bound_by_memory)
    assert {kind: len(each) for kind, each in by_kind(bound_by_memory).items()} == {"none": 3, "up to 64": 2}
