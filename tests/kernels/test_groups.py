"""Ranks of a tensor-parallel group give the bits of one process: here threads, each with a part of the weights."""

from __future__ import annotations

import ctypes
import math
import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from backends import CPU, emulation_slow, variants
from ragged_requests import Chunk, Runner
from random_networks import RandomWeights
from rank_networks import EPS, NETWORKS, dense, heads, logits, make_summing_groups, network, own_names, together
from specs import make_delta
from torch import Tensor

from splitfuse.errors import ConfigError, RankLostError
from splitfuse.kernels.cpu.backend import CpuBackend
from splitfuse.kernels.drawing import GREEDY, Filter
from splitfuse.kernels.group import WHOLE, Group, Shard, SharedGroup, make_group_file
from splitfuse.kernels.layers import HeadNormSpec, LayerSpec, Mixer
from splitfuse.models.decoder import Decoder
from splitfuse.models.kv_cache import KVCache, Piece
from splitfuse.models.parameters import parameters
from splitfuse.models.sharding import RankDecoder, check_ranks
from splitfuse.models.spec import ModelSpec
from splitfuse.models.weights import load_decoder, weight_bytes
from splitfuse.runtime.batch import BatchBuilder
from splitfuse.runtime.parallel.follower import RankExecutor
from splitfuse.runtime.parallel.messages import ComputeHead, ComputeStep

LOGIT_BYTES, STEP_BYTES = 2**19, 2**21
MEETINGS_AT = 64
"""Place of the number of meetings in the memory of a group: see csrc/group.h."""
FORMATS = [(None, None, False, 2), ("int8", None, True, 2), ("int8", 128, False, 3), ("int4", 64, False, 2)]
CASES = [
    pytest.param(*case.values, name, id=f"{case.id}-{name}", marks=case.marks)
    for each in FORMATS
    for case in variants(*each, id="-".join(map(str, each)))
    for name in NETWORKS
]


@pytest.fixture(autouse=True)
def _own_names() -> Iterator[None]:
    with own_names():
        yield


def load(spec: ModelSpec, backend: CpuBackend, group: Group | None = None) -> Decoder:
    return load_decoder(RandomWeights(), spec, dtype=torch.bfloat16, device=CPU, backend=backend, group=group)


def make_groups(size: int, patience: float = 60.0, *, step_bytes: int = STEP_BYTES) -> list[Group]:
    fd = make_group_file(logit_bytes=LOGIT_BYTES, step_bytes=step_bytes)
    shards = [Shard(rank, size) for rank in range(size)]
    groups: list[Group] = [SharedGroup(fd, shard, logit_bytes=LOGIT_BYTES, patience=patience) for shard in shards]
    os.close(fd)
    return groups


