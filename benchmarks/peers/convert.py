"""Convert a bf16 model folder for a peer: a W8A8 checkpoint for vLLM, GGUF files for llama.cpp, OpenVINO's IR.

`python -m benchmarks.peers.convert MODEL w8a8|BF16|Q8_0|Q4_0|Q4_K_M|int8|fp16 --peers FOLDER`. The result lies next to
the model (`MODEL-w8a8`, `MODEL-gguf/Q8_0.gguf`, `MODEL-openvino/int8`) and is reused.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.peers.install import llama_cpp_program, peer_python, run

W8A8 = "w8a8"
BF16 = "BF16"
GGUF_TYPES = (BF16, "Q8_0", "Q4_0", "Q4_K_M")
FP16 = "fp16"
IR_PRECISIONS = (FP16, "int8")
FORMS = (W8A8, *GGUF_TYPES, *IR_PRECISIONS)
HEAD = "lm_head"  # stays bf16, as in the W8A8 checkpoints that people publish

SYMMETRIC_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
QUANTIZATION: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": [HEAD],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**SYMMETRIC_INT8, "strategy": "channel", "dynamic": False},
            "input_activations": {**SYMMETRIC_INT8, "strategy": "token", "dynamic": True},
        }
    },
}


def converted(model: Path, form: str, peers: Path) -> Path:
    """Return the model in that form, converted if necessary; `peers` is the folder of the installed peers."""
    if form == W8A8:
        target = model.with_name(f"{model.name}-{W8A8}")
    elif form in IR_PRECISIONS:
        target = model.with_name(f"{model.name}-openvino") / form
    else:
        target = model.with_name(f"{model.name}-gguf") / f"{form}.gguf"
    if target.exists():
        return target
    target.parent.mkdir(exist_ok=True)
    unfinished = target.with_name(f"unfinished-{target.name}")
    if form == W8A8:
        shutil.rmtree(unfinished, ignore_errors=True)
        write_w8a8(model, unfinished)
    elif form in IR_PRECISIONS:
        shutil.rmtree(unfinished, ignore_errors=True)
        exporter = peer_python(peers, "openvino").with_name("optimum-cli")
        task = ("--task", "text-generation-with-past", "--weight-format", form)
        run(str(exporter), "export", "openvino", "--model", str(model), *task, str(unfinished))
    elif form == BF16:
        writer = Path(__file__).with_name("write_gguf.py")
        run(str(peer_python(peers, "llama.cpp")), str(writer), str(model), str(unfinished))
    else:
        plain = converted(model, BF16, peers)
        run(str(llama_cpp_program(peers, "llama-quantize")), str(plain), str(unfinished), form)
    return unfinished.rename(target)


def write_w8a8(model: Path, folder: Path) -> None:
    """Write a compressed-tensors checkpoint: int8 weights with a scale per output channel; activations per token."""
    folder.mkdir()
    weights: dict[str, Tensor] = {}
    with safe_open(model / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - the file is no mapping
            weight = file.get_tensor(name)
            if is_linear(name):
                weights[name], weights[f"{name}_scale"] = quantize(weight)
            else:
                weights[name] = weight
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for file in model.glob("*.json"):
        shutil.copy(file, folder)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = QUANTIZATION
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def is_linear(name: str) -> bool:
    """Return whether a tensor is the weight of a quantized linear layer."""
    return name.endswith("_proj.weight")


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize to symmetric int8 by rows; return the weight [N, K] and its scales [N, 1]."""
    values = weight.float()
    scales = values.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127.0
    return (values / scales).round().to(torch.int8), scales


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("form", choices=FORMS)
    parser.add_argument("--peers", type=Path, required=True, help="where the peers are installed")
    arguments = parser.parse_args()
    print(converted(arguments.model.resolve(), arguments.form, arguments.peers.resolve()))


if __name__ == "__main__":
    main()
