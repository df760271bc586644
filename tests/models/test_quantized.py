"""Quantized checkpoints of the Hugging Face formats: what their tensors mean, whole networks, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import quantized_folders
import tiny_models
import torch
from backends import variants
from quantized_folders import awq, fp8, gptq, integers, mxfp4, packed, quantize
from ragged_requests import Request, Runner
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from splitfuse.config.engine import EngineConfig
from splitfuse.errors import ConfigError, ModelError
from splitfuse.kernels.cpu.backend import CpuBackend
from splitfuse.kernels.cpu.structs import BF16
from splitfuse.kernels.interface import Backend
from splitfuse.kernels.reference import ReferenceBackend
from splitfuse.models.decoder import Decoder
from splitfuse.models.families import table
from splitfuse.models.families.registry import load_spec, spec_from_config
from splitfuse.models.sources.folder import ModelFolder
from splitfuse.models.sources.quantized import layouts
from splitfuse.models.sources.quantized.config import read_quantization
from splitfuse.models.sources.quantized.schemes import Header, PackedIntegers
from splitfuse.models.sources.source import Piece
from splitfuse.models.storage import TensorGroup, tensor_groups
from splitfuse.models.weights import check_weights, load_decoder, resolve_dtype, weight_bytes
from splitfuse.runtime.loading import load_model
from splitfuse.runtime.memory_plan import MemoryPlan

PROMPT = [5, 17, 3, 88, 41, 9, 60, 2, 33, 71]


class Case(NamedTuple):
    """A layout, and the quantization_config that says it."""

    layer: Callable[..., quantized_folders.Stored]
    config: dict[str, Any]
    variant: str = "llama-gqa"


def gptq_config(**fields: Any) -> dict[str, Any]:
    made = {"desc_act": False, "damp_percent": 0.1, "true_sequential": True, "dataset": "c4", "lm_head": False}
    return {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True, **made, **fields}


def compressed(stored: str, *, inputs: Any = None, targets: Any = ("Linear",), **weights: Any) -> dict[str, Any]:
    whole = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "channel",
        "dynamic": False,
        "observer": "mse",
    }
    group = {"targets": list(targets), "weights": whole | weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": stored,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


def fp8_config(**fields: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", **fields}


DYNAMIC = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}

CASES = {
    "gptq": Case(gptq, gptq_config()),
    "gptq-v2-zeros-act-order": Case(
        partial(gptq, symmetric=False, act_order=True, minus_one=False, least_zero=0),
        gptq_config(checkpoint_format="gptq_v2", sym=False, desc_act=True),
    ),
    "gptq-int8-rows-zeros": Case(
        partial(gptq, bits=8, group_size=-1, symmetric=False), gptq_config(bits=8, group_size=-1, sym=False)
    ),
    "gptq-zeros-of-0-of-gptqmodel": Case(
        partial(gptq, symmetric=False, least_zero=0), gptq_config(sym=False, meta={"quantizer": ["gptqmodel:4.2.5"]})
    ),
    "awq": Case(awq, {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}),
    "auto-round-gptq": Case(
        gptq,
        {
            "quant_method": "auto-round",
            "packing_format": "auto_round:auto_gptq",
            "bits": 4,
            "group_size": 16,
            "sym": True,
            "data_type": "int",
            "iters": 200,
            "extra_config": {"lm_head": {"bits": 16}},
        },
    ),
    "auto-round-awq": Case(
        awq, {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "bits": 4, "group_size": 16}
    ),
    "packed-groups-act-order": Case(
        partial(packed, act_order=True),
        compressed("pack-quantized", strategy="group", group_size=16, actorder="group"),
    ),
    "packed-zeros": Case(
        partial(packed, symmetric=False),
        compressed("pack-quantized", strategy="group", group_size=16, symmetric=False, actorder="weight"),
    ),
    "packed-int8-rows-zeros": Case(
        partial(packed, bits=8, group_size=None, symmetric=False),
        compressed("pack-quantized", num_bits=8, symmetric=False),
    ),
    "gptq-act-order-experts": Case(partial(gptq, act_order=True), gptq_config(desc_act=True), "mixtral-window"),
    "packed-one-scale-experts": Case(
        partial(packed, group_size=None, one_scale=True),
        compressed("pack-quantized", strategy="tensor", targets=["re:.*experts.*", "re:.*self_attn\\.[qkvo]_proj$"]),
        "mixtral-window",
    ),
    "int8-rows": Case(integers, compressed("int-quantized", num_bits=8, inputs=DYNAMIC)),
    "int8-one-scale-zeros": Case(
        partial(integers, one_scale=True, symmetric=False),
        compressed(
            "int-quantized", num_bits=8, strategy="tensor", symmetric=False, inputs={**DYNAMIC, "dynamic": False}
        ),
    ),
    "fp8-blocks": Case(fp8, fp8_config(weight_block_size=[16, 128], modules_to_not_convert=["lm_head"])),
    "fp8-blocks-bf16-scales-experts": Case(
        partial(fp8, block=(32, 128), dtype=torch.bfloat16), fp8_config(weight_block_size=[32, 128]), "qwen3-moe"
    ),
    "fp8-static": Case(
        partial(fp8, block=None, ending=".weight_scale", static=True), fp8_config(activation_scheme="static")
    ),
    "fp8-rows": Case(
        partial(fp8, block=None, scale_shape=lambda rows: (rows, 1), ending=".weight_scale", dtype=torch.bfloat16),
        {
            **compressed("float-quantized", num_bits=8, type="float", inputs={**DYNAMIC, "type": "float"}),
            "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False},
        },
    ),
    "fp8-rows-fbgemm": Case(
        partial(fp8, block=None, scale_shape=lambda rows: (rows, 1), ending=".weight_scale"),
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]},
    ),
    "fp8-compressed-blocks": Case(
        partial(fp8, block=(8, 128), ending=".weight_scale"),
        compressed("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[8, 128]),
    ),
}


LAYER = "model.layers.0.self_attn.q_proj"
CONTRADICTIONS = {
    "gptq-zeros-of-0": Case(partial(gptq, symmetric=False, least_zero=0), gptq_config(sym=False)),
    "fp8-left-out": Case(fp8, fp8_config(weight_block_size=[16, 128], modules_to_not_convert=[LAYER])),
    "packed-no-target": Case(
        packed, compressed("pack-quantized", strategy="group", group_size=16, targets=["re:.*[ko]_proj", "re:.*mlp.*"])
    ),
}


def load(folder: Path, dtype: torch.dtype = torch.float32, backend: Backend | None = None) -> Decoder:
    weights, spec = ModelFolder(folder).weights(), load_spec(ModelFolder(folder))
    spec = check_weights(weights, spec)
    backend = backend or ReferenceBackend()
    return load_decoder(weights, spec, dtype=dtype, device=torch.device("cpu"), backend=backend)


def write(case: str, folder: Path) -> dict[str, Tensor]:
    """The quantized checkpoint of a case in `folder`; returns the weights that it means."""
    layer, config, variant = (CASES | CONTRADICTIONS)[case]
    folder.mkdir(exist_ok=True)
    tiny_models.save(variant, folder / "source")
    return quantize(folder / "source", folder, layer, config)


def dense(folder: Path, weights: dict[str, Tensor]) -> Any:
    """The transformers model of a folder with these weights."""
    target = folder / "dense"
    target.mkdir(parents=True)
    (target / "config.json").write_bytes((folder / "source" / "config.json").read_bytes())
    save_file({name: weight.float().contiguous() for name, weight in weights.items()}, target / "model.safetensors")
    return AutoModelForCausalLM.from_pretrained(target)


def logits(decoder: Decoder) -> Tensor:
    request = Request(list(PROMPT))
    Runner(decoder, block_size=32).step([(request, len(PROMPT))])
    return torch.stack(request.logits)


@torch.no_grad()
def assert_same_logits(decoder: Decoder, model: Any) -> None:
    oracle = model(input_ids=torch.tensor([PROMPT])).logits[0]
    assert (logits(decoder) - oracle).abs().max() <= 1e-4 * oracle.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_weights_and_logits(case: str, tmp_path: Path) -> None:
    """Each weight is what its tensors mean, rounded once; the network is that of transformers with these weights."""
    meaning = write(case, tmp_path)
    weights = ModelFolder(tmp_path).weights()
    quantized = 0
    for name, expected in meaning.items():
        if weights.quantization(name) is not None:
            quantized += 1
            with weights.read_quantized(Piece(name, tuple(expected.shape))) as weight:
                assert torch.equal(weight.dequantize(torch.float32), expected.float())
                assert torch.equal(weight.dequantize(torch.bfloat16), expected.float().bfloat16())
    assert quantized == sum(bool(quantized_folders.LAYERS.search(name)) for name in meaning) > 20
    assert_same_logits(load(tmp_path), dense(tmp_path, meaning))


def test_mxfp4_experts_as_gpt_oss_is_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two numbers a byte, rows as rows, all experts in one tensor: what transformers makes of them."""
    model = tiny_models.gpt_oss(hidden_size=64, intermediate_size=32, num_local_experts=5, num_experts_per_tok=5)
    model.float().save_pretrained(tmp_path / "source")
    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    meaning = quantize(tmp_path / "source", tmp_path, mxfp4, config, which=re.compile("$^"))
    stored = load_file(tmp_path / "model.safetensors")
    experts = [name.removesuffix("_blocks") for name in stored if name.endswith("_blocks")]
    for name in experts:
        oracle = convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"], dtype=torch.bfloat16)
        assert torch.equal(oracle, meaning[name].bfloat16())
    assert len(experts) == 6
    assert_same_logits(load(tmp_path), dense(tmp_path, meaning))
    kept = load(tmp_path, torch.bfloat16).weights.layers[1].w2[3]
    assert torch.equal(kept.float(), meaning["model.layers.1.mlp.experts.down_proj"][3].T.float())
    quantized = assert_loads_as_planned(tmp_path, variants()[-1].values[0], monkeypatch)
    assert quantized["kept as stored"].count == 6 * 5