@pytest.mark.parametrize(
    ("variant", "quantization", "group_size", "kv_int8", "ranks", "name"), emulation_slow(CASES, "2-experts")
)
def test_ranks_give_the_bits_of_one_process(
    variant: str, quantization: str | None, group_size: int | None, kv_int8: bool, ranks: int, name: str
) -> None:
    spec, formats = NETWORKS[name], {"quantization": quantization, "group_size": group_size, "kv_int8": kv_int8}

    def backend(threads: int) -> CpuBackend:
        return CpuBackend(variant=variant, num_threads=threads, **formats)  # type: ignore[arg-type]

    alone = logits(load(spec, backend(1)), spec.vocab_size)
    assert all(rows.isfinite().all() and rows.std() > 0.1 for rows in alone)
    decoders = [load(spec, backend(1 + group.shard.rank), group) for group in make_groups(ranks)]
    for rows in together(decoders, lambda decoder: logits(decoder, spec.vocab_size)):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(rows, alone, strict=True))


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("variant", emulation_slow(variants()))
def test_ranks_choose_in_the_call_what_one_process_chooses(variant: str, ranks: int) -> None:
    spec = NETWORKS["plain"]
    chunks = [Chunk(0, range(40), (1, 2), 1), Chunk(0, range(3), (3,), 0), Chunk(0, (9, 8), (5,), 2)]
    draws: tuple[list[Filter], list[float]] = [Filter(0.7), Filter(1.5, top_k=4), GREEDY], [0.1, 0.5, 0.0]
    cases = (chunks, draws), (chunks, ([], [])), (chunks[1:2], ([], []))

    def choices(decoder: Decoder) -> list[Any]:
        runner = Runner(decoder, block_size=32, num_blocks=8)
        assert decoder.chooses_at_once
        return [decoder.forward_and_choose(runner.batches.build(some), runner.cache, *draw) for some, draw in cases]

    def backend(threads: int) -> CpuBackend:
        return CpuBackend(variant=variant, num_threads=threads, quantization="int8")

    alone = choices(load(spec, backend(1)))
    decoders = [load(spec, backend(1 + group.shard.rank), group) for group in make_groups(ranks)]
    assert len(alone[0][0]) == 3 and together(decoders, choices)[0] == alone


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("variant", emulation_slow(variants()))
def test_ranks_leave_out_rows_that_need_no_logits(variant: str, name: str) -> None:
    spec = NETWORKS[name]

    def hidden(decoder: Decoder) -> list[Tensor]:
        found = []
        for wanted in ((40, 3, 2), (1, 0, 2), (0, 0, 0)):
            runner = Runner(decoder, block_size=32, num_blocks=8)
            parts = zip((range(40), range(3), (9, 8)), ((1, 2), (3,), (5,)), wanted, strict=True)
            chunks = [Chunk(0, ids, table, count) for ids, table, count in parts]
            found.append(decoder.forward(runner.batches.build(chunks), runner.cache))
        return found

    def load_all(groups: list[Group]) -> list[Decoder]:
        return [load(spec, CpuBackend(variant=variant, num_threads=1 + g.shard.rank), g) for g in groups]

    (every, *_) = hidden(load(spec, CpuBackend(variant=variant, num_threads=1)))
    for shared, groups in ((True, make_groups(3)), (False, make_summing_groups(2))):
        for whole, some, none in together(load_all(groups), hidden):
            assert torch.equal(whole, every) or not shared
            assert torch.equal(some, whole[[39, 43, 44]]) and none.shape == (0, 96)


@pytest.mark.parametrize(("rows", "room", "num_more"), [(31, STEP_BYTES, 0), (32, STEP_BYTES, 4), (32, 2**16, 0)])
def test_ranks_pack_many_rows_for_each_other(rows: int, room: int, num_more: int) -> None:
    """Which takes a meeting before each of the four products of a layer, if the memory that they share has room."""
    spec, numbers = NETWORKS["plain"], []
    for count in (1, rows):
        groups = make_groups(2, step_bytes=room)

        def step(decoder: Decoder, count: int = count) -> list[Tensor]:
            runner = Runner(decoder, block_size=32, num_blocks=8)
            return [decoder.forward(runner.batches.build([Chunk(0, range(count), (1,), count)]), runner.cache)]

        together([load(spec, CpuBackend(num_threads=1), group) for group in groups], step)
        assert isinstance(groups[0], SharedGroup)
        numbers.append(ctypes.c_uint32.from_address(groups[0].address + MEETINGS_AT).value)
    assert numbers[1] - numbers[0] == num_more * len(spec.layers)


SUMS = [
    pytest.param(*case.values, name, id=f"{case.id}-{name}", marks=case.marks)
    for each in ((None, None, 2), ("int8", None, 2), ("int4", 64, 3))
    for case in variants(*each, id="-".join(map(str, each)))
    for name in NETWORKS
    if each[0] != "int4" or name == "experts"
]


