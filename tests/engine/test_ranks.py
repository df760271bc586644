"""An engine of several processes gives the tokens and logprobs of one, to the last bit. It ends when one of them does:
its requests go on elsewhere.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import tiny_models
import torch
from backends import runnable
from patience import PATIENCE
from router_streams import closed_loop, read, requests, resumed, run, running, until

from splitfuse.config.engine import EngineConfig
from splitfuse.core.pooling_params import NOTHING_GENERATED, PoolingParams
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.engine.client import EngineState
from splitfuse.engine.engine import Engine
from splitfuse.engine.messages import Add
from splitfuse.engine.ragged import RaggedEngine
from splitfuse.engine.remote import supervisor
from splitfuse.engine.remote.launcher import SubprocessLauncher
from splitfuse.engine.remote.supervisor import SupervisedEngine
from splitfuse.engine.thread import AsyncEngine
from splitfuse.errors import ConfigError, EngineUnavailableError, ModelError, RankLostError
from splitfuse.kernels.group import Shard, SharedGroup, make_group_file
from splitfuse.runtime import loading
from splitfuse.runtime.backend_choice import choose_backend
from splitfuse.runtime.fingerprint import describe_kernels, digest
from splitfuse.runtime.loading import load_model, load_rank, open_source
from splitfuse.runtime.parallel import leader
from splitfuse.runtime.parallel.distributed import DistributedGroup, Store, await_ranks

SETTINGS = {"num_blocks": 200, "max_num_batched_tokens": 128, "max_num_seqs": 4, "dtype": "bfloat16"}


def config(ranks: int, **settings: Any) -> EngineConfig:
    return EngineConfig.from_settings({**SETTINGS, "tensor_parallel_size": ranks, "num_threads": 1, **settings})


def wanted(vocab_size: int) -> list[Add]:
    """Return greedy and seeded requests; one wants the logprobs of its prompt, one those of tokens."""
    rng, made = Random(4), []
    for number, length in enumerate((1, 150, 40, 70, 9, 33)):
        sampling: dict[str, Any] = {"temperature": 0.9, "seed": number} if number % 2 else {"temperature": 0.0}
        if number == 2:
            sampling["prompt_logprobs"] = 2
        if number == 3:
            sampling["logprobs"] = 3
        params = SamplingParams(max_tokens=12, ignore_eos=True, **sampling)
        made.append(Add(str(number), tuple(rng.randrange(5, vocab_size) for _ in range(length)), params))
    return made


def outcomes(engine: Engine) -> dict[str, list[Any]]:
    """Return the tokens and logprobs of each request."""
    found: dict[str, list[Any]] = {}
    for request in wanted(engine.model.spec.vocab_size):
        engine.add(request)
    while engine.has_unfinished:
        for output in engine.step(isolate=True):
            assert output.error is None
            parts = (*output.token_ids, *map(str, output.logprobs or ()), *map(str, output.prompt_logprobs or ()))
            found.setdefault(output.request_id, []).extend(parts)
    return found


def out_of_memory(*_: object) -> None:
    raise RuntimeError("no memory")


@pytest.mark.parametrize(
    ("model", "quantization"),
    [
        ("storyteller", None),
        ("qwen2-moe", "int4"),
        pytest.param("storyteller", "int8", marks=pytest.mark.slow),
        pytest.param("storyteller", "int4", marks=pytest.mark.slow),
        pytest.param("gemma3", None, marks=pytest.mark.slow),
    ],
)
def test_ranks_give_the_bits_of_one_process(
    model: str, quantization: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"quantization": quantization}
    if model != "storyteller":
        network = tiny_models.make(model)
        network.config.max_position_embeddings = 640
        network.save_pretrained(tmp_path)
        settings["model"] = str(tmp_path)
    alone, together = (load_model(config(ranks, **settings)) for ranks in (1, 2))
    assert together.leader is not None and alone.leader is None
    assert together.identity == alone.identity and together.kv_fingerprint != alone.kv_fingerprint
    assert together.plan.block * 2 == alone.plan.block and together.plan.weights < 0.8 * alone.plan.weights
    assert "each of 2 ranks, which divide the model and the machine's memory" in str(together.plan)
    (pid,) = together.leader.pids
    engine = Engine(config(2, **settings), together)
    assert outcomes(engine) == outcomes(Engine(config(1, **settings), alone))
    count = together.decoder.backend.capabilities.head_rows + 1  # more than the ranks compute at once
    rows = [
        RaggedEngine(config(ranks), loaded).put(range(count), [[5 + n] for n in range(count)])
        for ranks, loaded in ((1, alone), (2, together))
    ]
    assert torch.equal(*rows)
    if model == "storyteller":  # no request is to blame, and none is tried again alone
        os.kill(pid, signal.SIGKILL)
    else:
        monkeypatch.setattr(together.decoder.backend.library, "network", out_of_memory)  # type: ignore[attr-defined]
    with pytest.raises(RankLostError, match="tensor-parallel group" if model == "storyteller" else "no memory"):
        outcomes(engine)
    assert together.leader.group.is_broken
    engine.close()
    assert not Path(f"/proc/{pid}").exists()
    engine.add_request("late", [5, 6], SamplingParams(max_tokens=2))
    with pytest.raises(RankLostError, match="the tensor-parallel group has ended: "):
        engine.step()


def tokens(engine: Engine, lengths: Sequence[int]) -> dict[str, list[int]]:
    """Return the greedy tokens of prompts of these lengths."""
    found: dict[str, list[int]] = {}
    for length in lengths:
        prompt = [7 * number + 5 + length for number in range(length)]
        engine.add_request(str(length), prompt, SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True))
    while engine.has_unfinished:
        for output in engine.step():
            found.setdefault(output.request_id, []).extend(output.token_ids)
    return found


ADDING = {"dtype": "float32", "num_threads": None, "block_size": 16, "max_num_batched_tokens": 64}
"""Settings of ranks that add up."""


@pytest.mark.parametrize(
    "kernels", ["reference", pytest.param("triton", marks=[*runnable("triton-float32"), pytest.mark.slow])]
)
def test_ranks_that_add_up_give_the_tokens_of_one_process(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on GPUs, by gloo in place of NCCL; log-probabilities differ in their last digits. The other rank has loaded
    its part before the leader knows that they are connected.
    """
    listeners: list[Callable[[float], None]] = []

    def await_and_keep(store: Store, size: int, device: torch.device, listen: Callable[[float], None]) -> None:
        listeners.append(listen)
        await_ranks(store, size, device, listen)

    def connect(*args: Any, **options: Any) -> DistributedGroup:
        group = DistributedGroup(*args, **options)
        listeners[0](PATIENCE)
        return group

    monkeypatch.setattr(leader, "await_ranks", await_and_keep)
    monkeypatch.setattr(leader, "DistributedGroup", connect)
    settings = {**ADDING, "kernels": kernels}
    alone, together = (load_model(config(ranks, **settings)) for ranks in (1, 2))
    assert together.leader is not None and together.identity == {**alone.identity, "ranks": "2"}
    assert "divide the model and the machine's memory; they add up by torch.distributed" in str(together.plan)
    assert together.plan.block * 2 == alone.plan.block and together.plan.weights < 0.7 * alone.plan.weights
    engine = Engine(config(2, **settings), together)
    assert tokens(engine, (1, 27, 9)) == tokens(Engine(config(1, **settings), alone), (1, 27, 9))
    (pid,) = together.leader.pids
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(RankLostError, match="tensor-parallel group"):
        tokens(engine, (5,))
    assert together.leader.group.is_broken
    engine.close()
    assert not Path(f"/proc/{pid}").exists()


