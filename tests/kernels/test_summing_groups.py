"""Ranks that add up partial sums, one operation after the other: as on GPUs, by gloo in place of NCCL.

Ranks are threads. Triton's interpreter has one state for all threads, so that launches take turns.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import torch.distributed as dist
from backends import CPU, runnable
from quantized_folders import awq, gptq, quantize
from ragged_requests import Runner
from random_networks import RandomWeights
from rank_networks import EPS, NETWORKS, dense, heads, logits, make_summing_groups, network, own_names, together
from specs import make_delta, make_experts
from torch import Tensor
from triton_faults import sum_in_one_order

from splitfuse.errors import ConfigError, EngineUnavailableError, RankLostError
from splitfuse.kernels.cpu.backend import CpuBackend
from splitfuse.kernels.group import Group, Shard
from splitfuse.kernels.interface import Backend
from splitfuse.kernels.layers import HeadNormSpec, LayerSpec, Mixer, TokenInputSpec
from splitfuse.kernels.reference import ReferenceBackend
from splitfuse.models.decoder import Decoder
from splitfuse.models.families.registry import load_spec
from splitfuse.models.sharding import RankDecoder, check_ranks
from splitfuse.models.sources.folder import ModelFolder
from splitfuse.models.spec import ModelSpec
from splitfuse.models.weights import kept_parameters, load_decoder, weight_bytes
from splitfuse.runtime.parallel.distributed import DistributedGroup, announce, await_ranks, connect_ranks
from splitfuse.runtime.parallel.follower import RankExecutor
from splitfuse.runtime.parallel.messages import ComputeHead, ComputeStep

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True, "desc_act": False, "lm_head": False}
OWN_INPUT = TokenInputSpec(size=20, activation="silu")
OTHERS = {
    "gates": network(
        LayerSpec(mixer=heads(gate=True), mlp=dense(132), output_scale=True, token_input=OWN_INPUT),
        LayerSpec(mixer=heads(), mlp=dense(66), token_input=OWN_INPUT),
        token_input_rows=71,
    ),
    "narrow": network(LayerSpec(mixer=heads(), mlp=make_experts(5, 2, 48)), hidden_size=50, tied_embeddings=True),
}
"""Networks that the fused one cannot divide."""
SPECS = NETWORKS | OTHERS
TRITON = runnable("triton-float32")
SLOW = [*TRITON, pytest.mark.slow]
FEW: dict[str, Any] = {"lengths": (2, 7), "block_size": 4, "num_chosen": 1}
"""Requests that the interpreter computes in some seconds."""


@pytest.fixture(autouse=True)
def _own_names() -> Iterator[None]:
    with own_names():
        yield


@pytest.fixture(autouse=True)
def _launches_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        from triton.runtime.interpreter import GridExecutor
    except ImportError:
        return
    lock, launch = threading.RLock(), GridExecutor.__call__

    def in_turn(self: Any, *args: Any, **kwargs: Any) -> None:
        with lock:
            launch(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", in_turn)


def triton(**options: Any) -> Backend:
    from splitfuse.kernels.triton.backend import TritonBackend

    return TritonBackend(device="cpu", **options)


def load(spec: ModelSpec, backend: Backend, group: Group | None = None, dtype: torch.dtype = torch.float32) -> Decoder:
    return load_decoder(RandomWeights(), spec, dtype=dtype, device=CPU, backend=backend, group=group)


def compute(decoder: Decoder, seed: int = 3, **options: Any) -> list[Tensor]:
    return logits(decoder, decoder.spec.vocab_size, seed, **options)


def check_close(ours: list[Tensor], theirs: list[Tensor], share: float = 1e-4) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape and other.isfinite().all() and other.std() > 0.1
        assert (one - other).abs().max() <= share * other.abs().max()


@pytest.mark.parametrize(("name", "size"), [*((name, 2) for name in SPECS), ("experts", 3)])
def test_ranks_compute_the_network_of_one(name: str, size: int) -> None:
    alone = compute(load(SPECS[name], ReferenceBackend()))
    groups = make_summing_groups(size)
    found = together([load(SPECS[name], ReferenceBackend(), group) for group in groups], compute)
    for rows in found:
        check_close(rows, alone)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(rows, found[0], strict=True))


@pytest.mark.parametrize(
    ("name", "in_order", "options"),
    [
        pytest.param("narrow", False, {}, marks=TRITON),
        *(pytest.param(name, True, {}, marks=SLOW) for name in SPECS),
        pytest.param("plain", True, {"kv_dtype": "int8"}, marks=SLOW),
    ],
)
def test_ranks_compute_the_network_of_one_with_triton(name: str, in_order: bool, options: dict[str, Any]) -> None:
    alone = compute(load(SPECS[name], triton(**options)), **FEW)
    decoders = [load(SPECS[name], triton(**options), each) for each in make_summing_groups(2, in_order=in_order)]
    share = 0.02 if options else 1e-4
    for rows in together(decoders, lambda decoder: compute(decoder, **FEW)):
        check_close(rows, alone, share)


@pytest.mark.parametrize("quantization", [pytest.param(name, marks=SLOW) for name in ("int8", "int4")])
def test_ranks_keep_weights_in_few_bits(quantization: str) -> None:
    """Scales of o and w2 are those of a rank's columns: the logits are like those of one process, not equal."""
    spec = SPECS["narrow"]
    alone = compute(load(spec, triton(quantization=quantization)), **FEW)
    groups = make_summing_groups(2)
    decoders = [load(spec, triton(quantization=quantization), group) for group in groups]
    found = together(decoders, lambda decoder: compute(decoder, **FEW))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))
    ours, theirs = (torch.cat([each[:-1] for each in rows]) for rows in (found[0], alone))  # later tokens may differ
    assert torch.cosine_similarity(ours, theirs, dim=-1).median() > 0.98
    backend = triton(quantization=quantization)
    whole, half = (weight_bytes(spec, torch.float32, backend, shard=each) for each in (Shard(0, 1), groups[0].shard))
    assert half < 0.75 * whole


