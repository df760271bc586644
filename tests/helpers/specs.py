"""Networks described in a few words: layers that are alike but for their windows and experts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from splitfuse.kernels.layers import (
    AttentionSpec,
    DeltaSpec,
    ExpertsSpec,
    LayerSpec,
    MambaSpec,
    MlpSpec,
    NormSpec,
    RouterSpec,
)
from splitfuse.models.spec import ModelSpec, RopeSpec


def make_experts(num_experts: int, top_k: int, intermediate_size: int, *, renormalize: bool = True) -> ExpertsSpec:
    """Return a mixture of gated experts."""
    return ExpertsSpec(
        router=RouterSpec(num_experts=num_experts, top_k=top_k, renormalize=renormalize),
        expert=MlpSpec(intermediate_size=intermediate_size, activation="silu"),
    )


def make_delta(
    key_heads: int, value_heads: int, key_dim: int, value_dim: int, conv_size: int = 4, eps: float = 1e-6
) -> DeltaSpec:
    """Return a gated delta net."""
    return DeltaSpec(
        num_key_heads=key_heads,
        num_value_heads=value_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        conv_size=conv_size,
        norm=NormSpec(eps=eps),
    )


def make_mamba(
    groups: int, heads: int, state_dim: int, head_dim: int, conv_size: int = 4, eps: float = 1e-6, **fields: Any
) -> MambaSpec:
    """Return a Mamba-2 mixer; `fields` are those of MambaSpec that differ from the defaults."""
    return MambaSpec(
        num_groups=groups,
        num_heads=heads,
        state_dim=state_dim,
        head_dim=head_dim,
        conv_size=conv_size,
        norm=NormSpec(eps=eps),
        **fields,
    )


def make_spec(
    *,
    num_layers: int,
    intermediate_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    activation: str = "silu",
    mlp_bias: bool = False,
    windows: Sequence[int | None] | None = None,
    experts: ExpertsSpec | None = None,
    dense_layers: Collection[int] = (),
    rope: RopeSpec | None = None,
    attention: dict[str, Any] | None = None,
    **network: Any,
) -> ModelSpec:
    """Return a network; `attention` are further fields of AttentionSpec, `network` those of ModelSpec."""
    dense = MlpSpec(intermediate_size=intermediate_size, activation=activation, bias=mlp_bias)
    heads = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim} | (attention or {})
    layers = tuple(
        LayerSpec(
            mixer=AttentionSpec(window=window, **heads),
            mlp=dense if experts is None or number in dense_layers else experts,
        )
        for number, window in enumerate(windows or (None,) * num_layers)
    )
    assert len(layers) == num_layers
    defaults = {"architecture": "LlamaForCausalLM", "dtype": "bfloat16", "norm": NormSpec(eps=1e-5)}
    ropes = (rope or RopeSpec(theta=10000.0, rotary_dim=head_dim),)
    return ModelSpec(layers=layers, ropes=ropes, **(defaults | network))