def test_fp8_is_what_transformers_dequantizes(tmp_path: Path) -> None:
    write("fp8-blocks", tmp_path)
    stored, weights = load_file(tmp_path / "model.safetensors"), ModelFolder(tmp_path).weights()
    name = f"{LAYER}.weight"
    parts = {part: stored[f"{LAYER}.{part}"] for part in ("weight", "weight_scale_inv")}
    with weights.read_quantized(Piece(name, (48, 48))) as weight:
        assert torch.equal(weight.dequantize(torch.float32), Fp8Dequantize(None).convert(parts)["weight"])


def test_words_are_those_of_compressed_tensors() -> None:
    """pack_to_int32 of compressed-tensors 0.20.1 made these: of weights along columns, of zero points along rows."""
    for bits, stored, zeros in (
        (4, [[1049950800, 728], [-1525980729, 2383]], [[213]]),
        (8, [[252314880, 589175060, 3288360], [1178680375, 1515540555, 6906975]], [[34173]]),
    ):
        middle = 2 ** (bits - 1)
        levels = (torch.arange(22) * 5 % 2**bits - middle).view(2, 11)
        scheme = PackedIntegers(label="", bits=bits, group_size=None, zeros=True, one_scale=False)
        parts = {
            "packed": torch.tensor(stored, dtype=torch.int32),
            "scales": torch.ones(2, 1),
            "zeros": torch.tensor(zeros, dtype=torch.int32),
        }
        headers = {part: Header(tuple(tensor.shape), "F32") for part, tensor in parts.items()}
        weight = scheme.read(scheme.format(headers), parts, (2, 11))
        assert torch.equal(weight.dequantize(torch.float32), levels.float() - torch.tensor([[-3], [5]]))