@pytest.mark.parametrize(("variant", "quantization", "group_size", "ranks", "name"), emulation_slow(SUMS, "2-experts"))
def test_sums_of_ranks_depend_on_their_number_alone(
    variant: str, quantization: str | None, group_size: int | None, ranks: int, name: str
) -> None:
    spec = NETWORKS[name]

    def backend(threads: int) -> CpuBackend:
        return CpuBackend(variant=variant, num_threads=threads, quantization=quantization, group_size=group_size)

    alone = logits(load(spec, backend(1)), spec.vocab_size)
    groups = make_summing_groups(ranks)
    found = []
    for threads, seed in ((1, 3), (2, 8)):
        decoders = [load(spec, backend(threads), group) for group in groups]
        found += together(decoders, lambda decoder, seed=seed: logits(decoder, spec.vocab_size, seed))  # type: ignore[misc]
    for rows in found[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(rows, found[0], strict=True))
    for ours, theirs in zip(found[0], alone, strict=True):  # which were rounded elsewhere; later tokens may differ
        likeness = torch.cosine_similarity(ours[:-3], theirs[:-3], dim=-1)
        assert likeness.numel() == 0 or likeness.median() > (0.999 if quantization is None else 0.98)


def test_a_sum_fails_that_another_rank_does_not_add_to() -> None:
    spec = NETWORKS["plain"]
    groups = make_summing_groups(2, patience=0.3)
    first, _ = (load(spec, CpuBackend(num_threads=2), group) for group in groups)
    for _ in range(2):
        with pytest.raises(RankLostError):
            logits(first, spec.vocab_size)
    assert groups[0].is_broken


def test_ranks_divide_the_weights() -> None:
    for spec in NETWORKS.values():
        backend = CpuBackend(num_threads=1, quantization="int8")
        parts = [
            sum(
                math.prod(each.of_rank(shard).shape)
                for each in parameters(spec)
                if each.role.linear and each.name not in ("router", "shared_gate")
            )
            for shard in (Shard(0, 2), Shard(1, 2), WHOLE)
        ]
        assert parts[0] + parts[1] == parts[2] and abs(parts[0] - parts[1]) <= 2 * spec.hidden_size
        whole = weight_bytes(spec, torch.bfloat16, backend)
        assert weight_bytes(spec, torch.bfloat16, backend, shard=Shard(0, 2)) < 0.75 * whole  # panels are whole


@pytest.mark.parametrize("how", ["absent", "ended", "slow"])
def test_a_step_fails_that_another_rank_does_not_compute(how: str) -> None:
    spec = NETWORKS["plain"]
    groups = make_groups(2, patience=0.2 if how == "absent" else 60.0)
    first, second = (load(spec, CpuBackend(num_threads=2), group) for group in groups)
    with ThreadPoolExecutor(2) as pool:
        if how == "slow":
            found = pool.submit(logits, first, spec.vocab_size)
            time.sleep(0.3)  # the first one sleeps meanwhile
            assert torch.equal(logits(second, spec.vocab_size)[0], found.result()[0])
            return
        found = pool.submit(logits, first, spec.vocab_size)
        if how == "ended":
            time.sleep(0.1)
            groups[1].end()
        with pytest.raises(RankLostError, match="has ended, or does not answer"):
            found.result()
    assert groups[0].is_broken and groups[1].is_broken
    with pytest.raises(RankLostError):  # for ever, and at once
        logits(second, spec.vocab_size)
    with pytest.raises(RankLostError):
        logits(first, spec.vocab_size)


def head_rows(count: int) -> Tensor:
    """Return hidden states, as the output head reads them."""
    return torch.randn(count, 96, generator=torch.Generator().manual_seed(count)).bfloat16()


def test_logits_for_which_shared_memory_has_no_room_are_computed_in_parts() -> None:
    spec = NETWORKS["biases"]
    count = LOGIT_BYTES // (4 * spec.vocab_size) + 5
    alone = load(spec, CpuBackend(num_threads=1)).logits(head_rows(count))
    leader, follower = (load(spec, CpuBackend(num_threads=1), group) for group in make_groups(2))
    assert isinstance(leader, RankDecoder)
    tasks = SimpleQueue[Tensor]()
    leader.on_head = tasks.put
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(lambda: [len(follower.head_products(tasks.get(timeout=60))) for _ in range(2)])
        assert torch.equal(leader.logits(head_rows(count)), alone)
        assert done.result() == [count - 5, 5]


