"""A request whose leading tiles another cache holds gets the bits of one whose cache has them all."""

from __future__ import annotations

import itertools
import mmap
import os
import random
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from backends import CPU, emulation_slow, poison, variants
from ragged_requests import Chunk, Request, Runner
from random_networks import OWN, OwnNames, RandomWeights
from specs import make_spec
from torch import Tensor

from splitfuse.kernels.cpu.backend import CpuBackend
from splitfuse.kernels.layers import AttentionSpec, LatentSpec, LayerSpec, MlpSpec, NormSpec
from splitfuse.kernels.loans import TILE, Channel, RequestLoan, make_channel
from splitfuse.models.decoder import Decoder
from splitfuse.models.families import registry
from splitfuse.models.families.common import Family
from splitfuse.models.kv_cache import KVCache
from splitfuse.models.spec import ModelSpec, RopeSpec
from splitfuse.models.weights import load_decoder
from splitfuse.runtime.batch import BatchBuilder

BLOCK, VOCABULARY, LENGTH, NUM_BLOCKS = 64, 70, 1601, 40
CHUNK, STREAMED = 24, 5
"""Numbers of tokens that follow the first ones of the request: in a chunk, and then one by one."""


def network(**fields: Any) -> ModelSpec:
    attention = fields.pop("attention", {})
    sizes = {"num_layers": 2, "intermediate_size": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    whole = {"architecture": OWN, "vocab_size": VOCABULARY, "hidden_size": 48, "max_position": 2 * LENGTH}
    return make_spec(**(sizes | whole | fields), attention=attention)


def latent_network() -> ModelSpec:
    norm = NormSpec(eps=1e-5)
    latent = LatentSpec(norm=norm, q_rank=None, kv_rank=32, rope_dim=8, nope_dim=16, v_dim=16)
    layer = LayerSpec(
        mixer=AttentionSpec(num_heads=4, num_kv_heads=1, head_dim=40, latent=latent),
        mlp=MlpSpec(intermediate_size=64, activation="silu"),
    )
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 48, "max_position": 2 * LENGTH}
    ropes = (RopeSpec(theta=10000.0, rotary_dim=8),)
    return ModelSpec(architecture=OWN, dtype="bfloat16", norm=norm, layers=(layer,) * 2, ropes=ropes, **sizes)


NETWORKS = {
    "plain": network(),
    "window": network(windows=(700, None)),  # which sees a part of the loan, or nothing
    "small window": network(windows=(None, 30)),
    "sinks and softcap": network(attention={"sinks": True, "softcap": 20.0}),
    "alibi": network(attention={"alibi": 8.0, "rope": None}),
    "latent": latent_network(),
}
CASES = [(name, kv_int8) for name in NETWORKS for kv_int8 in (False, True) if not (kv_int8 and name == "latent")]


@pytest.fixture(autouse=True)
def own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.FAMILIES, OWN, Family("own", lambda _: NETWORKS["plain"], OwnNames()))


def make_decoder(variant: str, name: str, *, threads: int = 1, kv_int8: bool = False) -> Decoder:
    backend = CpuBackend(variant=variant, num_threads=threads, kv_int8=kv_int8)
    return load_decoder(RandomWeights(), NETWORKS[name], dtype=torch.bfloat16, device=CPU, backend=backend)


def make_cache(decoder: Decoder) -> KVCache:
    sizes = {"num_blocks": NUM_BLOCKS, "block_size": BLOCK, "dtype": torch.bfloat16, "device": decoder.device}
    cache = KVCache(decoder.spec, backend=decoder.backend, **sizes)
    for store in cache.layers:
        poison(store)
    return cache


@contextmanager
def lending(decoder: Decoder, cache: KVCache, blocks: Sequence[int], *, answers: bool = True) -> Iterator[Channel]:
    """A channel to a creditor that holds a loan in these blocks, in a thread."""
    fd = make_channel(5, decoder.channel_bytes(cache, CHUNK))
    channel, theirs = Channel(fd, 5, patience=60.0 if answers else 0.05), Channel(fd, 5)
    os.close(fd)
    thread = threading.Thread(target=decoder.lend, args=(cache, theirs, blocks))
    if answers:
        thread.start()
    try:
        yield channel
    finally:
        channel.close()
        if answers:
            thread.join()


