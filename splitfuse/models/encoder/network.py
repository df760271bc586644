"""Computes a bidirectional encoder: each token attends to all tokens of its text.

Tokens of all texts lie one behind the other, without padding. Products are a backend's; norms and attention are
PyTorch's, in fp32 and text by text, so that a text's numbers do not depend on the others where the backend's do not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from splitfuse.errors import UnsupportedModelError
from splitfuse.kernels.interface import Backend
from splitfuse.kernels.weights import Weight, WeightRole
from splitfuse.models.encoder.spec import EncoderSpec
from splitfuse.models.sources.source import Piece, WeightSource

OPTIONAL = ("embeddings.position_ids", "embeddings.token_type_ids", "pooler.dense.weight", "pooler.dense.bias")
"""Tensors of a checkpoint that an embedding does not need."""


@dataclass(frozen=True)
class Parameter:
    """Names one weight, and the checkpoint's tensors that are stacked by rows to make it."""

    name: str
    role: WeightRole
    pieces: tuple[Piece, ...]


def parameters(spec: EncoderSpec) -> Iterator[Parameter]:
    """Yield every weight of a network."""
    hidden, inner = spec.hidden_size, spec.intermediate_size

    def norm(name: str, stored: str) -> Iterator[Parameter]:
        for part in ("weight", "bias"):
            yield Parameter(f"{name}.{part}", WeightRole.NORM, (Piece(f"{stored}.{part}", (hidden,)),))

    def linear(name: str, role: WeightRole, *stored: str, rows: int, columns: int) -> Iterator[Parameter]:
        yield Parameter(name, role, tuple(Piece(f"{each}.weight", (rows, columns)) for each in stored))
        yield Parameter(f"{name}_bias", WeightRole.PLAIN, tuple(Piece(f"{each}.bias", (rows,)) for each in stored))

    for name, count in (("word", spec.vocab_size), ("position", spec.num_positions), ("token_type", spec.num_types)):
        yield Parameter(name, WeightRole.EMBED, (Piece(f"embeddings.{name}_embeddings.weight", (count, hidden)),))
    yield from norm("norm", "embeddings.LayerNorm")
    for number in range(spec.num_layers):
        ours, theirs = f"{number}.", f"encoder.layer.{number}"
        attention = [f"{theirs}.attention.self.{part}" for part in ("query", "key", "value")]
        yield from linear(f"{ours}qkv", WeightRole.QKV, *attention, rows=hidden, columns=hidden)
        yield from linear(f"{ours}o", WeightRole.O, f"{theirs}.attention.output.dense", rows=hidden, columns=hidden)
        yield from norm(f"{ours}attn_norm", f"{theirs}.attention.output.LayerNorm")
        yield from linear(f"{ours}up", WeightRole.UP, f"{theirs}.intermediate.dense", rows=inner, columns=hidden)
        yield from linear(f"{ours}down", WeightRole.DOWN, f"{theirs}.output.dense", rows=hidden, columns=inner)
        yield from norm(f"{ours}mlp_norm", f"{theirs}.output.LayerNorm")


def weight_bytes(spec: EncoderSpec, backend: Backend, dtype: torch.dtype) -> int:
    """Return the bytes of all weights as `backend` keeps them."""
    total = 0
    for parameter in parameters(spec):
        shapes = [piece.shape for piece in parameter.pieces]
        shape = (sum(rows for rows, *_ in shapes), *shapes[0][1:])
        total += backend.weight_bytes(shape, role=parameter.role, dtype=dtype)
    return total


