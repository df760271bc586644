"""`python -m benchmarks.gpu --stage compile|launches|parity|tune|kernels|steps|policies|peers`: check and measure on a
GPU.

Needs a checkout, PyTorch and Triton, and no network. Each stage takes less than four minutes and prints its table as it
goes. `--rehearse` runs it on the CPU, in Triton's interpreter, on shapes so small that their times mean nothing. The
stages `compile` and `launches` need no GPU: they compile the kernels for one, and count what the host launches.

Fractions are of what the GPU does in the same minute: the rate of a large copy, and of a large product of matrices.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from functools import partial


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").partition("\n")[0])
    without = ("compile", "launches")
    stages = (*without, "parity", "tune", "kernels", "steps", "policies", "peers")
    parser.add_argument("--stage", choices=stages, required=True)
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, in the interpreter, on tiny shapes")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--clients", default="8,32", help="of the stage policies (the paper: 1,2,4,8,16,32,64)")
    parser.add_argument("--lengths", default="1200/60", help="prompt/answer of policies (the paper: 2600/128 too)")
    parser.add_argument("--cuda-graphs", action="store_true", help="of our engine in the stages policies and peers")
    capabilities = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
    parser.add_argument("--capability", choices=capabilities, default="9.0", help="of the GPU, without one")
    arguments = parser.parse_args()
    if arguments.stage in without and arguments.rehearse:
        parser.error(f"the stage {arguments.stage} needs no GPU: leave --rehearse out")
    if arguments.stage in without:
        os.environ.pop("TRITON_INTERPRET", None)
    if arguments.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported

    import torch

    from benchmarks.gpu import attention, compiling, engines, launches, parity
    from benchmarks.gpu.measure import Setting

    if arguments.stage not in without and not arguments.rehearse and not torch.cuda.is_available():
        parser.error("PyTorch finds no NVIDIA GPU: --rehearse runs on the CPU")
    setting = Setting.of(arguments, has_gpu=arguments.stage not in without)
    capability = tuple(map(int, arguments.capability.split(".")))
    print(setting.describe(), flush=True)
    started = time.perf_counter()
    run = {
        "compile": partial(compiling.compile_all, capability=capability),
        "launches": partial(launches.launches, capability=capability),
        "parity": parity.parity,
        "tune": attention.tune,
        "kernels": attention.kernels,
        "steps": engines.steps,
        "policies": engines.policies,
        "peers": engines.peers,
    }[arguments.stage]
    is_right = run(setting)
    print(f"stage {arguments.stage}: {time.perf_counter() - started:.0f} s", flush=True)
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
