"""From config.json to ModelSpec: each family, its defaults, and everything that is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from safetensors.torch import load_file
from specs import make_experts
from transformers import LlamaConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING as CONFIGS

from splitfuse.errors import ModelError, UnsupportedModelError
from splitfuse.kernels.layers import (
    AttentionSpec,
    ConvSpec,
    DeltaSpec,
    HeadNormSpec,
    LayerSpec,
    MambaSpec,
    MlpSpec,
    NormSpec,
    QueryScaling,
)
from splitfuse.models.families.common import decoder, mlp, read_attention
from splitfuse.models.families.config_json import ConfigJson
from splitfuse.models.families.registry import FAMILIES, load_spec, spec_from_config
from splitfuse.models.parameters import parameters
from splitfuse.models.sources.files import SINGLE_FILE
from splitfuse.models.sources.folder import ModelFolder
from splitfuse.models.spec import LinearScaling, ModelSpec, RopeSpec
from splitfuse.models.weights import left_aside, stored_parameters

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
}


NORMS = HeadNormSpec(norm=NormSpec(eps=1e-6))


def spec_of(architecture: str, **fields: Any) -> ModelSpec:
    return spec_from_config({"architectures": [architecture], **SIZES, **fields})


def test_llama_2_from_its_config() -> None:
    spec = spec_of("LlamaForCausalLM", rms_norm_eps=1e-5, torch_dtype="float16", rope_scaling=None, hidden_act="silu")
    assert spec == ModelSpec(
        architecture="LlamaForCausalLM",
        dtype="float16",
        vocab_size=100,
        hidden_size=64,
        max_position=512,
        norm=NormSpec(eps=1e-5),
        ropes=(RopeSpec(theta=10000.0, rotary_dim=8),),
        layers=(
            LayerSpec(
                mixer=AttentionSpec(num_heads=8, num_kv_heads=8, head_dim=8),
                mlp=MlpSpec(intermediate_size=160, activation="silu"),
            ),
        )
        * 3,
    )
    assert spec.layers[0].mixer.score_scale == 8**-0.5


def first(spec: ModelSpec) -> AttentionSpec:
    """Attention of the first layer."""
    mixer = spec.layers[0].mixer
    assert mixer is not None
    return mixer


def test_the_example_of_the_docs_is_a_family(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs" / "adding-a-family.md").read_text()
    defined: dict[str, Any] = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], defined)
    monkeypatch.setitem(FAMILIES, "HeronForCausalLM", defined["FAMILIES"]["HeronForCausalLM"])
    spec = spec_of("HeronForCausalLM", num_hidden_layers=4, local_window=9, num_key_value_heads=2)
    assert windows_of(spec) == (9, 9, 9, None)
    assert [isinstance(layer.mlp, MlpSpec) for layer in spec.layers] == [True, False, False, False]
    stored = dict(piece for parameter in parameters(spec) for piece in parameter.pieces)
    assert stored["model.layers.3.self_attn.qkv.weight"] == ((8 + 2 * 2) * 8, 64)
    assert "model.norm.bias" in stored
    with pytest.raises(UnsupportedModelError, match="use_beak True is not supported: use false"):
        spec_of("HeronForCausalLM", use_beak=True)


def windows_of(spec: ModelSpec) -> tuple[int | None, ...]:
    return tuple(layer.mixer.window for layer in spec.layers)


def test_family_defaults() -> None:
    llama = spec_of("LlamaForCausalLM", attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=10)
    assert (first(llama).qkv_bias, first(llama).o_bias, llama.tied_embeddings) == (True, True, True)
    assert llama.layers[0].mlp == MlpSpec(intermediate_size=160, activation="silu", bias=True)
    assert first(llama).head_dim == 10
    mistral = spec_of("MistralForCausalLM")
    assert first(mistral).num_kv_heads == 8
    assert windows_of(mistral) == (4096,) * 3
    assert windows_of(spec_of("MistralForCausalLM", sliding_window=None)) == (None,) * 3
    qwen2 = first(spec_of("Qwen2ForCausalLM"))
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.qk_norm) == (True, False, None)
    qwen3 = first(spec_of("Qwen3ForCausalLM"))
    assert (qwen3.qkv_bias, qwen3.o_bias, qwen3.qk_norm, qwen3.head_dim) == (False, False, NORMS, 128)
    assert first(spec_of("Qwen3ForCausalLM", attention_bias=True)).o_bias


@pytest.mark.parametrize("architecture", [name for name, family in FAMILIES.items() if family.model_type in CONFIGS])
def test_defaults_are_those_of_transformers(architecture: str) -> None:
    """A config that leaves everything out is that in which transformers has written everything."""
    sizes = {**SIZES, "hidden_size": 2048, "num_attention_heads": 32}  # as many as Qwen has key/value heads by default
    sizes |= {"ffn_dim": 160, "max_seq_len": 512}  # names of OPT and MPT
    sizes |= {"num_hidden_layers": 4}  # of hybrids every fourth layer is attention
    if architecture == "DeepseekV2ForCausalLM":
        sizes["num_experts_per_tok"] = 6  # the only one that has no default
    if architecture in ("BambaForCausalLM", "GraniteMoeHybridForCausalLM"):  # by default they have no attention
        sizes |= {"layer_types": KINDS + KINDS[1:2]} if "Granite" in architecture else {"attn_layer_indices": [1, 3]}
    family = FAMILIES[architecture]
    fields = {"text_config": {**sizes, "model_type": family.text_types[0]}} if family.text_types else sizes
    named = {"architectures": [architecture]}
    theirs = CONFIGS[family.model_type](**fields).to_dict()
    assert spec_from_config(fields | named) == spec_from_config(theirs | named)


@pytest.mark.parametrize(
    ("dtype", "scale"), [("bfloat16", 50.5), ("torch.float16", 50.59375), ("float32", 50.59644317626953)]
)
def test_gemma_scales_embeddings_by_a_rounded_number(dtype: str, scale: float) -> None:
    for architecture in ("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM"):
        assert spec_of(architecture, hidden_size=2560, num_key_value_heads=1, torch_dtype=dtype).embed_scale == scale


def test_null_heads_are_as_many_as_those_of_queries() -> None:
    """In transformers only an absent number of key/value heads is the default of the family."""
    assert first(spec_of("MistralForCausalLM", num_key_value_heads=None, num_attention_heads=16)).num_kv_heads == 16
    assert first(spec_of("SmolLM3ForCausalLM")).num_kv_heads == 4


def test_hybrids_of_gated_delta_nets() -> None:
    def kinds(**fields: Any) -> str:
        spec = spec_of("Qwen3_5ForCausalLM", num_hidden_layers=5, **fields)
        return "".join("d" if isinstance(layer.mixer, DeltaSpec) else "a" for layer in spec.layers)

    assert (kinds(), kinds(full_attention_interval=2)) == ("dddad", "dadad")
    types = ["full_attention", "linear_attention", "linear_attention", "full_attention", "full_attention"]
    assert kinds(layer_types=types, attn_output_gate=True, mamba_ssm_dtype="float32") == "addaa"
    for field, value in {
        "attention_bias": True,
        "hidden_act": "gelu",
        "attn_output_gate": False,
        "mamba_ssm_dtype": "bfloat16",
        "layer_types": ["sliding_attention", *types[1:]],
    }.items():
        with pytest.raises(UnsupportedModelError, match=f"{field} .* is not supported here"):
            kinds(**{field: value})
    with pytest.raises(ModelError, match="6 value heads of a delta net cannot be shared evenly by 4 key heads"):
        kinds(linear_num_value_heads=6, linear_num_key_heads=4)


KINDS = ["linear_attention", "full_attention", "linear_attention"]
HYBRID, NEMOTRON_H = "GraniteMoeHybridForCausalLM", "NemotronHForCausalLM"
GRANITE = {"hidden_size": 64, "mamba_n_heads": 8, "layer_types": KINDS}


def kinds_of(spec: ModelSpec) -> str:
    """The kinds of layers as `hybrid_override_pattern` names them."""

    def kind(layer: LayerSpec) -> str:
        if layer.mixer is None:
            return "-" if isinstance(layer.mlp, MlpSpec) else "E"
        return "M" if isinstance(layer.mixer, MambaSpec) else "*"

    return "".join(map(kind, spec.layers))


@pytest.mark.parametrize("types", [KINDS, ["mamba", "attention", "mamba"]])
def test_granite_hybrid_of_its_lab(types: list[str]) -> None:
    spec = spec_of(
        "GraniteMoeHybridForCausalLM",
        **GRANITE | {"layer_types": types},
        mamba_d_head=16,
        mamba_d_state=32,
        mamba_chunk_size=256,
        num_experts_per_tok=0,
        num_local_experts=0,
        shared_intermediate_size=96,
        normalization_function="rmsnorm",
        position_embedding_type="nope",
        time_step_limit=[0.0, {"__float__": "Infinity"}],
    )
    assert kinds_of(spec) == "M*M"
    assert spec.layers[0].mixer == MambaSpec(
        num_heads=8, num_groups=1, state_dim=32, head_dim=16, conv_size=4, conv_bias=True, norm=NormSpec(eps=1e-6)
    )
    assert spec.layers[0].mlp == MlpSpec(intermediate_size=96, activation="silu")
    assert (first(replace(spec, layers=spec.layers[1:])).rope, spec.ropes) == (None, ())
    assert spec_of("GraniteMoeHybridForCausalLM", **GRANITE, position_embedding_type="rope").ropes[0].rotary_dim == 8


@pytest.mark.parametrize(
    "fields",
    [
        {"hybrid_override_pattern": "M*E-M", "num_hidden_layers": 5},
        {"layers_block_type": ["mamba", "attention", "moe", "mlp", "mamba"], "num_hidden_layers": 5},
        {
            "layer_types": ["linear_attention", "full_attention", "moe", "mlp", "linear_attention"],
            "num_hidden_layers": 5,
        },
        {"hybrid_override_pattern": "M*E-M", "num_hidden_layers": None},
    ],
)
def test_layers_of_nemotron_h_by_list_or_pattern(fields: dict[str, Any]) -> None:
    limits = {"time_step_limit": [0.0, float("inf")], "time_step_min": 0.001, "mamba_ssm_cache_dtype": "float32"}
    spec = spec_of("NemotronHForCausalLM", **fields, **limits, use_mamba_kernels=True, sliding_window=None)
    assert kinds_of(spec) == "M*E-M"
    assert isinstance(mixer := spec.layers[0].mixer, MambaSpec)
    assert (mixer.num_heads, mixer.num_groups, mixer.dt_min, mixer.dt_max) == (128, 8, 0.0, None)
    assert spec.layers[3].mlp == MlpSpec(intermediate_size=160, activation="relu2", gated=False)


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        (HYBRID, {"mamba_n_heads": 7}, "mamba_expand x hidden_size is 128, which 7 heads of 18"),
        (HYBRID, {"mamba_d_head": 8}, "is 128, which 8 heads of 8 .* do not fill"),
        (
            HYBRID,
            {"mamba_n_groups": 3},
            "8 heads of a Mamba cannot be shared evenly by 3 groups",
        ),
        (HYBRID, {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported: use \"silu\""),
        (HYBRID, {"position_embedding_type": "alibi"}, "'alibi' is not supported: use \"nope\""),
        (
            HYBRID,
            {"layer_types": ["moe", *KINDS[1:]]},
            r"layer_types \['moe', .* is not supported",
        ),
        (HYBRID, {"mlp_bias": True}, "mlp_bias = True: biases"),
        (HYBRID, {"time_step_limit": [0.1]}, r"such as \[0.0, Infinity\], not \[0.1\]"),
        (
            HYBRID,
            {"time_step_limit": [0.2, 0.1]},
            r"time_step_limit must be .* not \[0.2, 0.1\]",
        ),
        (HYBRID, {"time_step_limit": ["0", True]}, "time_step_limit must be the least and"),
        (NEMOTRON_H, {"hybrid_override_pattern": "M*X"}, "hybrid_override_pattern has 'X': use M .Mamba"),
        (NEMOTRON_H, {"hybrid_override_pattern": "M*"}, "the mixers of 2 layers, num_hidden_layers is 3"),
        (
            NEMOTRON_H,
            {"layers_block_type": ["moe", "rnn", "mlp"]},
            "layers_block_type has 'rnn': use linear",
        ),
        (NEMOTRON_H, {"hybrid_override_pattern": "M-M"}, "no layer keeps keys and values"),
        (NEMOTRON_H, {"attention_bias": True}, "attention_bias True is not supported: use false"),
        (NEMOTRON_H, {"sliding_window": 9}, "sliding_window 9 is not supported: use null"),
        (NEMOTRON_H, {"moe_latent_size": 8}, "moe_latent_size = 8: experts of compressed inputs"),
        (NEMOTRON_H, {"mamba_n_groups": 4}, "mamba_n_groups = 4: a recurrent state"),
        (NEMOTRON_H, {"n_groups": 3}, "128 heads of a Mamba cannot be shared evenly by 3 groups"),
    ],
)
def test_what_hybrids_of_mamba_refuse(architecture: str, fields: dict[str, Any], message: str) -> None:
    own = GRANITE if architecture == HYBRID else {"hybrid_override_pattern": "M*-"}
    with pytest.raises((ModelError, UnsupportedModelError), match=message):
        spec_of(architecture, **own | fields)


def test_sizes_of_lfm2() -> None:
    """The inner size that a config says is not that of its MLPs, unless it says so."""
    sizes = {"num_key_value_heads": 4, "intermediate_size": 3000}
    for fields, size in (
        ({}, 2048),
        ({"block_ff_dim": 6000}, 4096),
        ({"block_ffn_dim_multiplier": 1.5, "block_multiple_of": 10}, 3000),
        ({"block_ffn_dim_multiplier": None}, 2000),
        ({"block_auto_adjust_ff_dim": False}, 3000),
    ):
        assert spec_of("Lfm2ForCausalLM", **sizes, **fields).layers[0].mlp.intermediate_size == size
    spec = spec_of("Lfm2ForCausalLM", **sizes, full_attn_idxs=[1], conv_L_cache=4)
    assert [isinstance(layer.mixer, ConvSpec) for layer in spec.layers] == [True, False, True]
    assert spec.tied_embeddings and not spec_of("Lfm2ForCausalLM", **sizes, tie_embedding=False).tied_embeddings


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("Lfm2ForCausalLM", {"full_attn_idxs": []}),
        ("Lfm2ForCausalLM", {"layer_types": ["conv"] * 3}),
        ("Qwen3_5ForCausalLM", {"layer_types": ["linear_attention"] * 3}),
    ],
)
def test_a_network_without_attention_is_refused(architecture: str, fields: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="no layer keeps keys and values: at least one must be"):
        spec_of(architecture, **fields)


@pytest.mark.parametrize(
    ("source", "fields", "message"),
    [
        (1, {}, "layer 1 takes the keys and values of layer 1, which must be one before it"),
        (-1, {}, "layer 1 takes the keys and values of layer -1, which must be one before it"),
        (0, {"head_dim": 16}, "layer 0, which has 8 key/value heads of 8: it must have as many, not 8 of 16"),
        (0, {"num_kv_heads": 4}, "layer 0, which has 8 key/value heads of 8: it must have as many, not 4 of 8"),
    ],
)
def test_keys_of_another_layer_are_of_the_same_sizes(source: int, fields: dict[str, Any], message: str) -> None:
    spec = spec_of("LlamaForCausalLM")
    below, layer, above = spec.layers
    layer = replace(layer, mixer=replace(layer.mixer, kv_layer=source, **fields))
    with pytest.raises(ModelError, match=message):
        replace(spec, layers=(below, layer, above))
    reusing = replace(layer, mixer=replace(first(spec), kv_layer=0))
    replace(spec, layers=(below, reusing, reusing))
    chained = replace(layer, mixer=replace(first(spec), kv_layer=1))
    with pytest.raises(ModelError, match="layer 2 takes the keys and values of layer 1, which must be one before it"):
        replace(spec, layers=(below, reusing, chained))


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 0]}, "no_rope_layers describes 2 layers, num_hidden_layers is 3"),
        (
            "SmolLM3ForCausalLM",
            {"no_rope_layers": [1, 0], "use_sliding_window": True, "sliding_window": 9},
            "no_rope_layers describes 2 layers",
        ),
        ("SmolLM3ForCausalLM", {"no_rope_layers": [1] * 4}, "no_rope_layers describes 4 layers"),
        ("MellumForCausalLM", {"mlp_layer_types": ["sparse"] * 2}, "mlp_layer_types describes 2 layers"),
        ("MellumForCausalLM", {"layer_types": ["full_attention"] * 4}, "json: layer_types describes 4 layers"),
        ("Lfm2ForCausalLM", {"layer_types": ["full_attention"]}, "layer_types describes 1 layers"),
        ("Qwen3_5ForCausalLM", {"layer_types": ["full_attention"]}, "layer_types describes 1 layers"),
    ],
)
def test_a_list_describes_every_layer(architecture: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        spec_of(architecture, **fields)


@pytest.mark.parametrize(("mixers", "mlps", "message"), [(2, 3, "mixers of 2 layers"), (3, 4, "MLPs of 4 layers")])
def test_mixers_and_mlps_are_as_many_as_layers(mixers: int, mlps: int, message: str) -> None:
    config = ConfigJson({"architectures": ["LlamaForCausalLM"], **SIZES})
    with pytest.raises(ModelError, match=f"config.json describes the {message}, num_hidden_layers is 3"):
        decoder(config, [read_attention(config)] * mixers, [mlp(config)] * mlps)


def test_norms_of_hunyuan_may_be_said() -> None:
    spec = spec_of("HunYuanDenseV1ForCausalLM", use_qk_norm=True)
    assert first(spec).qk_norm is not None
    assert spec == spec_of("HunYuanDenseV1ForCausalLM")
    with pytest.raises(UnsupportedModelError, match="use_qk_norm False is not supported: use true"):
        spec_of("HunYuanDenseV1ForCausalLM", use_qk_norm=False)


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("CwmForCausalLM", {"rope_parameters": None, "rope_scaling": {}}),
        ("GptOssForCausalLM", {"rope_parameters": None, "rope_scaling": {}}),
        ("Ministral3ForCausalLM", {"rope_parameters": None, "rope_scaling": {}}),
        ("DeepseekV3ForCausalLM", {"n_group": None, "first_k_dense_replace": None}),
        ("HunYuanDenseV1ForCausalLM", {"rms_norm_eps": None}),
    ],
)
def test_null_is_absent_where_a_family_has_a_default(architecture: str, fields: dict[str, Any]) -> None:
    assert spec_of(architecture, **fields) == spec_of(architecture)


def test_null_rank_of_queries_is_none() -> None:
    ranks = [first(spec_of("Glm4MoeLiteForCausalLM", **fields)).latent for fields in ({}, {"q_lora_rank": None})]
    assert [latent and latent.q_rank for latent in ranks] == [768, None]


def test_ministral_scales_queries_as_the_section_of_its_rope_says() -> None:
    rope = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "llama_4_scaling_beta": 0.3}
    for fields in ({"rope_parameters": rope, "rope_scaling": {}}, {"rope_scaling": rope}):
        assert first(spec_of("Ministral3ForCausalLM", **fields)).query_scaling == QueryScaling(beta=0.3, length=64)


def test_length_of_the_first_llama() -> None:
    sizes = {name: value for name, value in SIZES.items() if name != "max_position_embeddings"}
    config = {"architectures": ["LLaMAForCausalLM"], "model_type": "llama", **sizes}
    assert spec_from_config(config).max_position == 2048
    assert spec_from_config({**config, "max_sequence_length": 512}).max_position == 512


def test_biases_of_internlm3_come_all_or_none() -> None:
    spec = spec_of("InternLM3ForCausalLM", qkv_bias=True, bias=True)
    assert (first(spec).qkv_bias, first(spec).o_bias, spec.layers[0].mlp.bias) == (True, True, True)
    with pytest.raises(UnsupportedModelError, match="qkv_bias other than bias"):
        spec_of("InternLM3ForCausalLM", qkv_bias=True)


def test_ropes_of_gemma_3_by_kind_of_layer_or_by_field() -> None:
    linear = {"rope_type": "linear", "factor": 8.0}
    before = spec_of("Gemma3ForCausalLM", rope_theta=5e5, rope_local_base_freq=2e4, rope_scaling=linear)
    sections = {"full_attention": {**linear, "rope_theta": 5e5}, "sliding_attention": {"rope_theta": 2e4}}
    assert before.ropes == spec_of("Gemma3ForCausalLM", rope_parameters=sections).ropes
    assert [rope.theta for rope in before.ropes] == [5e5, 2e4]
    assert [rope.scaling for rope in before.ropes] == [LinearScaling(factor=8.0), None]
    with pytest.raises(UnsupportedModelError, match=r"those of full_attention and of sliding_attention .* \['factor'"):
        spec_of("Gemma3ForCausalLM", rope_parameters=linear)


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({"sliding_window": 9}, (None, None, None)),
        ({"sliding_window": 9, "use_sliding_window": True}, (None, None, None)),  # from layer 28 on
        ({"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 2}, (None, None, 9)),
        ({"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 0}, (9, 9, 9)),
        ({"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0}, (None, None, None)),
        (
            {
                "sliding_window": 9,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            (9, None, 9),
        ),
    ],
)
@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_qwen_windows(architecture: str, fields: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert windows_of(spec_of(architecture, **fields)) == windows


def test_family_defaults_with_experts() -> None:
    mixtral = spec_of("MixtralForCausalLM")
    experts = make_experts(8, 2, 160)
    assert [layer.mlp for layer in mixtral.layers] == [experts] * 3
    assert (first(mixtral).num_kv_heads, mixtral.norm.eps, mixtral.ropes[0].theta) == (8, 1e-5, 1e6)
    assert windows_of(mixtral) == (None,) * 3
    assert windows_of(spec_of("MixtralForCausalLM", sliding_window=9)) == (9,) * 3
    qwen = spec_of("Qwen3MoeForCausalLM")
    experts = make_experts(128, 8, 768, renormalize=False)
    assert [layer.mlp for layer in qwen.layers] == [experts] * 3
    heads = first(qwen)
    assert (heads.num_kv_heads, heads.head_dim, heads.qk_norm, heads.o_bias) == (4, 8, NORMS, False)
    assert windows_of(spec_of("Qwen3MoeForCausalLM", sliding_window=9, use_sliding_window=True)) == (9,) * 3


@pytest.mark.parametrize(
    ("fields", "dense"),
    [
        ({"mlp_only_layers": [0, 2]}, {0, 2}),
        ({"decoder_sparse_step": 2}, {0, 2}),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1, 7]}, {0, 1, 2}),
    ],
)
def test_layers_without_experts(fields: dict[str, Any], dense: set[int]) -> None:
    layers = spec_of("Qwen3MoeForCausalLM", **fields).layers
    assert {number for number, layer in enumerate(layers) if isinstance(layer.mlp, MlpSpec)} == dense


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts": 4}, "a token cannot visit 8 experts: there are 4"),
        ({"num_experts": 0}, "num_experts must be a whole number from 1"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step must be a whole number from 1"),
        ({"mlp_only_layers": 3}, "mlp_only_layers must be a list of whole numbers from 0 on, not 3"),
        ({"mlp_only_layers": [True]}, "mlp_only_layers"),
        ({"mlp_only_layers": [-1]}, "mlp_only_layers"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob must be true or false"),
    ],
)
def test_invalid_experts_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        spec_of("Qwen3MoeForCausalLM", **fields)


@pytest.mark.parametrize("variant", tiny_models.VARIANTS)
def test_weights_are_those_of_transformers(variant: str, tmp_path: Path) -> None:
    """Same names, same shapes as in its checkpoints, none more, none fewer."""
    tiny_models.save(variant, tmp_path)
    source = ModelFolder(tmp_path)
    weights, spec = source.weights(), load_spec(source)
    ours = dict(piece for parameter in stored_parameters(weights, spec) for piece in parameter.pieces)
    aside = {name for names in left_aside(weights, spec).values() for name in names}
    stored = load_file(tmp_path / SINGLE_FILE)
    assert ours == {name: tuple(weight.shape) for name, weight in stored.items() if name not in aside}


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({}, "float32"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "torch.float16"}, "float16"),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, "bfloat16"),
    ],
)
def test_dtype(fields: dict[str, Any], dtype: str) -> None:
    assert spec_of("LlamaForCausalLM", **fields).dtype == dtype


def test_scaled_rope_extends_the_length() -> None:
    assert spec_of("LlamaForCausalLM", rope_scaling={"type": "linear", "factor": 4.0}).max_position == 2048


@pytest.mark.parametrize(
    "fields", [{"max_position_embeddings": 2**31 - 1}, {"rope_scaling": {"type": "linear", "factor": 1e300}}], ids=str
)
def test_length_ends_where_fp32_tells_positions_apart(fields: dict[str, Any]) -> None:
    assert spec_of("LlamaForCausalLM", **fields).max_position == 2**24


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_scaling": {}, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5.0}},
        {"rope_scaling": None, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5.0}},
        {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": {"rope_theta": 7.0}, "rope_theta": 5.0},
    ],
    ids=["empty", "null", "both"],
)
def test_rope_is_that_of_transformers_where_two_sections_say_it(fields: dict[str, Any]) -> None:
    [rope] = spec_of("LlamaForCausalLM", **fields).ropes
    theirs = LlamaConfig(**SIZES, **json.loads(json.dumps(fields))).rope_parameters
    assert (rope.theta, rope.scaling) == (theirs["rope_theta"], LinearScaling(factor=theirs["factor"]))


def test_model_type_of_another_family_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="has the model_type qwen2, not 'llama'"):
        spec_of("Qwen2ForCausalLM", model_type="llama")


@pytest.mark.parametrize("architectures", [None, [], "LlamaForCausalLM", [7]])
def test_config_without_architecture(architectures: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="names no architecture"):
        spec_from_config({**SIZES, "architectures": architectures})
    with pytest.raises(UnsupportedModelError, match="names no architecture"):
        spec_from_config(SIZES)


def test_unknown_architecture_says_where_known_ones_are_listed() -> None:
    with pytest.raises(UnsupportedModelError) as refused:
        spec_of("Qwen3VLForCausalLM")
    assert f"not one of the {len(FAMILIES)} that `splitfuse models` lists" in str(refused.value)
    assert "the nearest is Qwen3ForCausalLM" in str(refused.value)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM") as refused:
        spec_of("ZZZ")
    assert "nearest" not in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantization_config": {"quant_method": "aqlm"}}, "the quant_method 'aqlm' is not known"),
        ({"num_experts": 8}, "num_experts"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"n_routed_experts": 8}, "n_routed_experts = 8: experts"),
        ({"n_group": 4}, "n_group = 4: experts chosen by groups"),
        ({"use_mrope": True}, "use_mrope = True: positions of images"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}, "rope type 'mrope'"),
        ({"hc_mult": 4}, "hc_mult = 4: hyper-connections"),
        ({"index_topk": 2048}, "index_topk = 2048: a sparse index of keys"),
        ({"attention_chunk_size": 8192}, "attention_chunk_size = 8192: chunked attention"),
        ({"kv_lora_rank": 512}, "kv_lora_rank = 512: MLA"),
        ({"mamba_d_state": 16}, "mamba_d_state = 16: a recurrent state"),
        ({"linear_num_value_heads": 32}, "linear_num_value_heads = 32: a recurrent state"),
        ({"ngram_vocab_size_base": 9}, "ngram_vocab_size_base = 9: embeddings of n-grams"),
        ({"hidden_size_per_layer_input": 256}, "hidden_size_per_layer_input = 256: per-layer embeddings"),
        ({"num_kv_shared_layers": 15}, "num_kv_shared_layers = 15: shared KV"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention = True: attention to later tokens"),
        ({"alibi": True}, "alibi = True: scores that fall with distance"),
        ({"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping = 50.0: soft caps"),
        ({"clip_qkv": 8.0}, r"clip_qkv = 8.0: clipped projections"),
        ({"attn_temperature_tuning": True}, "attn_temperature_tuning = True: queries scaled by position"),
        ({"residual_multiplier": 0.22}, r"residual_multiplier = 0.22: multipliers"),
        ({"logits_scaling": 8}, "logits_scaling = 8: scaled logits"),
        ({"lm_head_bias": True}, "lm_head_bias = True: biases"),
        ({"use_qk_norm": True}, "use_qk_norm = True: QK norm"),
        ({"parallel_attn": True}, "parallel_attn = True: parallel blocks"),
        ({"no_rope_layers": [1, 0, 1]}, "no_rope_layers = .*: NoPE layers"),
        ({"num_attention_heads_per_layer": [8, 4, 8]}, "num_attention_heads_per_layer = .*: layers of different sizes"),
        ({"layers_block_type": ["mamba"] * 3}, "layers_block_type = .*: a recurrent state"),
        ({"hidden_act": "xielu"}, "hidden_act 'xielu' .*: gelu, "),
        ({"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types"),
        ({"rope_scaling": {"rope_type": "axial"}}, "rope type 'axial'"),
    ],
)
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
def test_features_not_honoured_are_refused(architecture: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        spec_of(architecture, **fields)


def test_features_switched_off_are_accepted() -> None:
    off = {"use_mrope": False, "quantization_config": None, "layer_types": ["full_attention"] * 3, "n_group": 1}
    spec_of("Qwen2ForCausalLM", residual_multiplier=1.0, logits_scaling=1, clip_qkv=0, no_rope_layers=[], **off)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be a whole number from 1 .*, not 0"),
        ({"hidden_size": -64}, "not -64"),
        ({"hidden_size": 64.5}, "not 64.5"),
        ({"hidden_size": "64"}, "not '64'"),
        ({"hidden_size": True}, "not True"),
        ({"hidden_size": 10**30}, "hidden_size"),
        ({"hidden_size": [[[[[[[[0]]]]]]]]}, r"not \[\[.*\.\.\."),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps must be a positive finite number, not 1000"),
        ({"hidden_act": "x" * 10**6}, "hidden_act must be a string of at most 200 characters, not 'xxx.{,80}$"),
        ({"hidden_size": 60}, "hidden_size 60 is not a multiple of its 8 attention heads"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be a whole number from 1 to 10000"),
        ({"num_hidden_layers": None}, "config.json has no num_hidden_layers"),
        ({"num_key_value_heads": 3}, "8 attention heads cannot be shared evenly by 3 key/value heads"),
        ({"head_dim": 7}, "even number from 2 to head_dim 7, not 7"),
        ({"partial_rotary_factor": 2.0}, "rotates 16 of 8 elements of a head is not supported: use 1"),
        ({"partial_rotary_factor": 1e308}, "rotates 2147483647 of 8 elements of a head is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}}, "rotates 4 of 8 elements"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 1e308}}, "beta_fast .* of at most 1e.09"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive finite number"),
        ({"rms_norm_eps": False}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false, not 'yes'"),
        ({"hidden_act": 3}, "hidden_act must be a string"),
        ({"dtype": 16}, "dtype must be a string"),
        ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window"),
        ({"use_sliding_window": True, "layer_types": "full_attention"}, "layer_types must be a list of strings"),
        (
            {"use_sliding_window": True, "layer_types": ["full_attention"]},
            "layer_types describes 1 layers, num_hidden_layers is 3",
        ),
    ],
)
def test_invalid_values_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        spec_of("Qwen2ForCausalLM", **fields)
