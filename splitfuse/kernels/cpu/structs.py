"""Describes weights, caches, steps and choices as structs for the compiled library.

csrc/interface.h is the other side of every line here. A struct borrows the memory that it points to: its caller keeps
the tensors alive, except those in its own attributes.
"""

from __future__ import annotations

import ctypes
import logging
from array import array
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64, c_uint8, c_void_p
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from splitfuse.errors import RankLostError
from splitfuse.kernels.cpu.library import Library, check_rules
from splitfuse.kernels.drawing import Filter
from splitfuse.kernels.group import Group, SharedGroup, SummingGroup
from splitfuse.kernels.layers import AttentionSpec
from splitfuse.kernels.loans import TILE, Channel, RequestLoan

_logger = logging.getLogger(__name__)

BF16, INT8, INT4, GROUPED, FP8 = range(5)
NONE, F32, F16, BFLOAT16, U8, I8, E8M0, LOW_BITS, HIGH_BITS = range(9)
PANEL = 32
"""Number of rows of a panel, and of elements that sizes of values are padded to. It is in csrc/multiply.h too."""


OPERATORS = (
    *("embedding", "qkv", "rotate and store", "attention", "o", "gate and up", "down"),
    *("head", "choice", "others"),
)
"""Names of the parts of a step whose time the kernels add up. They are `Operator` in csrc/interface.h."""


def check(tensor: Tensor, dtype: torch.dtype) -> None:
    """Assert what C++ takes for granted of a tensor whose address it gets."""
    assert tensor.dtype == dtype and tensor.is_contiguous() and tensor.device.type == "cpu", (
        f"the C++ kernels want a contiguous {dtype} on the CPU, not {tensor.dtype} on {tensor.device}"
    )


def vector_address(vector: Tensor | None, length: int, dtype: torch.dtype = torch.bfloat16) -> int | None:
    """Return the address of a bias [length], or of a norm's weight in fp32, if there is one."""
    if vector is None:
        return None
    check(vector, dtype)
    assert vector.numel() == length
    return vector.data_ptr()


def int32(tensor: Tensor) -> Tensor:
    """Return the numbers as C++ reads them: the tensor itself if it is so already."""
    return tensor.to(torch.int32).contiguous()


def fields(kind: Any, *names: str) -> list[tuple[str, Any]]:
    """Return fields of one type."""
    return [(name, kind) for name in names]


class Struct(ctypes.Structure):
    """Mirrors a struct of csrc/interface.h. Its address is good while the object lives; attributes that are no
    fields keep alive what it points to.
    """

    @property
    def address(self) -> int:
        return ctypes.addressof(self)


class Weight(Struct):
    """Describes a linear weight [rows, columns] in panels, which lie in `memory`; of a weight of each head that of the
    first, which the others follow.
    """

    memory: Tensor
    num_heads: int
    kept: tuple[Any, ...]
    """What else the struct points to, and parts of it."""
    _fields_ = (
        *fields(c_int32, "format", "gated"),
        *fields(c_int64, "rows", "columns", "group"),
        ("data", c_void_p),
        ("qvalues", c_uint8 * 16),
        *fields(c_int32, "bias", "bits", "scale_type", "offset_type", "zeros", "two_level"),
        *fields(c_void_p, "order", "parts"),
        ("num_parts", c_int64),
    )

    @property
    def num_panels(self) -> int:
        """Return the number of panels."""
        rows: int = self.rows
        return -(-rows // PANEL)  # gated too: of either half a panel has half as many rows

    def is_packed_as(self, other: Weight) -> bool:
        """Return whether a weight of the same shape has panels of the same layout, and neither is of parts."""
        names = ("format", "group", "bits", "bias", "scale_type", "offset_type", "zeros", "two_level")
        same = all(getattr(self, name) == getattr(other, name) for name in names)
        return same and bytes(self.qvalues) == bytes(other.qvalues) and not self.parts and not other.parts


class Stored(Struct):
    """Points to rows of a weight as a checkpoint holds them, which it keeps alive."""

    num_rows: int
    tensors: tuple[Tensor | None, ...]
    _fields_ = fields(c_void_p, "levels", "scales", "offsets", "scale_units", "offset_units")

    @classmethod
    def of(cls, levels: Tensor, *others: Tensor | None) -> Stored:
        """Return the struct of tensors in the order of its fields."""
        tensors = (levels, *others)
        whole = tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)
        stored = cls(*(None if tensor is None else tensor.data_ptr() for tensor in whole))
        stored.num_rows, stored.tensors = len(levels), whole
        return stored


