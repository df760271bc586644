"""Drive vLLM offline. Run by the Python of its own environment; imports only our workload."""

from __future__ import annotations

import sys

if {"-h", "--help"} & set(sys.argv):  # before the imports of a peer that may not be installed
    raise SystemExit(print(__doc__))

import time
from collections.abc import Mapping
from typing import Any

import torch
import vllm  # type: ignore[import-not-found]  # of another environment
from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind  # type: ignore[import-not-found]

from benchmarks.peers.workload import Figures, Run, Workload, figures, take_orders


def load(arguments: Mapping[str, Any]) -> tuple[Run, Mapping[str, Any]]:
    """Load `vllm.LLM` with its defaults, except for what the README lists and the given settings."""
    options = {"dtype": "bfloat16", "max_model_len": 4096, "enable_prefix_caching": False, **arguments["settings"]}
    llm = LLM(arguments["model"], **options)

    def run(workload: Workload, round_number: int) -> Figures:
        prompts = workload.prompts(round_number)
        if workload.num_prompts == 1:
            return alone(llm, workload, prompts[0], f"{workload.name} {round_number}")
        start = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling(workload), use_tqdm=False)
        seconds = time.perf_counter() - start
        num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        return figures(workload, seconds=seconds, first_token_seconds=None, num_tokens=num_tokens)

    config = llm.llm_engine.vllm_config
    facts = {
        "version": f"vllm {vllm.__version__}, torch {torch.__version__}",
        "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
        "quantization": config.model_config.quantization,
    }
    return run, facts


def alone(llm: LLM, workload: Workload, prompt: list[int], request_id: str) -> Figures:
    """Do what LLM.generate does, and note the time of the first token."""
    engine = llm.llm_engine
    num_tokens, first = 0, None
    start = time.perf_counter()
    engine.add_request(request_id, {"prompt_token_ids": prompt}, sampling(workload, RequestOutputKind.DELTA))
    while engine.has_unfinished_requests():
        for output in engine.step():
            num_tokens += len(output.outputs[0].token_ids)
            if first is None and num_tokens:
                first = time.perf_counter() - start
    seconds = time.perf_counter() - start
    return figures(workload, seconds=seconds, first_token_seconds=first, num_tokens=num_tokens)


def sampling(workload: Workload, kind: RequestOutputKind = RequestOutputKind.FINAL_ONLY) -> SamplingParams:
    """Return greedy parameters without detokenizing, as for ours."""
    return SamplingParams(
        temperature=0.0, max_tokens=workload.output_tokens, ignore_eos=True, detokenize=False, output_kind=kind
    )


if __name__ == "__main__":
    take_orders(load)
