"""KV tiers: what moving blocks costs beside computing them, what conversations gain, and what tiers cost otherwise.

    python -m benchmarks.kv_tiers MODEL [--only move peer conversations overhead] [FLAGS]

move            a prompt computed by one engine, and fetched by another from the memory tier they share
peer            the same by TCP on the loopback device, from a process that lets others have the tier's blocks
conversations   several turns each, in turns, over replicas whose caches hold a quarter of them: tier on and off
overhead        prompts of which none repeats, with and without a memory tier, in turns A B A B

MODEL is a folder, such as `python -m benchmarks.models 0.5b FOLDER` writes. Engine FLAGS as --name=value.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import queue
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import numpy as np
import torch

from splitfuse.config.engine import EngineConfig
from splitfuse.core.kv.fetching import Fetch, Frame
from splitfuse.core.limits import ceil_div
from splitfuse.core.sampling_params import SamplingParams
from splitfuse.engine.engine import Engine
from splitfuse.engine.messages import Add
from splitfuse.engine.remote.peers import Peers
from splitfuse.engine.replicas import make_replicas
from splitfuse.engine.tier_files import open_tiers
from splitfuse.runtime.executor import Executor
from splitfuse.runtime.loading import LoadedModel, load_model

TIER = {"kv_memory_tier": "2GiB"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parts = {"move": move, "peer": peer, "conversations": conversations, "overhead": overhead}
    parser.add_argument("--only", nargs="+", choices=parts, default=[*parts])
    parser.add_argument("--tokens", type=int, default=2000, help="length of the prompt that moves")
    parser.add_argument("--conversations", type=int, default=8)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--message", type=int, default=128, help="new tokens of a turn")
    parser.add_argument("--answer", type=int, default=8)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8, help="of the comparison of what tiers cost")
    arguments, flags = parser.parse_known_args()
    settings: dict[str, Any] = {"model": str(arguments.model), "load_format": "safetensors"}
    for flag in flags:
        name, _, text = flag.removeprefix("--").replace("-", "_").partition("=")
        settings[name] = int(text) if text.isdigit() else text
    for name in arguments.only:
        parts[name](arguments, settings)


def tokens(rng: Random, count: int) -> list[int]:
    return [rng.randrange(10, 1000) for _ in range(count)]


def engines(settings: dict[str, Any], count: int) -> list[Engine]:
    """Engines of one model in this process, with tiers in common if the settings have any."""
    config = EngineConfig.from_settings(settings)
    model = load_model(config)
    files, key = open_tiers(config.cache)
    shares = [None] * count if files is None else files.split(count)
    return [Engine(config, model, name_key=key, tier_files=share) for share in shares]


def run(engine: Engine, name: str, prompt: list[int], answer: int, source: str = "") -> tuple[list[int], int]:
    """The answer to a prompt, and how many of its tokens were not computed. Blocks may come from a source."""
    params = SamplingParams(max_tokens=answer, ignore_eos=True)
    engine.add(Add(name, tuple(prompt), params, block_sources=(source,) if source else ()))
    output, cached = [], 0
    while engine.has_unfinished:
        for each in engine.step():
            output += each.token_ids
            cached = each.num_cached_tokens
    return output, cached


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of the clock and of the processor that it takes."""
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - processor


