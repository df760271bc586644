"""Leads from the config.json of a bidirectional encoder to its network. Knows no tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from splitfuse.errors import ModelError, UnsupportedModelError, brief
from splitfuse.models.families.common import checkpoint_dtype
from splitfuse.models.families.config_json import ConfigJson
from splitfuse.models.families.features import refuse_unread
from splitfuse.models.families.registry import ENCODERS
from splitfuse.models.sources.pooling import Mode, Pooling, read_pooling
from splitfuse.models.sources.source import ModelSource

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
"""Values of hidden_act -> their names in kernels."""


@dataclass(frozen=True)
class EncoderSpec:
    """Describes a network of BERT's kind: embeddings of words, positions and types, and layers whose norms come after
    attention and MLP.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    activation: str
    norm_eps: float
    num_positions: int
    """Rows of the table of positions."""
    position_offset: int
    """Row of that table for the first token; the token with the id of the row before, if there is one, is padding."""
    num_types: int
    dtype: str
    pooling: Mode
    wanted_length: int | None
    """Number of tokens that the folder lets a text have, if it says it."""

    @property
    def max_position(self) -> int:
        """Return how many tokens a text may have at most."""
        return self.num_positions - self.position_offset

    @property
    def head_dim(self) -> int:
        """Return the size of a head."""
        return self.hidden_size // self.num_heads


def is_encoder(source: ModelSource) -> bool:
    """Return whether a stored model is a bidirectional encoder. Raises as `ModelSource.config`."""
    architectures = source.config().get("architectures")
    return isinstance(architectures, list) and bool(architectures) and architectures[0] in ENCODERS


def read_encoder(source: ModelSource) -> EncoderSpec:
    """Return the network of a stored encoder. Raises UnsupportedModelError for a feature that is not supported,
    ModelError for values that make no sense.
    """
    values: Mapping[str, Any] = source.config()
    architecture, config = str(values["architectures"][0]), ConfigJson(values)
    kind = ENCODERS[architecture]
    if config.text("model_type", kind) != kind:
        raise UnsupportedModelError(
            f"config.json contradicts itself: {architecture} has the model_type {kind}, not "
            f"{brief(values['model_type'])}"
        )
    positions = config.text("position_embedding_type", "absolute")
    activation = config.text("hidden_act", "gelu")
    for name, value, supported in (
        ("position_embedding_type", positions, ("absolute",)),
        ("hidden_act", activation, tuple(ACTIVATIONS)),
    ):
        if value not in supported:
            raise UnsupportedModelError(f"config.json: {name} {brief(value)} is not supported: {', '.join(supported)}")
    if config.flag("is_decoder", False):
        raise UnsupportedModelError(f"config.json: is_decoder makes {architecture} generate, which is not supported")
    pooling = read_pooling(source) or Pooling("mean")
    offset = 0 if kind == "bert" else config.integer("pad_token_id", 1, least=0) + 1
    spec = EncoderSpec(
        architecture=architecture,
        vocab_size=config.integer("vocab_size"),
        hidden_size=config.integer("hidden_size"),
        num_layers=config.integer("num_hidden_layers"),
        num_heads=config.integer("num_attention_heads"),
        intermediate_size=config.integer("intermediate_size"),
        activation=ACTIVATIONS[activation],
        norm_eps=config.number("layer_norm_eps", 1e-12),
        num_positions=config.integer("max_position_embeddings"),
        position_offset=offset,
        num_types=config.integer("type_vocab_size", 2),
        dtype=checkpoint_dtype(config),
        pooling=pooling.mode,
        wanted_length=pooling.max_length,
    )
    refuse_unread(config, architecture)
    if spec.hidden_size % spec.num_heads:
        raise ModelError(
            f"config.json: hidden_size {spec.hidden_size} is no multiple of num_attention_heads {spec.num_heads}"
        )
    if spec.max_position < 2:
        raise ModelError(f"config.json: max_position_embeddings {spec.num_positions} leaves no text room")
    return spec
