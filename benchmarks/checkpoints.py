"""Load one network from checkpoints of each format: memory that the weights take against the file's size, seconds a GB.

    python -m benchmarks.checkpoints MODELS/0.5b --peers FOLDER [--format Q4_K_M ...] [--repeat 3]

MODELS/0.5b is a folder that benchmarks.models wrote; llama.cpp in FOLDER (benchmarks.peers.install) writes the GGUF
files, the layouts of Hugging Face are those of the tests. Every load is a process of its own, which has read the file
before: it measures unpacking, not the disk.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.peers.install import llama_cpp_program, peer_python, run

GGUF_TYPES = (
    *("BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K"),
    *("IQ4_NL", "IQ4_XS"),
)
FOLDERS = ("safetensors", "gptq", "gptq-act-order", "awq", "packed-int4", "int8-rows", "fp8-blocks", "fp8-rows")
REPOSITORY = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--peers", type=Path, help="where benchmarks.peers.install put llama.cpp")
    parser.add_argument("--format", action="append", choices=(*FOLDERS, *GGUF_TYPES), help="may be repeated")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--load", action="store_true", help="load the model once and print figures, as JSON")
    arguments = parser.parse_args()
    model = arguments.model.resolve()
    if arguments.load:
        print(json.dumps(load(model)))
        return
    formats = arguments.format or [*FOLDERS, *(() if arguments.peers is None else GGUF_TYPES)]
    print("| format | file | planned | resident | resident / file | load | s/GB |\n|---|---|---|---|---|---|---|")
    for name in formats:
        path = written(model, name, arguments.peers)
        found = [load_in_process(path) for _ in range(arguments.repeat)]
        size, planned, resident, seconds = (median(each[key] for each in found) for key in found[0])
        sizes = " | ".join(f"{each / 1e6:.0f} MB" for each in (size, planned, resident))
        pace = f"{seconds:.2f} s | {seconds / size * 1e9:.1f}"
        print(f"| {name} | {sizes} | {resident / size:.3f} | {pace} |", flush=True)


def load_in_process(path: Path) -> Mapping[str, float]:
    """Return the figures of one load."""
    command = [sys.executable, "-m", "benchmarks.checkpoints", str(path), "--load"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=REPOSITORY)
    figures: Mapping[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def load(path: Path) -> Mapping[str, float]:
    """Load the weights of a checkpoint, and return its size, the planned and the resident bytes, and the seconds."""
    from splitfuse.config.engine import EngineConfig
    from splitfuse.engine.engine import Engine
    from splitfuse.models.sources.hub import open_model
    from splitfuse.runtime.machine import anonymous_bytes

    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    for file in files:
        with file.open("rb") as stream:
            while stream.read(2**24):
                pass
    small = {"max_model_len": 64, "num_blocks": 8, "max_num_seqs": 1, "max_num_batched_tokens": 32}
    config = EngineConfig.from_settings({"model": str(path), **small})
    source = open_model(config.model.model)
    before, began = anonymous_bytes() or 0, time.perf_counter()
    engine = Engine.load(config, source)
    seconds = time.perf_counter() - began
    size = sum(file.stat().st_size for file in files)
    resident = (anonymous_bytes() or 0) - before
    return {"size": size, "planned": engine.model.plan.weights, "resident": resident, "seconds": seconds}


def written(model: Path, name: str, peers: Path | None) -> Path:
    """Return the checkpoint of a format, written unless it is there."""
    if name == "safetensors":
        return model
    target = (
        model.with_name(f"{model.name}-{name}")
        if name in FOLDERS
        else model.with_name(f"{model.name}-gguf") / (f"{name}.gguf")
    )
    if target.exists():
        return target
    if name in FOLDERS:
        write_folder(model, target, name)
    elif peers is None:
        raise SystemExit(f"{name} needs --peers")
    elif name == "BF16":
        target.parent.mkdir(exist_ok=True)
        writer = REPOSITORY / "benchmarks" / "peers" / "write_gguf.py"
        run(str(peer_python(peers, "llama.cpp")), str(writer), str(model), str(target))
    else:
        plain = written(model, "BF16", peers)
        run(str(llama_cpp_program(peers, "llama-quantize")), str(plain), str(target), name)
    return target


def write_folder(model: Path, target: Path, name: str) -> None:
    """Write a checkpoint of Hugging Face's kind, with random levels."""
    sys.path.append(str(REPOSITORY / "tests" / "helpers"))
    import quantized_folders as layouts

    def compressed(stored: str, inputs: Any = None, **weights: Any) -> dict[str, Any]:
        group = {"weights": {"type": "int", "symmetric": True, **weights}, "targets": ["Linear"]}
        group |= {} if inputs is None else {"input_activations": inputs}
        return {"quant_method": "compressed-tensors", "format": stored, "config_groups": {"group_0": group}}

    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "gptq", "sym": True}
    dynamic = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    schemes: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "gptq": (partial(layouts.gptq, group_size=128), {**gptq, "desc_act": False}),
        "gptq-act-order": (partial(layouts.gptq, group_size=128, act_order=True), {**gptq, "desc_act": True}),
        "awq": (
            partial(layouts.awq, group_size=128),
            {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
        ),
        "packed-int4": (
            partial(layouts.packed, group_size=128),
            compressed("pack-quantized", num_bits=4, strategy="group", group_size=128),
        ),
        "int8-rows": (layouts.integers, compressed("int-quantized", dynamic, num_bits=8, strategy="channel")),
        "fp8-blocks": (partial(layouts.fp8, block=(128, 128)), fp8),
        "fp8-rows": (
            partial(layouts.fp8, block=None, scale_shape=lambda rows: (rows, 1), ending=".weight_scale"),
            compressed("float-quantized", dynamic | {"type": "float"}, num_bits=8, type="float", strategy="channel"),
        ),
    }
    layer, config = schemes[name]
    layouts.quantize(model, target, layer, config, dtype="bfloat16")


if __name__ == "__main__":
    main()