@pytest.mark.parametrize(
    ("kernels", "layer", "config", "is_kept"),
    [
        pytest.param("cpp", awq, AWQ, True, marks=runnable("avx2"), id="cpp-awq"),
        pytest.param("triton", awq, AWQ, True, marks=SLOW, id="awq"),
        pytest.param("triton", gptq, GPTQ, True, marks=SLOW, id="gptq"),
        pytest.param("triton", partial(gptq, act_order=True), GPTQ | {"desc_act": True}, False, marks=SLOW, id="order"),
    ],
)
def test_ranks_keep_the_bits_of_a_checkpoint(
    kernels: str, layer: Callable[..., Any], config: dict[str, Any], is_kept: bool, tmp_path: Path
) -> None:
    """Also of o and down, whose columns they divide, unless those are in an order of their own."""
    changes = {"num_key_value_heads": 2, "num_attention_heads": 4, "head_dim": 16, "intermediate_size": 96}
    network = tiny_models.make("llama-gqa", lambda: tiny_models.llama(**changes))
    network.save_pretrained(tmp_path / "dense")
    quantize(tmp_path / "dense", tmp_path / "kept", layer, config)
    folder, is_cpp = ModelFolder(tmp_path / "kept"), kernels == "cpp"
    weights, spec = folder.weights(), load_spec(folder)
    dtype = torch.bfloat16 if is_cpp else torch.float32

    def loaded(group: Group | None = None) -> Decoder:
        backend = CpuBackend(variant="avx2", num_threads=1) if is_cpp else triton()
        return load_decoder(weights, spec, dtype=dtype, device=CPU, backend=backend, group=group)

    few = FEW | {"block_size": 32} if is_cpp else FEW
    alone, decoders = loaded(), [loaded(group) for group in make_summing_groups(2)]
    for rows in together(decoders, lambda decoder: compute(decoder, **few)):
        check_close(rows, compute(alone, **few), 0.05 if is_cpp else 1e-4)
    plan = kept_parameters(weights, spec, alone.backend, Shard(1, 2, sums=True))
    formats = [formats for parameter, formats in plan if parameter.name in ("o", "mlp.down")]
    assert len(formats) == 2 * len(spec.layers) and all(all(each) == is_kept for each in formats)
    if not is_cpp:
        assert isinstance(decoders[1].weights.layers[0].o, Tensor) != is_kept