def test_layers_that_the_checkpoint_leaves_out_stay_dense(tmp_path: Path) -> None:
    case = CASES["awq"]
    tiny_models.save("llama-gqa", tmp_path / "source")
    which = re.compile(r"layers\.[02]\..*(q|down)_proj\.weight")
    meaning = quantize(tmp_path / "source", tmp_path, case.layer, case.config, which=which)
    assert_same_logits(load(tmp_path), dense(tmp_path, meaning))


@pytest.mark.parametrize("case", ["packed-zeros", "fp8-rows"])
@pytest.mark.parametrize("variant", variants())
def test_time_steps_of_a_quantized_projection_are_dense(variant: str, case: str, tmp_path: Path) -> None:
    """They are rows of the same tensor as the rest of what a Mamba reads, which stays as it is stored."""
    tiny_models.save("granite-hybrid-dense-rope", tmp_path / "source")
    meaning = quantize(tmp_path / "source", tmp_path, CASES[case].layer, CASES[case].config)
    assert_same_logits(load(tmp_path), dense(tmp_path, meaning))
    decoder = load(tmp_path, torch.bfloat16, CpuBackend(variant=variant, num_threads=2))
    layer = decoder.weights.layers[0]
    assert layer.gates.format == BF16 != layer.in_proj.format
    assert logits(decoder).isfinite().all()