class Store(Struct):
    """Describes the packed keys and values of one layer, which lie in `memory`."""

    memory: Tensor
    _fields_ = (
        ("data", c_void_p),
        ("num_blocks", c_int64),
        *fields(c_int32, "block_size", "num_kv_heads", "head_dim", "int8", "value_from"),
    )

    def block(self, block: int) -> Tensor:
        """Return the bytes of a block, which lie side by side. Raises IndexError if there is no such block."""
        return self.memory.view(self.num_blocks, -1)[block]

    def fits(self, spec: AttentionSpec) -> bool:
        """Return whether the store has the shape that the attention of a layer reads."""
        return (self.num_kv_heads, self.head_dim, self.value_from) == (
            spec.num_kv_heads,
            spec.head_dim,
            spec.value_from,
        )

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes


class States(Struct):
    """Describes the recurrent states of one layer, which lie in `memory`."""

    memory: Tensor
    _fields_ = (("data", c_void_p), *fields(c_int64, "num_slots", "slot_floats"))

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes


class LoraWeight(Struct):
    """Describes what an adapter adds to one weight; without ranks, nothing."""

    _fields_ = (*fields(c_void_p, "a", "scales", "vectors", "b"), ("rank", c_int64))


class Lora(Struct):
    """Describes the adapters of a step, and keeps alive what it points to."""

    kept: tuple[Any, ...]
    _fields_ = (*fields(c_void_p, "of_row", "order", "tables"), *fields(c_int64, "num_adapters", "most_ranks"))


