"""Times steps of an 8B shape, the policies, and other engines on the same GPU."""

from __future__ import annotations

import gc
import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch

import splitfuse
from benchmarks.gpu.measure import Setting, Table
from benchmarks.models import SHAPES, VOCAB_SIZE, ModelShape, write_without_weights
from splitfuse.config.engine import EngineConfig
from splitfuse.core.plan import Chunk
from splitfuse.runtime.executor import Executor
from splitfuse.runtime.loading import LoadedModel, load_model

BLOCK = 32
POLICIES = ("splitfuse", "prefill-first", "orca", "static")
TURNS = 2


def shape_of(setting: Setting) -> ModelShape:
    """Return the shape that is measured: that of a 7B model with eight key/value heads; one layer in a rehearsal."""
    return replace(SHAPES["15m"], num_layers=1, num_heads=2, num_kv_heads=1) if setting.is_rehearsal else SHAPES["7b"]


def settings_of(setting: Setting, folder: str) -> dict[str, Any]:
    """Return the settings of our engine: random weights, the Triton kernels."""
    write_without_weights(shape_of(setting), Path(folder))
    dtype = str(setting.dtype).removeprefix("torch.")
    return {
        "model": folder,
        "load_format": "dummy",
        "device": setting.device,
        "dtype": dtype,
        "kernels": "triton",
        "num_blocks": 16 if setting.is_rehearsal else 8192,
        "block_size": BLOCK,
    }


def steps(setting: Setting) -> bool:
    """Time whole steps: single tokens, chunks, and both, beside what they must read and compute."""
    with tempfile.TemporaryDirectory() as folder:
        model = load_model(EngineConfig.from_settings(settings_of(setting, folder)))
        plain = model.make_executor()
        graphs = Executor(model.decoder, plain.kv_cache, model.grammars, cuda_graphs=not setting.is_rehearsal)
        names = ("step                  ", "      ms", "host ms", "graph ms", "outside ms", "tokens/s", "of bandwidth")
        table = Table(*names, "of rate")
        decodes = setting.few([(1, 512), (8, 512), (32, 512), (32, 4096), (256, 512)], [(2, 20)])
        chunks = setting.few([(0, n) for n in (16, 64, 256, 512, 1024, 2048, 4096)], [(0, 5)])
        mixes = setting.few([(32, 512, 480), (64, 512, 1984)], [(2, 20, 5)])
        timed = partial(row, table, setting, model, plain, graphs)
        for count, context in decodes:
            timed(f"{count} decodes at {context}", singles(count, context))
        for before, count in chunks:
            timed(f"chunk of {count}", [chunk("p", 0, count, before)])
        for count, context, tokens in mixes:
            plan = singles(count, context)
            plan.append(chunk("p", sum(len(each.block_table) for each in plan), tokens, 0))
            timed(f"{count} decodes + {tokens}", plan)
    return True