class Encoder:
    """Computes embeddings of texts.

    >>> encoder = Encoder.load(spec, source.weights(), ReferenceBackend(), dtype=torch.float32)  # doctest: +SKIP
    >>> encoder.embed([(101, 7592, 102)])                     # [texts, hidden], in fp32         # doctest: +SKIP
    """

    def __init__(self, spec: EncoderSpec, weights: dict[str, Weight], backend: Backend, *, dtype: torch.dtype) -> None:
        self.spec = spec
        self.backend = backend
        self.dtype = dtype
        self._weights = weights
        # What a token's embedding has besides its word's: its position, and the one type of all tokens.
        self._positions = weights["position"].float() + weights["token_type"][0].float()

    @classmethod
    def load(cls, spec: EncoderSpec, source: WeightSource, backend: Backend, *, dtype: torch.dtype) -> Encoder:
        """Load the weights, one at a time. Raises WeightsError if one is missing, surplus or misshapen,
        UnsupportedModelError if one is quantized.
        """
        wanted = list(parameters(spec))
        pieces = [piece for parameter in wanted for piece in parameter.pieces]
        aside = [name for name in source.names() if name in OPTIONAL]
        source.check(pieces, architecture=spec.architecture, aside=aside)
        if quantized := [piece.name for piece in pieces if source.quantization(piece.name) is not None]:
            stored = source.stored_as(quantized[0])
            raise UnsupportedModelError(f"{quantized[0]} is quantized ({stored}), which encoders must not be")
        weights: dict[str, Weight] = {}
        for parameter in wanted:
            with ExitStack() as stack:
                tensors = [stack.enter_context(source.read(piece)) for piece in parameter.pieces]
                weights[parameter.name] = backend.pack(tensors, role=parameter.role, dtype=dtype)
        return cls(spec, weights, backend, dtype=dtype)

    def embed(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Return the pooled hidden states of texts, given as token ids: [texts, hidden] in fp32."""
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))  # those of one length lie side by side
        lengths = [len(texts[index]) for index in order]
        hidden = torch.split(self._hidden([token for index in order for token in texts[index]], lengths), lengths)
        match self.spec.pooling:
            case "cls":
                pooled = [text[0] for text in hidden]
            case "last":
                pooled = [text[-1] for text in hidden]
            case "mean":
                pooled = [text.mean(0) for text in hidden]
        found = torch.empty(len(texts), self.spec.hidden_size)
        found[torch.tensor(order)] = torch.stack(pooled)
        return found

    def _hidden(self, token_ids: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """Return the last hidden states [T, C] of texts that lie one behind the other, ordered by length."""
        weights, backend = self._weights, self.backend
        tokens, before = torch.tensor(token_ids), self.spec.position_offset - 1
        counted = (
            tokens != before
        )  # RoBERTa's pad tokens have no position: its number is that of the row before the first
        numbers = torch.cat([each.cumsum(0) for each in torch.split(counted, list(lengths))]) * counted + before
        x = self._norm(F.embedding(tokens, weights["word"]).float() + self._positions[numbers], "norm")
        for number in range(self.spec.num_layers):
            qkv = backend.linear(x.to(self.dtype), weights[f"{number}.qkv"], weights[f"{number}.qkv_bias"])
            mixed = self._attention(qkv, lengths).to(self.dtype)
            mixed = backend.linear(mixed, weights[f"{number}.o"], weights[f"{number}.o_bias"])
            x = self._norm(x + mixed, f"{number}.attn_norm")
            up, bias = weights[f"{number}.up"], weights[f"{number}.up_bias"]
            inner = backend.activated(x.to(self.dtype), up, bias, self.spec.activation)
            out = backend.linear(inner, weights[f"{number}.down"], weights[f"{number}.down_bias"])
            x = self._norm(x + out, f"{number}.mlp_norm")
        return x

    def _attention(self, qkv: Tensor, lengths: Sequence[int]) -> Tensor:
        """Return the attention of each text's tokens to all of them: [T, 3 C] -> [T, C]. Texts of one length, which lie
        side by side, are computed together.
        """
        attended: list[Tensor] = []
        first = 0
        for length, alike in groupby(lengths):
            texts = len(list(alike))
            rows = qkv[first : first + texts * length]
            q, k, v = rows.view(texts, length, 3, self.spec.num_heads, self.spec.head_dim).permute(2, 0, 3, 1, 4)
            attended.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(len(rows), -1))
            first += len(rows)
        return torch.cat(attended)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        return F.layer_norm(x, (self.spec.hidden_size,), weight, bias, self.spec.norm_eps)
