"""Drive our own engine with token ids, as everything above `Engine` does."""

from __future__ import annotations

import sys

if {"-h", "--help"} & set(sys.argv):  # before the imports of a peer that may not be installed
    raise SystemExit(print(__doc__))

import time
from collections.abc import Mapping
from itertools import count
from typing import Any

import torch

import splitfuse
from benchmarks.peers.workload import Figures, Run, Workload, figures, take_orders
from splitfuse import Engine, EngineConfig, SamplingParams


def load(arguments: Mapping[str, Any]) -> tuple[Run, Mapping[str, Any]]:
    """Load an engine with settings of EngineConfig; the prefix cache is off, as for the others."""
    settings = {"enable_prefix_caching": False, **arguments["settings"]}
    engine = Engine.load(EngineConfig.from_settings({"model": arguments["model"], **settings}))
    request_numbers = count()

    def run(workload: Workload, round_number: int) -> Figures:
        prompts = workload.prompts(round_number)
        params = SamplingParams(max_tokens=workload.output_tokens, ignore_eos=True)
        num_tokens, first = 0, None
        start = time.perf_counter()
        for prompt in prompts:
            engine.add_request(str(next(request_numbers)), prompt, params)
        while engine.has_unfinished:
            for output in engine.step():
                if output.error is not None:
                    raise RuntimeError(output.error)
                num_tokens += len(output.token_ids)
                if first is None and output.token_ids:
                    first = time.perf_counter() - start
        seconds = time.perf_counter() - start
        return figures(workload, seconds=seconds, first_token_seconds=first, num_tokens=num_tokens)

    facts = {
        "version": f"splitfuse {splitfuse.__version__}, torch {torch.__version__}",
        "threads": torch.get_num_threads(),
        "kernels": type(engine.model.decoder.backend).__name__,
    }
    return run, facts


if __name__ == "__main__":
    take_orders(load)