def singles(count: int, context: int) -> list[Chunk]:
    """Return a decode of each of some requests."""
    blocks = -(-context // BLOCK)
    return [chunk(str(i), i * blocks, 1, context - 1) for i in range(count)]


def chunk(name: str, first_block: int, count: int, before: int) -> Chunk:
    """Return the next tokens of a request, whose blocks are those from `first_block` on."""
    blocks = range(first_block, first_block + -(-(before + count) // BLOCK))
    return Chunk(name, before, (5,) * count, tuple(blocks), 1, True)


def row(
    table: Table, setting: Setting, model: LoadedModel, plain: Executor, graphs: Executor, name: str, plan: list[Chunk]
) -> None:
    """Print the time of a step with its choice of tokens: launched kernel by kernel, with the time in which the host
    launches them, and as a CUDA graph, with what of it the GPU does not compute. Fractions are of the latter.
    """
    tokens, positions = sum(len(each.token_ids) for each in plan), sum(each.end for each in plan)
    mixer: Any = model.spec.layers[0].mixer
    kept = 2 * len(model.spec.layers) * mixer.num_kv_heads * mixer.head_dim * setting.dtype.itemsize
    host: list[float] = []

    def run(executor: Executor) -> None:
        with torch.inference_mode():
            begin = time.perf_counter()
            hidden = executor.hidden(plan)
            host.append(time.perf_counter() - begin)
            executor.decoder.choose(hidden)

    launched, launching = setting.wall_seconds(partial(run, plain)), min(host)
    replay = partial(run, graphs)
    seconds = setting.wall_seconds(replay)
    outside = seconds - setting.kernel_seconds(replay)
    weights = model.plan.weights
    bandwidth = (weights + positions * kept) / seconds / setting.bandwidth
    rate = 2.0 * tokens * weights / setting.dtype.itemsize / seconds / setting.rate
    in_ms = (each * 1e3 for each in (launched, launching, seconds, outside))
    table.row(name, *in_ms, tokens / seconds, bandwidth, rate)


def policies(setting: Setting) -> bool:
    """Measure SplitFuse and the paper's rivals, each in a process of its own, with `splitfuse bench run`."""
    prompt, answer = setting.lengths.split("/")
    all_right = True
    with tempfile.TemporaryDirectory() as folder:
        given = settings_of(setting, folder) | {"max_num_batched_tokens": 16 if setting.is_rehearsal else 512}
        flags = [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]
        flags += ["--cuda-graphs"] * setting.cuda_graphs
        for policy in POLICIES:
            print(f"policy {policy}", flush=True)
            load = ["--prompt", prompt, "--generate", answer, "--repeat", "1", "--quiet"]
            for count in setting.clients.split(","):
                requests = str(1 if setting.is_rehearsal else 3 * int(count))
                command = [sys.executable, "-m", "splitfuse.cli", "bench", "run", "--policy", policy, *flags, *load]
                command += ["--clients", count, "--requests", requests]
                all_right &= subprocess.run(command, check=False, timeout=600).returncode == 0
    return all_right


def peers(setting: Setting) -> bool:
    """Measure the same prompts on ours, transformers' continuous batching and, if it is installed, vLLM, in turns."""
    count, prompt, answer = (1, 4, 2) if setting.is_rehearsal else (64, 512, 64)
    rng = Random(0)
    prompts = [[rng.randrange(3, VOCAB_SIZE) for _ in range(prompt)] for _ in range(count)]
    all_right = True
    with tempfile.TemporaryDirectory() as folder:
        given = settings_of(setting, folder)
        makers: dict[str, Callable[[], Callable[[], int]]] = {
            "splitfuse": lambda: ours(given | {"cuda_graphs": setting.cuda_graphs}, prompts, answer),
            "transformers": lambda: transformers_batching(setting, folder, prompts, answer),
            "vllm": lambda: vllm(setting, folder, prompts, answer),
        }
        engines: dict[str, Callable[[], int]] = {}
        for name, make in makers.items():
            if importlib.util.find_spec(name) is None:
                print(f"{name} is not installed: left out")
                continue
            try:
                engines[name] = make()
                engines[name]()  # warms up
            except Exception as error:
                print(f"{name} failed: {type(error).__name__}: {error}")
                engines.pop(name, None)
                all_right = all_right and name != "splitfuse"
        table = Table("engine      ", "turn", "tokens/s")
        for turn in range(1 if setting.is_rehearsal else TURNS):
            for name, run in engines.items():
                setting.synchronize()
                begin = time.perf_counter()
                generated = run()
                table.row(name, turn + 1, generated / (time.perf_counter() - begin))
        engines.clear()
        gc.collect()
    return all_right


def ours(given: dict[str, Any], prompts: list[list[int]], answer: int) -> Callable[[], int]:
    pipe = splitfuse.pipeline(**given, enable_prefix_caching=False)

    def run() -> int:
        answers = pipe(prompts, max_new_tokens=answer, ignore_eos=True)
        return sum(each.generated_length for each in answers)

    return run


def transformers_batching(setting: Setting, folder: str, prompts: list[list[int]], answer: int) -> Callable[[], int]:
    from transformers import AutoConfig, AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    small = ContinuousBatchingConfig(page_size=BLOCK, num_blocks=16, max_batch_tokens=64)  # else it fills the memory
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=setting.dtype, attn_implementation="sdpa").to(setting.device)
    options = GenerationConfig(max_new_tokens=answer, do_sample=False, eos_token_id=-1, pad_token_id=0)

    def run() -> int:
        batching = small if setting.is_rehearsal else None
        results = model.eval().generate_batch(prompts, generation_config=options, continuous_batching_config=batching)
        return sum(len(each.generated_tokens) for each in results.values())

    return run


def vllm(setting: Setting, folder: str, prompts: list[list[int]], answer: int) -> Callable[[], int]:
    from vllm import LLM, SamplingParams

    dtype = str(setting.dtype).removeprefix("torch.")
    engine = LLM(folder, load_format="dummy", dtype=dtype, gpu_memory_utilization=0.4, enable_prefix_caching=False)
    params = SamplingParams(temperature=0.0, max_tokens=answer, ignore_eos=True)

    def run() -> int:
        outputs = engine.generate([{"prompt_token_ids": each} for each in prompts], params, use_tqdm=False)
        return sum(len(each.outputs[0].token_ids) for each in outputs)

    return run