class Whole:
    """A request computed by one cache that has it all, beside another one, and the logits of its last tokens."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        rng = random.Random(3)
        self.tokens = [rng.randrange(VOCABULARY) for _ in range(LENGTH)]
        self.runner = Runner(decoder, block_size=BLOCK, num_blocks=NUM_BLOCKS)
        self.request = Request(list(self.tokens))
        self.first = LENGTH - CHUNK - STREAMED
        while (left := self.first - self.request.num_computed) > 0:
            self.runner.step([(self.request, min(left, 600))])
        self.request.logits.clear()
        self.steps = [CHUNK, *[1] * STREAMED]
        for length in self.steps:
            self.runner.step([(self.request, length)])
        self.logits = torch.stack(self.request.logits)

    def block(self, index: int) -> Tensor:
        data = torch.empty(self.runner.cache.block_bytes, dtype=torch.uint8)
        self.runner.cache.read_block(self.request.blocks[index], data)
        return data


def with_loan(
    whole: Whole, cache: KVCache, channel: Channel, tiles: int, most_logits: int = LENGTH
) -> tuple[Tensor, Tensor, bool]:
    """Return the logits of the last rows of the same steps in a cache that has all but the leading tiles, those of a
    neighbour, and whether the loan was lost.
    """
    decoder, held = whole.decoder, tiles * TILE // BLOCK
    blocks = list(range(1, -(-LENGTH // BLOCK) - held + 1))
    for index, block in enumerate(blocks, start=held):
        cache.write_block(block, whole.block(index))  # those that are computed again are overwritten
    table = [0] * held + blocks
    start, rows, others, lost = whole.first, [], [], False
    for length in whole.steps:
        neighbour = Chunk(0, whole.tokens[:3], [NUM_BLOCKS - 1], 3)
        num_logits = min(length, most_logits)
        chunk = Chunk(start, whole.tokens[start : start + length], table[: -(-(start + length) // BLOCK)], num_logits)
        batch = BatchBuilder(BLOCK, decoder.device).build([neighbour, chunk])
        batch.loans = [RequestLoan(1, tiles * TILE, channel)]
        logits = decoder.logits(decoder.forward(batch, cache))
        others.append(logits[:3])
        rows.append(logits[3:])
        lost |= batch.loans[0].is_lost
        start += length
    return torch.cat(rows), torch.stack(others), lost


@pytest.mark.parametrize(("name", "kv_int8"), CASES)
@pytest.mark.parametrize("variant", emulation_slow(variants()))
def test_bits_do_not_depend_on_who_holds_leading_tiles(variant: str, name: str, kv_int8: bool) -> None:
    whole = Whole(make_decoder(variant, name, threads=2, kv_int8=kv_int8))
    for threads, tiles in ((1, 1), (1, 3), (2, 2)):
        whole.decoder = make_decoder(variant, name, threads=threads, kv_int8=kv_int8)
        theirs = make_cache(whole.decoder)
        lent = random.Random(tiles).sample(range(NUM_BLOCKS), tiles * TILE // BLOCK)
        with lending(whole.decoder, theirs, lent) as channel:
            for index in range(len(lent)):
                assert whole.decoder.backend.deposit(channel, index, whole.block(index))
            logits, _, lost = with_loan(whole, make_cache(whole.decoder), channel, tiles)
        assert not lost
        assert torch.equal(logits, whole.logits)


@pytest.mark.parametrize("variant", variants())
@pytest.mark.parametrize("most", [0, 1, 5])
def test_creditors_are_asked_for_the_rows_that_need_logits(variant: str, most: int) -> None:
    """Which are those of the last layer, if there are any: more would be lost work, not other bits."""
    whole = Whole(make_decoder(variant, "plain", threads=2))
    with lending(whole.decoder, make_cache(whole.decoder), range(8)) as channel:
        for index in range(8):
            assert whole.decoder.backend.deposit(channel, index, whole.block(index))
        logits, others, lost = with_loan(whole, make_cache(whole.decoder), channel, 1, most)
    ends = list(itertools.accumulate(whole.steps))
    rows = [row for length, end in zip(whole.steps, ends, strict=True) for row in range(end - min(length, most), end)]
    assert not lost and torch.equal(logits, whole.logits[rows])
    assert all(torch.equal(each, others[0]) for each in others)


@pytest.mark.parametrize("variant", variants())
def test_two_requests_have_creditors_of_their_own(variant: str) -> None:
    decoder = make_decoder(variant, "plain")
    whole, cache = Whole(decoder), make_cache(decoder)
    first, second = (lending(decoder, make_cache(decoder), range(held)) for held in (16, 8))
    with first as one, second as two:
        chunks = []
        for place, (channel, held) in enumerate(((one, 16), (two, 8))):
            for index in range(held):
                assert decoder.backend.deposit(channel, index, whole.block(index))
            table = [0] * held + [1 + 18 * place + number for number in range(26 - held)]
            for index in range(held, 25):
                cache.write_block(table[index], whole.block(index))
            chunks.append(Chunk(LENGTH - 2, whole.tokens[LENGTH - 2 :], table, 2))
        batch = BatchBuilder(BLOCK, decoder.device).build(chunks)
        batch.loans = [RequestLoan(0, 16 * BLOCK, one), RequestLoan(1, 8 * BLOCK, two)]
        logits = decoder.logits(decoder.forward(batch, cache))
    assert torch.equal(logits[:2], whole.logits[-2:]) and torch.equal(logits[2:], whole.logits[-2:])


@pytest.mark.parametrize("how", ["no answer", "closed"])
@pytest.mark.parametrize("variant", variants())
def test_a_lost_creditor_is_noticed_and_harms_no_other(variant: str, how: str) -> None:
    decoder = make_decoder(variant, "plain")
    whole = Whole(decoder)
    with lending(decoder, make_cache(decoder), range(8), answers=False) as channel:
        if how == "closed":
            channel.close()
        _, others, lost = with_loan(whole, make_cache(decoder), channel, 1)
        assert lost
        assert not decoder.backend.deposit(channel, 0, whole.block(0))
    alone = Request(whole.tokens[:3])
    Runner(decoder, block_size=BLOCK).step([(alone, 3)])
    for each in others:
        assert torch.equal(each, torch.stack(alone.logits))


ATTEND, DEPOSIT = 1, 2
NO_SENSE = {
    "kind": (3, 0, 1, 1, TILE),
    "layer": (ATTEND, 2, 1, 1, TILE),
    "negative layer": (ATTEND, -1, 1, 1, TILE),
    "no tokens": (ATTEND, 0, 0, 1, TILE),
    "more tokens than there is room for": (ATTEND, 0, 10**6, 1, TILE),
    "most tokens": (ATTEND, 0, 2**31 - 1, 1, TILE),
    "more tiles than are lent": (ATTEND, 0, 1, 2, 2 * TILE),
    "most tiles": (ATTEND, 0, 1, 2**31 - 1, 2**40),
    "queries within the tiles": (ATTEND, 0, 1, 1, TILE - 1),
    "a start beyond all positions": (ATTEND, 0, 1, 1, 2**63 - 1),
    "block": (DEPOSIT, 8, 0, 0, 0),
    "negative block": (DEPOSIT, -1, 0, 0, 0),
}
"""Kind, index, tokens, tiles and start of messages to a creditor of one tile, in eight blocks and two layers."""


def bytes_of(cache: KVCache) -> Tensor:
    """Return what is in all blocks of a cache."""
    out = torch.empty(NUM_BLOCKS, cache.block_bytes, dtype=torch.uint8)
    for block in range(NUM_BLOCKS):
        cache.read_block(block, out[block])
    return out


def send(memory: mmap.mmap, message: tuple[int, ...]) -> bool:
    """Send a message by the layout of the header in csrc/loans.h. Returns whether the creditor refuses it."""
    (number,) = struct.unpack_from("<I", memory, 64)
    struct.pack_into("<iiiiq", memory, 72, *message)
    struct.pack_into("<I", memory, 64, number + 1)
    while struct.unpack_from("<I", memory, 128) != (number + 1,):
        time.sleep(0.001)
    return bool(*struct.unpack_from("<i", memory, 132))


@pytest.mark.parametrize("variant", variants())
def test_a_message_that_makes_no_sense_is_refused(variant: str) -> None:
    decoder = make_decoder(variant, "plain")
    cache = make_cache(decoder)
    before = bytes_of(cache)
    fd = make_channel(5, decoder.channel_bytes(cache, CHUNK))
    channel, memory = Channel(fd, 5), mmap.mmap(fd, 0)
    os.close(fd)
    thread = threading.Thread(target=decoder.lend, args=(cache, channel, range(8)))
    thread.start()
    try:
        memory[8:64] = b"\x7f" * 56  # whatever a debtor writes elsewhere in the header
        for name, message in NO_SENSE.items():
            assert send(memory, message), name
        assert not send(memory, (ATTEND, 0, 1, 1, TILE))
        assert not decoder.backend.deposit(channel, 8, torch.zeros(cache.block_bytes, dtype=torch.uint8))
    finally:
        channel.close()
        thread.join()
    assert torch.equal(bytes_of(cache), before)


@pytest.mark.parametrize(("num_tokens", "start"), [(TILE + 1, 1500), (TILE, 500), (0, 500)])
@pytest.mark.parametrize("variant", variants())
def test_a_loan_is_of_tiles_before_the_chunk(variant: str, num_tokens: int, start: int) -> None:
    decoder = make_decoder(variant, "plain")
    cache = make_cache(decoder)
    with lending(decoder, cache, range(8), answers=False) as channel:
        batch = BatchBuilder(BLOCK, decoder.device).build([Chunk(start, [1], range(30), 1)])
        batch.loans = [RequestLoan(0, num_tokens, channel)]
        with pytest.raises(IndexError, match="leading tiles"):
            decoder.forward(batch, cache)


def test_a_channel_is_of_one_loan() -> None:
    fd = make_channel(7, 1000)
    with pytest.raises(ValueError, match="loan 8"):
        Channel(fd, 8)
    for size in (100, 10**6):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    other = os.memfd_create("other")
    os.ftruncate(other, 100)
    with pytest.raises(ValueError, match="100 bytes"):
        Channel(other, 7)
    for each in (fd, other):
        os.close(each)