@pytest.mark.parametrize("ranks", [pytest.param(number, marks=SLOW) for number in (2, 3)])
def test_bits_depend_on_the_number_of_ranks_alone(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With batch_invariant: however prompts are cut, and whatever runs beside them."""
    sum_in_one_order(monkeypatch)
    spec = SPECS["narrow"]
    groups = make_summing_groups(ranks)
    found = []
    for seed, lengths in ((3, (2, 7)), (8, (2, 7)), (5, (2,))):
        decoders = [load(spec, triton(invariant=True), group) for group in groups]
        options = {**FEW, "seed": seed, "lengths": lengths}
        found.append(together(decoders, lambda decoder, options=options: compute(decoder, **options))[ranks - 1])  # type: ignore[misc]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[0], found[1], strict=True))
    assert torch.equal(found[0][0], found[2][0])


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_sums_are_those_of_all_ranks(dtype: torch.dtype, in_order: bool) -> None:
    groups = make_summing_groups(3, in_order=in_order)
    parts = [torch.randn(5, 7, generator=torch.Generator().manual_seed(n)).to(dtype) for n in range(3)]

    def add_up(group: Group) -> tuple[Tensor, Tensor]:
        assert isinstance(group, DistributedGroup)
        total, rows = parts[group.shard.rank].clone(), parts[group.shard.rank].clone()
        group.add_up(total)
        group.broadcast(rows)
        return total, rows

    with ThreadPoolExecutor(3) as pool:
        for total, rows in pool.map(add_up, groups):
            assert torch.equal(rows, parts[0])
            if in_order:
                assert torch.equal(total, (parts[0].float() + parts[1].float() + parts[2].float()).to(dtype))
            else:
                assert torch.allclose(total, sum(parts, torch.zeros_like(total)), atol=4e-3)


def test_a_follower_computes_what_it_is_told() -> None:
    """A step, and the head of rows that the leader broadcasts."""
    spec = SPECS["plain"]
    leader, follower = (load(spec, ReferenceBackend(), group) for group in make_summing_groups(2))
    assert isinstance(leader, RankDecoder) and isinstance(follower, RankDecoder)
    executor = RankExecutor(follower, Runner(follower, block_size=32, num_blocks=16).cache)
    tasks: list[ComputeStep | ComputeHead] = []
    done: list[Any] = []
    with ThreadPoolExecutor(1) as pool:

        def tell(task: ComputeStep | ComputeHead) -> None:
            tasks.append(task)
            done.append(pool.submit(executor.execute, task))

        leader.on_step = lambda batch, chooses: tell(ComputeStep.of(batch, chooses))
        leader.on_head = lambda hidden: tell(ComputeHead(len(hidden)))
        check_close(compute(leader), compute(load(spec, ReferenceBackend())))
        for each in done:
            each.result()
    assert {type(task) for task in tasks} == {ComputeStep, ComputeHead}
    assert all(not task.rows for task in tasks if isinstance(task, ComputeHead))


def test_a_step_fails_that_another_rank_does_not_compute() -> None:
    first, _ = groups = make_summing_groups(2, patience=0.3)
    decoder = load(SPECS["plain"], ReferenceBackend(), first)
    for _ in range(2):
        with pytest.raises(RankLostError):
            compute(decoder)
    assert groups[0].is_broken
    with pytest.raises(RankLostError, match="cannot connect to each other"):
        DistributedGroup(dist.HashStore(), Shard(0, 2, sums=True), address="192.0.2.1")


def test_ranks_that_do_not_come_or_compute_elsewhere_are_not_met() -> None:
    store, heard = dist.HashStore(), list[float]()
    announce(store, 1, torch.device("cuda:1"))
    await_ranks(store, 2, torch.device("cuda:0"), heard.append)
    assert not heard
    with pytest.raises(ConfigError, match="rank 1 computes on a device of kind cuda, and its leader on cpu: name a"):
        await_ranks(store, 2, CPU, heard.append)
    with pytest.raises(RankLostError, match="rank 2 of the group has not come within 0 s"):
        await_ranks(store, 3, torch.device("cuda:0"), heard.append, seconds=0.0)


def test_a_rank_that_ends_while_ranks_connect_is_not_waited_for() -> None:
    """NCCL waits for it without end, and does not hear of it."""
    connected, (group, _) = threading.Event(), make_summing_groups(2)

    def connect() -> DistributedGroup:
        connected.wait()
        return group

    def tell(_: float) -> None:
        raise EngineUnavailableError("rank 1 was lost")

    with pytest.raises(EngineUnavailableError, match="rank 1 was lost"):
        connect_ranks(connect, tell)
    with pytest.raises(RankLostError, match="the ranks of the group are not connected to each other after 0 s"):
        connect_ranks(connect, lambda _: None, seconds=0.0)
    connected.set()
    assert connect_ranks(connect, tell) is group
    with pytest.raises(RankLostError, match="cannot connect to each other"):
        connect_ranks(lambda: DistributedGroup(dist.HashStore(), group.shard, address="192.0.2.1"), lambda _: None)


@pytest.mark.parametrize(
    ("size", "layer", "message"),
    [
        (
            4,
            heads(num_heads=8, num_kv_heads=2),
            "=4 does not divide the 2 key/value heads of the model: it can be 1 or 2",
        ),
        (2, heads(alibi=1.0), "the model has ALiBi, whose slopes depend on all heads; leave it out"),
        (2, heads(qk_norm=HeadNormSpec(norm=EPS, whole_row=True)), "norms over all heads of queries and keys"),
        (2, make_delta(2, 6, 10, 18), "the model has layers with a recurrent state"),
    ],
)
def test_what_ranks_cannot_divide_is_refused(size: int, layer: Mixer, message: str) -> None:
    spec = network(
        LayerSpec(mixer=heads(num_heads=8, num_kv_heads=4), mlp=None), LayerSpec(mixer=layer, mlp=dense(132))
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_ranks(spec, ReferenceBackend(), size)
