"""Run llama.cpp's own benchmark program for one request alone, without a server.

It makes its own random tokens and times generation at the depth of the prompt, which is our pace after the first token.
Standard library only.
"""

from __future__ import annotations

import sys

if {"-h", "--help"} & set(sys.argv):  # before the imports of a peer that may not be installed
    raise SystemExit(print(__doc__))

import json
import subprocess
from collections.abc import Mapping
from typing import Any

from benchmarks.peers.drive_llama_server import version
from benchmarks.peers.workload import MS_PER_TOKEN, Figures, Run, Workload, take_orders


def load(arguments: Mapping[str, Any]) -> tuple[Run, Mapping[str, Any]]:
    """Return a runner of the program, which loads the model each time; settings are its long options."""
    program = arguments["program"]
    options = {"threads": arguments["threads"], **arguments["settings"]}
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]

    def run(workload: Workload, round_number: int) -> Figures:  # noqa: ARG001 - its tokens are not ours to choose
        if workload.num_prompts > 1:
            return {}
        sizes = ["-p", "0", "-n", str(workload.output_tokens - 1), "-d", str(workload.prompt_tokens)]
        command = [program, "-m", arguments["model"], *sizes, "-r", "1", "-o", "json", *flags]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        (result,) = json.loads(done.stdout)
        return {MS_PER_TOKEN: result["avg_ns"] / 1e6 / (workload.output_tokens - 1)}

    server = str(program).removesuffix("bench") + "server"
    return run, {"version": version(server)}


if __name__ == "__main__":
    take_orders(load)