def test_a_rank_that_fails_before_it_connects_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL would wait for it without end: the leader is told why, and begins no connection."""
    monkeypatch.setattr(leader, "__version__", "0.0")
    monkeypatch.setattr(leader, "DistributedGroup", None)
    with pytest.raises(ConfigError, match=r"a rank is splitfuse .*, and its leader 0\.0: use the same version"):
        load_model(config(2, **ADDING, kernels="reference"))
    monkeypatch.setattr(leader, "FOLLOWER", "this")
    with pytest.raises(EngineUnavailableError, match=r"rank 1 \(process .* was lost .*: it ended with code 0"):
        load_model(config(2, **ADDING, kernels="reference"))


@pytest.mark.slow
def test_a_rank_that_is_killed_while_ranks_connect_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    started = list[subprocess.Popen[bytes]]()

    class Recorded(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            started.append(self)

    def connect(*_: object, **__: object) -> None:
        started[0].kill()
        threading.Event().wait()  # as NCCL does

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    monkeypatch.setattr(leader, "DistributedGroup", connect)
    with pytest.raises(EngineUnavailableError, match=r"rank 1 \(process .* was lost .*: it ended with signal 9"):
        load_model(config(2, **ADDING, kernels="reference"))


def test_ranks_of_pytorch_divide_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    given = list[int]()
    monkeypatch.setattr(loading, "_all_cores", lambda: 7)
    monkeypatch.setattr(loading, "use_cores", lambda _: None)
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    for ranks, kernels in ((1, "reference"), (3, "reference"), (3, "auto")):
        loading._open(EngineConfig.from_settings({"tensor_parallel_size": ranks, "kernels": kernels, "device": "cpu"}))
    assert given == [2]


def test_no_embedding_is_given_of_sums_that_were_broken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU what waits for a lost rank ends without an error, and with some numbers."""
    loaded = load_model(config(2, **ADDING, kernels="reference"))
    assert loaded.leader is not None
    engine, forward = Engine(config(2, **ADDING, kernels="reference"), loaded), loaded.decoder.forward

    def broken_off(*args: Any) -> torch.Tensor:
        found = forward(*args)
        assert loaded.leader is not None
        loaded.leader.group.end()
        return found

    engine.add(Add("whole", (5, 6, 7), NOTHING_GENERATED, pooling=PoolingParams()))
    while not (outputs := engine.step()):
        pass
    assert outputs[0].values
    monkeypatch.setattr(loaded.decoder, "forward", broken_off)
    engine.add(Add("part", (5, 6, 7), NOTHING_GENERATED, pooling=PoolingParams()))
    with pytest.raises(RankLostError, match="tensor-parallel group has ended"):
        while engine.has_unfinished:
            engine.step()
    engine.close()
    assert loaded.leader.group.is_broken