def test_biases_of_zeros_that_old_tools_wrote_are_left_aside(tmp_path: Path) -> None:
    meaning = write("gptq", tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    bias = "model.layers.1.mlp.up_proj.bias"
    save_file({**stored, bias: torch.zeros(72, dtype=torch.float16)}, tmp_path / "model.safetensors")
    assert_same_logits(load(tmp_path), dense(tmp_path, meaning))
    save_file({**stored, bias: torch.full((72,), 1e-3)}, tmp_path / "model.safetensors")
    assert bias in refusal(tmp_path)


def test_quantized_checkpoints_in_float16_are_computed_in_bfloat16(tmp_path: Path) -> None:
    write("gptq", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    source = ModelFolder(tmp_path)
    assert resolve_dtype("auto", load_spec(source)) == torch.bfloat16
    assert resolve_dtype("float16", load_spec(source)) == torch.float16
    assert source.weights().remarks() == [
        "dtype=auto is bfloat16 for quantized checkpoints that say float16, as this one does"
    ]


def test_the_config_of_old_gptq_files_is_read(tmp_path: Path) -> None:
    meaning = write("gptq", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    own = config.pop("quantization_config")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "weights missing from the checkpoint (21): model.layers.0.mlp.down_proj.weight" in refusal(tmp_path)
    del own["quant_method"]
    (tmp_path / "quantize_config.json").write_text(json.dumps(own))
    assert_same_logits(load(tmp_path), dense(tmp_path, meaning))


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as error:
        load(folder)
    return str(error.value)


def refusal_of(config: Any) -> str:
    values = {"architectures": ["LlamaForCausalLM"], **table.SIZES, "quantization_config": config}
    with pytest.raises(ModelError) as error:
        spec_from_config(values)
    return str(error.value)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            "bitsandbytes are not read: load the model it was made",
        ),
        ({"quant_method": "aqlm"}, "the quant_method 'aqlm' is not known: gptq, awq, "),
        (gptq_config(bits=3), "bits = 3 is not read: 2 or 4 or 8 is"),
        (gptq_config(act_bits=8), "act_bits = 8 is not read"),
        (gptq_config(checkpoint_format="marlin"), "checkpoint_format = 'marlin' is not read"),
        (gptq_config(group_size=0), "group_size = 0"),
        (gptq_config(group_size="128"), "group_size must be a whole number"),
        (gptq_config(dynamic={"+:.*down.*": {"bits": 8}}), "quantizes some layers otherwise"),
        (gptq_config(rotation="hadamard"), "rotation = 'hadamard' is not known here"),
        ({**CASES["awq"].config, "version": "gemv"}, "version = 'gemv' is not read"),
        ({**CASES["awq"].config, "zero_point": False}, "zero_point = False is not read"),
        ({"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round"}, "packing_format"),
        ({**CASES["auto-round-awq"].config, "extra_config": {"a": {"bits": 8}}}, "extra_config of 'a'"),
        (compressed("marlin-24"), "marlin-24 of int4, by channel"),
        (compressed("pack-quantized", num_bits=3), "pack-quantized of int3, by channel"),
        (compressed("pack-quantized", actorder="other"), "weights.actorder = 'other' is not read"),
        (compressed("pack-quantized", dynamic=True), "weights.dynamic = True"),
        (compressed("pack-quantized", kind_of_grid="e8"), "weights.kind_of_grid = 'e8' is not known here"),
        (compressed("pack-quantized", targets=["re:(a+)+b"]), "repeats a group"),
        (compressed("pack-quantized", targets=["re:.*.*.*.*.*x"]), "more than 4 wildcards"),
        (compressed("pack-quantized", targets=["re:("]), "is no pattern"),
        (compressed("pack-quantized", targets=["re:" + "(" * 1001]), "it has 1001 characters; at most 1000 are"),
        (compressed("pack-quantized", targets=["re:" + "a?" * 24 + "a" * 24]), "64 ways to choose among alternatives"),
        (compressed("pack-quantized", targets=["re:" + "(?:a|a)" * 7 + "b"]), "64 ways to choose among alternatives"),
        (compressed("pack-quantized", targets=["re:(?x)(a+) +b"]), "repeats a group, or has flags"),
        (compressed("nvfp4-pack-quantized", type="float"), "nvfp4-pack-quantized of float4"),
        (
            {**compressed("pack-quantized"), "sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparsity_config.format",
        ),
        ({**compressed("pack-quantized"), "transform_config": {"config_groups": {"u": 1}}}, "transform_config"),
        ({**compressed("pack-quantized"), "config_groups": {"W4A16": ["Linear"]}}, "W4A16 is a preset"),
        ({**compressed("pack-quantized"), "config_groups": {}}, "config_groups is empty"),
        (fp8_config(weight_block_size=[128, 64]), "the second a multiple of 128"),
        (fp8_config(weight_block_size=128), "weight_block_size must be a list"),
        (fp8_config(expert_dtype="fp4"), "expert_dtype = 'fp4'"),
        (fp8_config(fmt="e5m2"), "fmt = 'e5m2' is not read"),
        ("gptq", "quantization_config must be an object"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_configs_that_are_not_read_are_refused_by_name(config: Any, reason: str) -> None:
    assert reason in refusal_of(config)


ODD_VALUES: tuple[Any, ...] = (None, True, 0, -1, 3, 10**30, 1e300, "", "a", [], [1], ["re:("], {}, {"a": 1})


@pytest.mark.parametrize("case", CASES)
def test_odd_values_in_the_config_are_read_or_refused(case: str) -> None:
    """Each field of a config, and of what is in it, with each value."""

    def odd(value: Any) -> Iterator[Any]:
        yield from ODD_VALUES
        if isinstance(value, dict):
            for name, inner in value.items():
                yield from ({**value, name: other} for other in odd(inner))
            yield {**value, "other": 1}

    refused = 0
    for config in odd(CASES[case].config):
        try:
            read_quantization({"quantization_config": config})
        except ModelError as error:
            refused += 1
            assert len(str(error)) < 500
    assert refused >= 30


@pytest.mark.parametrize(
    ("pattern", "module"),
    [
        (r"re:.*mlp\.experts\.[0-9]+\..*_proj$", "model.layers.3.mlp.experts.17.up_proj"),
        (r"re:.*\.(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)$", "model.layers.3.mlp.down_proj"),
        (r"re:.*(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)$", "model.layers.3.self_attn.o_proj"),
        (r"re:^(?!.*visual).*proj$", "model.layers.3.mlp.up_proj"),
    ],
)
def test_targets_are_patterns_of_names(pattern: str, module: str) -> None:
    found = read_quantization({"quantization_config": compressed("pack-quantized", targets=[pattern])})
    assert found is not None
    assert found.scheme(module, ".weight_packed") and not found.scheme("model.visual.blocks.0", ".weight_packed")
    assert not found.scheme("model." * 40 + module, ".weight_packed")  # long names take long


@pytest.mark.parametrize("name", ["modules_to_not_convert", "ignored_layers", "ignore"])
def test_layers_left_out_of_fp8(name: str) -> None:
    found = read_quantization({"quantization_config": fp8_config(**{name: [LAYER, "re:.*visual.*"]})})
    assert found is not None and found.ignored == {LAYER}


def test_blocks_and_groups_beyond_a_matrix_take_no_memory(tmp_path: Path) -> None:
    values, scales = torch.ones(4, 256).to(torch.float8_e4m3fn), torch.tensor([[0.5, 0.25]])
    weight = layouts.fp8(values, scales, (2**40, 128))
    assert torch.equal(weight.dequantize(torch.float32), scales.repeat_interleave(128, dim=1).expand(4, -1))
    tiny_models.save("llama-gqa", tmp_path / "source")
    config = compressed("pack-quantized", strategy="group", group_size=2**31 - 1)
    meaning = quantize(tmp_path / "source", tmp_path, partial(packed, group_size=None), config)
    assert_same_logits(load(tmp_path), dense(tmp_path, meaning))
    assert logits(load(tmp_path, torch.bfloat16, CpuBackend(num_threads=1))).isfinite().all()


@pytest.mark.parametrize("others", [4, 6])
def test_parts_of_another_number_of_experts_are_refused(others: int, tmp_path: Path) -> None:
    model = tiny_models.gpt_oss(hidden_size=64, intermediate_size=32, num_local_experts=5)
    model.float().save_pretrained(tmp_path / "source")
    quantize(tmp_path / "source", tmp_path, mxfp4, {"quant_method": "mxfp4"}, which=re.compile("$^"))
    stored = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj"
    scales = stored[f"{name}_scales"]
    stored[f"{name}_scales"] = torch.cat([scales, scales])[:others].contiguous()
    save_file(stored, tmp_path / "model.safetensors")
    assert f"tensors of {name} have 5 and {others} experts: all must have as many" in refusal(tmp_path)


def test_sizes_that_do_not_fill_words_are_refused(tmp_path: Path) -> None:
    """68 columns of 4 bits, in the 8 words of 64."""
    tiny_models.llama(intermediate_size=68).save_pretrained(tmp_path / "source")
    quantize(tmp_path / "source", tmp_path, gptq, gptq_config(), which=re.compile(r"layers\.\d+\.mlp\.down_proj"))
    stored = load_file(tmp_path / "model.safetensors")
    cut = {name: tensor[:8].contiguous() for name, tensor in stored.items() if name.endswith(".qweight")}
    save_file({**stored, **cut}, tmp_path / "model.safetensors")
    assert "in GPTQ int4 rows must be a multiple of 8, and columns of 8" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("case", "change", "reason"),
    [
        ("gptq", {".qzeros": None}, "q_proj.qzeros"),
        ("gptq", {".scales": torch.ones(3, 40)}, "q_proj.scales has shape [3, 40], but config.json implies [3, 48]"),
        ("gptq", {".qweight": torch.ones(6, 48)}, "q_proj.qweight is stored as F32, but must be I32 in GPTQ int4"),
        ("gptq", {".g_idx": torch.zeros(48, dtype=torch.int32)}, "g_idx does not put 16 columns into each group"),
        ("gptq", {".qzeros": torch.zeros(3, 6, dtype=torch.int32)}, "zero points that are not 8"),
        ("gptq-zeros-of-0", {}, "zero points of 0 in version 1 of GPTQ"),
        ("fp8-blocks", {".weight": torch.ones(48, 48)}, "is stored as F32, but must be F8_E4M3"),
        ("fp8-blocks", {".weight_scale_inv": None}, "is stored as F8_E4M3, but must be one of BF16"),
        ("fp8-left-out", {}, "q_proj is stored quantized, although quantization_config leaves it out"),
        ("packed-no-target", {}, "_proj is stored quantized, but no target"),
        ("int8-rows", {".other": torch.ones(1)}, "q_proj.other"),
    ],
)
def test_tensors_that_contradict_the_config_are_refused(
    case: str, change: dict[str, Tensor | None], reason: str, tmp_path: Path
) -> None:
    write(case, tmp_path)
    stored: dict[str, Tensor | None] = {**load_file(tmp_path / "model.safetensors")}
    stored |= {LAYER + ending: tensor for ending, tensor in change.items()}
    kept = {name: tensor for name, tensor in stored.items() if tensor is not None}
    save_file(kept, tmp_path / "model.safetensors")
    assert reason in refusal(tmp_path)


@pytest.mark.parametrize(
    ("case", "line"),
    [
        ("awq", "quantized weights: 21 of AWQ int4 dequantized to float32"),
        ("mixed", "quantized weights: 9 of GPTQ int4 dequantized to float32"),
        ("int8-rows", "inputs of linear layers are not rounded to dynamic int8, as this checkpoint's"),
        ("fp8-static", "inputs of linear layers are not rounded to static FP8, as this checkpoint's"),
        ("fp8-rows", "keys and values are kept as kv_cache_dtype says, not in the FP8 of this checkpoint's"),
    ],
)
def test_the_memory_plan_says_what_is_dequantized(case: str, line: str, tmp_path: Path) -> None:
    if case == "mixed":
        tiny_models.save("llama-gqa", tmp_path / "source")
        config = gptq_config(dynamic={"-:.*self_attn.*": {}}, lm_head=True)
        quantize(tmp_path / "source", tmp_path, gptq, config, which=re.compile(r"mlp\..*_proj\.weight"))
    else:
        write(case, tmp_path)
    plans: list[MemoryPlan] = []
    settings = {"model": str(tmp_path), "kernels": "reference", "num_blocks": 8}
    load_model(EngineConfig.from_settings(settings), announce=plans.append)
    assert line in str(plans[0])


def test_quantizing_a_second_time_is_refused_but_fp8_to_int8(tmp_path: Path) -> None:
    for case, quantization in (("gptq", "int4"), ("fp8-blocks", "int4"), ("awq", "int8"), ("int8-rows", "int8")):
        write(case, tmp_path / case)
        settings = {"model": str(tmp_path / case), "dtype": "bfloat16", "quantization": quantization}
        with pytest.raises(
            ConfigError, match=f"={quantization} would quantize .* a second time, which has 21 tensors in"
        ):
            load_model(EngineConfig.from_settings(settings))


@pytest.mark.parametrize(
    "case",
    [
        *("gptq-v2-zeros-act-order", "gptq-act-order-experts", "awq", "packed-one-scale-experts", "int8-rows"),
        "fp8-blocks-bf16-scales-experts",
    ],
)
@pytest.mark.parametrize("variant", variants())
def test_cpp_kernels_keep_what_is_stored(
    variant: str, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In as many bytes as are planned; the network is near to that in fp32, although inputs are rounded to 8 bits."""
    write(case, tmp_path)
    quantized = assert_loads_as_planned(tmp_path, variant, monkeypatch)
    assert quantized["kept as stored"].exact and quantized["kept as stored"].count >= 18


def assert_loads_as_planned(
    folder: Path, variant: str, monkeypatch: pytest.MonkeyPatch, *, tolerance: float = 0.05
) -> dict[str, TensorGroup]:
    """Assert that the C++ kernels load a folder in as many bytes as are planned, and are near to the network in fp32;
    return what becomes of quantized tensors.
    """
    backend = CpuBackend(variant=variant, num_threads=1)
    taken: list[int] = []
    own = backend._weights.take
    monkeypatch.setattr(backend._weights, "take", lambda size: taken.append(size) or own(size))
    ours, exact = logits(load(folder, torch.bfloat16, backend)), logits(load(folder))
    assert (ours - exact).abs().max() <= tolerance * exact.abs().max()
    weights, spec = ModelFolder(folder).weights(), load_spec(ModelFolder(folder))
    assert sum(taken) == weight_bytes(spec, torch.bfloat16, backend, weights)
    groups = tensor_groups(weights, spec, backend, torch.bfloat16)
    assert sum(group.num_bytes for group in groups) == pytest.approx(sum(taken), abs=100)  # of each weight, whole bytes
    return {group.kept: group for group in groups if "BF16" not in group.stored and "F32" not in group.stored}


@pytest.mark.parametrize(
    ("case", "model", "which", "dense"),
    [
        # Three weights of four experts in each of three layers: all experts are packed as the first, which is dense.
        ("gptq-act-order-experts", "mixtral-window", r"experts\.[1-9]\.\w+\.weight$", 36),
        # Queries and keys are packed with the values, which are dense; the gate of attention is not.
        ("fp8-rows", "qwen3-next", r"([qk]_proj|in_proj_ba|in_proj_qkvz|out_proj)\.weight$", 5),
    ],
    ids=lambda value: value if isinstance(value, str) and "." not in value else "",
)
@pytest.mark.parametrize("variant", variants())
def test_what_is_quantized_in_part_is_dense(
    variant: str,
    case: str,
    model: str,
    which: str,
    dense: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, config, _ = CASES[case]
    tiny_models.save(model, tmp_path / "source")
    quantize(tmp_path / "source", tmp_path, layer, config, which=re.compile(which))
    quantized = assert_loads_as_planned(tmp_path, variant, monkeypatch, tolerance=0.1)
    assert quantized["dequantized to bfloat16"].count == dense


def test_parts_in_different_orders_are_dense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of q, k and v, and of gate and up of one layer."""
    write("gptq-v2-zeros-act-order", tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for name in ("self_attn.k_proj", "mlp.up_proj"):
        stored[f"model.layers.1.{name}.g_idx"] = stored[f"model.layers.1.{name}.g_idx"].flip(0).contiguous()
    save_file(stored, tmp_path / "model.safetensors")
    quantized = assert_loads_as_planned(tmp_path, variants()[-1].values[0], monkeypatch)
    assert quantized["dequantized to bfloat16"].count == 5 and quantized["kept as stored"].count == 16


@pytest.mark.parametrize("variant", variants())
def test_fp8_to_int8(variant: str, tmp_path: Path) -> None:
    write("fp8-blocks", tmp_path)
    settings = {
        "model": str(tmp_path),
        "dtype": "bfloat16",
        "quantization": "int8",
        "kernels": variant,
        "num_blocks": 8,
    }
    plans: list[MemoryPlan] = []
    load_model(EngineConfig.from_settings(settings), announce=plans.append)
    assert "21 of FP8 in blocks of 16 x 128 quantized anew to int8 from what they mean" in str(plans[0])