@pytest.mark.parametrize("what", ["network", "head"])
def test_a_rank_that_fails_in_what_others_compute_too_ends_the_group(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the others, which wait for it in this step, would take the next one for it."""
    spec, why = NETWORKS["plain"], list[str]()
    groups = make_groups(2)
    backend = CpuBackend(num_threads=1)
    first, second = load(spec, backend, groups[0]), load(spec, CpuBackend(num_threads=1), groups[1])
    assert isinstance(first, RankDecoder)
    first.on_failed = why.append
    with pytest.raises(IndexError):  # the others are not told of what cannot be computed
        logits(first, 10**6)
    assert not groups[0].is_broken and not why

    def fail(*_: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(backend.library, what, fail)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(logits, second, spec.vocab_size)
        with pytest.raises(RankLostError, match="rank 0 failed in a step of all ranks: RuntimeError"):
            logits(first, spec.vocab_size)
        with pytest.raises(RankLostError):
            found.result()
    assert groups[0].is_broken and len(why) == 1


def test_a_follower_has_memory_there_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the head, for which the leader asks at once."""
    had: list[Piece] = []

    def have(_: KVCache, piece: Piece) -> bool:
        had.append(piece)
        return True

    monkeypatch.setattr(KVCache, "have", have)
    decoder = load(NETWORKS["plain"], CpuBackend(num_threads=1), make_groups(1)[0])
    assert isinstance(decoder, RankDecoder)
    for num_rows in (1, 0):
        executor = RankExecutor(decoder, Runner(decoder, block_size=32, num_blocks=16).cache)
        batch = BatchBuilder(32, CPU).build([Chunk(0, (5, 6), (3,), num_rows)])
        had.clear()
        executor.execute(ComputeStep.of(batch))
        assert bool(had) == (num_rows == 0)
        if num_rows:
            executor.execute(ComputeHead.of(head_rows(1)))
            assert had


def test_ctrl_c_waits_until_all_ranks_have_computed() -> None:
    spec = NETWORKS["plain"]
    first, second = (load(spec, CpuBackend(num_threads=1), group) for group in make_groups(2))
    assert isinstance(first, RankDecoder)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell may have let us ignore
    try:
        with ThreadPoolExecutor(1) as pool:
            theirs = pool.submit(lambda: [second.logits(head_rows(count)) for count in (3, 4)])
            first.on_head = lambda _: os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                first.logits(head_rows(3))
            first.on_head = lambda _: None
            assert torch.equal(first.logits(head_rows(4)), theirs.result()[1])
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("size", "layer", "message"),
    [
        (
            4,
            heads(),
            "=4 does not divide the 6 key/value heads of the model: it can be 1 or 2 or 3",
        ),
        (5, heads(num_heads=10, num_kv_heads=5), "does not divide the 96 elements of hidden states of the model"),
        (2, heads(alibi=1.0), "the model has ALiBi, whose slopes depend on all heads; leave it out"),
        (2, heads(gate=True), "the model has a gate of attention"),
        (2, heads(qk_norm=HeadNormSpec(norm=EPS, whole_row=True)), "norms over all heads of queries and keys"),
        (2, make_delta(2, 6, 10, 18), "the model has layers with a recurrent state"),
    ],
)
def test_what_ranks_cannot_divide_is_refused(size: int, layer: Mixer, message: str) -> None:
    spec = network(LayerSpec(mixer=heads(), mlp=None), LayerSpec(mixer=layer, mlp=dense(132)))
    if size == 5:
        spec = network(LayerSpec(mixer=layer, mlp=dense(130)))
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_ranks(spec, CpuBackend(num_threads=1), size)
    check_ranks(spec, CpuBackend(num_threads=1), 1)


def test_indivisible_elements_are_refused() -> None:
    message = "tensor_parallel_size=3 does not divide the 130 inner elements of an MLP of the model: it can be 1 or 2"
    with pytest.raises(ConfigError, match=message):
        check_ranks(network(LayerSpec(mixer=heads(), mlp=dense(130))), CpuBackend(num_threads=1), 3)
