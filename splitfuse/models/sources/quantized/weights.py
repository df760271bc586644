"""Gives the tensors of a quantized checkpoint under the names that their family knows them by."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from splitfuse.errors import WeightsError, brief
from splitfuse.kernels.quantized import QuantizedFormat, QuantizedWeight
from splitfuse.models.sources.quantized.config import Quantization
from splitfuse.models.sources.quantized.schemes import ExpertsMxfp4, Header, Scheme
from splitfuse.models.sources.safetensors import COMPUTED_SUFFIXES, FLOAT_DTYPES, SafetensorsWeights
from splitfuse.models.sources.source import MOST_EXPERTS, Piece, WeightSource, check_names, listing

BIAS = ".bias"


@dataclass(frozen=True)
class Layer:
    """Names the stored tensors of a quantized layer by part; of one with an `expert` they hold all experts."""

    scheme: Scheme
    parts: Mapping[str, str]
    format: QuantizedFormat
    expert: int | None = None


class QuantizedWeights(WeightSource):
    """Reads tensors from safetensors files as a quantization_config describes them. What it does not quantize is dense.

    Raises WeightsError where the two contradict each other.
    """

    def __init__(self, stored: SafetensorsWeights, quantization: Quantization) -> None:
        self._stored, self._quantization = stored, quantization
        self._layers: dict[str, Layer] = {}
        taken = {name for name in stored.names() if name.endswith(quantization.aside)}
        self._biases: set[str] = set()
        for marker in {group.scheme.marker for group in quantization.groups}:
            for name in stored.names():
                if name.endswith(marker):
                    taken |= self._add(name.removesuffix(marker), marker)
        self._names = (stored.names() - taken) | self._layers.keys()

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def names(self) -> Collection[str]:
        return self._names

    def check(self, wanted: Collection[Piece], *, architecture: str, aside: Collection[str] = ()) -> None:
        names = {piece.name for piece in wanted}
        no_use = (self._biases & self._names) - names  # old tools wrote biases of zeros for layers without
        check_names(self._names, wanted, architecture=architecture, aside={*aside, *no_use}, computed=COMPUTED_SUFFIXES)
        if others := [name for name in no_use if not self._is_zero(name)]:
            check_names([*names, *others], wanted, architecture=architecture)
        for piece in wanted:
            if piece.name in self._layers:
                self._check_layer(piece)
            else:
                self._stored.check_tensor(piece)

    def read(self, piece: Piece) -> AbstractContextManager[Tensor]:
        return self._stored.read(piece)

    def quantization(self, name: str) -> QuantizedFormat | None:
        layer = self._layers.get(name)
        return None if layer is None else layer.format

    @contextmanager
    def read_quantized(self, piece: Piece) -> Iterator[QuantizedWeight]:
        layer = self._layers[piece.name]
        rows, columns = piece.shape
        with ExitStack() as stack:
            tensors = {part: stack.enter_context(self._stored.tensor(name)) for part, name in layer.parts.items()}
            if layer.expert is not None:
                tensors = {part: tensor[layer.expert] for part, tensor in tensors.items()}
            try:
                weight = layer.scheme.read(layer.format, tensors, (rows, columns))
            except WeightsError as error:
                raise WeightsError(f"{piece.name} is stored with {error}") from error
            yield weight

    def is_in_order(self, name: str) -> bool:
        if (stored := self._layers[name].parts.get("g_idx")) is None:
            return True
        with self._stored.tensor(stored) as groups:
            return bool((groups[1:] >= groups[:-1]).all())

    def in_one_order(self, names: Collection[str]) -> bool:
        stored = [self._layers[name].parts.get("g_idx") for name in names]
        if len(stored) < 2 or not any(stored):
            return True
        if None in stored:
            return False
        with ExitStack() as stack:
            first, *others = (stack.enter_context(self._stored.tensor(name)).long() for name in stored if name)
            return all(torch.equal(first, other) for other in others)

    def stored_as(self, name: str) -> str:
        layer = self._layers.get(name)
        return self._stored.stored_as(name) if layer is None else layer.scheme.label

    def remarks(self) -> list[str]:
        return list(self._quantization.remarks) if self._layers else []

    def _add(self, module: str, marker: str) -> set[str]:
        """Enter a quantized layer, and return the names of its tensors."""
        if module in self._quantization.ignored:
            raise WeightsError(f"{module:.200} is stored quantized, although quantization_config leaves it out")
        scheme = self._quantization.scheme(module, marker)
        if scheme is None:
            raise WeightsError(f"{module:.200} is stored quantized, but no target of quantization_config names it")
        names = {part: module + suffix for part, suffix in scheme.parts().items()}
        parts = {part: name for part, name in names.items() if name in self._stored}
        if absent := [names[part] for part in names.keys() - parts.keys() - scheme.optional]:
            raise WeightsError(f"tensors of quantized weights are missing ({len(absent)}): {listing(absent)}")
        headers = self._headers(parts)
        stored = scheme.format(headers)
        if isinstance(scheme, ExpertsMxfp4):
            outer, _, name = module.rpartition(".")
            numbers = [header.size(0) for header in headers.values()]
            if len(set(numbers)) > 1 or numbers[0] > MOST_EXPERTS:
                raise WeightsError(
                    f"tensors of {module:.200} have {' and '.join(map(str, numbers))} experts: all must have as many, "
                    f"and at most {MOST_EXPERTS}"
                )
            for expert in range(numbers[0]):
                self._layers[f"{outer}.{expert}.{name}{scheme.weight}"] = Layer(scheme, parts, stored, expert)
        else:
            self._layers[module + scheme.weight] = Layer(scheme, parts, stored)
            self._biases.add(module + BIAS)
        return set(parts.values())

    def _headers(self, parts: Mapping[str, str]) -> dict[str, Header]:
        return {part: Header(*self._stored.header(name)) for part, name in parts.items()}

    def _check_layer(self, piece: Piece) -> None:
        layer = self._layers[piece.name]
        if len(piece.shape) != 2:
            raise WeightsError(f"{piece.name} is stored quantized, which only matrices may be")
        multiples = layer.scheme.multiples()
        if any(size % multiple for size, multiple in zip(piece.shape, multiples, strict=True)):
            raise WeightsError(
                f"weight {piece.name} has shape {list(piece.shape)}, but in {layer.scheme.label} rows must be a "
                f"multiple of {multiples[0]}, and columns of {multiples[1]}"
            )
        headers = self._headers(layer.parts)
        for part, (shapes, dtypes) in layer.scheme.wanted(*piece.shape).items():
            if part not in headers:
                continue
            name, (shape, dtype) = layer.parts[part], headers[part]
            if (shape if layer.expert is None else shape[1:]) not in shapes:
                raise WeightsError(
                    f"weight {name} has shape {brief(list(shape))}, but config.json implies {list(shapes[-1])}"
                    f"{'' if layer.expert is None else ' for each expert'} in {layer.scheme.label}"
                )
            if dtype not in dtypes:
                raise WeightsError(
                    f"weight {name} is stored as {dtype}, but must be {' or '.join(dtypes)} in {layer.scheme.label}"
                )

    def _is_zero(self, name: str) -> bool:
        _, dtype = self._stored.header(name)
        with self._stored.tensor(name) as tensor:
            return dtype in FLOAT_DTYPES and not bool(tensor.any())