class Loan(Struct):
    """Describes the loan of a request of a step."""

    _fields_ = (
        *fields(c_int32, "request", "tiles"),
        ("channel", c_void_p),
        ("capacity", c_int64),
        *fields(c_int32, "lost", "asked", "awaits", "patience"),
    )

    @classmethod
    def of(cls, channel: Channel, request: int = 0, num_tokens: int = 0) -> Loan:
        """Return the loan of `num_tokens` leading tokens; the caller keeps the channel alive."""
        patience = int(1000 * channel.patience)
        return cls(request, num_tokens // TILE, channel.address, channel.capacity, 0, 0, 0, patience)


class Loans(Struct):
    """Lists the loans of a step, which it keeps alive."""

    array: Any
    numbers: Any
    _fields_ = (*fields(c_void_p, "of", "of_request"), ("count", c_int64))

    @classmethod
    def of_step(cls, loans: Sequence[RequestLoan], starts: Sequence[int]) -> Loans:
        """Return the loans of requests, of which each begins in the step at one of the positions `starts`. Raises
        IndexError for a loan that C++ cannot compute with.
        """
        numbers = array("i", [-1] * len(starts))
        for place, loan in enumerate(loans):
            if numbers[loan.request] >= 0 or not 0 < loan.num_tokens <= starts[loan.request] or loan.num_tokens % TILE:
                raise IndexError("a step that cannot be computed: a loan that is not of leading tiles of its request")
            numbers[loan.request] = place
        each = (Loan * len(loans))(*(Loan.of(loan.channel, loan.request, loan.num_tokens) for loan in loans))
        struct = cls(ctypes.addressof(each), numbers.buffer_info()[0], len(loans))
        struct.array, struct.numbers = each, numbers
        return struct


class Step(Struct):
    """Points to the arrays of a step; null where an operation does not need one."""

    tensors: list[Tensor | None]
    _fields_ = (
        *fields(c_int32, "tokens", "requests", "table_width", "num_rows"),
        *fields(c_void_p, "ids", "positions", "slots", "query_start", "seq_lens"),
        *fields(c_void_p, "state_reads", "state_writes", "tables", "rows", "lora", "loans"),
    )

    @classmethod
    def of(cls, num_tokens: int, **arrays: Tensor) -> Step:
        """Return the step of one operation with the arrays that it needs, by their names in RaggedBatch; it keeps them
        alive.
        """
        per_request = ("query_start", "seq_lens", "state_reads", "state_writes", "block_tables")
        names = (None, "positions", "slot_mapping", *per_request, None)
        tensors = [int32(arrays[name]) if name in arrays else None for name in names]
        _, positions, slots, query_start, seq_lens, reads, writes, tables, _ = tensors
        assert all(len(each) == num_tokens for each in (positions, slots) if each is not None)
        num_requests, width = 0 if query_start is None else len(query_start) - 1, 0
        if tables is not None:
            width = tables.shape[1]
        assert all(len(each) == num_requests for each in (seq_lens, reads, writes, tables) if each is not None)
        pointers = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
        step = cls(num_tokens, num_requests, width, 0, *pointers)
        step.tensors = tensors
        return step

    def check(
        self, library: Library, store: Store | None, *, max_position: int = 0, states: States | None = None
    ) -> None:
        """Raise IndexError if a number of the step would lead a kernel out of a store, the states or a table."""
        num_blocks, block_size = (0, 1) if store is None else (store.num_blocks, store.block_size)
        num_states = -1 if states is None else states.num_slots
        check_rules(library.check_step(self.address, max_position, num_blocks, block_size, 0, num_states))


class PackedStep(Struct):
    """Points to the numbers of a RaggedBatch on the host, for a whole network."""

    _fields_ = (
        ("numbers", c_void_p),
        *fields(c_int32, "tokens", "requests", "table_width", "num_rows"),
        *fields(c_void_p, "lora", "loans"),
    )


class OperatorTime(Struct):
    """Holds the nanoseconds that a thread has taken for an operator: for work that was split or claimed, and for waits
    after either.
    """

    split: int
    after_split: int
    claimed: int
    after_claimed: int
    _fields_ = fields(c_int64, "split", "after_split", "claimed", "after_claimed")


_Reduce = ctypes.CFUNCTYPE(c_int32, c_void_p, c_int64)
_ANY_FLOATS = c_float * 2**40  # one type for all lengths: types of arrays are never freed


class Rank(Struct):
    """Describes this process as a rank of a group, which it keeps alive. It is `Group` in C++."""

    group: Group
    callback: Any
    _fields_ = (
        *fields(c_int32, "rank", "size"),
        *fields(c_void_p, "meeting", "shared"),
        *fields(c_int64, "shared_bytes", "patience"),
        ("reduce", c_void_p),
        ("failed", c_int32),
    )

    @classmethod
    def of(cls, group: Group) -> Rank:
        """Return the rank of this process."""
        rank = cls(group.shard.rank, group.shard.size)
        rank.group = group
        if isinstance(group, SharedGroup):
            rank.meeting, rank.shared, rank.shared_bytes = group.address, group.buffers_address, group.buffer_bytes
            rank.patience = int(1000 * group.patience)
        else:
            assert isinstance(group, SummingGroup)
            rank.callback = _Reduce(partial(_add_up, group))
            rank.reduce = ctypes.cast(rank.callback, c_void_p)
        return rank


def _add_up(group: SummingGroup, address: int, count: int) -> int:
    """Add numbers up over all ranks, for C++. Returns whether that failed."""
    try:
        group.add_up(torch.frombuffer(_ANY_FLOATS.from_address(address), dtype=torch.float32, count=count))
    except RankLostError:
        return 1
    except BaseException:  # C++ would go on with what was not added
        _logger.exception("sums of ranks could not be added")
        return 1
    return 0


def _address(numbers: array[Any]) -> int:
    return numbers.buffer_info()[0]


class Choices(Struct):
    """Says how a token is chosen for each of some rows, and has room for these and the largest logits."""

    arrays: tuple[array[Any], ...]
    _fields_ = (
        *fields(c_void_p, "head", "bias", "filters", "numbers", "ids", "peaks"),
        *fields(c_int64, "vocabulary", "first_id"),
        ("logits", c_void_p),
    )

    @classmethod
    def of(
        cls, head: Weight, bias: Tensor | None, count: int, filters: Sequence[Filter], numbers: Sequence[float]
    ) -> Choices:
        """Return the choices of `count` rows, drawn by filters and numbers if there are any; it keeps all of it."""
        assert not head.gated and len(filters) == len(numbers) in (0, count)
        ids, peaks = array("i", bytes(4 * count)), array("f", bytes(4 * count))
        places = None, None, _address(ids), _address(peaks)
        choices = cls(head.address, vector_address(bias, head.rows), *places, head.rows)
        choices.arrays = ids, peaks
        if filters:
            kept, wanted = array("d", chain.from_iterable(filters)), array("d", numbers)
            choices.filters, choices.numbers = _address(kept), _address(wanted)
            choices.arrays = ids, peaks, kept, wanted
        return choices

    def share(self, group: SharedGroup, vocabulary: int) -> None:
        """Let this be the part of a rank, which has its rows of the head: the first one chooses."""
        ids, count = group.shard.span(vocabulary), len(self.arrays[0])
        assert 4 * count * vocabulary <= group.logit_bytes
        self.vocabulary, self.first_id, self.logits = vocabulary, ids.start, group.logits_address

    @property
    def result(self) -> tuple[list[int], list[float]]:
        """Return the chosen tokens and the largest logits."""
        ids, peaks, *_ = self.arrays
        return ids.tolist(), peaks.tolist()