def test_ranks_capture_no_steps() -> None:
    with pytest.raises(ConfigError, match="cuda_graphs cannot be used with tensor_parallel_size=2, whose ranks would"):
        config(2, cuda_graphs=True)


def test_a_rank_with_other_weights_or_kernels_is_refused(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("leader", "rank")]
    for folder in folders:
        network = tiny_models.make("llama-gqa")
        if folder.name == "rank":  # as another fine-tune of it
            network.model.norm.weight.data += 1
        network.save_pretrained(folder)
    fd = make_group_file(logit_bytes=2**10, step_bytes=2**10)
    group = SharedGroup(fd, Shard(1, 2), logit_bytes=2**10)
    os.close(fd)
    there = {"rank": ["10.0.0.2:9100"], "rank_key_file": "key"}
    ours, theirs = (config(2, **there, model=str(folder), max_model_len=32) for folder in folders)
    opened = open_source(ours)
    files = digest(opened, ours)
    kernels = describe_kernels(choose_backend(ours, torch.bfloat16))
    load_rank(ours, group, files=files, kernels=kernels)
    with pytest.raises(ModelError, match="rank is not that of the leader: copy that one's files"):
        load_rank(theirs, group, files=files, kernels=kernels)
    with pytest.raises(ConfigError, match="its leader other kernels: their bits differ; name kernels that both have"):
        load_rank(ours, group, files=files, kernels="other kernels")


def ranks_of(engine: SupervisedEngine) -> list[int]:
    """Return the processes that an engine's process has started."""
    tasks = Path(f"/proc/{engine.pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "is_alone", "settings"),
    [
        (signal.SIGKILL, False, {}),
        (signal.SIGKILL, True, {}),
        (signal.SIGSTOP, True, {}),
        pytest.param(signal.SIGKILL, True, {**ADDING, "kernels": "reference"}, id="adding"),
    ],
)
def test_requests_go_on_when_a_rank_is_lost(
    how: signal.Signals, is_alone: bool, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They go on at another engine, or when this one is there again, and no process is left of the one that was."""
    monkeypatch.setattr(supervisor, "FIRST_PAUSE", 0.01)
    wanted = requests(6, max_tokens=60)

    async def test() -> None:
        group = SupervisedEngine(SubprocessLauncher(config(2, **settings)))
        other = AsyncEngine(Engine.load(config(1, **settings)))
        async with running(group, other) as router:
            whole = await asyncio.gather(*(read(other.open(request)) for request in wanted))
            if is_alone:
                other.drain()
            pid, (rank,) = group.pid, ranks_of(group)
            async with closed_loop(router, wanted, whole) as streams:
                os.kill(rank, how)
                await until(lambda: group.state is not EngineState.READY)
            assert resumed(streams) and router.num_resumed["death"] > 0
            await until(lambda: group.state is EngineState.READY)
            assert group.pid != pid and not Path(f"/proc/{rank}").exists()

    run(test())