def move(arguments: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Time each copy of the blocks of a prompt, and the prompt computed."""
    first, second = engines({**settings, **TIER, "num_blocks": 2 * ceil_div(arguments.tokens, 32)}, 2)
    prompt = tokens(Random(0), arguments.tokens)
    print(first.model.plan.kernels)
    results: dict[str, Any] = {}
    computed = timed(lambda: results.update(first=run(first, "first", prompt, 1)))
    assert first.tiers is not None and second.tiers is not None and isinstance(second.executor, Executor)
    first.tiers.wait_until_written(600.0)
    fetched = timed(lambda: results.update(second=run(second, "second", prompt, 1)))
    assert results["first"][0] == results["second"][0], "another token"
    count, cache = second.tiers.stats.num_fetched, second.executor.kv_cache
    source = second.tiers._tiers[0].file
    names = [*source._index][:count]
    buffers = [np.empty(cache.block_bytes, np.uint8) for _ in names]

    def copy_out() -> None:
        for block, buffer in enumerate(buffers):
            cache.read_block(block, torch.from_numpy(buffer))

    def read() -> None:
        for name in names:
            frame = source.read(name)
            assert frame is not None and frame.is_intact

    def copy_in() -> None:
        for block, buffer in enumerate(buffers):
            cache.write_block(block, torch.from_numpy(buffer))

    copies = {"out of the cache": copy_out, "from the tier, checked": read, "into the cache": copy_in}
    best = {name: min(timed(work) for _ in range(5)) for name, work in copies.items()}
    size = count * cache.block_bytes
    print(f"\n{arguments.tokens} tokens, {count} blocks, {size / 2**20:.1f} MiB\n")
    print("| what | ms, clock | ms, processor |\n|---|---|---|")
    for name, seconds in [("the prompt computed", computed), ("the prompt fetched, its last tokens computed", fetched)]:
        print(f"| {name} | {1e3 * seconds[0]:.0f} | {1e3 * seconds[1]:.0f} |")
    for name, seconds in best.items():
        print(f"| {name} | {1e3 * seconds[0]:.1f} | {1e3 * seconds[1]:.1f} |")
    moved = [best["from the tier, checked"][i] + best["into the cache"][i] for i in (0, 1)]
    print(
        f"\nmoved / computed: 1/{computed[0] / moved[0]:.0f} by the clock, 1/{computed[1] / moved[1]:.0f} by processor"
    )
    for engine in (first, second):
        engine.close()


def peer(arguments: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Time the blocks of a prompt on their way by TCP, from another process, and the prompt computed."""
    config = EngineConfig.from_settings({**settings, **TIER, "num_blocks": 2 * ceil_div(arguments.tokens, 32)})
    model, name_key, key = load_model(config), secrets.token_bytes(32), secrets.token_bytes(32)
    first = Engine(config, model, name_key=name_key, tier_files=open_tiers(config.cache)[0])
    prompt = tokens(Random(0), arguments.tokens)
    print(first.model.plan.kernels)
    results: dict[str, Any] = {}
    computed = timed(lambda: results.update(first=run(first, "first", prompt, 1)))
    assert first.tiers is not None
    first.tiers.wait_until_written(600.0)
    block_bytes, size, tier = first.tiers.block_bytes, model.plan.block_size, first.tiers._tiers[0].file
    names = list[bytes]()
    first.allocator.name_blocks(tuple(prompt), names, len(prompt) // size, salt="")
    fingerprint = os.pread(tier._fd, 64, 0)[32:].hex()  # of the file's header
    command = [tier._fd, config.cache.memory_tier_bytes, block_bytes, size, fingerprint, key.hex()]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.kv_peer", *map(str, command)],
        pass_fds=[tier._fd],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdin is not None
    source = f"tcp://{process.stdout.readline().strip()}"

    peers = Peers(key, block_bytes=block_bytes, block_size=size)
    blocks = tuple(tuple(prompt[start : start + size]) for start in range(0, size * len(names), size))
    fetch = Fetch(1, "a", 0, tuple(names), blocks, 60.0)

    def ask() -> None:
        came: queue.SimpleQueue[list[Frame]] = queue.SimpleQueue()
        peers.ask(source, fetch, 0, time.monotonic() + fetch.seconds, came.put)
        assert len(fetch.matching(came.get())) == len(names), "blocks are missing"

    cold = timed(ask)
    before = processor_of(process.pid)
    warm = [timed(ask) for _ in range(20)]
    served = (processor_of(process.pid) - before) / len(warm)
    expected = peers.find(source, len(names), fetch.seconds)
    assert expected.num_blocks == len(names), "the peer is not asked"
    peers.close()
    second = Engine(config, model, name_key=name_key, tier_files=open_tiers(config.cache)[0])
    second.use_peers(key)
    fetched = timed(lambda: results.update(second=run(second, "second", prompt, 1, source=source)))
    assert results["second"][0] == results["first"][0], "another token"
    assert second.tiers is not None and second.tiers.peers is not None
    assert isinstance(second.executor, Executor)
    count, cache = second.tiers.peers.num_fetched, second.executor.kv_cache
    buffer = np.empty(block_bytes, np.uint8)
    copied = min(
        timed(lambda: [cache.write_block(b, torch.from_numpy(buffer)) for b in range(count)]) for _ in range(5)
    )
    megabytes = len(names) * block_bytes / 2**20
    print(
        f"\n{arguments.tokens} tokens, {len(names)} blocks, {megabytes:.1f} MiB; {count} fetched by the second engine\n"
    )
    print("| what | ms, clock | ms, processor |\n|---|---|---|")
    best = min(warm)
    rows = {
        "the prompt computed": computed,
        "the prompt fetched, its last tokens computed": fetched,
        "by TCP, with connection and handshake": cold,
        "by TCP, median of 20 (processor: of the receiving process)": (
            median(clock for clock, _ in warm),
            median(processor for _, processor in warm),
        ),
        "by TCP, best": best,
        "into the cache": copied,
    }
    for name, seconds in rows.items():
        print(f"| {name} | {1e3 * seconds[0]:.1f} | {1e3 * seconds[1]:.1f} |")
    print(f"| of the sending process, mean | | {1e3 * served:.1f} |")
    print(f"\nexpected by what was measured: {1e3 * expected.seconds:.1f} ms")
    clock = median(clock for clock, _ in warm) + copied[0]
    processor = median(each for _, each in warm) + served + copied[1]
    print(f"moved / computed: 1/{computed[0] / clock:.0f} by the clock, 1/{computed[1] / processor:.0f} by processor")
    for engine in (first, second):
        engine.close()
    process.stdin.close()
    process.wait()


def processor_of(pid: int) -> float:
    """Seconds of the processor that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def conversations(arguments: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Compare prompt tokens computed and the TTFT of turns, with the tier and without."""
    context = arguments.turns * (arguments.message + arguments.answer)
    blocks = ceil_div(arguments.conversations * ceil_div(context, 32), 4 * arguments.replicas)
    settings = {**settings, "num_blocks": max(blocks, ceil_div(context, 32) + 1), "max_model_len": context + 1}
    print(f"\n{arguments.conversations} conversations of {arguments.turns} turns, {arguments.replicas} replicas of "
          f"{settings['num_blocks']} blocks\n")  # fmt: skip
    print("| tier | prompt tokens | computed | TTFT P50 | P90 |\n|---|---|---|---|---|")
    results = {}
    for label, more in (("none", {}), ("memory", TIER)):
        config = EngineConfig.from_settings({**settings, **more})
        prompt, computed, times, texts = asyncio.run(talk(arguments, config))
        results[label] = computed, median(times), texts
        times.sort()
        print(f"| {label} | {prompt} | {computed} | {median(times):.2f} s | {times[len(times) * 9 // 10]:.2f} s |")
    none, memory = results["none"], results["memory"]
    assert none[2] == memory[2], "another text"
    print(f"\ncomputed: {memory[0] / none[0]:.2f}, TTFT P50: {memory[1] / none[1]:.2f}; equal tokens")


async def talk(
    arguments: argparse.Namespace, config: EngineConfig
) -> tuple[int, int, list[float], dict[tuple[int, int], list[int]]]:
    """Hold all conversations, as many at a time as there are replicas. Returns the prompt tokens after the first turn,
    how many of them were computed, times to the first token, and all answers.
    """
    client = make_replicas(config, replicas=arguments.replicas)
    await client.start()
    rng, texts = Random(1), dict[tuple[int, int], list[int]]()
    histories: list[list[int]] = [[] for _ in range(arguments.conversations)]
    times, counts, slots = list[float](), [0, 0], asyncio.Semaphore(arguments.replicas)

    async def ask(number: int, turn: int, message: list[int]) -> None:
        history = histories[number]
        history += message
        params = SamplingParams(max_tokens=arguments.answer, ignore_eos=True)
        async with slots:
            began, answer = time.monotonic(), list[int]()
            request = Add(f"{number}-{turn}", tuple(history), params)
            async with client.open(request) as stream:
                async for output in stream:
                    if not answer and output.token_ids:
                        times.extend([time.monotonic() - began] * (turn > 0))
                        counts[0] += len(history) * (turn > 0)
                        counts[1] += (len(history) - output.num_cached_tokens) * (turn > 0)
                    answer += output.token_ids
        texts[number, turn] = answer
        history += answer

    for turn in range(arguments.turns):
        messages = [tokens(rng, arguments.message) for _ in histories]
        await asyncio.gather(*(ask(number, turn, message) for number, message in enumerate(messages)))
    await client.close()
    return counts[0], counts[1], times, texts


def overhead(arguments: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Compare an engine with a tier and one without, where nothing repeats."""
    settings = {**settings, "num_blocks": 64}
    (tiered,) = engines({**settings, **TIER}, 1)
    assert isinstance(tiered.model, LoadedModel)
    plain = Engine(EngineConfig.from_settings(settings), tiered.model)  # with the same copy of the weights
    rng, ratios = Random(2), list[tuple[float, float]]()
    for round_number in range(arguments.rounds + 1):
        prompts = [tokens(rng, 300) for _ in range(2)]
        pair = [(plain, prompts[0]), (tiered, prompts[1])]
        seconds: dict[Engine, tuple[float, float]] = {}
        for engine, prompt in pair if round_number % 2 else reversed(pair):
            work = (engine, f"{round_number}", prompt, 24)
            seconds[engine] = timed(lambda work=work: run(*work))  # type: ignore[misc]
        if round_number:  # the first one warms up
            ratios.append((seconds[tiered][0] / seconds[plain][0], seconds[tiered][1] / seconds[plain][1]))
    clock, processor = (sorted(ratio[i] for ratio in ratios) for i in (0, 1))
    assert tiered.tiers is not None
    print(f"\nnothing repeats, 300 + 24 tokens, {len(ratios)} pairs: with a tier / without, median (quartiles)\n")
    for name, each in (("clock", clock), ("processor", processor)):
        print(f"{name}: {median(each):.3f} ({each[len(each) // 4]:.3f} to {each[len(each) * 3 // 4]:.3f})")
    print(f"{tiered.tiers.stats.num_saved} blocks saved, {tiered.tiers.stats.num_unsaved} not")
    for engine in (plain, tiered):
        engine.close()


if __name__ == "__main__":
    main()
